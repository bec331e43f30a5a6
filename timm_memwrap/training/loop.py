"""The training loop, made of timm's optimizer, scheduler, task and checkpoints."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad, random_seed
from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from timm_memwrap.labels import present
from timm_memwrap.training.checkpoint import Checkpoints, SafetensorsSaver
from timm_memwrap.training.configuration import TrainingConfig
from timm_memwrap.training.processes import Processes

__all__ = ["fit"]

_logger = logging.getLogger(__name__)

Row = dict[str, Any]


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
    """Trains a task's model on batches `(images, labels, extra)`, and returns a row of metrics for each epoch.

    All randomness of an epoch comes from a seed made of `config.seed`, the epoch and the process, so that a resumed
    training does what one without interruption does. The first process calls `on_epoch` with the rows so far.
    """
    loop = _Loop(task, loader, config, processes, mixup)
    history: list[Row] = []
    saver = loop.resume(checkpoints, history) if checkpoints is not None else None
    total, done = config.epochs * len(loader), len(history) * len(loader)
    bar = tqdm(total=total, initial=done, desc="Training", unit="step", disable=not progress, mininterval=0.5)
    with logging_redirect_tqdm(), bar:
        for epoch in range(len(history), config.epochs):
            row = loop.train(epoch, bar)
            if epoch + 1 == config.epochs or (epoch + 1) % config.val_interval == 0:
                # The model itself, because a compiled or distributed one around it has no memory bank.
                module = unwrap_model(task.get_eval_model(ema=config.model_ema))
                found = validate(getattr(module, "_orig_mod", module))
                row |= {f"val_{name}": value for name, value in found.items()}
            history.append(row)
            _logger.info("%s", _describe(row, config.epochs))
            if processes.first and on_epoch is not None:
                on_epoch(history)
            if saver is not None:
                saver.save_checkpoint(epoch, row.get("val_mean_average_precision", row.get("val_accuracy")))
            processes.wait()
    return history


class _Loop:
    """The optimizer, scheduler and scaler of a training, and its epochs."""

    def __init__(
        self,
        task: ClassificationTask,
        loader: DataLoader,
        config: TrainingConfig,
        processes: Processes,
        mixup: Mixup | None,
    ) -> None:
        self.task, self.loader, self.config = task, loader, config
        self.processes, self.mixup = processes, mixup
        device = processes.device
        self.module = unwrap_model(task.get_trainable_module())
        try:
            self.optimizer = create_optimizer_v2(self.module, **optimizer_kwargs(config))
        except ValueError as error:
            raise ValueError(f"training.opt={config.opt!r} is not valid: {error}") from error
        self.steps = math.ceil(len(loader) / config.grad_accum_steps)  # of an epoch
        self.scheduler = _scheduler(self.optimizer, config, self.steps)
        # Disabled, it leaves losses and steps as they are.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        if config.torchcompile:
            task.compile()
        if processes.distributed:
            task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)

    def resume(self, checkpoints: Checkpoints, history: list[Row]) -> SafetensorsSaver | None:
        """Restores the state of a checkpoint and adds its rows to `history`; returns the first process's saver."""
        state = checkpoints.state
        if state is not None:
            self.task.load_checkpoint_state(state["state_dict"], state.get("task_state"))
            if "state_dict_ema" in state:
                self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["amp_scaler"])
            history += state["history"]
            _logger.info("Resuming after epoch %d of %d.", len(history), self.config.epochs)
        if not self.processes.first:
            return None
        saver = SafetensorsSaver(
            history=history,
            recipe=checkpoints.recipe,
            lengths=checkpoints.lengths,
            model=self.module,
            optimizer=self.optimizer,
            amp_scaler=self.scaler,
            task=self.task,
            checkpoint_dir=str(checkpoints.folder),
            max_history=1,
        )
        if state is not None:
            saver.load_state_dict(state["saver"])
        return saver

    def train(self, epoch: int, bar: tqdm) -> Row:
        """Trains for an epoch, and returns its row of metrics."""
        config, processes, device = self.config, self.processes, self.processes.device
        random_seed(int(np.random.SeedSequence([config.seed, epoch, processes.rank]).generate_state(1)[0]))
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(epoch)
        self.task.train()
        # Sums of losses and of correct predictions; they stay on the device.
        sums = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        seen = 0
        start = time.perf_counter()
        if self.scheduler is not None:
            self.scheduler.step_update(epoch * self.steps)
        for i, (inputs, labels, extra) in enumerate(self.loader):
            inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            extra = {name: tensor.to(device, non_blocking=True) for name, tensor in extra.items()}
            loss, output = self._step(epoch, i, inputs, labels, extra)
            sums[0] += loss * len(inputs)
            if self.mixup is None:
                sums[1] += _right(output, labels)
            seen += len(inputs)
            # Only as often as the bar is drawn, because metrics and checks wait for the device.
            drawn = bar.update()
            if drawn or device.type == "cpu" or i + 1 == len(self.loader):
                self._check_loss(float(sums[0]), epoch, i)
            if drawn:
                shown = self._metrics(sums.tolist(), seen)
                bar.set_postfix({"epoch": epoch + 1, **{k[6:]: f"{v:.3f}" for k, v in shown.items()}})
        seconds = time.perf_counter() - start
        totals = torch.cat([sums, sums.new_tensor([seen])])
        if processes.distributed:
            torch.distributed.all_reduce(totals)
        *found, count = totals.tolist()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        row = {"epoch": epoch + 1, "lr": lr, **self._metrics(found, count)}
        return row | {"seconds": seconds, "images_per_second": count / seconds}

    def _metrics(self, sums: list[float], count: float) -> Row:
        loss, correct = sums
        accuracy = {} if self.mixup is not None else {"train_accuracy": correct / count}
        return {"train_loss": loss / count, **accuracy}

    def _check_loss(self, loss: float, epoch: int, i: int) -> None:
        """Raises a `ValueError` if the sum of losses is not finite, before weights of this epoch are kept."""
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss is {loss} in epoch {epoch + 1}, batch {i + 1} of {len(self.loader)}. Lower "
                f"training.lr={self.config.lr}, or set training.clip_grad. The last complete epoch is kept."
            )

    def _step(
        self, epoch: int, i: int, inputs: Tensor, labels: Tensor, extra: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of a batch, steps with the last batch of a step, and returns loss and output."""
        task, config, batches = self.task, self.config, len(self.loader)
        first = i - i % config.grad_accum_steps
        in_step = min(config.grad_accum_steps, batches - first)
        is_last = i + 1 == first + in_step
        images, targets = self.mixup(inputs, labels) if self.mixup is not None else (inputs, labels)
        with nullcontext() if is_last else task.no_sync():
            with torch.autocast(inputs.device.type, dtype=getattr(torch, config.amp_dtype), enabled=config.amp):
                result = task(images, targets, **extra)
            loss = result["loss"]
            self.scaler.scale(loss / in_step).backward()
        if is_last:
            if config.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                dispatch_clip_grad(task.get_clip_parameters(), config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            step = epoch * self.steps + i // config.grad_accum_steps + 1
            task.update_ema(step=step)
            if self.scheduler is not None:
                self.scheduler.step_update(step)
        return loss.detach(), result["output"].detach()


def _right(output: Tensor, labels: Tensor) -> Tensor:
    """Returns how many predictions are right; of several classes each counts for its share."""
    if labels.ndim == 2:
        return (present(output) == labels.bool()).float().mean(dim=1).sum()
    return (output.argmax(dim=-1) == labels).sum()


def _describe(row: Row, epochs: int) -> str:
    text = f"Epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.4f}"
    if "train_accuracy" in row:
        text += f"  accuracy {row['train_accuracy']:.2%}"
    if "val_accuracy" in row:
        text += f"  validation: loss {row['val_loss']:.4f}  accuracy {row['val_accuracy']:.2%}"
    if "val_mean_average_precision" in row:
        text += f"  mAP {row['val_mean_average_precision']:.2%}"
    return f"{text}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} img/s"


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int) -> Any:
    try:
        if config.sched == "plateau":
            raise ValueError("it needs a metric in each step. Pass another, e.g. 'cosine'.")
        options = scheduler_kwargs(config) | {"step_on_epochs": False, "updates_per_epoch": steps}
        return create_scheduler_v2(optimizer, **options)[0]
    except (AssertionError, ValueError) as error:
        raise ValueError(f"training.sched={config.sched!r} is not valid: {error}") from error
