"""Whatever the bytes of a bank or a configuration: an error of ours, or the model that they describe."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_models import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import timm_memwrap
from timm_memwrap import MemoryBank, MemoryWrapModel

bounded = settings(
    max_examples=25,
    deadline=20_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Numbers that constructors stumble over, and values of the wrong type.
VALUES = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([10**6, 10**12, 10**400, 0.5, -1e300, float("inf"), float("nan")]),
    st.sampled_from([None, True, "", "resnet18", "../../etc/passwd", [], {}, [10**9], {"a": [1]}]),
)


class Saved:
    """A model on disk, and a folder to damage."""

    def __init__(self, folder: Path) -> None:
        self.model = make_model()
        self.images = torch.randn(2, 3, 64, 64)
        self.folder = timm_memwrap.save_pretrained(self.model, folder / "model")
        self.bank = self.model.memory_bank.save(folder / "bank.safetensors").read_bytes()
        self.weights = (self.folder / "model.safetensors").read_bytes()
        tensors = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        self.plain_weights = safetensors.torch.save(tensors, {"format": "pt"})
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.logits: Tensor = self.model(self.images)

    def write(self, weights: bytes | None = None, config: bytes | dict | None = None) -> Path:
        config = self.config if config is None else config
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (self.folder / "model.safetensors").write_bytes(self.weights if weights is None else weights)
        (self.folder / "config.json").write_bytes(text)
        return self.folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def load(folder: Path) -> MemoryWrapModel | None:
    """Loads a model; `None` if it was refused, which must be by an error that says so."""
    try:
        return timm_memwrap.from_pretrained(folder).eval()
    except ValueError as error:
        reason = str(error)
    assert str(folder) in reason
    return None


@st.composite
def damage(draw: st.DrawFn) -> Any:
    """A function that damages bytes: flips, cuts, inserts, overwrites, mostly where a header is."""
    place = draw(st.one_of(st.floats(0, 0.02), st.floats(0, 1)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "overwrite"]))
    new = draw(st.binary(min_size=1, max_size=12))

    def apply(content: bytes) -> bytes:
        at = min(int(place * len(content)), len(content) - 1)
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ (new[0] or 1)]) + content[at + 1 :]
        if kind == "cut":
            return content[:at]
        if kind == "insert":
            return content[:at] + new + content[at:]
        return content[:at] + new + content[at + len(new) :]

    return apply


@bounded
@given(change=damage())
def test_damaged_weights_never_load(saved: Saved, change: Any) -> None:
    weights = change(saved.weights)
    model = load(saved.write(weights))
    if model is not None:
        # White space in the header is all that may change unseen.
        assert weights == saved.weights or len(weights) == len(saved.weights)
        assert torch.equal(model(saved.images), saved.logits)
        assert model.state_dict().keys() == saved.model.state_dict().keys()


@bounded
@given(change=damage())
def test_damaged_weights_without_a_checksum_load_only_what_fits(saved: Saved, change: Any) -> None:
    model = load(saved.write(change(saved.plain_weights)))
    if model is not None:
        assert model(saved.images).shape == (2, 3)
        assert torch.isfinite(model.memory_bank.encodings).all()
        assert 0 <= int(model.memory_bank.labels.min()) <= int(model.memory_bank.labels.max()) < 3
        assert len(model.memory_bank.ids) == len(model.memory_bank)


@bounded
@given(change=damage())
def test_a_damaged_configuration_loads_only_what_it_describes(saved: Saved, change: Any) -> None:
    text = change(json.dumps(saved.config).encode())
    check_described(saved, load(saved.write(saved.plain_weights, text)), text)


@bounded
@given(change=damage())
def test_a_damaged_configuration_is_mended_from_the_weights(saved: Saved, change: Any) -> None:
    model = load(saved.write(config=change(json.dumps(saved.config).encode())))
    assert model is not None
    assert torch.equal(model(saved.images), saved.logits)
    assert json.loads((saved.folder / "config.json").read_text()) == saved.config


@bounded
@given(
    block=st.sampled_from(["", "pretrained_cfg", "model_args", "memory_bank"]),
    field=st.integers(0, 100),
    value=VALUES,
)
def test_a_changed_value_loads_only_what_it_describes(saved: Saved, block: str, field: int, value: Any) -> None:
    config = json.loads(json.dumps(saved.config))
    target = config[block] if block else config
    keys = [*target, "pretrained", "file", "url", "custom_load", "state_dict", "device", "depth", "img_size"]
    target[keys[field % len(keys)]] = value
    text = json.dumps(config).encode()
    check_described(saved, load(saved.write(saved.plain_weights, text)), text)


def check_described(saved: Saved, model: MemoryWrapModel | None, text: bytes) -> None:
    """Checks that a model is what its configuration says, and that nothing else changed with it."""
    if model is None:
        return
    config = json.loads(text)
    assert model.pretrained_cfg["architecture"] == config["architecture"]
    arguments = config.get("model_args", {})
    described = {name: arguments[name] for name in model.memory_args if arguments.get(name) is not None}
    assert {name: model.memory_args[name] for name in described} == described
    if model.memory_args == saved.model.memory_args and model.num_classes == 3:
        assert torch.equal(model(saved.images), saved.logits)


@bounded
@given(change=damage())
def test_a_damaged_bank_alone(saved: Saved, tmp_path_factory: pytest.TempPathFactory, change: Any) -> None:
    path = saved.folder / "bank.safetensors"
    path.write_bytes(change(saved.bank))
    bank = MemoryBank()
    try:
        bank.load(path)
    except ValueError:
        assert len(bank) == 0
    else:
        assert len(bank.ids) == len(bank) == len(bank.encodings)
        assert torch.isfinite(bank.encodings).all()


def test_what_was_not_damaged_loads(saved: Saved) -> None:
    """So that the others do not pass because nothing ever loads."""
    for create in (timm_memwrap.from_pretrained, lambda f: timm.create_model(f"local-dir:{f}", pretrained=True)):
        assert torch.equal(create(saved.write()).eval()(saved.images), saved.logits)
