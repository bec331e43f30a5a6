"""From a recipe to a saved model with its memory, card, metrics and curves."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_memwrap import __version__
from timm_memwrap.building import build_memory_bank
from timm_memwrap.explaining import ExplanationMetrics, calibrate, evaluate_explanations
from timm_memwrap.hub import check_repo_id, push_to_hub, save_pretrained
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.selection import select
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.control import WithoutMemory
from timm_memwrap.training.creation import (
    check_model_config,
    create_model,
    image_config,
    image_mode,
    wrap_trained,
)
from timm_memwrap.training.datasets import DIGITS, Images, open_dataset, split_off
from timm_memwrap.training.evaluation import evaluate, sampled_accuracy
from timm_memwrap.training.frozen import FrozenMemory, encode_images, freeze
from timm_memwrap.training.loaders import (
    MemoryCollate,
    Numbered,
    check_batch_size,
    create_mixup,
    eval_loader,
    train_loader,
)
from timm_memwrap.training.loop import Checkpoints, fit
from timm_memwrap.training.outputs import plot_curves, tensorboard, write_metrics, write_summary
from timm_memwrap.training.processes import Processes, processes
from timm_memwrap.training.recipes import settings_of, write_recipe
from timm_memwrap.training.task import MemoryWrapTask

__all__ = ["Fitted", "TrainingReport", "check_recipe", "fit_recipe", "open_data", "train"]

_logger = logging.getLogger(__name__)

# Settings that may change between an interruption and its resumption: they do not change the result.
_FREE = {"data": ("workers", "data_dir"), "training": ("device", "tensorboard"), "hub": None}


@dataclass(frozen=True)
class TrainingReport:
    """What a training came to.

    Args:
        directory: Folder with the model and all else.
        model: The model, with its memory.
        accuracy: Validation accuracy of the model with its memory, 0 to 1.
        plain_accuracy: Validation accuracy of the plain classifier, with `memory.mode` none.
        sampled_accuracies: Validation accuracies as in the paper, if they were asked for.
        metrics: What the explanations are worth on the validation images.
        history: A row of metrics for each epoch.
        seconds: Time of training, evaluation included.
        first: Whether this is the process that wrote the files.
    """

    directory: Path
    model: MemoryWrapModel
    accuracy: float
    plain_accuracy: float | None
    sampled_accuracies: list[float]
    metrics: ExplanationMetrics
    history: list[dict[str, Any]]
    seconds: float
    first: bool


def train(
    recipe: Recipe,
    out: str | os.PathLike,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> TrainingReport:
    """Trains the model of a recipe, and leaves it with its memory in a folder.

    The folder gets `model.safetensors`, `config.json` and `README.md`, which stock timm and the Hub take;
    `recipe.yaml`, `metrics.csv`, `summary.json`, `curves.png`; and `checkpoints/`, from which an interrupted training
    goes on. Started with `torchrun`, all processes make this call; the first writes.

    Args:
        recipe: What to train and how.
        out: The folder; made if absent.
        resume: Whether to go on with an interrupted training in it. The result is that of one without interruption, bit
            for bit with one process on a CPU in full precision (PyTorch's own bfloat16 gradients differ from run to
            run).
        overwrite: Whether to start anew in a folder that holds a training.
        progress: Whether to show progress bars; `None` for if there is a terminal.

    Raises:
        ValueError: If the recipe does not fit the data or itself, or the loss is not finite.
    """
    if progress is None:
        progress = sys.stderr.isatty()
    check_recipe(recipe)
    out = Path(out)
    with processes(recipe.training.device) as env, logging_redirect_tqdm(), _terminated_as_interrupted():
        try:
            checkpoints = _checkpoints(recipe, out, resume, overwrite, env)
            return _train(recipe, out, checkpoints, progress and env.first, env)
        except KeyboardInterrupt:
            _logger.warning("Interrupted. The last whole epoch is kept in %s; --resume goes on from there.", out)
            raise


def check_recipe(recipe: Recipe) -> None:
    """Refuses a recipe that contradicts itself, before anything is read.

    Raises:
        ValueError: If so.
    """
    check_model_config(recipe.model, recipe.memory.mode)
    if recipe.hub.push is not None:
        check_repo_id(recipe.hub.push)
    numbers = (
        ("training.epochs", recipe.training.epochs),
        ("training.val_interval", recipe.training.val_interval),
        ("training.grad_accum_steps", recipe.training.grad_accum_steps),
        ("memory.train_size", recipe.memory.train_size),
        ("memory.size", recipe.memory.size if recipe.memory.size is not None else 1),
    )
    for name, value in numbers:
        if value < 1:
            raise ValueError(f"{name}={value}. Pass 1 or more.")
    if recipe.memory.calibrate and recipe.model.temperature is not None:
        raise ValueError(
            f"model.temperature={recipe.model.temperature}, but memory.calibrate would replace it. Give one of the two."
        )
    if recipe.training.freeze_backbone and (recipe.data.mixup or recipe.data.cutmix):
        raise ValueError(
            "training.freeze_backbone trains on encodings, which Mixup cannot mix. Set mixup and cutmix 0."
        )


def open_data(recipe: Recipe, progress: bool) -> tuple[Images, Images]:
    """Opens the training and validation images of a recipe.

    Raises:
        ValueError: If there are none, or of one class only.
    """
    data = recipe.data
    mode = image_mode(in_chans_of(recipe))
    images = open_dataset(data.dataset, data.data_dir, data.train_split, mode=mode, download=data.download)
    if len(set(images.targets)) < 2:
        raise ValueError(
            f"{images.name} has images of one class only, {images.classes[images.targets[0]]!r}: there is nothing to "
            f"tell apart. Pass a folder with a folder for each class."
        )
    if data.val_split is not None:
        held_out = open_dataset(
            data.dataset, data.data_dir, data.val_split, images.classes, mode=mode, download=data.download
        )
        if data.dataset != DIGITS and data.val_split == data.train_split:
            raise ValueError(f"data.val_split and data.train_split are both {data.train_split!r}. Name two splits.")
    if data.unreadable == "skip":
        images = images.readable(progress)
    if data.val_split is None:
        images, held_out = split_off(images, data.val_fraction, data.subset_seed)
    elif data.unreadable == "skip":
        held_out = held_out.readable(progress)
    return images.subset(data.train_samples, data.subset_seed), held_out.subset(data.val_samples, data.subset_seed)


def in_chans_of(recipe: Recipe) -> int:
    """Returns the number of channels of a recipe's images."""
    return recipe.model.in_chans or (1 if recipe.data.dataset == DIGITS else 3)


