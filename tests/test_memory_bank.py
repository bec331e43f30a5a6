"""The bank: what goes in comes back, whole or not at all, and nothing mixes two samples."""

import copy
import dataclasses
import errno
import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import TensorDataset

from timm_memwrap import MemoryBank, build_memory_bank, memory_bank
from timm_memwrap.bank_format import BUFFERS, ENTRIES
from timm_memwrap.meaning import Meaning, Provenance

PROVENANCE = Provenance(dataset="animals", selection="balanced", seed=3, population=50, encoder="abc")


def _bank(size: int = 6, width: int = 4, images: bool = False, start: int = 0) -> MemoryBank:
    bank = MemoryBank()
    generator = torch.Generator().manual_seed(start)
    bank.replace(
        torch.randn(size, width, generator=generator),
        torch.arange(size) % 3,
        [f"{start + i}.png" for i in range(size)],
        torch.randint(256, (size, 3, 5, 5), generator=generator, dtype=torch.uint8) if images else None,
        ["cat", "dog", "newt"],
        PROVENANCE,
    )
    return bank


def _snapshot(bank: MemoryBank) -> dict[str, Any]:
    tensors = {name: None if (t := getattr(bank, name)) is None else t.clone() for name in ENTRIES}
    meaning = {name: getattr(bank, name) for name in ("ids", "class_names", "provenance", "reference")}
    return {**tensors, **meaning}


def _assert_same(one: MemoryBank, other: MemoryBank | dict[str, Any]) -> None:
    expected = other if isinstance(other, dict) else _snapshot(other)
    for name, value in _snapshot(one).items():
        if isinstance(value, Tensor):
            assert isinstance(expected[name], Tensor)
            assert torch.equal(value, expected[name]), name
        else:
            assert value == expected[name], name


