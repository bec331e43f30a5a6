"""What was saved is what comes back, through stock timm and in another process."""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import MemoryWrapModel, build_memory_bank, from_pretrained, save_pretrained

CLASSES = 3
NAMES = ["cat", "dog", "newt"]
BASELINE = "memwrap_baseline_test_resnet"
EVIDENCE = "memwrap_evidence_test_resnet"
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"model_name": "memwrap_test_resnet"},
    "linear": {"model_name": "memwrap_test_resnet", "classifier": "linear", "read_head": "identity", "distance": "l2"},
    "learned scale": {"model_name": "memwrap_test_resnet", "scale": "learned"},
    "scaled": {"model_name": "memwrap_test_vit", "img_size": 32, "scale": 3.0, "distance": "dot"},
    "grey": {"model_name": "memwrap_test_efficientnet", "in_chans": 1},
    "baseline": {"model_name": BASELINE},
    "evidence": {"model_name": EVIDENCE},
    "logits": {"model_name": EVIDENCE, "read_head": "logits", "scale": 100_000.0},
    "calibrated": {"model_name": EVIDENCE, "read_head": "pre_logits"},
    "vote": {"model_name": BASELINE, "classifier": "vote"},
    "five channels": {"model_name": "memwrap_test_resnet", "in_chans": 5},
    "wrapped": {},
    "wrapped linear": {"read_head": "linear"},
    "no memory": {"model_name": "memwrap_test_resnet"},
}


def _images(channels: int = 3, count: int = 12) -> Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def _model(variant: str = "mlp") -> MemoryWrapModel:
    torch.manual_seed(len(variant))
    args = dict(VARIANTS[variant])
    if variant.startswith("wrapped"):
        model = timm_memwrap.wrap(timm.create_model("test_convnext", num_classes=CLASSES), **args)
    else:
        model = timm.create_model(num_classes=CLASSES, **args)
    model.eval()
    if variant == "calibrated":
        model.temperature = 70_000.0
        model.calibration.confidence.copy_(torch.tensor([0.3, 1e-3, -1.5, 70_000.0]))
    if variant != "no memory":
        data = TensorDataset(_images(model.in_chans), torch.arange(12) % CLASSES)
        build_memory_bank(model, data, size=9, store_images=model.in_chans in (1, 3), progress=False, class_names=NAMES)
    return model