def _checkpoints(recipe: Recipe, out: Path, resume: bool, overwrite: bool, env: Processes) -> Checkpoints:
    """Looks at the folder, the first process before the others, since it may change what they find."""
    folder, fixed = out / "checkpoints", settings_of(recipe, _FREE)
    checkpoints = Checkpoints(folder, fixed, resume, overwrite) if env.first else None
    env.wait()
    return checkpoints or Checkpoints(folder, fixed, resume)


@dataclass(frozen=True)
class Fitted:
    """What `fit_recipe` comes to.

    Args:
        model: The model, in evaluation mode, without a memory bank.
        images: The training images.
        held_out: The validation images.
        history: A row of metrics for each epoch.
    """

    model: nn.Module
    images: Images
    held_out: Images
    history: list[dict[str, Any]]


def fit_recipe(recipe: Recipe, out: str | os.PathLike, progress: bool, reads_memory: bool = True) -> Fitted:
    """Trains as `train` does, in one process, and stops there: no bank, no evaluation of it, no files but checkpoints.

    Goes on with what the folder holds of the same recipe, so that a second call with the same arguments only loads.

    Args:
        recipe: What to train and how.
        out: Folder for the checkpoints; made if absent.
        progress: Whether to show progress bars.
        reads_memory: Whether a head with a memory reads it. Without, it is a control: the same layers, trained and
            evaluated with nothing to read.

    Raises:
        ValueError: If the recipe does not fit the data, itself, or what is in the folder.
    """
    check_recipe(recipe)
    with processes(recipe.training.device) as env, logging_redirect_tqdm(), _terminated_as_interrupted():
        checkpoints = _checkpoints(recipe, Path(out), True, False, env)
        run, history = _fit(recipe, Path(out), checkpoints, progress, env, reads_memory)
    return Fitted(run.model, run.images, run.held_out, history)


