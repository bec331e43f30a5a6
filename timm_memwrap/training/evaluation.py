"""Measures the accuracy of a model over a data set, in one process or several."""

from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from timm_memwrap._utils import evaluating
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.processes import Processes

__all__ = ["evaluate", "sampled_accuracy"]


def evaluate(model: nn.Module, loader: Any, processes: Processes, **kwargs: Any) -> dict[str, float]:
    """Returns the mean cross-entropy `loss` and the `accuracy`, from 0 to 1, over the batches of all processes."""
    evaluator = ClassificationEvaluator(device=processes.device)
    with evaluating(model):
        for inputs, labels in loader:
            evaluator.update(model(inputs.to(processes.device), **kwargs), labels.to(processes.device))
    found = evaluator.compute(processes.distributed)
    return {"loss": found["loss"], "accuracy": found["top1"] / 100}


def sampled_accuracy(
    model: MemoryWrapModel, loader: DataLoader, memory: Any, size: int, draws: int, seed: int = 0
) -> list[float]:
    """Evaluates `draws` times by the paper's protocol (Section 4): each batch reads `size` images drawn at random."""
    if size > len(memory):
        raise ValueError(f"memory.train_size={size}, but there are {len(memory)} training images to draw from.")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)

    class Drawing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            drawn = torch.randperm(len(memory), generator=generator)[:size].tolist()
            return model(images, memory=default_collate([memory[i][0] for i in drawn]).to(device))

    with evaluating(model):
        return [evaluate(Drawing(), loader, Processes(device))["accuracy"] for _ in range(draws)]