# It imports timm and timm_memwrap, and knows nothing else.
_RELOAD = """
import sys, timm, timm_memwrap, torch
from safetensors.torch import save_file
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    images = torch.load(folder + "/images.pth", weights_only=True)
    with torch.no_grad():
        tensors = {"logits": model(images)}
    tensors |= {name: tensor + 0 for name, tensor in model.state_dict().items()}
    save_file(tensors, folder + "/reloaded.safetensors", metadata={"names": ",".join(model.memory_bank.class_names)})
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, MemoryWrapModel, dict[str, Tensor]]]:
    """All variants, saved here and loaded in one new process."""
    root = tmp_path_factory.mktemp("saved")
    models = {variant: _model(variant) for variant in VARIANTS}
    folders = {variant: root / variant.replace(" ", "_") for variant in VARIANTS}
    for variant, model in models.items():
        save_pretrained(model, folders[variant], allow_empty_memory=variant == "no memory")
        torch.save(_images(model.in_chans), folders[variant] / "images.pth")
    subprocess.run([sys.executable, "-c", _RELOAD, *map(str, folders.values())], check=True, timeout=200)
    return {v: (folders[v], models[v], load_file(folders[v] / "reloaded.safetensors")) for v in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_bank_come_back_bit_for_bit_in_a_new_process(variant: str, reloaded: dict[str, Any]) -> None:
    _, model, got = reloaded[variant]
    with torch.no_grad():
        assert torch.equal(got.pop("logits"), model(_images(model.in_chans)))
    expected = model.state_dict()
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_pretrained_brings_everything_back_here(variant: str, reloaded: dict[str, Any]) -> None:
    folder, model, _ = reloaded[variant]
    other = from_pretrained(folder).eval()
    assert other.memory_args == model.memory_args
    assert other.memory_only == model.memory_only
    assert other.temperature == model.temperature
    for name in ("ids", "class_names", "provenance", "class_counts"):
        assert getattr(other.memory_bank, name) == getattr(model.memory_bank, name)
    assert not other.memory_is_stale()
    if variant != "no memory":
        assert other.memory_bank.class_names == NAMES
        assert list(other.pretrained_cfg["label_names"]) == NAMES
    with torch.no_grad():
        assert torch.equal(other(_images(model.in_chans)), model(_images(model.in_chans)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reloaded_model_saves_the_same_again(variant: str, reloaded: dict[str, Any], tmp_path: Path) -> None:
    folder, _, _ = reloaded[variant]
    save_pretrained(from_pretrained(folder), tmp_path, allow_empty_memory=True)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("variant", ["mlp", "logits", "baseline", "wrapped"])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_other_classes_get_a_new_last_layer_and_no_bank(
    variant: str, num_classes: int, reloaded: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder, model, _ = reloaded[variant]
    with caplog.at_level(logging.WARNING):
        other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=num_classes).eval()
    assert "memory bank is not loaded" in caplog.text
    assert len(other.memory_bank) == 0
    with torch.no_grad():
        images = _images()
        assert other(images).shape == (12, num_classes)
        assert torch.equal(other.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("variant", ["mlp", "logits", "scaled"])
def test_features_come_from_the_saved_backbone(variant: str, reloaded: dict[str, Any]) -> None:
    folder, model, _ = reloaded[variant]
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    headless = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(_images(), intermediates_only=True)
        got = features(_images())
        if variant != "scaled":  # a ViT's extractor picks its layers itself
            assert all(any(torch.equal(a, b) for b in expected) for a in got)
        pooled = model.forward_head(model.forward_features(_images()), pre_logits=True)
        assert torch.equal(headless(_images()), pooled)


@pytest.mark.parametrize("variant", ["mlp", "logits"])
def test_other_input_channels_adapt_the_first_layer(
    variant: str, reloaded: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder, model, _ = reloaded[variant]
    grey = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1).eval()
    with torch.no_grad():
        assert grey(_images(1)).shape == (12, CLASSES)
    assert not torch.equal(next(grey.backbone.parameters()), next(model.backbone.parameters()))
    assert grey.memory_is_stale()
    assert "its memory bank is stale" in caplog.text


def test_only_safetensors_and_text_is_written(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*")} <= {".safetensors", ".json", ".md"}
    json.loads((tmp_path / "config.json").read_text())


def test_a_model_without_memory_is_saved_on_request_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"build_memory_bank.*allow_empty_memory=True"):
        save_pretrained(_model("no memory"), tmp_path)
    assert not list(tmp_path.iterdir())
    save_pretrained(_model("no memory"), tmp_path, allow_empty_memory=True)


def test_a_stale_bank_is_not_saved(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.1)
    with pytest.raises(ValueError, match=r"stale.*build_memory_bank"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_bank_that_a_hand_written_average_made_stale_is_not_saved(tmp_path: Path) -> None:
    model = _model()
    model.memory_is_stale()
    for parameter in model.backbone.parameters():
        parameter.data.copy_(0.9 * parameter.data)
    with pytest.raises(ValueError, match=r"stale.*build_memory_bank"):
        save_pretrained(model, tmp_path)


def test_what_is_no_memory_wrap_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wrap\(model\)"):
        save_pretrained(timm.create_model("test_resnet"), tmp_path)  # type: ignore[arg-type]


def _visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("where", ["write_tensors", "save_config_for_hf", "build_shell", "os.replace"])
def test_a_failed_save_leaves_the_old_files(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(_model(), tmp_path)
    before = _visible(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"timm_memwrap.hub.saving.{where}", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(_model("linear"), tmp_path)
    assert _visible(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "nothing temporary is left"


def _save_for_ever(models: list[MemoryWrapModel], folder: Path, ready: Any) -> None:
    torch.set_num_threads(1)
    ready.set()
    while True:
        for model in models:
            save_pretrained(model, folder, overwrite_card=True)


@pytest.mark.parametrize("kills", [30, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_killed_save_leaves_a_model_that_loads(kills: int, tmp_path: Path) -> None:
    """One of two models of other architectures and classes, whole; and the next save cleans up."""
    models = [_model("wrapped"), _wide_model()]
    folders = [save_pretrained(model, tmp_path / str(i)) for i, model in enumerate(models)]
    target = save_pretrained(models[0], tmp_path / "target")
    saved = {(folder / "model.safetensors").read_bytes(): model for folder, model in zip(folders, models, strict=True)}
    random, fork = Random(0), multiprocessing.get_context("fork")
    for _ in range(kills):
        ready = fork.Event()
        process = fork.Process(target=_save_for_ever, args=(models, target, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.join()
        model = saved[(target / "model.safetensors").read_bytes()]
        # timm reads config.json first; either call mends it.
        loads = [lambda: timm.create_model(f"local-dir:{target}", pretrained=True), lambda: from_pretrained(target)]
        for load in random.sample(loads, 2):
            with torch.no_grad():
                assert torch.equal(load().eval()(_images()), model(_images()))
    save_pretrained(models[0], target)
    assert {path.name for path in target.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def _wide_model() -> MemoryWrapModel:
    model = timm_memwrap.wrap(timm.create_model("test_vit", num_classes=7, img_size=32)).eval()
    build_memory_bank(model, TensorDataset(_images(count=14), torch.arange(14) % 7), size=None, progress=False)
    return model


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize(
    "load", [from_pretrained, lambda path: timm.create_model(f"local-dir:{path}", pretrained=True)]
)
def test_a_config_of_another_save_is_mended(
    load: Any, writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a save leaves it that was killed between its two files."""
    model = _wide_model()
    save_pretrained(model, tmp_path)
    config = (tmp_path / "config.json").read_text()
    old = save_pretrained(_model(), tmp_path / "old")
    (tmp_path / "config.json").write_bytes((old / "config.json").read_bytes())
    if not writable:
        monkeypatch.setattr(os, "access", lambda *_: False)
    loaded = load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(_images()), model(_images()))
    assert loaded.num_classes == 7
    assert loaded.pretrained_cfg["architecture"] == "memwrap_evidence_test_vit"
    assert "is not the one that the weights beside it were saved with" in caplog.text
    assert ((tmp_path / "config.json").read_text() == config) == writable
    # What was loaded so is saved as what it is.
    again = from_pretrained(save_pretrained(loaded, tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(again(_images()), model(_images()))


def test_arguments_of_the_user_outlive_a_mended_config(tmp_path: Path) -> None:
    save_pretrained(_wide_model(), tmp_path)
    old = save_pretrained(_model(), tmp_path / "old")
    (tmp_path / "config.json").write_bytes((old / "config.json").read_bytes())
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4, drop_rate=0.25)
    assert loaded.num_classes == 4
    assert loaded.backbone.head_drop.p == 0.25


def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    leftover = tmp_path / ".saving-model-abc"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    save_pretrained(_model(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors", "notes"}


def test_saves_into_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    models = [_model("wrapped"), _wide_model()]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: save_pretrained(models[i % 2], tmp_path), range(8)))
    loaded = from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == loaded.pretrained_cfg["architecture"]
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_models_are_loaded_in_several_threads(tmp_path: Path) -> None:
    models = [_model("wrapped"), _wide_model(), _model("mlp")]
    folders = [save_pretrained(model, tmp_path / str(i)) for i, model in enumerate(models)]

    def load(i: int) -> bool:
        with torch.no_grad():
            return torch.equal(from_pretrained(folders[i % 3])(_images()), models[i % 3](_images()))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(load, range(30)))
    # A model that is made meanwhile in another thread is a whole one.
    assert not any(p.is_meta for p in timm.create_model("test_resnet").parameters())


