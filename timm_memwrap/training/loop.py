"""The training loop: one epoch after the other with timm's optimizer and scheduler, and what came of it."""

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_memwrap.training.configuration import TrainingConfig

__all__ = ["evaluate", "train"]


def train(
    model: nn.Module, loader: DataLoader, config: TrainingConfig, description: str, progress: bool = True
) -> None:
    """Trains `model` on batches `(images, labels)`, and leaves it in evaluation mode.

    Args:
        model: Any model that maps images `[B, C, H, W]` to logits; a Memory Wrap model reads the rest of the batch.
        loader: The training batches.
        config: The schedule.
        description: What the progress bar says.
        progress: Whether to show it.

    Raises:
        ValueError: If the loss is not finite.
    """
    optimizer = create_optimizer_v2(model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
    steps = len(loader)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * steps,
        warmup_t=config.warmup_epochs * steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    model.train()
    step = 0
    scheduler.step_update(step)
    with tqdm(total=config.epochs * steps, desc=description, unit="step", disable=not progress) as bar:
        for epoch in range(config.epochs):
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                if not torch.isfinite(loss):
                    raise ValueError(f"The loss is {loss.item()} in epoch {epoch}, step {step}. Lower lr={config.lr}.")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                scheduler.step_update(step)
                bar.set_postfix(epoch=f"{epoch + 1}/{config.epochs}", loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    model.eval()


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader) -> float:
    """Returns the accuracy of `model` in evaluation mode on batches `(images, labels)`, from 0 to 1."""
    model.eval()
    right = total = 0
    for images, labels in loader:
        right += int((model(images).argmax(dim=-1) == labels).sum())
        total += len(labels)
    return right / total
