"""Samples that show the same picture: they are nearer than samples ever are by chance.

Shapes: N samples, M memory samples, K neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from timm_memwrap.explaining.neighbours import Neighbours

__all__ = ["Sameness", "keep_one"]

# The ball around a sample that reaches to the furthest of 50 neighbours holds 50. If they are spread evenly, a 65,536th
# of its volume holds one in 1 of 1,300 cases; what is nearer is the same picture.
_HALVINGS = 16
# Where samples are nowhere near each other (features of very many dimensions), a copy is still less than half as far.
_MOST = 0.5
# Cosine distance of two encodings of one picture, up to rounding.
_ROUNDING = 1e-6
# Neighbours that tell how fast a ball fills.
_ENOUGH = 4


@dataclass(frozen=True)
class Sameness:
    """How near samples are that show the same picture, as a share of the distance of one of their neighbours.

    That neighbour is as far away as half of the class reaches, and at most the last of all: beyond its class, all is
    far from a sample, and its whole class would look like copies. It depends on the network and the data how fast a
    ball of neighbours fills as it grows, but not on copies, if half of the neighbours are measured against all of them.

    Args:
        share: The share of the distance.
        reach: Which of the neighbours it is, by class; 0 for the nearest.
    """

    share: float
    reach: Tensor

    @classmethod
    def of(cls, neighbours: Neighbours, labels: Tensor, most: int) -> "Sameness":
        """Measures it on the neighbours of all samples of a memory, `[M, K]`, with labels `[M]`.

        Args:
            most: The last of the neighbours that may be measured against, at most K.
        """
        count = ((labels.bincount() - 1) // 2).clamp(1, most)
        reach, distances = count[labels].unsqueeze(1), _distances(neighbours.similarities)
        half = (reach + 1) // 2
        far, near = distances.gather(1, reach - 1), distances.gather(1, half - 1)
        measured = (reach >= _ENOUGH) & (far > _ROUNDING)
        if not bool(measured.any()):
            return cls(0.0, count - 1)
        # Each halving of the volume brings the distance down by the same factor.
        halving = (near / far)[measured].log() / (reach / half)[measured].log2()
        return cls(min(_MOST, float((_HALVINGS * halving.median()).exp())), count - 1)

    def furthest(self, neighbours: Neighbours, labels: Tensor) -> Tensor:
        """Returns the similarities `[N]` to measure against, of samples that look like those of classes `[N]`."""
        return neighbours.similarities.gather(1, self.reach[labels].unsqueeze(1)).flatten()

    def closeness(self, similarities: Tensor, furthest: Tensor) -> Tensor:
        """Computes how near samples are: 1 for a copy, 0 for as far as what is measured against.

        Args:
            similarities: Cosine similarities `[N, K]`.
            furthest: Those to measure against, `[N]`.
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
