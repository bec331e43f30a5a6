"""From a recipe to a fitted model: its data, its model, the loop, and the weights that are kept."""

import logging
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data.transforms import _str_to_pil_interpolation
from timm.loss import create_classification_loss
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_memwrap._utils import check_choice
from timm_memwrap.building import build_memory_bank
from timm_memwrap.data import DIGITS, Images, data_config, image_mode, known_class_names, open_dataset, split_off
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.selection import select
from timm_memwrap.training.checkpoint import Checkpoints
from timm_memwrap.training.configuration import Recipe, check_values
from timm_memwrap.training.creation import (
    adapt_source,
    check_model_config,
    create_model,
    in_chans_of,
    load_source,
)
from timm_memwrap.training.evaluation import evaluate
from timm_memwrap.training.heads import FrozenMemory, WithoutMemory, encode_images, freeze
from timm_memwrap.training.loaders import augmented, check_batch_size, create_mixup, eval_loader, train_loader
from timm_memwrap.training.loop import fit
from timm_memwrap.training.outputs import tensorboard, write_metrics
from timm_memwrap.training.processes import Processes
from timm_memwrap.training.recipes import write_recipe
from timm_memwrap.training.task import MemoryWrapTask

__all__ = ["Fitted", "check_one_class_each", "check_recipe", "fit_recipe", "open_data"]

_logger = logging.getLogger(__name__)


def check_recipe(recipe: Recipe) -> None:
    """Raises if a recipe contradicts itself, before any data is read."""
    config, memory = recipe.training, recipe.memory
    check_values(recipe)
    check_model_config(recipe.model, memory.mode)
    check_choice("data.interpolation", recipe.data.interpolation, (None, "random", *_str_to_pil_interpolation))
    if memory.calibrate and recipe.model.temperature is not None:
        raise ValueError(
            f"model.temperature={recipe.model.temperature}, but memory.calibrate would replace it. Set one of the two."
        )
    if config.freeze_backbone and (recipe.data.mixup or recipe.data.cutmix):
        raise ValueError(
            "training.freeze_backbone trains on encodings, which Mixup cannot mix. Set data.mixup and data.cutmix to 0."
        )


def open_data(recipe: Recipe, progress: bool, source: nn.Module | None = None) -> tuple[Images, Images]:
    """Opens the training and validation images of a recipe, which continues to train the model `source`, if any."""
    data = recipe.data
    mode = image_mode(in_chans_of(recipe) if source is None else source.in_chans)  # type: ignore[arg-type]
    open_split = partial(open_dataset, data.dataset, data.data_dir, mode=mode, download=data.download)
    images = open_split(data.train_split)
    if source is not None and set(names := known_class_names(source)) == set(images.classes):
        # Labels follow the model, which keeps its classifier.
        images = open_split(data.train_split, names)
    if not images.multi_label and len(set(images.targets)) < 2:
        raise ValueError(
            f"{images.name} has images of one class only, {images.classes[images.targets[0]]!r}. Pass a folder with a "
            f"folder for each class."
        )
    held_out = None
    if data.val_split is not None:
        if data.dataset != DIGITS and data.val_split == data.train_split:
            raise ValueError(f"data.val_split and data.train_split are both {data.train_split!r}. Pass two splits.")
        held_out = open_split(data.val_split, images.classes)
    if len(images.classes) < 2:
        raise ValueError(f"{images.name} has one class only, {images.classes[0]!r}. Label images with two at least.")
    if held_out is not None and held_out.multi_label != images.multi_label:
        raise ValueError(
            f"data.val_split={data.val_split!r} and data.train_split={data.train_split!r} have labels of two kinds: "
            f"one has one class for each image, the other several. Give their CSV files the same header."
        )
    if data.unreadable == "skip":
        images, held_out = images.readable(progress), held_out and held_out.readable(progress)
    if held_out is None:
        images, held_out = split_off(images, data.val_fraction, data.subset_seed)
    return images.subset(data.train_samples, data.subset_seed), held_out.subset(data.val_samples, data.subset_seed)


def check_one_class_each(recipe: Recipe, what: str) -> None:
    """Raises if a recipe contradicts itself, or its images may have several classes, which `what` cannot take."""
    check_recipe(recipe)
    data = recipe.data
    images = open_dataset(data.dataset, data.data_dir, data.train_split, download=data.download)
    if images.multi_label:
        raise ValueError(
            f"{what} is for classes that exclude each other, but images of {images.name} may have several. Call "
            f"timm-memwrap train with them, or pass other data."
        )


