"""Trains the model of a recipe, and leaves it with its memory, card, metrics and curves in a folder."""

import json
import logging
import os
import shlex
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch

from timm_memwrap import __version__
from timm_memwrap._utils import write_text
from timm_memwrap.explaining import ExplanationMetrics, MultiLabelMetrics, calibrate, evaluate_explanations
from timm_memwrap.hub import push_to_hub, reserve_repo, save_pretrained
from timm_memwrap.jobs.figures import plot_least_sure
from timm_memwrap.jobs.reproducing import reproduction
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.configuration import HubConfig, Recipe
from timm_memwrap.training.creation import source_of, wrap_trained
from timm_memwrap.training.evaluation import evaluate, sampled_accuracy
from timm_memwrap.training.fitting import Fitted, check_recipe, fit_recipe
from timm_memwrap.training.outputs import plot_curves
from timm_memwrap.training.processes import processes

__all__ = ["TrainingReport", "train"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingReport:
    """The result of a training.

    Args:
        directory: Folder with the model and all else.
        model: The model with its memory.
        accuracy: Validation accuracy of the model with its memory, 0 to 1; where images may have several classes, that
            of all classes (`MultiLabelMetrics.accuracy`).
        plain_accuracy: Validation accuracy of the plain classifier, with `memory.mode` none.
        sampled_accuracies: Validation accuracies by the paper's protocol, if they were asked for.
        metrics: Metrics of the explanations on the validation images.
        history: A row of metrics for each epoch.
        seconds: Duration of the training, with its evaluations.
        first: Whether this process wrote the files.
    """

    directory: Path
    model: MemoryWrapModel
    accuracy: float
    plain_accuracy: float | None
    sampled_accuracies: list[float]
    metrics: ExplanationMetrics | MultiLabelMetrics
    history: list[dict[str, Any]]
    seconds: float
    first: bool


def train(
    recipe: Recipe, out: str | os.PathLike, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> TrainingReport:
    """Trains the model of a recipe, builds its memory, evaluates and saves it, and pushes it if the recipe says so.

    The folder gets `model.safetensors`, `config.json` and `README.md`, which timm and the Hub read; `recipe.yaml`,
    `metrics.csv`, `summary.json`, `curves.png`; and `checkpoints/`, from which an interrupted training resumes. Started
    with `torchrun`, all processes make this call; the first writes. A repository to push to is made first, so that
    nothing is trained that could not be pushed.

    Args:
        recipe: What to train and how.
        out: The folder; created if it does not exist.
        resume: Whether to resume an interrupted training in the folder. The result is that of one without interruption,
            bit for bit with one process on a CPU in full precision (PyTorch's own bfloat16 gradients differ from run to
            run). With more `training.epochs`, a training goes on at the learning rate that the longer schedule has.
        overwrite: Whether to start over in a folder that holds a training.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the recipe contradicts itself or the data, or the loss is not finite.
        OSError: If the model cannot be pushed: before anything is trained as far as that is known by then. Afterwards,
            it is in the folder.
    """
    out = Path(out)
    start = time.perf_counter()
    with processes(recipe.training.device) as env:
        if recipe.hub.push is not None and env.first:
            check_recipe(recipe)
            reserve_repo(recipe.hub.push, private=recipe.hub.private)
        try:
            fitted = fit_recipe(recipe, out, env, resume, overwrite, progress)
            report = _finish(fitted, out, time.perf_counter() - start)
            env.wait()
        except KeyboardInterrupt:
            _logger.warning("Interrupted. The last complete epoch is kept in %s; continue with --resume.", out)
            raise
    return report


def _finish(fitted: Fitted, out: Path, seconds: float) -> TrainingReport:
    """Gives a fitted model its memory and temperature, evaluates it, and writes it on the first process."""
    recipe, env, model, progress = fitted.recipe, fitted.processes, fitted.model, fitted.progress
    memory, plain_accuracy = recipe.memory, None
    if not isinstance(model, MemoryWrapModel):
        plain_accuracy = evaluate(model, fitted.eval_batches, env, fitted.images.multi_label)["accuracy"]
        model = wrap_trained(model, recipe.model, fitted.images.multi_label).eval()
    fitted.remember(model, memory.store_images, progress)
    # Each process evaluates all images, so that none waits for another through a long evaluation.
    loader = fitted.batches(fitted.held_out)
    if memory.calibrate or (memory.calibrate is None and memory.mode == "none" and recipe.model.temperature is None):
        calibrate(model, loader, progress)
    metrics = evaluate_explanations(model, loader, progress=progress)
    sampled = []
    if memory.sampled_evaluations:
        images = fitted.batches(fitted.images).dataset
        draws, seed = memory.sampled_evaluations, recipe.training.seed
        several = fitted.images.multi_label
        sampled = sampled_accuracy(model, loader, images, memory.train_size, draws, seed, several)
    report = TrainingReport(
        out, model, metrics.accuracy, plain_accuracy, sampled, metrics, fitted.history, seconds, env.first
    )
    if env.first:
        _write(fitted, report)
    return report


def _write(fitted: Fitted, report: TrainingReport) -> None:
    """Writes the model with its card, the summary and the curves, and pushes if the recipe says so."""
    recipe, metrics, plain = fitted.recipe, report.metrics, report.plain_accuracy
    data, hub = recipe.data, recipe.hub
    curves = plot_curves(report.history, report.directory / "curves.png", None if plain is None else report.accuracy)
    name, split = data.dataset or fitted.images.name, data.val_split or "held out"
    dataset_id = hub.dataset_id or (data.dataset[5:] if data.dataset.startswith("hfds/") else None)
    results = metrics.to_results(name, split, dataset_id)
    if plain is not None:
        results.append({**results[0], "metric": "accuracy of the plain classifier", "value": plain})
    card: dict[str, Any] = {
        "results": results,
        "description": _describe(fitted),
        "license": hub.license,
        "datasets": dataset_id,
        "training": reproduction(fitted, report.directory.resolve().name),
    }
    save_pretrained(report.model, report.directory, model_card=card, overwrite_card=True)
    summary = {
        "model": recipe.model.name,
        "memory_mode": recipe.memory.mode,
        "train_images": len(fitted.images),
        "val_images": len(fitted.held_out),
        "classes": len(fitted.images.classes),
        "memory_size": len(report.model.memory_bank),
        "accuracy": report.accuracy,
        "plain_accuracy": plain,
        "sampled_accuracies": report.sampled_accuracies,
        "explanations": metrics.to_dict(),
        "seconds": report.seconds,
        "curves": curves.name if curves is not None else None,
        "versions": {"timm_memwrap": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
    write_text(report.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    if hub.push is not None:
        if hub.include_images and not fitted.images.multi_label and find_spec("matplotlib"):
            batches = fitted.batches(fitted.held_out)
            card["figure"] = plot_least_sure(report.model, batches, report.directory / "explanations.png")
        _push(report, recipe.hub, card)


def _push(report: TrainingReport, hub: HubConfig, card: dict[str, Any]) -> None:
    """Pushes a model that is saved; where that fails, the error says how to push it later."""
    assert hub.push is not None
    options: dict[str, Any] = {"private": hub.private, "include_images": hub.include_images}
    try:
        # A card of an earlier training would have its results.
        commit = push_to_hub(report.model, hub.push, model_card=card, overwrite_card=True, **options)
    except Exception as error:
        given = {**options, "overwrite_card": True}.items()
        flags = [f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in given if value is not None]
        command = f"timm-memwrap push {shlex.quote(str(report.directory))} {hub.push} {' '.join(flags)}"
        raise OSError(
            f"The model is saved in {report.directory}, but was not pushed: {error} Push it with: {command}"
        ) from error
    _logger.info("Pushed to %s: %s", hub.push, commit.commit_url)


def _describe(fitted: Fitted) -> str:
    recipe, config = fitted.recipe, fitted.recipe.training
    model = recipe.model
    pretrained = model.pretrained or model.pretrained_path or source_of(model.name)
    start = "from pretrained weights" if pretrained else "from scratch"
    part = "the head alone, on a frozen backbone" if config.freeze_backbone else "all weights"
    how = {
        "none": "The plain classifier was trained, and is read through the memory.",
        "batch": "In training, the memory was the rest of the batch.",
        "sample": f"In training, the memory was {recipe.memory.train_size} images drawn for each step.",
        "queue": f"In training, the memory was the {recipe.memory.train_size} most recent encodings.",
    }[recipe.memory.mode]
    by = "mean average precision" if fitted.images.multi_label else "accuracy"
    chosen = f" The weights are of the best epoch by validation {by}." if config.keep == "best" else ""
    return (
        f"Trained {start} ({part}) on {len(fitted.images)} images for {config.epochs} epochs, evaluated on "
        f"{len(fitted.held_out)} others. {how}{chosen}"
    )
