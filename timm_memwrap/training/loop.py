"""The training loop, made of timm's optimizer, scheduler, task and checkpoints."""

import logging
import math
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler, dispatch_clip_grad
from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_memwrap.training.checkpoint import EXTENSION, SafetensorsSaver, read_state, restore
from timm_memwrap.training.configuration import TrainingConfig
from timm_memwrap.training.processes import Processes
from timm_memwrap.training.recipes import first_difference

__all__ = ["Checkpoints", "fit"]

_logger = logging.getLogger(__name__)

Row = dict[str, Any]

# Seconds between two looks at the loss for the progress bar: each waits for the device.
_REFRESH = 0.5


class Checkpoints:
    """Where a training keeps what it needs to go on.

    Args:
        folder: The folder; made if absent.
        recipe: The recipe as a dict, without what does not change the result.
        resume: Whether to go on from what is there.
        overwrite: Whether to start anew, and leave nothing of what is there.

    Raises:
        ValueError: If there is a training already and neither is set, or it is of another recipe.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], resume: bool, overwrite: bool = False) -> None:
        self.folder, self.recipe = folder, recipe
        last = folder / f"last{EXTENSION}"
        self.state: dict[str, Any] | None = None
        if resume and overwrite:
            raise ValueError("Both resume and overwrite are set. Go on with the training that is there, or start anew.")
        if overwrite:
            for file in folder.glob(f"*{EXTENSION}"):
                file.unlink()
        if last.exists():
            if not resume:
                raise ValueError(
                    f"{str(folder.parent)!r} holds a training already. Pass --resume to go on with it, --overwrite to "
                    f"start anew, or another --out."
                )
            self.state = read_state(last)
            self._check_recipe(self.state["recipe"])
        folder.mkdir(parents=True, exist_ok=True)

    def _check_recipe(self, before: dict[str, Any]) -> None:
        difference = first_difference(before, self.recipe)
        if difference is not None:
            name, old, value = difference
            raise ValueError(
                f"The training in {str(self.folder.parent)!r} has {name}={old!r}, now it is {value!r}. Resume with the "
                f"same recipe, or start anew in another --out."
            )

    def best(self) -> dict[str, Any] | None:
        """Reads the checkpoint of the best epoch, if epochs were ranked."""
        path = self.folder / f"model_best{EXTENSION}"
        return read_state(path) if path.exists() else None


def fit(
    task: ClassificationTask,
    loader: DataLoader,
    config: TrainingConfig,
    processes: Processes,
    validate: Callable[[nn.Module], dict[str, float]],
    mixup: Mixup | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
    on_epoch: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Trains a task's model, which is then in training mode.

    All randomness of an epoch comes from a seed made of `config.seed`, the epoch and the process, so that a training
    that goes on from a checkpoint does what one without interruption does.

    Args:
        task: The task, on its device.
        loader: Batches `(images, labels, extra)`; `extra` is passed to the task by name.
        config: The schedule.
        processes: The processes, which all make this call.
        validate: Evaluates a model, and returns `loss` and `accuracy`.
        mixup: Mixes each batch.
        checkpoints: Where to keep checkpoints, and to go on from.
        progress: Whether to show a progress bar.
        on_epoch: Called on the first process after each epoch with the rows so far.

    Returns:
        A row of metrics for each epoch.

    Raises:
        ValueError: If the loss is not finite, or the schedule does not fit.
    """
    batches = len(loader)
    steps = math.ceil(batches / config.grad_accum_steps)
    module = unwrap_model(task.get_trainable_module())
    optimizer = create_optimizer_v2(
        module,
        opt=config.opt,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=config.layer_decay,
    )
    scheduler = _scheduler(optimizer, config, steps)
    scaler = NativeScaler(processes.device.type) if config.amp and config.amp_dtype == "float16" else None
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    if config.torchcompile:
        task.compile()
    if processes.distributed:
        ids = [processes.device.index] if processes.device.type == "cuda" else None
        task.prepare_distributed(device_ids=ids)

    history: list[Row] = []
    state = checkpoints.state if checkpoints is not None else None
    if state is not None:
        restore(state, task, optimizer)
        if scaler is not None:
            scaler.load_state_dict(state["amp_scaler"])
        history += state["history"]
        _logger.info("Going on after epoch %d of %d.", len(history), config.epochs)
    saver = None
    if checkpoints is not None and processes.first:
        saver = SafetensorsSaver(
            history=history,
            recipe=checkpoints.recipe,
            model=module,
            optimizer=optimizer,
            amp_scaler=scaler,
            task=task,
            checkpoint_dir=str(checkpoints.folder),
            max_history=1,
        )
        if state is not None:
            saver.load_state_dict(state["saver"])

    with tqdm(
        total=config.epochs * batches,
        initial=len(history) * batches,
        desc="Training",
        unit="step",
        disable=not progress,
    ) as bar:
        for epoch in range(len(history), config.epochs):
            _seed(config.seed, epoch, processes.rank)
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)
            row: Row = {"epoch": epoch + 1}
            row |= _train_epoch(task, loader, config, processes, optimizer, scheduler, scaler, mixup, epoch, bar)
            last = epoch + 1 == config.epochs
            if last or (epoch + 1) % config.val_interval == 0:
                evaluated = task.get_eval_model(ema=config.model_ema)
                assert evaluated is not None
                # By the model itself: a compiled or distributed shell has no memory bank.
                found = validate(_module(evaluated))
                row |= {"val_loss": found["loss"], "val_accuracy": found["accuracy"]}
            history.append(row)
            _logger.info("%s", describe(row, config.epochs))
            if processes.first and on_epoch is not None:
                on_epoch(history)
            if saver is not None:
                saver.save_checkpoint(epoch, row.get("val_accuracy"))
            processes.wait()
    return history