def _check_labels(recipe: Recipe, images: Images) -> None:
    """Raises if a recipe cannot train with images of several classes."""
    if not images.multi_label:
        return
    if recipe.training.class_weight is not None:
        raise ValueError(
            f"training.class_weight={recipe.training.class_weight!r} weighs an image by its one class, but images of "
            f"{images.name} may have several. Leave it out."
        )
    if recipe.model.classifier == "vote":
        raise ValueError(
            f"model.classifier='vote' counts one label of each image, but images of {images.name} may have several. "
            f"Leave it out."
        )


def balanced_weight(images: Images) -> torch.Tensor:
    """Returns a weight for each class, with which all classes weigh the same: N images / (C classes * its images)."""
    counts = torch.bincount(torch.tensor(images.targets), minlength=len(images.classes))
    return len(images) / (len(counts) * counts.clamp(min=1).float())


def fit_recipe(
    recipe: Recipe,
    out: str | os.PathLike,
    processes: Processes,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    reads_memory: bool = True,
) -> "Fitted":
    """Trains the model of a recipe.

    Writes `recipe.yaml`, `metrics.csv`, TensorBoard events if enabled, and `checkpoints/`, from which it resumes: a
    second call with the same arguments only loads.

    Args:
        recipe: What to train and how.
        out: The folder; created if it does not exist.
        processes: The processes, which all make this call; the first writes.
        resume: Whether to resume an interrupted training in the folder.
        overwrite: Whether to start over in a folder that holds a training.
        progress: Whether to show progress bars.
        reads_memory: Whether a head with a memory reads it. Otherwise it is a control: the same layers, trained and
            evaluated with nothing to read.

    Raises:
        ValueError: If the recipe contradicts itself or the data, the folder holds another training, or the loss is not
            finite.
    """
    out, config, memory = Path(out), recipe.training, recipe.memory
    progress = progress and processes.first
    check_recipe(recipe)
    # The first process before the others, because it may delete what they would read.
    checkpoints = Checkpoints(out / "checkpoints", recipe, resume, overwrite) if processes.first else None
    processes.wait()
    checkpoints = checkpoints or Checkpoints(out / "checkpoints", recipe, resume)
    if processes.first:
        write_recipe(recipe, out / "recipe.yaml")
    source = load_source(recipe)
    images, held_out = open_data(recipe, progress, source)
    _check_labels(recipe, images)
    check_batch_size(recipe.data, memory, len(images), processes.world_size)
    classes = len(images.classes)
    torch.manual_seed(config.seed)
    model = create_model(recipe, classes) if source is None else adapt_source(source, recipe, images.classes)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model.to(processes.device, memory_format=layout)  # type: ignore[call-overload]
    what = f"{recipe.model.name} on {len(images)} images of {classes} classes ({images.name})"
    _logger.info("%s, %d for validation, on %s.", what, len(held_out), processes.device)
    write_events = tensorboard(out) if config.tensorboard and processes.first else None

    def on_epoch(rows: list[dict[str, Any]]) -> None:
        write_metrics(rows, out)
        if write_events is not None:
            write_events(rows)

    fitted = Fitted(recipe, processes, model, images, held_out, progress, reads_memory, checkpoints.lengths)
    task, loader, validate = fitted.head_alone() if config.freeze_backbone else fitted.whole()
    mixup = create_mixup(recipe.data, config.smoothing, classes, images.multi_label)
    fitted.history = fit(task, loader, config, processes, validate, mixup, checkpoints, progress, on_epoch)
    processes.wait()
    # Weights of the last epoch are there already, unless their average is what was evaluated.
    kept = checkpoints.read("model_best") if config.keep == "best" else None
    if kept is not None or config.model_ema:
        key = "state_dict_ema" if config.model_ema else "state_dict"
        task.load_checkpoint_state((kept or task.get_checkpoint_state(ema=True))[key])
    model.requires_grad_(True).eval()
    return fitted