def _fit(
    recipe: Recipe, out: Path, checkpoints: Checkpoints, progress: bool, env: Processes, reads_memory: bool = True
) -> tuple["_Run", list[dict[str, Any]]]:
    config, memory = recipe.training, recipe.memory
    if env.first:
        write_recipe(recipe, out / "recipe.yaml")
    images, held_out = open_data(recipe, progress)
    if memory.size is not None and memory.size > len(images):
        raise ValueError(
            f"memory.size={memory.size}, but there are {len(images)} training images. Pass at most that, or null for "
            f"all."
        )
    torch.manual_seed(config.seed)
    model = create_model(recipe.model, recipe.data, memory.mode, len(images.classes), in_chans_of(recipe))
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model.to(env.device, memory_format=layout)  # type: ignore[call-overload]
    run = _Run(recipe, env, model, images, held_out, progress, reads_memory)
    _logger.info(
        "%s on %d images of %d classes (%s), %d for validation, on %s.",
        recipe.model.name,
        len(images),
        len(images.classes),
        images.name,
        len(held_out),
        env.device,
    )

    writers: list[Any] = [lambda rows: write_metrics(rows, out)]
    if config.tensorboard and env.first:
        writers.append(tensorboard(out))

    def on_epoch(rows: list[dict[str, Any]]) -> None:
        for write in writers:
            write(rows)

    task, loader, validate = run.frozen() if config.freeze_backbone else run.whole()
    mixup = create_mixup(recipe.data, config.smoothing, len(images.classes))
    history = fit(task, loader, config, env, validate, mixup, checkpoints, progress, on_epoch)
    env.wait()
    _take_weights(task, config.keep, config.model_ema, checkpoints)
    model.requires_grad_(True).eval()
    return run, history


def _train(recipe: Recipe, out: Path, checkpoints: Checkpoints, progress: bool, env: Processes) -> TrainingReport:
    memory = recipe.memory
    start = time.perf_counter()
    run, history = _fit(recipe, out, checkpoints, progress, env)
    seconds = time.perf_counter() - start
    model, plain_accuracy = run.model, None
    if not isinstance(model, MemoryWrapModel):
        plain_accuracy = evaluate(model, run.eval_batches, env)["accuracy"]
        model = wrap_trained(model, recipe.model)
    run.remember(model, memory.store_images, progress)
    # All processes measure the same, so that none waits for the other through a long evaluation.
    loader = eval_loader(run.held_out, recipe.data, run.image_config)
    calibrates = memory.calibrate
    if calibrates is None:
        calibrates = memory.mode == "none" and recipe.model.temperature is None
    if calibrates:
        calibrate(model, loader, progress)
    metrics = evaluate_explanations(model, loader, progress=progress)
    sampled = []
    if memory.sampled_evaluations:
        sampled = sampled_accuracy(
            model, loader, run.memory_images, memory.train_size, memory.sampled_evaluations, recipe.training.seed
        )
    report = TrainingReport(out, model, metrics.accuracy, plain_accuracy, sampled, metrics, history, seconds, env.first)
    if env.first:
        _write(recipe, report, run.images, run.held_out)
    env.wait()
    return report


