import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from training_images import write_images

import timm_memwrap
from timm_memwrap.data import data_config
from timm_memwrap.explaining import evaluate_explanations
from timm_memwrap.jobs.train import train
from timm_memwrap.training.configuration import DataConfig, MemoryConfig, ModelConfig, Recipe, TrainingConfig
from timm_memwrap.training.evaluation import evaluate
from timm_memwrap.training.fitting import Fitted, open_data
from timm_memwrap.training.loaders import eval_loader
from timm_memwrap.training.processes import Processes

Make = Callable[..., Recipe]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("frozen", [False, True], ids=["whole", "frozen"])
@pytest.mark.parametrize("mode", ["none", "batch", "sample", "queue"])
def test_every_mode_leaves_the_same_files(tmp_path: Path, digits: Make, mode: str, frozen: bool) -> None:
    recipe = digits(memory={"mode": mode}, training={"freeze_backbone": frozen})
    report = train(recipe, tmp_path / "out", progress=False)
    expected = {"model.safetensors", "config.json", "README.md", "recipe.yaml", "metrics.csv", "summary.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected | {"curves.png", "checkpoints"}

    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert len(model.memory_bank) == 40
    assert model.memory_bank.class_names == list("0123456789")
    assert not model.memory_is_stale()
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(model(images), report.model.eval()(images))

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy"] == report.accuracy
    assert (summary["plain_accuracy"] is None) == (mode != "none")
    assert summary["memory_mode"] == mode
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["val_accuracy"]) == pytest.approx(report.history[-1]["val_accuracy"])
    assert f"{report.accuracy}" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_accuracy_on_the_card_is_what_the_saved_model_has(tmp_path: Path, digits: Make) -> None:
    recipe = digits()
    report = train(recipe, tmp_path / "out", progress=False)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    _, held_out = open_data(recipe, progress=False)
    assert evaluate_explanations(model, held_out, progress=False).accuracy == pytest.approx(report.accuracy)


@pytest.mark.parametrize(
    ("sections", "fitted"),
    [
        ({}, True),
        ({"memory": {"calibrate": False}}, False),
        ({"model": {"temperature": 1.0}}, False),
        ({"memory": {"mode": "batch"}}, False),
        ({"memory": {"mode": "batch", "calibrate": True}}, True),
    ],
    ids=str,
)
def test_a_classifier_that_is_read_through_gets_its_temperature(
    tmp_path: Path, digits: Make, sections: dict, fitted: bool
) -> None:
    recipe = digits(**sections)
    report = train(recipe, tmp_path / "out", progress=False)
    assert (report.model.temperature != 1.0) == fitted
    _, held_out = open_data(recipe, progress=False)
    loader = eval_loader(held_out, recipe.data, data_config(report.model))
    before = report.model.temperature
    best = timm_memwrap.calibrate(report.model, loader, progress=False)
    assert (before == pytest.approx(best, rel=1e-4)) == fitted


def test_channels_last_is_a_layout_and_changes_no_result(tmp_path: Path, digits: Make) -> None:
    reports = [
        train(digits(training={"channels_last": last}), tmp_path / str(last), progress=False) for last in (False, True)
    ]
    convolutions = [
        next(m for m in r.model.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 1) for r in reports
    ]
    layouts = [conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions]
    assert layouts == [False, True]
    first, second = (r.history[-1]["train_loss"] for r in reports)
    assert second == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("frozen", [False, True], ids=["whole", "frozen"])