@pytest.mark.parametrize("size", [1, 6, 50])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("into", ["empty", "shorter", "longer"])
def test_a_state_dict_comes_back_into_a_bank_of_any_length(size: int, images: bool, into: str) -> None:
    bank = _bank(size, images=images)
    other = {"empty": MemoryBank(), "shorter": _bank(2, 7, start=100), "longer": _bank(60, images=True)}[into]
    result = other.load_state_dict(bank.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    _assert_same(other, bank)


def test_an_empty_bank_has_no_keys_and_is_still_a_bank() -> None:
    bank = MemoryBank()
    assert not bank.state_dict()
    assert len(bank) == 0
    assert bool(bank)
    assert (bank.ids, bank.class_names, bank.class_counts, bank.provenance) == ([], [], {}, Provenance())


def test_a_state_dict_without_a_bank_leaves_it() -> None:
    bank = _bank()
    before = _snapshot(bank)
    for strict in (True, False):
        bank.load_state_dict({}, strict=strict)
        _assert_same(bank, before)


def test_a_bank_is_not_tied_to_the_state_dict_that_it_came_from() -> None:
    bank, other = _bank(), MemoryBank()
    state = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    other.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    _assert_same(other, bank)


def test_a_state_dict_holds_the_banks_own_tensors() -> None:
    bank = _bank(images=True)
    for name, tensor in bank.state_dict().items():
        assert tensor.data_ptr() == getattr(bank, name).data_ptr()


def test_a_state_dict_that_lacks_a_buffer_or_has_one_too_many_is_refused() -> None:
    state = _bank().state_dict()
    before = _snapshot(bank := _bank(3, start=9))
    for name in ("encodings", "labels", "meaning"):
        with pytest.raises(RuntimeError, match=name):
            bank.load_state_dict({k: v for k, v in state.items() if k != name})
        _assert_same(bank, before)
    with pytest.raises(RuntimeError, match="surplus"):
        bank.load_state_dict({**state, "surplus": torch.zeros(1)})
    _assert_same(bank, before)


def test_a_bank_changed_in_place_says_what_it_holds_now() -> None:
    """timm's average of weights copies state dicts in place."""
    bank, other = _bank(), _bank(start=1)
    assert bank.ids != other.ids
    for own, new in zip(bank.state_dict().values(), other.state_dict().values(), strict=True):
        own.copy_(new)
    _assert_same(bank, other)


def test_a_bank_moves_to_a_device_and_loads_there(tmp_path: Path) -> None:
    path = _bank(images=True).save(tmp_path / "bank.safetensors")
    bank = _bank(images=True).to("meta")
    assert all(tensor.is_meta for tensor in bank.buffers())
    # The meta device is no place for values that are known.
    _assert_same(bank.load(path), _bank(images=True))


def test_a_bank_keeps_its_encodings_in_float32() -> None:
    bank = _bank(images=True)
    before = _snapshot(bank)
    for cast in (MemoryBank.half, MemoryBank.bfloat16, MemoryBank.double):
        _assert_same(cast(bank), before)
    assert bank.to("meta").encodings.is_meta


_GOOD: dict[str, Any] = {
    "encodings": torch.zeros(3, 4),
    "labels": torch.tensor([0, 1, 2]),
    "ids": ["a", "b", "c"],
}


@pytest.mark.parametrize(
    ("wrong", "quoted"),
    [
        ({"encodings": torch.zeros(2, 4)}, r"encodings .* \[2, 4\].*length 3"),
        ({"encodings": torch.zeros(3)}, r"encodings .* \[3\].*2 dimensions"),
        ({"encodings": torch.zeros(3, 4, 1)}, r"encodings .* \[3, 4, 1\]"),
        ({"encodings": torch.tensor([[0.0], [float("nan")], [float("inf")]])}, "2 of 3 encodings.*'b'"),
        ({"labels": torch.tensor([0, 1])}, "length 2"),
        ({"labels": torch.tensor(1)}, "labels"),
        ({"labels": torch.tensor([[0, 1, 2]])}, "labels"),
        ({"labels": torch.tensor([0, -1, 2])}, "Label -1 is below 0"),
        ({"ids": ["a", "b"]}, "2 ids for 3 samples"),
        ({"ids": ["a", "b", "a"]}, r"\['a'\] come more than once"),
        ({"images": torch.zeros(3, 3, 5, 5)}, r"images .*float32.*uint8"),
        ({"images": torch.zeros(2, 3, 5, 5, dtype=torch.uint8)}, r"images .* \[2, 3, 5, 5\]"),
        ({"images": torch.zeros(3, 5, 5, dtype=torch.uint8)}, r"images .*4 dimensions"),
        ({"images": torch.zeros(3, 7, 5, 5, dtype=torch.uint8)}, r"images .*\[3, 7, 5, 5\]; expected \[M, 1 or 3"),
        ({"images": torch.zeros(3, 1, 0, 5, dtype=torch.uint8)}, r"images .*\[3, 1, 0, 5\]; expected \[M, 1 or 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_bank_unchanged(wrong: dict[str, Any], quoted: str) -> None:
    bank = _bank()
    before = _snapshot(bank)
    with pytest.raises(ValueError, match=quoted):
        bank.replace(**{**_GOOD, **wrong})
    _assert_same(bank, before)


def test_no_samples_are_refused_with_the_call_that_empties() -> None:
    with pytest.raises(ValueError, match=r"clear\(\)"):
        MemoryBank().replace(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), [])


@pytest.mark.parametrize("ids", [[1.5, 2, 3], [None, "b", "c"], [b"a", "b", "c"]])
def test_an_id_is_a_number_or_a_text(ids: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"[Ii]d"):
        MemoryBank().replace(**{**_GOOD, "ids": ids})


@pytest.mark.parametrize("images", [False, True])
def test_append_joins_and_remove_undoes_it(images: bool) -> None:
    bank, more = _bank(images=images), _bank(3, images=images, start=100)
    before = _snapshot(bank)
    bank.append(more.encodings, more.labels, more.ids, more.images)
    assert len(bank) == 9
    assert torch.equal(bank.encodings[6:], more.encodings)
    assert bank.ids[6:] == more.ids
    assert bank.provenance == dataclasses.replace(PROVENANCE, appended=3)
    assert bank.remove(more.ids) is bank
    assert bank.provenance == dataclasses.replace(PROVENANCE, appended=3, removed=3)
    bank._set(bank._state(), dataclasses.replace(bank._meaning.read(), provenance=PROVENANCE))
    _assert_same(bank, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_labels_are_whole_numbers(dtype: torch.dtype) -> None:
    bank = _bank()
    for remember in (bank.replace, bank.append):
        with pytest.raises(ValueError, match=rf"labels are {dtype}; expected integers"):
            remember(torch.zeros(1, 4), torch.full((1,), 0.9, dtype=dtype), ["new"])


def test_what_is_forgotten_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    bank = _bank()
    with caplog.at_level(logging.WARNING):
        bank.select([5, 4, 3, 2, 1, 0]).remove(["0.png", "1.png"])
        assert not caplog.records
        # Of what is left, 5, 4, 3 and 2, only a dog.
        bank.select([1])
    assert bank.provenance == dataclasses.replace(PROVENANCE, removed=5)
    assert "no sample of cat, newt any more" in caplog.text


def test_append_to_an_empty_bank_starts_it() -> None:
    bank = MemoryBank()
    bank.append(**_GOOD)
    assert bank.ids == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("wrong", "quoted"),
    [
        ({"encodings": torch.zeros(3, 5)}, r"\[3, 5\]; expected \[N, 4\]"),
        ({"encodings": torch.zeros(4)}, r"\[4\]; expected \[N, 4\]"),
        ({"encodings": torch.full((3, 4), float("nan"))}, "NaN"),
        ({"ids": ["0.png", "b", "c"]}, r"'0.png'"),
        ({"images": torch.zeros(3, 3, 5, 5, dtype=torch.uint8)}, "for all samples or for none"),
    ],
)
def test_append_refuses_what_does_not_fit(wrong: dict[str, Any], quoted: str) -> None:
    bank = _bank()
    before = _snapshot(bank)
    with pytest.raises(ValueError, match=quoted):
        bank.append(**{**_GOOD, **wrong})
    _assert_same(bank, before)


def test_append_refuses_images_of_another_size_or_none() -> None:
    bank = _bank(images=True)
    for images in (None, torch.zeros(3, 3, 6, 6, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="for all samples or for none"):
            bank.append(**_GOOD, images=images)


def test_remove_takes_one_id_or_many_and_names_an_unknown_one() -> None:
    bank = _bank()
    before = _snapshot(bank)
    with pytest.raises(ValueError, match=r"No sample with id 'zebra'.*bank\.ids"):
        bank.remove(["0.png", "zebra"])
    with pytest.raises(ValueError, match=r"clear\(\)"):
        bank.remove(bank.ids)
    _assert_same(bank, before)
    # Not one id for each letter.
    assert bank.remove("1.png").ids == ["0.png", "2.png", "3.png", "4.png", "5.png"]
    assert bank.remove(name for name in ["0.png", "5.png"]).ids == ["2.png", "3.png", "4.png"]
    assert torch.equal(bank.encodings, before["encodings"][2:5])
    assert torch.equal(bank.labels, before["labels"][2:5])


def test_select_keeps_the_samples_in_the_given_order() -> None:
    bank = _bank(images=True)
    before = _snapshot(bank)
    assert bank.select([4, 0, 2]).ids == ["4.png", "0.png", "2.png"]
    for name in ("encodings", "labels", "images"):
        assert torch.equal(getattr(bank, name), before[name][[4, 0, 2]])
    assert bank.class_names == before["class_names"]


def test_select_of_nothing_or_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clear\(\)"):
        _bank().select([])
    with pytest.raises(ValueError, match="empty"):
        MemoryBank().select([0])


def test_remove_from_an_empty_bank_names_the_id() -> None:
    with pytest.raises(ValueError, match="'a'"):
        MemoryBank().remove(["a"])


def test_clear_forgets_everything() -> None:
    bank = _bank(images=True)
    bank.clear()
    _assert_same(bank, MemoryBank())


def test_without_images_leaves_the_original_alone() -> None:
    bank = _bank(images=True)
    slim = bank.without_images()
    assert slim.images is None
    assert bank.images is not None
    expected = {**_snapshot(bank), "images": None}
    _assert_same(slim, expected)


def test_meaning_can_be_changed_piece_by_piece() -> None:
    bank = _bank()
    bank.set_class_names(["a", "b", "c"])
    bank.set_provenance(encoder="def")
    assert bank.class_names == ["a", "b", "c"]
    assert bank.provenance == Provenance("animals", "balanced", 3, 50, "def")
    for change in (lambda b: b.set_class_names(["a"]), lambda b: b.set_provenance(encoder="x")):
        with pytest.raises(ValueError, match="empty"):
            change(MemoryBank())


def test_repr_shows_size_shape_and_source() -> None:
    assert repr(MemoryBank()) == "MemoryBank(empty)"
    text = repr(_bank(images=True))
    for part in ("6 samples", "3 classes", "[6, 4]", "images [3, 5, 5]", "balanced from animals"):
        assert part in text


def test_a_copy_is_independent() -> None:
    bank = _bank()
    other = copy.deepcopy(bank)
    other.remove("0.png")
    other.encodings.zero_()
    _assert_same(bank, _bank())


@pytest.mark.parametrize("ids", [[3, 1, 2], ["ä/猫.png", "b", 'quote".png'], ["1", 1, "x"]])
def test_ids_come_back_as_they_are(ids: list[int | str]) -> None:
    bank, other = MemoryBank(), MemoryBank()
    bank.replace(**{**_GOOD, "ids": ids}, class_names=["Kätzchen", "狗"])
    other.load_state_dict(bank.state_dict())
    assert other.ids == ids
    assert other.class_names == ["Kätzchen", "狗"]


@pytest.mark.parametrize("images", [False, True])
def test_a_file_brings_the_bank_back(images: bool, tmp_path: Path) -> None:
    bank = _bank(images=images)
    path = bank.save(tmp_path / "new folder" / "bank.safetensors")
    other = _bank(9, images=True, start=50)
    assert other.load(str(path)) is other
    _assert_same(other, bank)
    assert [p.name for p in path.parent.iterdir()] == ["bank.safetensors"], "nothing temporary is left"
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt", "transformers cannot open it without"


def test_an_empty_bank_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build_memory_bank"):
        MemoryBank().save(tmp_path / "bank.safetensors")
    assert not list(tmp_path.iterdir())


def _damage(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    meaning = json.loads(bytes(state["meaning"].numpy()))

    def text(value: str) -> Tensor:
        return torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8)

    return {
        "lacks labels": {k: v for k, v in state.items() if k != "labels"},
        "foreign": {**state, "weight": torch.zeros(1)},
        "not JSON": {**state, "meaning": text("{")},
        "not UTF-8": {**state, "meaning": torch.full((4,), 255, dtype=torch.uint8)},
        "a list": {**state, "meaning": text("[]")},
        "other version": {**state, "meaning": text(json.dumps({**meaning, "format_version": 99}))},
        "no ids": {**state, "meaning": text(json.dumps({**meaning, "ids": None}))},
        "ids of lists": {**state, "meaning": text(json.dumps({**meaning, "ids": [[i] for i in range(6)]}))},
        "ids too few": {**state, "meaning": text(json.dumps({**meaning, "ids": ["a"]}))},
        "class names of numbers": {**state, "meaning": text(json.dumps({**meaning, "class_names": [1]}))},
        "meaning of floats": {**state, "meaning": torch.zeros(3)},
        "labels of floats": {**state, "labels": state["labels"].float()},
        "encodings in double": {**state, "encodings": state["encodings"].double()},
        "NaN": {**state, "encodings": state["encodings"] * float("nan")},
        "lengths differ": {**state, "labels": state["labels"][1:]},
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        *("lacks labels", "foreign", "not JSON", "not UTF-8", "a list", "other version", "no ids", "ids of lists"),
        *("ids too few", "class names of numbers", "meaning of floats", "labels of floats", "encodings in double"),
        *("NaN", "lengths differ"),
    ],
)
def test_a_damaged_file_is_refused_and_the_bank_unchanged(how: str, tmp_path: Path) -> None:
    bank, path = _bank(), tmp_path / "bank.safetensors"
    before = _snapshot(bank)
    save_file(_damage(bank.state_dict(), how), path)
    with pytest.raises(ValueError, match=r"."):
        bank.load(path)
    _assert_same(bank, before)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"\x80\x04K\x01."])
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        MemoryBank().load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = _bank(50).save(tmp_path / "bank.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        MemoryBank().load(path)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MemoryBank().load(tmp_path / "none.safetensors")


def test_a_file_with_a_flipped_bit_is_refused_and_the_bank_unchanged(tmp_path: Path) -> None:
    path = _bank(50).save(tmp_path / "bank.safetensors")
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    bank = _bank()
    before = _snapshot(bank)
    with pytest.raises(ValueError, match="damaged"):
        bank.load(path)
    _assert_same(bank, before)


def test_a_bank_outlives_its_file(tmp_path: Path) -> None:
    path = _bank(50).save(tmp_path / "bank.safetensors")
    bank = MemoryBank().load(path)
    with path.open("r+b") as file:
        file.write(b"\x00" * path.stat().st_size)
    _assert_same(bank, _bank(50))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _bank().save(tmp_path / "bank.safetensors")
    old = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("timm_memwrap.tensor_files.raw_bytes", "timm_memwrap._utils.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(OSError, match="No space"):
                _bank(50).save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def _model(bank: MemoryBank | None) -> torch.nn.Module:
    torch.manual_seed(5)
    model = timm.create_model("memwrap_test_resnet", num_classes=3)
    if bank is not None:
        model.memory_bank.load_state_dict(bank.state_dict())
    return model


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 5), (5, 0)])
def test_an_ema_leaves_a_bank_that_only_one_of_two_models_has(foreach: bool, before: int, after: int) -> None:
    model = _model(_bank(before, 96, start=10) if before else None)
    ema = ModelEmaV3(model, decay=0.5, foreach=foreach)
    old = _snapshot(ema.module.memory_bank)
    model.memory_bank.clear()
    model.memory_bank.load_state_dict(_bank(after, 96, start=1000).state_dict() if after else {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    reference = [p.clone() for p in ema.module.parameters()]
    ema.update(model)
    for parameter, was, new in zip(ema.module.parameters(), reference, model.parameters(), strict=True):
        torch.testing.assert_close(parameter, 0.5 * was + 0.5 * new, atol=1e-5, rtol=1e-5)
    _assert_same(ema.module.memory_bank, old)
    assert ema.module.eval()(torch.randn(2, 3, 32, 32)).isfinite().all()
    ema.set(model)
    assert len(ema.module.memory_bank) == before, "an EMA keeps its own bank, which is of its own weights"


@pytest.mark.parametrize("foreach", [False, True])
def test_an_average_of_two_banks_is_stale_and_two_of_other_sizes_are_an_error(foreach: bool) -> None:
    model = _model(None)
    data = TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)
    build_memory_bank(model, data, size=4, selection="random", progress=False)
    ema = ModelEmaV3(model, decay=0.5, foreach=foreach)
    assert not ema.module.memory_is_stale()
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1.0)
    build_memory_bank(model, data, size=4, selection="random", seed=1, progress=False)
    ema.update(model)
    assert ema.module.memory_is_stale()
    assert not model.memory_is_stale()
    build_memory_bank(model, data, size=5, progress=False)
    with pytest.raises(RuntimeError, match="size"):
        ema.update(model)