def describe(row: Row, epochs: int) -> str:
    """Says a row of metrics in one line."""
    text = f"Epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.4f}"
    if "train_accuracy" in row:
        text += f"  accuracy {row['train_accuracy']:.2%}"
    if "val_accuracy" in row:
        text += f"  validation: loss {row['val_loss']:.4f}  accuracy {row['val_accuracy']:.2%}"
    return f"{text}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} img/s"


def _module(model: nn.Module) -> nn.Module:
    module = unwrap_model(model)
    return getattr(module, "_orig_mod", module)


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int) -> Any:
    if config.sched == "plateau":
        raise ValueError("training.sched='plateau' needs a metric in each step. Pass another, e.g. 'cosine'.")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            decay_epochs=config.decay_epochs,
            decay_milestones=config.decay_milestones,
            decay_rate=config.decay_rate,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"training.sched={config.sched!r} does not fit: {error}") from error
    return scheduler


def _seed(seed: int, epoch: int, rank: int) -> None:
    state = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def _autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager:
    if not config.amp:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype))


def _train_epoch(
    task: ClassificationTask,
    loader: DataLoader,
    config: TrainingConfig,
    processes: Processes,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scaler: NativeScaler | None,
    mixup: Mixup | None,
    epoch: int,
    bar: tqdm,
) -> Row:
    task.train()
    batches, every = len(loader), config.grad_accum_steps
    steps = math.ceil(batches / every)
    device = processes.device
    total_loss = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    right, seen = torch.zeros((), dtype=torch.long, device=device), 0
    start = refreshed = time.perf_counter()
    if scheduler is not None:
        scheduler.step_update(epoch * steps)
    for i, (inputs, labels, extra) in enumerate(loader):
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        extra = {name: tensor.to(device, non_blocking=True) for name, tensor in extra.items()}
        images, targets = mixup(inputs, labels) if mixup is not None else (inputs, labels)
        step = epoch * steps + i // every
        first = i // every * every
        in_step = min(every, batches - first)
        whole = i + 1 == first + in_step
        with task.no_sync() if not whole else nullcontext():
            with _autocast(config, device):
                result = task(images, targets, **extra)
            loss = result["loss"]
            if not torch.isfinite(loss):
                raise ValueError(
                    f"The loss is {loss.item()} in epoch {epoch + 1}, batch {i + 1} of {batches}. Lower "
                    f"training.lr={config.lr}, or set training.clip_grad. The last whole epoch is kept."
                )
            _backward(loss / in_step, whole, task, config, optimizer, scaler)
        if whole:
            optimizer.zero_grad()
            task.update_ema(step=step + 1)
            if scheduler is not None:
                scheduler.step_update(step + 1)
        total_loss += loss.detach() * len(inputs)
        if mixup is None:
            right += (result["output"].argmax(dim=-1) == labels).sum()
        seen += len(inputs)
        bar.update()
        now = time.perf_counter()
        if not bar.disable and now - refreshed > _REFRESH:
            refreshed = now
            shown = {"loss": f"{total_loss.item() / seen:.3f}"}
            if mixup is None:
                shown["accuracy"] = f"{right.item() / seen:.1%}"
            shown["img/s"] = f"{seen * processes.world_size / (now - start):.0f}"
            bar.set_postfix({"epoch": f"{epoch + 1}/{config.epochs}", **shown}, refresh=False)
    seconds = time.perf_counter() - start
    sums = torch.stack([total_loss, right.to(total_loss.dtype), total_loss.new_tensor(float(seen))])
    if processes.distributed:
        torch.distributed.all_reduce(sums)
    loss_sum, right_sum, count = sums.tolist()
    row: Row = {"lr": max(group["lr"] for group in optimizer.param_groups), "train_loss": loss_sum / count}
    if mixup is None:
        row["train_accuracy"] = right_sum / count
    return row | {"seconds": seconds, "images_per_second": count / seconds}


def _backward(
    loss: Tensor,
    whole: bool,
    task: ClassificationTask,
    config: TrainingConfig,
    optimizer: torch.optim.Optimizer,
    scaler: NativeScaler | None,
) -> None:
    """Adds to the gradients, and steps once the batches of a step are there."""
    if scaler is not None:
        scaler(loss, optimizer, config.clip_grad, parameters=task.get_clip_parameters(), need_update=whole)
        return
    loss.backward()
    if whole:
        if config.clip_grad is not None:
            dispatch_clip_grad(task.get_clip_parameters(), config.clip_grad)
        optimizer.step()
