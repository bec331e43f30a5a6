"""The figure of a model that a job leaves: the predictions that it is least sure of, with their evidence."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from timm_memwrap.explaining import explain, plot_explanations
from timm_memwrap.model import MemoryWrapModel

__all__ = ["plot_least_sure"]

_SHOWN = 4  # images in the figure


def plot_least_sure(model: MemoryWrapModel, batches: Iterable[tuple[Tensor, Tensor]], path: Path) -> Path:
    """Draws the images that a model is least sure of, one per class, because they show the most."""
    images, labels, sure = [], [], []
    device = next(model.parameters()).device
    with torch.inference_mode():
        for x, y in batches:
            probabilities = model(x.to(device)).softmax(dim=-1).amax(dim=-1)
            # Of each batch what may be among the few at the end: a large data set does not fit into memory.
            for i in _least_sure(probabilities, y):
                images.append(x[i])
                labels.append(y[i])
                sure.append(probabilities[i])
    chosen = _least_sure(torch.stack(sure), torch.stack(labels))
    shown = torch.stack([images[i] for i in chosen]).to(device)
    plot_explanations(model, shown, explain(model, shown), labels=torch.stack([labels[i] for i in chosen]), path=path)
    return path


def _least_sure(probabilities: Tensor, labels: Tensor) -> list[int]:
    chosen: list[int] = []
    for i in probabilities.argsort(stable=True).tolist():
        if len(chosen) < _SHOWN and int(labels[i]) not in {int(labels[j]) for j in chosen}:
            chosen.append(i)
    return chosen
