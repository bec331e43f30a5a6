"""Synthetic encodings that are like real ones."""

import torch
from torch import Tensor

__all__ = ["synthetic_encodings"]

# Chosen so that what a read depends on comes near that of 1,000 encodings of CIFAR-10 by an EfficientNet trained on
# ImageNet: cosines within a class (real 0.43), to other classes (0.37) and to the nearest sample (0.64), half of the
# entries 0, and how many samples are read: 4 at scale 10, 29 at scale 1, 21 in a reconstruction.
# Standard deviations: of a feature, of a feature by class, of a sample within its class, and without structure.
_FEATURE, _CLASS, _WITHIN, _NOISE = 0.6, 0.45, 1.0, 0.3
# Directions in which samples vary, how fast their standard deviation falls, and how long the tail of a feature is.
_RANK, _DECAY, _TAIL = 256, 0.5, 1.5
_ROWS = 2**14


def synthetic_encodings(size: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws encodings `[M, D]` and labels `[M]`; those of other seeds are other samples of the same classes.

    What a search costs depends on how the scores are spread, and those of plain Gaussians are all alike. As the pooled
    output of a ReLU, encodings are at least 0. Each class has a prototype; its samples vary around it in directions
    that the classes share, with variances that fall as a power; a little noise is in every feature; and what is below 0
    is cut off.
    """
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    prototypes = _FEATURE * torch.randn(width, generator=shared)
    prototypes = prototypes + _CLASS * torch.randn(classes, width, generator=shared)
    spectrum = torch.arange(1, min(_RANK, width) + 1).pow(-_DECAY)
    scales = _WITHIN * spectrum / spectrum.norm()
    directions = torch.randn(len(scales), width, generator=shared) * scales.unsqueeze(1)
    labels = torch.arange(size) % classes
    encodings = torch.empty(size, width)
    for rows, part in zip(encodings.split(_ROWS), labels.split(_ROWS), strict=True):
        torch.randn(rows.shape, generator=own, out=rows)
        rows.mul_(_NOISE).add_(torch.randn(len(rows), len(scales), generator=own) @ directions)
        rows.add_(prototypes[part]).clamp_(min=0).pow_(_TAIL)
    return encodings, labels