@pytest.mark.parametrize("change", ["trained", "a bank", "a bank in the average"])
def test_an_ema_that_copies_buffers_pairs_them_rightly(change: str) -> None:
    """It pairs them in order, so one that exists in only one of the two must not shift others."""
    model = _model(_bank(5, 96) if change == "a bank in the average" else None)
    ema = ModelEmaV3(model, exclude_buffers=True)
    model.memory_bank.clear()
    if change == "trained":
        model.train()(torch.randn(4, 3, 32, 32))
    elif change == "a bank":
        model.memory_bank.load_state_dict(_bank(5, 96).state_dict())
    with torch.no_grad():
        model.backbone.bn1.running_mean.add_(1.0)
    ema.update(model)
    averaged = dict(ema.module.named_buffers())
    for name, buffer in model.named_buffers():
        if not name.startswith("memory_bank."):
            assert torch.equal(averaged[name], buffer), name
    assert len(ema.module.memory_bank) == (5 if change == "a bank in the average" else 0)


def test_a_state_dict_survives_pytorch_safetensors_and_copies(tmp_path: Path) -> None:
    bank = _bank(images=True)
    state = bank.state_dict()
    torch.save(state, tmp_path / "state.pth")
    save_file(state, tmp_path / "state.safetensors")
    copies = {
        "saved": torch.load(tmp_path / "state.pth", weights_only=True),
        "deep": copy.deepcopy(state),
        "computed": {name: tensor + 0 for name, tensor in state.items()},
    }
    for one in (state, *copies.values()):
        for name, tensor in one.items():
            assert type(tensor) is Tensor
            assert torch.equal(tensor, getattr(bank, name))
    _assert_same(MemoryBank().load(tmp_path / "state.safetensors"), bank)