@dataclass
class Fitted:
    """A model that is trained, its data, and how it is evaluated."""

    recipe: Recipe
    processes: Processes
    model: nn.Module  # after training in evaluation mode, without a memory bank
    images: Images  # for training
    held_out: Images  # for validation
    progress: bool  # whether this process shows progress bars
    reads_memory: bool  # as in `fit_recipe`
    lengths: list[list[int]] = field(default_factory=list)  # as in `Checkpoints`
    history: list[dict[str, Any]] = field(default_factory=list)  # a row of metrics for each epoch

    def __post_init__(self) -> None:
        self.data_config = data_config(self.model)
        # This process's batches of the validation images.
        self.eval_batches = self.batches(self.held_out, self.processes.rank, self.processes.world_size)

    def batches(self, images: Images, rank: int = 0, world_size: int = 1) -> DataLoader:
        """Makes batches of images in order, as for evaluation."""
        return eval_loader(images, self.recipe.data, self.data_config, rank, world_size)

    def remember(self, model: MemoryWrapModel, store_images: bool, progress: bool) -> None:
        """Builds the memory bank for the weights that the model has now."""
        recipe = self.recipe
        build_memory_bank(
            model,
            self.batches(self.images),
            size=recipe.memory.size,
            selection=recipe.memory.selection,
            store_images=store_images,
            seed=recipe.training.seed,
            progress=progress,
            class_names=self.images.classes,
            dataset_name=recipe.data.dataset or self.images.name,
            distributed=self.processes.distributed,
        )

    def whole(self) -> tuple[ClassificationTask, DataLoader, Any]:
        """Returns what `fit` needs to train all weights."""
        recipe, distributed = self.recipe, self.processes.distributed
        images = augmented(self.images, recipe.data, self.data_config)
        loader = train_loader(images, recipe.data, recipe.memory, recipe.data.workers, distributed)
        return self._task(self.model), loader, self._validate

    def head_alone(self) -> tuple[ClassificationTask, DataLoader, Any]:
        """Returns what `fit` needs to train the head on encodings."""
        recipe, memory, processes = self.recipe, self.recipe.memory, self.processes
        head = freeze(self.model)
        known, unseen = (
            encode_images(head, self.model, self.batches(part), processes.device, self.progress)
            for part in (self.images, self.held_out)
        )
        loader = train_loader(known, recipe.data, memory, distributed=processes.distributed)
        kwargs: dict[str, Any] = {}
        if isinstance(head, FrozenMemory) and self.reads_memory:
            encodings, size = known.tensors[0], None if memory.selection == "all" else memory.size
            chosen = select(memory.selection, self.images.labels, encodings, size, recipe.training.seed)
            kwargs["memory"] = encodings[chosen].to(processes.device)
        mine = TensorDataset(*(tensor[processes.rank :: processes.world_size] for tensor in unseen.tensors))
        batches = DataLoader(mine, recipe.data.batch_size)
        several = self.images.multi_label
        return self._task(head), loader, lambda module: evaluate(module, batches, processes, several, **kwargs)

    def _task(self, module: Any) -> ClassificationTask:
        data, memory = self.recipe.data, self.recipe.memory
        mixes, smoothing = bool(data.mixup or data.cutmix), self.recipe.training.smoothing
        common: dict[str, Any] = {"device": self.processes.device, "verbose": False}
        if self.recipe.training.class_weight == "balanced":
            # timm's own has no weights for classes that exclude each other. Mixup has smoothed the labels already.
            weight = balanced_weight(self.images)
            common["criterion"] = nn.CrossEntropyLoss(weight, label_smoothing=0.0 if mixes else smoothing)
        else:
            soft = {"soft_targets": True} if mixes else {"smoothing": smoothing}
            common["criterion"] = create_classification_loss(multi_label=self.images.multi_label, **soft)
        if not self.reads_memory:
            return ClassificationTask(WithoutMemory(module), **common)
        if memory.mode == "none":
            return ClassificationTask(module, **common)
        return MemoryWrapTask(module, queue_size=memory.train_size, **common)

    def _validate(self, model: nn.Module) -> dict[str, float]:
        """Evaluates with a bank of these weights, which is then cleared."""
        # A control is not a MemoryWrapModel but has one inside, and needs no bank.
        if not isinstance(model, MemoryWrapModel):
            return evaluate(model, self.eval_batches, self.processes, self.images.multi_label)
        self.remember(model, store_images=False, progress=False)
        found = evaluate(model, self.eval_batches, self.processes, self.images.multi_label)
        model.memory_bank.clear()
        return found
