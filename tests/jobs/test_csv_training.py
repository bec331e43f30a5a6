"""From a CSV file of images of several classes to a model that finds and explains them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from small_training import override

import timm_memwrap
from timm_memwrap.cli import main
from timm_memwrap.experiments.comparison import compare
from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.explaining import MultiLabelMetrics, evaluate_explanations
from timm_memwrap.jobs.quickstart import run_quickstart
from timm_memwrap.jobs.train import train
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.evaluation import evaluate
from timm_memwrap.training.fitting import open_data
from timm_memwrap.training.processes import Processes

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures whose channels are bright where they have the class, and a CSV file for each split."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 96), ("val", 40)):
        lines = []
        for i in range(count):
            has = rng.random(3) < 0.5
            pixels = rng.normal(70 + 110 * has[::-1], 25, (16, 16, 3)).clip(0, 255).astype("uint8")
            name = f"{split}/{i:03}.png"
            (root / split).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / name)
            lines.append([name, *(label for label, there in zip(CLASSES, has, strict=True) if there)])
        with (root / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["file", "label", "label"], *lines])
    return root


@pytest.fixture
def recipe(root: Path) -> Callable[..., Recipe]:
    def make(**sections: dict[str, Any]) -> Recipe:
        recipe = Recipe()
        recipe.model.name, recipe.data.data_dir = "test_resnet", str(root)
        recipe.data.img_size, recipe.data.batch_size, recipe.data.workers = 32, 16, 0
        recipe.data.scale, recipe.data.color_jitter = (0.5, 1.0), 0.0
        recipe.training.epochs, recipe.training.lr, recipe.training.warmup_epochs = 6, 3e-3, 0
        recipe.memory.size, recipe.memory.train_size = 40, 20
        override(recipe, sections)
        return recipe

    return make


@pytest.mark.parametrize("mode", ["none", "batch", "sample", "queue"])
def test_every_mode_learns_several_classes(tmp_path: Path, recipe: Callable[..., Recipe], mode: str) -> None:
    report = train(recipe(memory={"mode": mode}), tmp_path / "out", progress=False)
    metrics = report.metrics
    assert isinstance(metrics, MultiLabelMetrics)
    # Half the pictures have a class, so chance is a half.
    assert metrics.mean_average_precision > 0.75
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model.multi_label
    assert model.memory_bank.class_names == [*CLASSES]
    assert model.memory_args["read_head"] == ("joint_equal" if mode == "none" else "linear")
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert {"train_accuracy", "val_loss", "val_accuracy", "val_mean_average_precision"} <= rows[0].keys()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_value == metrics.mean_average_precision
    assert f"| Mean average precision | {round(metrics.mean_average_precision, 4)} |" in card.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["explanations"]["mean_average_precision"] == metrics.mean_average_precision
    assert (summary["plain_accuracy"] is None) == (mode != "none")


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"mixup": 0.2, "cutmix": 0.5}, "training": {"smoothing": 0.1}},
        {"training": {"freeze_backbone": True, "smoothing": 0.1}},
        {"training": {"freeze_backbone": True}, "memory": {"mode": "batch"}},
        {"data": {"val_split": None, "val_fraction": 0.2}, "training": {"keep": "best"}},
        {"data": {"train_samples": 40, "val_samples": 20}, "training": {"model_ema": True, "amp": True}},
        {"memory": {"mode": "sample", "sampled_evaluations": 1}},
    ],
    ids=["mixup", "frozen", "frozen head", "held out", "ema", "sampled"],
)
def test_options_of_training_go_with_several_classes(
    tmp_path: Path, recipe: Callable[..., Recipe], sections: dict[str, Any]
) -> None:
    training = {**sections.get("training", {}), "epochs": 2}
    report = train(recipe(**{**sections, "training": training}), tmp_path / "out", progress=False)
    assert report.model.multi_label
    assert all(np.isfinite(row["train_loss"]) for row in report.history)


def test_the_best_epoch_is_the_one_of_the_best_ranking(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    best = recipe(training={"keep": "best", "epochs": 5}, memory={"calibrate": False})
    report = train(best, tmp_path / "out", progress=False)
    _, held_out = open_data(best, progress=False)
    plain = report.metrics.mean_average_precision_plain
    assert plain == pytest.approx(max(row["val_mean_average_precision"] for row in report.history), abs=1e-4)
    assert "best epoch by validation mean average precision" in (tmp_path / "out" / "README.md").read_text()
    assert evaluate_explanations(report.model, held_out, progress=False).scores == report.metrics.scores


def test_the_mean_leaves_out_classes_that_no_image_has() -> None:
    logits, labels = torch.randn(20, 3), (torch.rand(20, 3) < 0.5).float()
    labels[:, 1] = 0

    def found(columns: list[int]) -> dict[str, float]:
        batches = [(logits[i : i + 8, columns], labels[i : i + 8, columns]) for i in range(0, 20, 8)]
        return evaluate(torch.nn.Identity(), batches, Processes(torch.device("cpu")), multi_label=True)

    assert found([0, 1, 2])["mean_average_precision"] == pytest.approx(found([0, 2])["mean_average_precision"])
    assert found([0, 2])["accuracy"] == pytest.approx(float(((logits > 0) == labels.bool()).float()[:, [0, 2]].mean()))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"class_weight": "balanced"}}, "class_weight='balanced' weighs an image by its one class"),
        ({"model": {"classifier": "vote", "read_head": "logits"}}, "classifier='vote' counts one label"),
    ],
)
def test_what_needs_one_class_is_refused_before_training(
    tmp_path: Path, recipe: Callable[..., Recipe], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe(**sections), tmp_path / "out", progress=False)


def test_splits_of_two_kinds_are_refused(tmp_path: Path, root: Path, recipe: Callable[..., Recipe]) -> None:
    (root / "one.csv").write_text("file,label\nval/000.png,red\n")
    with pytest.raises(ValueError, match="labels of two kinds"):
        train(recipe(data={"val_split": "one"}), tmp_path / "out", progress=False)


def test_what_compares_heads_needs_one_class(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="The quickstart is for classes that exclude each other"):
        run_quickstart(recipe(), tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="A comparison is for classes that exclude each other"):
        compare(Comparison(data=recipe().data, model=recipe().model), tmp_path / "out", progress=False)


def test_commands_go_with_several_classes(
    tmp_path: Path, root: Path, recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    train(recipe(memory={"store_images": True}), folder, progress=False)
    assert main(["evaluate", str(folder), "--data", str(root), "--split", "val", "--progress", "false"]) == 0
    printed = capsys.readouterr().out
    assert "mean average precision " in printed
    assert "red" in printed
    page = tmp_path / "page.html"
    image = str(root / "val" / "000.png")
    assert main(["explain", str(folder), image, "--out", str(page), "--progress", "false"]) == 0
    assert "without its memory no" in capsys.readouterr().out
    assert page.exists()
    assert main(["report", str(folder), "--data", str(root), "--split", "val", "--progress", "false"]) != 0
    assert "memory_report is for classes that exclude each other" in capsys.readouterr().err
    wrapped = str(tmp_path / "wrapped")
    options = ["--data", str(root), "--val_split", "val", "--out", wrapped, "--progress", "false"]
    assert main(["wrap", str(folder), *options]) == 0
    assert "by mean average precision" in capsys.readouterr().out
    assert timm_memwrap.from_pretrained(wrapped).multi_label