class _Run:
    """What both ways of training need: the model, the data, and how they are evaluated."""

    def __init__(
        self,
        recipe: Recipe,
        env: Processes,
        model: nn.Module,
        images: Images,
        held_out: Images,
        progress: bool,
        reads_memory: bool,
    ) -> None:
        self.recipe, self.env, self.model, self.images, self.held_out = recipe, env, model, images, held_out
        self.progress, self.reads_memory = progress, reads_memory
        self.image_config = image_config(model)
        self.memory_images = images.with_transform(create_transform(**self.image_config))
        self.eval_batches = eval_loader(held_out, recipe.data, self.image_config, env.rank, env.world_size)

    def remember(self, model: MemoryWrapModel, store_images: bool, progress: bool) -> None:
        """Builds the memory bank for the weights that the model has now."""
        memory = self.recipe.memory
        build_memory_bank(
            model,
            DataLoader(
                self.memory_images,
                batch_size=self.recipe.data.batch_size,
                num_workers=self.recipe.data.workers,
            ),
            size=memory.size,
            selection=memory.selection,
            store_images=store_images,
            seed=self.recipe.training.seed,
            progress=progress,
            class_names=self.images.classes,
            dataset_name=self.recipe.data.dataset or self.images.name,
            distributed=self.env.distributed,
        )

    def whole(self) -> tuple[ClassificationTask, DataLoader, Any]:
        """Returns what `fit` needs to train all weights."""
        recipe, env = self.recipe, self.env
        mode, size = recipe.memory.mode, recipe.memory.train_size
        loader = train_loader(self.images, recipe.data, self.image_config, mode, size, env.distributed)
        return self._task(self.model), loader, self._validate

    def frozen(self) -> tuple[ClassificationTask, DataLoader, Any]:
        """Returns what `fit` needs to train the head alone."""
        recipe, env = self.recipe, self.env
        memory, batch_size = recipe.memory, recipe.data.batch_size
        check_batch_size(len(self.images), recipe.data, memory.mode)
        head = freeze(self.model)
        known, unseen = (
            encode_images(
                head, self.model, eval_loader(part, recipe.data, self.image_config), env.device, self.progress
            )
            for part in (self.images, self.held_out)
        )
        numbered = Numbered(known)
        sampler: Any = DistributedSampler(numbered, drop_last=True) if env.distributed else None
        loader: DataLoader = DataLoader(
            numbered,
            batch_size,
            shuffle=sampler is None,
            sampler=sampler,
            drop_last=True,
            collate_fn=MemoryCollate(numbered, memory.mode, memory.train_size, batch_size),
        )
        kwargs: dict[str, Any] = {}
        if isinstance(head, FrozenMemory) and self.reads_memory:
            labels = torch.tensor(self.images.targets)
            chosen = select(
                memory.selection,
                labels,
                known.tensors[0],
                None if memory.selection == "all" else memory.size,
                recipe.training.seed,
            )
            kwargs["memory_encoding"] = known.tensors[0][chosen].to(env.device)
        mine = TensorDataset(*(tensor[env.rank :: env.world_size] for tensor in unseen.tensors))
        batches = DataLoader(mine, batch_size)
        return self._task(head), loader, lambda module: evaluate(module, batches, env, **kwargs)

    def _task(self, module: nn.Module) -> ClassificationTask:
        recipe, device = self.recipe, self.env.device
        mixed = bool(recipe.data.mixup or recipe.data.cutmix)
        criterion = {"soft_targets": True} if mixed else {"smoothing": recipe.training.smoothing}
        common: dict[str, Any] = {"criterion_kwargs": criterion, "device": device, "verbose": False}
        if not self.reads_memory:
            return ClassificationTask(WithoutMemory(module), **common)
        if recipe.memory.mode == "none":
            return ClassificationTask(module, **common)
        return MemoryWrapTask(module, queue_size=recipe.memory.train_size, **common)

    def _validate(self, model: nn.Module) -> dict[str, float]:
        """Evaluates with a bank made for these very weights, which is then dropped: training reads no bank."""
        # A control is no MemoryWrapModel but stands around one, and needs no bank.
        if isinstance(model, MemoryWrapModel):
            self.remember(model, store_images=False, progress=False)
        found = evaluate(model, self.eval_batches, self.env)
        if isinstance(model, MemoryWrapModel):
            model.memory_bank.clear()
        return found


