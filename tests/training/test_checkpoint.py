import random
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_memwrap.training.checkpoint import SafetensorsSaver, read_state, write_state


class _Task:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: object = None) -> dict:
        return {} if ema else {"state_dict": self.model.state_dict()}


def _saver(folder: Path, model: nn.Module, **kwargs: object) -> SafetensorsSaver:
    optimizer = torch.optim.Adam(model.parameters())
    state = {"history": [], "recipe": {}, "lengths": []}
    return SafetensorsSaver(
        **state, model=model, optimizer=optimizer, task=_Task(model), checkpoint_dir=str(folder), **kwargs
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_nested_state_comes_back(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)

    def make(depth: int) -> object:
        kind = rng.choice(["tensor", "value", "list", "dict"] if depth else ["tensor", "value"])
        if kind == "tensor":
            shape = [rng.randrange(3) for _ in range(rng.randrange(3))]
            return torch.randn(shape).to(rng.choice([torch.float32, torch.bfloat16, torch.int64]))
        if kind == "value":
            return rng.choice([None, True, 3, 0.1, float("inf"), "text/__tensor__", ""])
        if kind == "list":
            return [make(depth - 1) for _ in range(rng.randrange(4))]
        return {key: make(depth - 1) for key in rng.sample([0, 1, "a", "a/b", "__tensor__", "__pairs__"], 3)}

    state = {"state": make(4), "more": make(3)}
    write_state(state, tmp_path / "s.safetensors")

    def same(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
        return a == b and type(a) is type(b)

    assert same(state, read_state(tmp_path / "s.safetensors"))


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    tensor = torch.randn(4)
    write_state({"a": tensor, "b": tensor, "c": tensor[:2]}, tmp_path / "s.safetensors")
    state = read_state(tmp_path / "s.safetensors")
    assert torch.equal(state["a"], tensor)
    assert torch.equal(state["b"], tensor)
    assert torch.equal(state["c"], tensor[:2])


def test_what_no_checkpoint_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"/optimizer/0 is function"):
        write_state({"optimizer": [lambda: 1]}, tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "other", "empty"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "last.safetensors"
    write_state({"a": torch.randn(100)}, path)
    if damage == "other":
        save_file({"a": torch.randn(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:200] if damage == "truncated" else b"")
    with pytest.raises(ValueError, match=r"last\.safetensors"):
        read_state(path)


def test_timms_bookkeeping_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    saver = _saver(tmp_path, model, max_history=1)
    for epoch, metric in enumerate([0.2, 0.9, 0.5]):
        with torch.no_grad():
            model.weight.fill_(epoch)
        saver.save_checkpoint(epoch, metric)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1.safetensors",
        "last.safetensors",
        "model_best.safetensors",
    ]
    assert read_state(tmp_path / "last.safetensors")["state_dict"]["weight"][0, 0] == 2
    assert read_state(tmp_path / "model_best.safetensors")["state_dict"]["weight"][0, 0] == 1


def test_the_last_checkpoint_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    model = nn.Linear(2, 2)
    saver = _saver(tmp_path, model)
    saver.save_checkpoint(0, 0.1)
    seen = []

    def watch(name: str) -> None:
        original = getattr(os, name)

        def watched(*args: object, **kwargs: object) -> object:
            seen.append(read_state(tmp_path / "last.safetensors")["epoch"])
            result = original(*args, **kwargs)
            seen.append(read_state(tmp_path / "last.safetensors")["epoch"])
            return result

        monkeypatch.setattr(os, name, watched)

    for name in ("replace", "unlink", "link"):
        watch(name)
    saver.save_checkpoint(1, 0.2)
    assert set(seen) == {0, 1}
    assert seen == sorted(seen)
