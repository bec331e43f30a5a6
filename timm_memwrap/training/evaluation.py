"""Accuracy of a model over a data set, in one process or several."""

from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.datasets import Images
from timm_memwrap.training.processes import Processes

__all__ = ["evaluate", "sampled_accuracy"]


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, processes: Processes, **kwargs: Any) -> dict[str, float]:
    """Evaluates a model in evaluation mode, and restores its mode.

    Args:
        model: Maps inputs to logits.
        loader: Batches `(inputs, labels)`, of several processes each its own.
        processes: The processes, which all make this call.
        **kwargs: Passed to the model.

    Returns:
        `loss`, the mean cross-entropy, and `accuracy`, from 0 to 1, over the batches of all processes.
    """
    training = model.training
    model.eval()
    evaluator = ClassificationEvaluator(device=processes.device)
    for inputs, labels in loader:
        evaluator.update(model(inputs.to(processes.device), **kwargs), labels.to(processes.device))
    model.train(training)
    found = evaluator.compute(processes.distributed)
    return {"loss": found["loss"], "accuracy": found["top1"] / 100}


@torch.no_grad()
def sampled_accuracy(
    model: MemoryWrapModel, loader: DataLoader, memory: Images, size: int, draws: int, seed: int = 0
) -> list[float]:
    """Evaluates as in the paper (Section 4): each batch reads training images drawn at random.

    Args:
        model: The model; its bank is not read.
        loader: Batches `(images, labels)`.
        memory: The training images, with the evaluation transform.
        size: How many are drawn for a batch.
        draws: How often the data set is evaluated.
        seed: Seed of what is drawn.

    Returns:
        The accuracy of each evaluation, from 0 to 1.

    Raises:
        ValueError: If there are fewer images than `size`.
    """
    if size > len(memory):
        raise ValueError(f"memory.train_size={size}, but there are {len(memory)} training images to draw from.")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    accuracies = []
    for _ in range(draws):
        right = total = 0
        for images, labels in loader:
            drawn = torch.randperm(len(memory), generator=generator)[:size].tolist()
            chosen: Tensor = default_collate([memory[i][0] for i in drawn])
            logits = model(images.to(device), memory=chosen.to(device))
            right += int((logits.argmax(dim=-1).cpu() == labels).sum())
            total += len(labels)
        accuracies.append(right / total)
    return accuracies
