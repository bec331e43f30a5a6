"""Synthetic encodings that are like real ones."""

import torch
from torch import Tensor

__all__ = ["synthetic_encodings"]

# Directions in which the samples of all classes vary, and how fast their standard deviation falls.
_RANK, _DECAY = 64, 0.5
# Standard deviations, the classes' being 1: of a sample within its class, and of what has no structure.
_WITHIN, _NOISE = 1.0, 0.3
_ROWS = 2**14


def synthetic_encodings(size: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws encodings `[M, D]` and labels `[M]`; those of other seeds are other samples of the same classes.

    What a search costs depends on how the scores are spread, so plain Gaussians, all of whose similarities are near 0,
    would not do. As the pooled output of a ReLU, encodings are at least 0, and most similarities are large: a class has
    a prototype, its samples vary around it in few directions, which the classes share and whose variance falls as a
    power, a little noise is everywhere, and what is below 0 is cut off.
    """
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    prototypes = torch.randn(classes, width, generator=shared)
    rank = min(_RANK, width)
    spectrum = torch.arange(1, rank + 1).pow(-_DECAY)
    # The variance of an entry is that of _WITHIN.
    directions = torch.randn(rank, width, generator=shared) * (_WITHIN * spectrum / spectrum.norm()).unsqueeze(1)
    labels = torch.arange(size) % classes
    encodings = torch.empty(size, width)
    for rows, part in zip(encodings.split(_ROWS), labels.split(_ROWS), strict=True):
        torch.randn(rows.shape, generator=own, out=rows)
        rows.mul_(_NOISE).add_(torch.randn(len(rows), rank, generator=own) @ directions)
        rows.add_(prototypes[part]).clamp_(min=0)
    return encodings, labels
