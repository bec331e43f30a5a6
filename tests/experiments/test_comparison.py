"""A comparison is what training, wrapping and evaluating by hand come to, is done once, and can be gone on with."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_comparison import Compared

import timm_memwrap
from timm_memwrap.cli import main
from timm_memwrap.data import data_config
from timm_memwrap.experiments import comparison as module
from timm_memwrap.experiments.comparison import compare
from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.experiments.heads import HEADS, recipe_of
from timm_memwrap.explaining import evaluate_explanations
from timm_memwrap.training.evaluation import evaluate
from timm_memwrap.training.fitting import Fitted, check_recipe, fit_recipe
from timm_memwrap.training.loaders import eval_loader
from timm_memwrap.training.processes import Processes, processes
from timm_memwrap.training.recipes import find_recipe, load_recipe, recipe_names

Make = Callable[..., Comparison]
# Heads whose query holds what the classifier says.
ANSWERING = ("vote", "logits", "probabilities", "joint", "joint_equal")


def _fitted(compared: Compared, run: str, tmp_path: Path, seed: int = 0, **kwargs: bool) -> Fitted:
    """Trains again, elsewhere."""
    with processes("cpu") as env:
        recipe = recipe_of(compared.config, run, seed)
        return fit_recipe(recipe, tmp_path / run, env, progress=False, **kwargs)


def test_every_head_is_measured_for_every_seed(compared: Compared) -> None:
    assert list(compared.report.measures) == list(HEADS)
    for head, by_seed in compared.report.measures.items():
        assert list(by_seed) == [0, 1]
        for found in by_seed.values():
            assert 0 <= found["accuracy"] <= 1
            assert found["train_seconds"] > 0
            images = compared.config.training.epochs * compared.config.data.train_samples
            assert found["train_images_per_second"] * found["train_seconds"] == pytest.approx(images)
            assert ("support_size" in found) == (HEADS[head].read is not None)
            assert ("follows_exchanged_answer" in found) == (HEADS[head].read is not None)
            assert (found.get("follows_exchanged_answer") is not None) == (head in ANSWERING)
            assert ("growth" in found) == (HEADS[head].read is not None and not HEADS[head].redrawn)
    assert set(compared.report.times) == set(HEADS)
    assert (compared.out / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_linear_head_is_the_plain_classifier(compared: Compared, tmp_path: Path) -> None:
    fitted = _fitted(compared, "plain", tmp_path)
    loader = eval_loader(fitted.held_out, compared.config.data, data_config(fitted.model))
    expected = evaluate(fitted.model, loader, Processes(torch.device("cpu")))["accuracy"]
    assert compared.report.measures["linear"][0]["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("head", ["probabilities", "logits", "pre_logits", "vote"])
def test_a_wrapped_head_is_what_wrapping_by_hand_gives(compared: Compared, tmp_path: Path, head: str) -> None:
    fitted = _fitted(compared, "plain", tmp_path)
    options = {"classifier": "vote"} if head == "vote" else {"read_head": head}
    model = timm_memwrap.wrap(fitted.model, **options).eval()
    images, held_out = (
        eval_loader(part, compared.config.data, data_config(fitted.model)) for part in (fitted.images, fitted.held_out)
    )
    timm_memwrap.build_memory_bank(model, images, size=None, progress=False)
    metrics = evaluate_explanations(model, held_out, progress=False)
    found = compared.report.measures[head][0]
    assert found["memory_size"] == len(fitted.images)
    for name in (
        "accuracy",
        "explanation_accuracy",
        "identical_class_rate",
        "accuracy_without_memory",
        "follows_exchanged_answer",
    ):
        assert found[name] == pytest.approx(getattr(metrics, name)), name
    assert found["support_size"] == pytest.approx(metrics.support_size, rel=1e-3)
    assert found["calibration_error"] == pytest.approx(metrics.calibration_error, abs=1e-4)


def test_the_control_is_trained_and_evaluated_with_nothing_to_read(compared: Compared, tmp_path: Path) -> None:
    fitted = _fitted(compared, "mlp", tmp_path, reads_memory=False)
    right = total = 0
    with torch.no_grad():
        for images, labels in eval_loader(fitted.held_out, compared.config.data, data_config(fitted.model)):
            encoding = fitted.model.encode(images)
            nothing = torch.zeros_like(encoding)
            logits = fitted.model.head.classifier(torch.cat([encoding, nothing], dim=1))
            right += int((logits.argmax(dim=1) == labels).sum())
            total += len(labels)
    assert compared.report.measures["mlp"][0]["accuracy"] == pytest.approx(right / total)
    # What would be multiplied by the memory vector has met no gradient but the decay's.
    first = fitted.model.head.classifier.fc1.weight
    unread, read = first[:, fitted.model.encoding_size :], first[:, : fitted.model.encoding_size]
    other = _fitted(compared, "sample", tmp_path).model.head.classifier.fc1.weight
    assert unread.abs().mean() < other[:, fitted.model.encoding_size :].abs().mean()
    assert not torch.equal(read, other[:, : fitted.model.encoding_size])


def test_what_is_done_is_not_done_again(compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = shutil.copytree(compared.out, tmp_path / "out")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("Trained again.")

    monkeypatch.setattr(module, "fit_recipe", refuse)
    again = compare(compared.config, out, progress=False)
    assert again.to_dict() == compared.report.to_dict()
    assert (out / "table.md").read_bytes() == (compared.out / "table.md").read_bytes()


def test_an_interrupted_comparison_goes_on_to_the_same_end(
    comparison: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = comparison(comparison={"heads": ["linear", "batch", "probabilities"]})
    whole = compare(config, tmp_path / "whole", progress=False)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.measures, "memory_measures", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare(config, tmp_path / "parts", progress=False)
    assert [path.name for path in (tmp_path / "parts" / "measures" / "seed_0").iterdir()] == ["linear.json"]
    parts = compare(config, tmp_path / "parts", progress=False)
    for found in (whole, parts):
        for by_seed in found.measures.values():
            for time in ("train_seconds", "train_images_per_second"):
                by_seed[0].pop(time)
    assert parts.measures == whole.measures


def test_heads_and_seeds_can_be_added(comparison: Make, tmp_path: Path) -> None:
    first = comparison(comparison={"heads": ["linear"]}, training={"epochs": 1})
    compare(first, tmp_path, progress=False)
    checkpoints = tmp_path / "runs" / "plain" / "seed_0" / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in checkpoints.iterdir()}
    more = copy.deepcopy(first)
    more.comparison.heads, more.comparison.seeds = ["linear", "logits:scale=3", "logits"], [0, 1]
    report = compare(more, tmp_path, progress=False)
    assert {head: list(by_seed) for head, by_seed in report.measures.items()} == {
        head: [0, 1] for head in more.comparison.heads
    }
    assert report.measures["logits"][0]["support_size"] < report.measures["logits:scale=3"][0]["support_size"]
    assert before
    assert {path: path.stat().st_mtime_ns for path in checkpoints.iterdir()} == before


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "lr", 0.5),
        ("data", "train_samples", 100),
        # What was measured on one folder of images must not be given out as measured on another.
        ("data", "data_dir", "elsewhere"),
        ("comparison", "samples_per_class", [2]),
    ],
)
def test_a_folder_of_another_comparison_is_refused(
    comparison: Make, tmp_path: Path, section: str, key: str, value: object
) -> None:
    compare(comparison(comparison={"heads": ["linear"]}, training={"epochs": 1}), tmp_path, progress=False)
    other = comparison(comparison={"heads": ["linear"]}, training={"epochs": 1})
    setattr(getattr(other, section), key, value)
    with pytest.raises(ValueError, match=re.escape(f"{section}.{key}=")):
        compare(other, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("comparison", {"heads": []}, "comparison.heads=[]"),
        ("comparison", {"heads": ["linear", "linear"]}, "repeats a value"),
        ("comparison", {"heads": ["liner"]}, "Did you mean 'linear'?"),
        ("comparison", {"seeds": []}, "comparison.seeds=[]"),
        ("comparison", {"seeds": [1, 1]}, "repeats a value"),
        ("comparison", {"samples_per_class": [0]}, "comparison.samples_per_class=0"),
        ("comparison", {"selections": ["all"]}, "'all'"),
        ("comparison", {"draws": 0}, "comparison.draws=0"),
        ("comparison", {"timing_rounds": -1}, "comparison.timing_rounds=-1"),
        ("training", {"epochs": 0}, "training.epochs=0"),
        ("hub", {"push": "me/model"}, "hub.push='me/model'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    comparison: Make, tmp_path: Path, section: str, values: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(comparison(**{section: values}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("compare_")])
def test_every_comparison_has_a_recipe_for_each_of_its_heads(name: str) -> None:
    config = load_recipe(find_recipe(name), Comparison)
    assert isinstance(config, Comparison)
    for head in config.comparison.heads:
        check_recipe(recipe_of(config, module.parse_head(head).run, 0))


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = ["--data.train_samples=70", "--data.val_samples=30", "--data.img_size=16", "--training.epochs=1"]
    chosen = ["--comparison.heads=[linear,probabilities]", "--comparison.seeds=[3]", "--comparison.timing_rounds=0"]
    main(["compare", "--config=compare_digits", "--memory.size=20", *small, *chosen, f"--out={tmp_path / 'out'}"])
    shown = capsys.readouterr().out
    assert "| probabilities" in shown
    assert f"Written: {tmp_path / 'out'}" in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["heads"]) == ["linear", "probabilities"]
    assert list(results["heads"]["linear"]["seeds"]) == ["3"]
    assert results["config"]["data"]["train_samples"] == 70