def test_a_pickled_bank_comes_back() -> None:
    bank = _bank(images=True)
    _assert_same(pickle.loads(pickle.dumps(bank)), bank)


@pytest.mark.parametrize("way", ["replace", "load_state_dict"])
def test_a_bank_filled_in_inference_mode_serves_a_gradient(way: str) -> None:
    model = _model(None).eval()
    with torch.inference_mode():
        if way == "replace":
            bank = _bank(width=96)
            model.memory_bank.replace(bank.encodings.clone(), bank.labels.clone(), bank.ids)
        else:
            model.memory_bank.load_state_dict(_bank(width=96).state_dict())
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.any()


def test_file_names_that_are_not_unicode_come_back(tmp_path: Path) -> None:
    bank = MemoryBank()
    bank.replace(**{**_GOOD, "ids": [b"caf\xe9.png".decode(errors="surrogateescape"), "b", "c"]})
    assert MemoryBank().load(bank.save(tmp_path / "bank.safetensors")).ids == bank.ids


def test_ids_of_numpy_and_torch_are_whole_numbers_too() -> None:
    bank = MemoryBank()
    bank.replace(**{**_GOOD, "ids": [*np.arange(2), torch.tensor(7)]})
    assert bank.ids == [0, 1, 7]
    assert all(type(sample_id) is int for sample_id in bank.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_precision_of_storage_stays_through_all_that_happens_to_a_bank(tmp_path: Path, dtype: torch.dtype) -> None:
    bank, exact = _bank().store_as(dtype), _bank().encodings
    assert torch.equal(bank.encodings, exact.to(dtype))
    more = _bank(3, start=10)
    bank.append(more.encodings, more.labels, more.ids)
    bank.remove(["0.png"])
    bank.set_class_names(["a", "b", "c"])
    bank.double()
    assert bank.encodings.dtype == dtype
    expected = torch.cat([exact[1:], more.encodings]).to(dtype)
    assert torch.equal(bank.encodings, expected)
    loaded = MemoryBank().load(bank.save(tmp_path / "bank.safetensors"))
    _assert_same(loaded, bank)
    other = _bank()
    other.load_state_dict(bank.state_dict())
    _assert_same(other, bank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16"])
def test_an_unknown_precision_is_refused(dtype: Any) -> None:
    bank = _bank()
    before = _snapshot(bank)
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        bank.store_as(dtype)
    _assert_same(bank, before)


def test_an_encoding_beyond_half_precision_is_refused() -> None:
    bank = _bank()
    bank.encodings[2, 1] = 1e6
    before = _snapshot(bank)
    with pytest.raises(ValueError, match=r"2\.png"):
        bank.store_as(torch.float16)
    _assert_same(bank, before)


def test_appending_neither_copies_nor_serialises_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = _bank(400, images=True)
    before = [getattr(bank, name).data_ptr() for name in BUFFERS]
    monkeypatch.setattr(Meaning, "to_tensor", lambda self: pytest.fail("all ids are written as JSON"))
    for i in range(20):
        more = _bank(2, images=True, start=1000 + 2 * i)
        bank.append(more.encodings, more.labels, more.ids, more.images)
    assert [getattr(bank, name).data_ptr() for name in BUFFERS] == before
    assert len(bank) == 440


def test_a_loaded_bank_holds_the_tensors_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a copy: a large memory would be in memory twice."""
    path = _bank(400, images=True).save(tmp_path / "bank.safetensors")
    read, found = memory_bank.read_tensors, {}

    def note(*args: Any) -> Any:
        file = read(*args)
        found.update({name: file.tensors[name].data_ptr() for name in BUFFERS})
        return file

    monkeypatch.setattr(memory_bank, "read_tensors", note)
    bank = MemoryBank().load(path)
    assert {name: getattr(bank, name).data_ptr() for name in BUFFERS} == found
    more = _bank(2, images=True, start=1000)
    bank.append(more.encodings, more.labels, more.ids, more.images)
    bank.append(more.encodings, more.labels, [f"{i}+" for i in more.ids], more.images)
    assert torch.equal(bank.encodings[-2:], more.encodings)


def test_a_snapshot_and_a_gradient_outlive_samples_that_are_appended() -> None:
    bank, more = _bank(400), _bank(2, start=1000)
    same, before = bank.snapshot(), _snapshot(bank)
    query = torch.ones(4, requires_grad=True)
    score = (bank.encodings @ query).square().sum()
    bank.append(more.encodings, more.labels, more.ids)
    _assert_same(same, before)
    score.backward()
    assert query.grad is not None
    same.append(more.encodings + 1, more.labels, more.ids)
    assert torch.equal(bank.encodings[-2:], more.encodings)
    assert torch.equal(same.encodings[-2:], more.encodings + 1)


def test_nothing_is_lost_when_threads_append_and_remove() -> None:
    bank = _bank(100)

    def work(number: int) -> None:
        for i in range(30):
            more = _bank(2, start=1000 * (number + 1) + 2 * i)
            bank.append(more.encodings, more.labels, more.ids)
            bank.remove(more.ids[:1])
            same = bank.snapshot()
            assert len(same.ids) == len(same) == len(same.encodings)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(bank) == 100 + 4 * 30
    by_id = dict(zip(bank.ids, bank.encodings, strict=True))
    for number in range(4):
        expected = _bank(2, start=1000 * (number + 1) + 58)
        assert torch.equal(by_id[expected.ids[1]], expected.encodings[1])


def test_class_names_come_with_the_samples_that_need_them() -> None:
    bank, more = _bank(), _bank(2, start=100)
    bank.append(more.encodings, more.labels + 7, more.ids, class_names=[*"abcdefghi"])
    assert bank.class_names == [*"abcdefghi"]
    assert bank.largest_label == 8
    with pytest.raises(ValueError, match="Class name 3"):
        bank.append(more.encodings, more.labels, [1000, 1001], class_names=[3])  # type: ignore[list-item]
    assert len(bank) == 8


def several(size: int = 3) -> MemoryBank:
    bank = MemoryBank()
    labels = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])[:size]
    bank.replace(torch.randn(size, 5), labels, range(size), class_names=["cat", "dog", "fox"])
    return bank


def test_a_sample_may_have_several_classes_or_none(tmp_path: Path) -> None:
    bank = several()
    assert bank.multi_label
    assert not _bank().multi_label
    assert not MemoryBank().multi_label
    assert bank.class_counts == {0: 1, 1: 2}
    assert "3 multi-label samples of 2 classes" in repr(bank)
    loaded = MemoryBank().load(bank.save(tmp_path / "bank.safetensors"))
    assert loaded.multi_label
    assert torch.equal(loaded.labels, bank.labels)
    other = MemoryBank()
    other.load_state_dict(bank.state_dict())
    assert other.multi_label
    assert other.largest_label == 2


def test_multi_hot_labels_are_appended_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    bank = several()
    bank.append(torch.randn(1, 5), torch.tensor([[1.0, 0.0, 0.0]]), ["new"])
    assert bank.class_counts == {0: 2, 1: 2}
    bank.remove([0, 1])
    assert bank.class_counts == {0: 1}
    assert "no sample of dog any more" in caplog.text


@pytest.mark.parametrize(
    "labels", [torch.tensor([1]), torch.tensor([[1, 0]]), torch.tensor([[1, 0, 2]]), torch.tensor([[[1, 0, 1]]])]
)
def test_labels_of_another_kind_than_the_banks_are_not_appended(labels: torch.Tensor) -> None:
    bank = several()
    with pytest.raises(ValueError, match="labels"):
        bank.append(torch.randn(1, 5), labels, ["new"])
    assert len(bank) == 3


@pytest.mark.parametrize("labels", [torch.tensor([[3, 0]], dtype=torch.uint8), torch.zeros(1, 0, dtype=torch.uint8)])
def test_a_file_with_labels_that_are_not_multi_hot_is_refused(labels: torch.Tensor) -> None:
    state = several(1).state_dict()
    with pytest.raises(RuntimeError, match="label"):
        MemoryBank().load_state_dict({**state, "labels": labels})
