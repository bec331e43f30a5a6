import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from training_images import write_images

from timm_memwrap.training.configuration import DataConfig, ModelConfig, Recipe
from timm_memwrap.training.creation import create_model
from timm_memwrap.training.fitting import Fitted, check_recipe, fit_recipe, open_data
from timm_memwrap.training.processes import Processes

Make = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "resnet19"}}, r"resnet19"),
        ({"model": {"name": "memwrap_resnet18"}}, r"Pass the backbone, 'resnet18'"),
        ({"model": {"name": ""}}, r"Unknown model\.name=''"),
        ({"model": {"pretrained_path": "w.pth"}}, r"w\.pth.*safetensors"),
        ({"model": {"pretrained_path": "a/b.pth.tar"}}, r"clean_checkpoint\.py --checkpoint b\.pth\.tar --safetensors"),
        ({"model": {"name": "hf-hub:me/m", "pretrained_path": "w.safetensors"}}, r"Pass one of them"),
        ({"model": {"in_chans": 5}}, r"in_chans=5"),
        ({"model": {"read_head": "linear"}}, r"read_head='linear' needs training"),
        ({"model": {"classifier": "vote"}, "memory": {"mode": "batch"}}, r"'vote' has no layer to train"),
        ({"model": {"classifier": "mlp"}}, r"classifier='mlp'"),
        ({"model": {"name": "memwrap_evidence_resnet18"}}, r"Pass the backbone, 'resnet18'"),
        ({"model": {"read_head": "logits"}, "memory": {"mode": "batch"}}, r"'logits'.* has no head to train"),
        ({"model": {"scale": "learned"}}, r"'learned' needs training with a memory"),
        ({"training": {"epochs": 0}}, r"training\.epochs=0"),
        ({"memory": {"size": 0}}, r"memory\.size=0"),
        ({"data": {"batch_size": 0}}, r"data\.batch_size=0 is not valid. Pass 1 or a number above it"),
        ({"data": {"img_size": 0}}, r"data\.img_size=0"),
        ({"data": {"hflip": -1}}, r"data\.hflip=-1 is not valid. Pass 0 to 1"),
        ({"data": {"mean": [float("nan")]}}, r"data\.mean=\[nan\]"),
        ({"data": {"std": [0.0]}}, r"data\.std=\[0\.0\]"),
        ({"data": {"scale": [1.0, 0.5]}}, r"data\.scale=\[1\.0, 0\.5\] is not a range"),
        ({"data": {"ratio": [-1.0, 1.0]}}, r"data\.ratio"),
        ({"data": {"interpolation": "none"}}, r"data\.interpolation='none'"),
        ({"model": {"drop_path_rate": 2.0}}, r"model\.drop_path_rate=2\.0"),
        ({"model": {"temperature": 0.0}}, r"model\.temperature=0\.0"),
        ({"training": {"decay_epochs": 0.0}}, r"training\.decay_epochs=0\.0"),
        ({"training": {"smoothing": float("inf")}}, r"training\.smoothing=inf"),
        ({"training": {"seed": -1}}, r"training\.seed=-1"),
        ({"data": {"mixup": -0.1}}, r"data\.mixup=-0\.1"),
        ({"data": {"mixup": 0.1}, "training": {"freeze_backbone": True}}, r"Mixup cannot mix"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused_before_data_is_read(
    digits: Make, sections: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(digits(**sections))


def test_a_temperature_that_would_be_replaced_is_refused(digits: Make) -> None:
    with pytest.raises(ValueError, match=re.escape("model.temperature=2.0")):
        check_recipe(digits(model={"temperature": 2.0}, memory={"calibrate": True}))


def test_pretrained_weights_come_from_a_file_and_a_new_classifier_starts_from_zero(
    tmp_path: Path, digits: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    source = timm.create_model("test_resnet")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    recipe = digits(model={"pretrained_path": str(tmp_path / "w.safetensors"), "in_chans": 3})
    recipe.data.mean = recipe.data.std = None
    model = create_model(recipe, 10)
    assert not model.get_classifier().weight.any()
    a, b = source.state_dict(), model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a if not name.startswith("fc"))
    recipe.model.head_init_scale = 1.0
    assert create_model(recipe, 10).get_classifier().weight.any()


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 4, ("cat",))
    recipe = Recipe(ModelConfig("test_resnet"), DataConfig(data_dir=str(tmp_path), val_split=None, workers=0))
    with pytest.raises(ValueError, match="one class only, 'cat'"):
        open_data(recipe, progress=False)


def test_balanced_classes_weigh_the_same(digits: Make) -> None:
    recipe = digits(training={"class_weight": "balanced", "smoothing": 0.1}, data={"val_samples": None})
    images, held_out = open_data(recipe, progress=False)
    few = images.at([i for i, label in enumerate(images.targets) if label or i % 4 == 0])
    fitted = Fitted(recipe, Processes(torch.device("cpu")), create_model(recipe, 10), few, held_out, False, True)
    task, _, _ = fitted.whole()
    labels = torch.tensor(few.targets)
    sums = [float(task.criterion.weight[labels[labels == label]].sum()) for label in range(10)]
    assert sums == pytest.approx([len(few) / 10] * 10)
    assert task.criterion.label_smoothing == 0.1


@pytest.mark.parametrize(
    "sections", [{"data": {"mixup": 0.2}}, {"training": {"freeze_backbone": True}}, {"memory": {"mode": "queue"}}]
)
def test_class_weights_go_with_all_that_trains(tmp_path: Path, digits: Make, sections: dict) -> None:
    training = {**sections.get("training", {}), "class_weight": "balanced", "epochs": 1}
    recipe = digits(**{**sections, "training": training})
    fitted = fit_recipe(recipe, tmp_path, Processes(torch.device("cpu")), progress=False)
    assert fitted.history[0]["train_loss"] > 0