def _take_weights(task: ClassificationTask, keep: str, ema: bool, checkpoints: Checkpoints) -> None:
    """Puts the weights that are to be saved into the model that is trained."""
    best = checkpoints.best() if keep == "best" else None
    if best is not None:
        task.load_checkpoint_state(best["state_dict_ema" if ema else "state_dict"])
    elif ema:
        task.load_checkpoint_state(task.get_checkpoint_state(ema=True)["state_dict_ema"])


def _write(recipe: Recipe, report: TrainingReport, images: Images, held_out: Images) -> None:
    """Writes all that a training leaves but checkpoints, and pushes if asked."""
    metrics, data = report.metrics, recipe.data
    plain = report.plain_accuracy
    curves = plot_curves(report.history, report.directory, report.accuracy if plain is not None else None)
    dataset = data.dataset or Path(data.data_dir or "data").name
    common = {"dataset": dataset, "split": data.val_split or "held out"}
    if recipe.hub.dataset_id is not None:
        common["dataset_id"] = recipe.hub.dataset_id
    results = [
        {"value": metrics.accuracy, **common},
        {"metric": "explanation accuracy", "value": metrics.explanation_accuracy, **common},
        {"metric": "samples a prediction", "value": metrics.support_size, **common},
    ]
    if plain is not None:
        results.insert(1, {"metric": "accuracy of the plain classifier", "value": plain, **common})
    card: dict[str, Any] = {"results": results, "description": _describe(recipe, report, images, held_out)}
    if recipe.hub.license is not None:
        card["license"] = recipe.hub.license
    if recipe.hub.dataset_id is not None:
        card["datasets"] = [recipe.hub.dataset_id]
    save_pretrained(report.model, report.directory, model_card=card, overwrite_card=True)
    write_metrics(report.history, report.directory)
    summary = {
        "model": recipe.model.name,
        "memory_mode": recipe.memory.mode,
        "train_images": len(images),
        "val_images": len(held_out),
        "classes": len(images.classes),
        "memory_size": len(report.model.memory_bank),
        "accuracy": report.accuracy,
        "plain_accuracy": plain,
        "sampled_accuracies": report.sampled_accuracies,
        "explanations": metrics.to_dict(),
        "seconds": report.seconds,
        "curves": curves.name if curves is not None else None,
        "versions": {"timm_memwrap": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
    write_summary(summary, report.directory)
    if recipe.hub.push is not None:
        commit = push_to_hub(
            report.model,
            recipe.hub.push,
            private=recipe.hub.private,
            include_images=recipe.hub.include_images,
            model_card=card,
        )
        _logger.info("Pushed to %s: %s", recipe.hub.push, commit.commit_url)


def _describe(recipe: Recipe, report: TrainingReport, images: Images, held_out: Images) -> str:
    config = recipe.training
    start = "from pretrained weights" if recipe.model.pretrained or recipe.model.pretrained_path else "from scratch"
    part = "the head alone, on a frozen backbone" if config.freeze_backbone else "all weights"
    how = {
        "none": "The plain classifier was trained and is the read head.",
        "batch": "The memory in training was the rest of the batch.",
        "sample": f"The memory in training was {recipe.memory.train_size} images drawn anew at each step.",
        "queue": f"The memory in training was the {recipe.memory.train_size} most recent encodings.",
    }[recipe.memory.mode]
    chosen = " The weights are of the best epoch by validation accuracy." if config.keep == "best" else ""
    return (
        f"Trained {start} ({part}) on {len(images)} images for {config.epochs} epochs, evaluated on {len(held_out)} "
        f"others. {how}{chosen}"
    )


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Makes a SIGTERM end a training as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