@pytest.mark.parametrize("selection", ["balanced", "herding", "random"])
def test_evaluation_in_training_reads_a_bank_of_these_weights(
    tmp_path: Path, digits: Make, selection: str, frozen: bool
) -> None:
    memory = {"mode": "batch", "selection": selection, "size": 20}
    recipe = digits(memory=memory, model={"memory_only": True, "scale": 10.0}, training={"freeze_backbone": frozen})
    report = train(recipe, tmp_path / "out", progress=False)
    # The last epoch was evaluated with the weights and the bank that are saved.
    assert report.history[-1]["val_accuracy"] == pytest.approx(report.accuracy)
    _, held_out = open_data(recipe, progress=False)
    loader = eval_loader(held_out, recipe.data, data_config(report.model))
    found = evaluate(report.model, loader, Processes(torch.device("cpu")))
    assert report.history[-1]["val_loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_the_best_epoch_is_kept_on_request(tmp_path: Path, digits: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.9, 0.1, 0.5])
    monkeypatch.setattr(Fitted, "_validate", lambda self, model: {"loss": 1.0, "accuracy": next(accuracies)})
    train(digits(training={"epochs": 3, "keep": "best"}), tmp_path / "out", progress=False)
    best = load_file(tmp_path / "out" / "checkpoints" / "model_best.safetensors")
    last = load_file(tmp_path / "out" / "checkpoints" / "last.safetensors")
    first = _first_weight(tmp_path / "out")
    saved = _weights(tmp_path / "out")[first]
    name = "/state_dict/" + first.removeprefix("backbone.")
    assert torch.equal(saved, best[name])
    assert not torch.equal(saved, last[name])


def _first_weight(folder: Path) -> str:
    return next(name for name, tensor in _weights(folder).items() if name.startswith("backbone.") and tensor.ndim == 4)


def test_the_average_is_what_is_evaluated_and_saved(tmp_path: Path, digits: Make) -> None:
    recipe = digits(training={"model_ema": True, "model_ema_decay": 0.5})
    train(recipe, tmp_path / "out", progress=False)
    state = load_file(tmp_path / "out" / "checkpoints" / "last.safetensors")
    name = _first_weight(tmp_path / "out")
    saved = _weights(tmp_path / "out")[name]
    plain = name.removeprefix("backbone.")
    assert torch.equal(saved, state[f"/state_dict_ema/{plain}"])
    assert not torch.equal(saved, state[f"/state_dict/{plain}"])


@pytest.mark.parametrize("mode", ["none", "batch"])
def test_mixed_precision_trains(tmp_path: Path, digits: Make, mode: str) -> None:
    report = train(digits(training={"amp": True}, memory={"mode": mode}), tmp_path / "out", progress=False)
    assert report.history[-1]["train_loss"] < report.history[0]["train_loss"]
    assert {tensor.dtype for name, tensor in _weights(tmp_path / "out").items() if name.startswith("backbone.")} <= {
        torch.float32,
        torch.int64,
    }


def test_a_compiled_training_is_saved_like_any(tmp_path: Path, digits: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # The backend that compiles nothing: what is tested is the wrapping, not the compiler.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compile_(model, backend="eager"))
    for mode in ("none", "batch"):
        recipe = digits(training={"torchcompile": True, "epochs": 1}, memory={"mode": mode})
        train(recipe, tmp_path / mode, progress=False)
        assert not [name for name in _weights(tmp_path / mode) if "_orig_mod" in name]


def test_the_papers_evaluation_is_repeated_as_often_as_asked(tmp_path: Path, digits: Make) -> None:
    recipe = digits(memory={"mode": "sample", "train_size": 20, "sampled_evaluations": 3})
    report = train(recipe, tmp_path / "out", progress=False)
    assert len(report.sampled_accuracies) == 3
    assert all(0 <= accuracy <= 1 for accuracy in report.sampled_accuracies)


def test_an_image_folder_trains_and_a_share_can_be_held_out(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", 20)
    recipe = Recipe(
        ModelConfig(name="test_resnet"),
        DataConfig(
            data_dir=str(folder),
            train_split="",
            val_split=None,
            val_fraction=0.25,
            img_size=32,
            batch_size=15,
            workers=0,
            color_jitter=0.0,
        ),
        TrainingConfig(epochs=8, lr=5e-3),
        MemoryConfig(size=None, selection="all"),
    )
    report = train(recipe, tmp_path / "out", progress=False)
    assert report.accuracy > 0.9
    assert len(report.model.memory_bank) == 45
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["train_images"], summary["val_images"]) == (45, 15)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"memory": {"mode": "sample", "train_size": 180}}, r"train_size=180"),
        ({"training": {"device": "warp"}}, r"training\.device='warp'"),
        ({"training": {"lr": 1e30, "opt": "sgd"}}, r"loss is .* in epoch"),
        ({"model": {"kwargs": {"nonsense": 1}}}, r"nonsense"),
        ({"data": {"auto_augment": "none"}}, r"data\.auto_augment='none'"),
        ({"training": {"opt": "none"}}, r"training\.opt='none'"),
        ({"data": {"mean": [0.1, 0.2]}}, r"data\.mean.*2 values for 1 channels"),
    ],
)
def test_what_does_not_fit_the_data_is_one_clear_line(
    tmp_path: Path, digits: Make, sections: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(digits(**sections), tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)


def test_sizes_are_the_most_that_there_are(tmp_path: Path) -> None:
    """The defaults, 1,000 samples in the memory and 128 images in a batch, do for a handful of images."""
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "validation", 2)
    recipe = Recipe(ModelConfig("test_resnet"), DataConfig(data_dir=str(tmp_path), img_size=32, workers=0))
    recipe.training.epochs = 1
    report = train(recipe, tmp_path / "out", progress=False)
    assert len(report.model.memory_bank) == report.model.memory_bank.provenance.population == 12


@pytest.mark.parametrize("unreadable", ["fail", "skip"])
def test_an_unreadable_image_stops_or_is_left_out_with_a_count(
    tmp_path: Path, folder: Path, unreadable: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "train" / "dog" / "001.png").write_bytes(b"no image")
    data = DataConfig(data_dir=str(folder), img_size=32, batch_size=5, workers=0, unreadable=unreadable)
    recipe = Recipe(ModelConfig("test_resnet"), data, TrainingConfig(epochs=1), MemoryConfig(size=10))
    if unreadable == "fail":
        with pytest.raises(ValueError, match=r"dog/001\.png"):
            train(recipe, tmp_path / "out", progress=False)
    else:
        report = train(recipe, tmp_path / "out", progress=False)
        assert "1 of 36 images" in caplog.text
        assert report.model.memory_bank.provenance.population == 35


@pytest.mark.parametrize("other", ["architecture", "classes"])
@pytest.mark.parametrize("mode", ["none", "batch"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, digits: Make, other: str, mode: str) -> None:
    from safetensors.torch import save_file

    if other == "classes":
        save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    else:
        save_file({"nothing.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="do not fit"):
        train(
            digits(model={"pretrained_path": str(tmp_path / "w.safetensors")}, memory={"mode": mode}),
            tmp_path / "out",
            progress=False,
        )


def test_events_are_written_for_tensorboard(tmp_path: Path, digits: Make) -> None:
    pytest.importorskip("tensorboard")
    train(digits(training={"epochs": 1, "tensorboard": True}), tmp_path / "out", progress=False)
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))


def test_a_repository_that_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path, digits: Make) -> None:
    with pytest.raises(ValueError, match="no repo id"):
        train(digits(hub={"push": "no repo id"}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