def test_files_get_the_permissions_of_the_users_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_pretrained(_model(), tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_the_model_has_the_methods(tmp_path: Path) -> None:
    model = _model()
    assert model.save_pretrained(tmp_path / "model") == tmp_path / "model"
    loaded = from_pretrained(tmp_path / "model")
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(_images()), model(_images()))


class _Adapter(torch.nn.Module):
    """A low-rank adapter around a layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.low_rank = torch.nn.Sequential(torch.nn.Linear(layer.in_features, 2), torch.nn.Linear(2, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.low_rank(x)


def _changed(change: Any) -> MemoryWrapModel:
    """Returns a model with a bank that is true to its weights after a change of its backbone."""
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=CLASSES)).eval()
    change(model.backbone)
    build_memory_bank(model, TensorDataset(_images(), torch.arange(12) % CLASSES), size=None, progress=False)
    return model


def _set(name: str, make: Any) -> Any:
    return lambda backbone: backbone.set_submodule(name, make(backbone.get_submodule(name)))


def _wrong_bank(encodings: Any, labels: Any) -> MemoryWrapModel:
    model = _model("wrapped")
    bank = model.memory_bank
    bank.replace(encodings(bank.encodings), labels(bank.labels), bank.ids)
    return model


class _WithState(torch.nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: _changed(_set("fc", torch.nn.Sequential)), r"backbone\.fc is a Sequential, timm's a Linear"),
        (lambda: _changed(_set("fc", _Adapter)), r"backbone\.fc is a _Adapter, timm's a Linear.*merge adapters"),
        (lambda: _changed(_set("fc", weight_norm)), r"backbone\.fc is a ParametrizedLinear.*remove parametrizations"),
        (lambda: _changed(_set("fc", lambda _: torch.nn.Linear(96, CLASSES, bias=False))), r"missing.*fc\.bias"),
        (lambda: _changed(_set("fc", lambda _: _WithState(96, CLASSES))), r"fc\._extra_state is a dict, which safe"),
        (lambda: timm_memwrap.wrap(timm.create_model("test_byobnet", act_layer=torch.nn.SiLU)), "act_layer='silu'"),
        (lambda: _wrong_bank(lambda e: e, lambda labels: labels + CLASSES), "outside num_classes"),
        (lambda: _wrong_bank(lambda e: e[:, 1:], lambda labels: labels), "encodings have shape"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(make: Any, why: str, tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path)
    before = _visible(tmp_path)
    with pytest.raises(ValueError, match=why):
        save_pretrained(make(), tmp_path, allow_empty_memory=True)
    assert _visible(tmp_path) == before


def _freeze(backbone: Any) -> None:
    timm.utils.freeze(backbone)


@pytest.mark.parametrize(
    "change",
    [
        _freeze,
        _set("layer1", lambda layer: torch.compile(layer, backend="eager")),
        lambda backbone: backbone.compile(backend="eager"),
        lambda backbone: backbone.double(),
    ],
    ids=["frozen norm layers", "compiled part", "compiled", "double"],
)
def test_what_timm_loads_is_saved(change: Any, tmp_path: Path) -> None:
    model = _changed(change)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    assert not loaded.memory_is_stale()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        torch.testing.assert_close(loaded(_images()), model(_images().to(dtype)), check_dtype=False)


def test_a_folder_with_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    model = _model()
    save_pretrained(model, tmp_path)
    os.remove(tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for load in (from_pretrained, lambda path: timm.create_model(f"local-dir:{path}", pretrained=True)):
        with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
            load(tmp_path)


def test_weights_with_a_missing_or_foreign_name_are_refused(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    gone = {name: tensor for name, tensor in state.items() if name != "head.classifier.fc1.bias"}
    for wrong, quoted in ((gone, r"head\.classifier\.fc1\.bias"), ({**state, "extra": torch.zeros(1)}, "extra")):
        save_file(wrong, path, metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=quoted):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_saving_over_an_older_save_replaces_it(tmp_path: Path) -> None:
    save_pretrained(_model(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model = _model("logits")
    save_pretrained(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path).eval()(_images()), model(_images()))
