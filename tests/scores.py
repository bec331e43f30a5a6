"""Scores of every shape that a sparsemax meets."""

import torch

from timm_memwrap.attention import MASKED

SCORES = {
    "random": torch.randn(5, 300, generator=torch.Generator().manual_seed(1)),
    "close together": torch.randn(5, 300, generator=torch.Generator().manual_seed(2)) * 1e-3,
    "far apart": torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * 1e4,
    "all equal": torch.full((3, 200), 0.3),
    "ties at the top": torch.cat([torch.ones(3, 70), torch.zeros(3, 70)], dim=1),
    # The first row needs one sample, the second all of them.
    "different supports": torch.stack([torch.arange(200.0), torch.zeros(200)]),
    "one sample": torch.randn(4, 1),
    "masked": torch.randn(4, 100).index_fill(1, torch.arange(30), MASKED),
}
