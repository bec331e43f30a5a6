"""Models to train that come from elsewhere: the Hub or a folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from training_images import write_images

import timm_memwrap
from timm_memwrap.jobs.train import train
from timm_memwrap.training.configuration import DataConfig, ModelConfig, Recipe, TrainingConfig
from timm_memwrap.training.creation import adapt_source, load_source, source_of

Make = Callable[..., Recipe]
DIGITS = list("0123456789")


def _plain(classes: list[str]) -> torch.nn.Module:
    cfg = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "label_names": classes}
    return timm.create_model("test_resnet", num_classes=len(classes), in_chans=1, pretrained_cfg_overlay=cfg)


def _saved(folder: Path, kind: str, classes: list[str] = DIGITS) -> str:
    """Saves a model, a timm model or one with a memory and its own head or classifier; returns what names it."""
    plain = _plain(classes)
    if kind == "timm":
        save_for_hf(plain, folder, safe_serialization=True, model_config={"label_names": classes})
        return f"local-dir:{folder}"
    model = timm_memwrap.wrap(plain) if kind == "evidence" else timm_memwrap.wrap(plain, read_head="linear")
    data = torch.utils.data.TensorDataset(torch.randn(20, 1, 16, 16), torch.arange(20) % len(classes))
    timm_memwrap.build_memory_bank(model, data, class_names=classes, progress=False)
    timm_memwrap.save_pretrained(model, folder)
    return str(folder)


def _encoder(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = getattr(model, "backbone", model).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize("mode", ["none", "batch"])
@pytest.mark.parametrize("kind", ["timm", "evidence", "head"])
def test_what_fits_of_a_model_is_trained_further(tmp_path: Path, digits: Make, kind: str, mode: str) -> None:
    recipe = digits(model={"name": _saved(tmp_path / "m", kind)}, memory={"mode": mode})
    source = load_source(recipe)
    model = adapt_source(load_source(recipe), recipe, DIGITS)
    before, after = _encoder(source), _encoder(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.num_classes == 10
    if kind == "head" and mode == "batch":
        assert all(torch.equal(a, b) for a, b in zip(source.head.parameters(), model.head.parameters(), strict=True))
        assert len(model.memory_bank) == 0
    elif kind != "head" and mode == "none":
        classifier = getattr(source, "backbone", source).get_classifier()
        assert torch.equal(classifier.weight, model.get_classifier().weight)
    elif mode == "none":
        assert not model.get_classifier().weight.any()


@pytest.mark.parametrize("kind", ["timm", "evidence", "head"])
@pytest.mark.parametrize("classes", [["a", "b"], ["a", *DIGITS[1:]]], ids=["other number", "other names"])
def test_other_classes_get_a_new_classifier(tmp_path: Path, digits: Make, kind: str, classes: list[str]) -> None:
    recipe = digits(model={"name": _saved(tmp_path / "m", kind, classes)})
    model = adapt_source(load_source(recipe), recipe, DIGITS)
    assert model.num_classes == 10
    assert not model.get_classifier().weight.any()
    assert "label_names" not in model.pretrained_cfg


def test_labels_follow_the_model_whose_classifier_is_kept(tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train", 20)
    write_images(tmp_path / "data" / "validation", 3)
    data = DataConfig(data_dir=str(tmp_path / "data"), img_size=32, batch_size=15, workers=0, color_jitter=0.0)
    data.scale = (1.0, 1.0)
    first = train(
        Recipe(ModelConfig("test_resnet"), data, TrainingConfig(epochs=8, lr=5e-3)), tmp_path / "a", progress=False
    )
    assert first.accuracy == 1.0
    model = timm_memwrap.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        for parameter in model.backbone.get_classifier().parameters():
            parameter.copy_(parameter[[2, 0, 1]])
    names = [model.memory_bank.class_names[i] for i in (2, 0, 1)]
    model.memory_bank.set_class_names(names)
    bank_data = torch.utils.data.TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)
    timm_memwrap.build_memory_bank(model, bank_data, progress=False)
    timm_memwrap.save_pretrained(model, tmp_path / "b")

    config = TrainingConfig(epochs=1, lr=1e-9, warmup_epochs=0)
    again = train(Recipe(ModelConfig(str(tmp_path / "b")), data, config), tmp_path / "c", progress=False)
    assert again.history[0]["val_accuracy"] == again.accuracy == 1.0
    assert again.model.memory_bank.class_names == names
    # What is published does not say where the model was.
    for file in ("model.safetensors", "config.json", "README.md"):
        assert str(tmp_path).encode() not in (tmp_path / "c" / file).read_bytes()
    assert "pretrained weights" in (tmp_path / "c" / "README.md").read_text()


def test_a_folder_does_not_hide_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("test_resnet", "mine"):
        Path(name).mkdir()
    assert source_of("test_resnet") is None
    assert source_of("mine") == "local-dir:mine"
    assert source_of("hf-hub:me/mine") == "hf-hub:me/mine"


def test_an_image_size_reaches_a_model_of_fixed_size(tmp_path: Path, digits: Make) -> None:
    plain = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=32)
    save_for_hf(plain, tmp_path / "m", safe_serialization=True)
    recipe = digits(model={"name": str(tmp_path / "m")}, data={"img_size": 48})
    model = adapt_source(load_source(recipe), recipe, DIGITS)
    assert model(torch.randn(1, 1, 48, 48)).shape == (1, 10)
    assert model.pretrained_cfg["input_size"] == (1, 48, 48)
