"""Samples that show the same picture: they are nearer than samples ever are by chance.

Shapes: N samples, M memory samples, K neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from timm_memwrap.explaining.neighbours import Neighbours

__all__ = ["Sameness", "keep_one"]

# The ball around a sample that reaches to the furthest of its 50 neighbours holds 50. If they are spread evenly, a
# 65,536th of its volume holds one in 1 of 1,300 cases; what is nearer is the same picture.
_HALVINGS = 16
# Cosine distance of two encodings of one picture, up to rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Sameness:
    """How near samples are that show the same picture, as a share of the distance of the furthest neighbour.

    It depends on the network and the data how fast a ball of neighbours fills as it grows, but not on copies: it is
    measured between half of the neighbours and all of them.
    """

    share: float

    @classmethod
    def of(cls, neighbours: Neighbours) -> "Sameness":
        """Measures it on the neighbours of all samples of a memory, `[M, K]`."""
        distances = _distances(neighbours.similarities)
        half, furthest = distances[:, (distances.shape[1] - 1) // 2], distances[:, -1].clamp(min=_ROUNDING)
        # Each halving of the volume brings the distance down by the same factor.
        return cls(float((half / furthest).median()) ** _HALVINGS)

    def closeness(self, similarities: Tensor, furthest: Tensor) -> Tensor:
        """Computes how near samples are: 1 for a copy, 0 for as far as the furthest neighbour.

        Args:
            similarities: Cosine similarities `[N, K]`.
            furthest: That of the furthest neighbour, `[N]`.
        """
        return 1 - _distances(similarities) / _distances(furthest).clamp(min=_ROUNDING).unsqueeze(1)

    def same(self, similarities: Tensor, furthest: Tensor) -> Tensor:
        """Returns which samples show the same picture, bool `[N, K]`. Arguments are as in `closeness`."""
        return _distances(similarities) <= (self.share * _distances(furthest)).clamp(min=_ROUNDING).unsqueeze(1)


def keep_one(neighbours: Neighbours, same: Tensor, support: Tensor) -> Tensor:
    """Chooses of samples that show the same picture which to keep: that with the best supported label, or the first.

    Args:
        neighbours: The nearest other samples, `[M, K]`.
        same: Which of them show the same picture, bool `[M, K]`.
        support: Support of the labels `[M]`.

    Returns:
        For each sample the position of the one to keep in its place, `[M]`: its own if that is itself.
    """
    rows, columns = same.nonzero(as_tuple=True)
    others = neighbours.positions[rows, columns]
    pairs = torch.cat([torch.stack([rows, others]), torch.stack([others, rows])], dim=1)
    group = torch.arange(len(support), device=support.device)
    # Each sample takes the smallest number that it and its copies have, until none changes.
    while True:
        smaller = group.scatter_reduce(0, pairs[0], group[pairs[1]], "amin")
        if torch.equal(smaller, group):
            break
        group = smaller
    order = support.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    best = torch.full_like(order, len(order)).scatter_reduce(0, group, rank, "amin")
    return order[best[group]]


def _distances(similarities: Tensor) -> Tensor:
    return (1 - similarities).clamp(min=0)
