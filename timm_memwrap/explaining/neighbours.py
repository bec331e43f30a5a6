"""What the nearest memory samples of each memory sample tell: a label that they do not share, or that none is near.

Shapes: M memory samples, K neighbours, B samples of a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from timm_memwrap.readouts import Index

__all__ = ["NEIGHBOURS", "Neighbours", "Support", "find_neighbours", "label_support", "out_of_place"]

# Neighbours that judge a sample; fewer in a memory that is not twice as large.
NEIGHBOURS = 50
# Scores computed at a time: 64 MB of float32.
_MOST_SCORES = 2**24
# Of so many votes, each class has one to begin with.
_FIRST = 25
# Samples whose neighbours vote at a time.
_ROWS = 2**12


class Neighbours(NamedTuple):
    """The nearest samples of each of some samples, nearest first."""

    similarities: Tensor  # [M, K], cosine similarities
    positions: Tensor  # [M, K]

    def without(self, left_out: Tensor, count: int) -> "Neighbours":
        """Returns the `count` nearest that are not left out, bool `[M, K]`.

        Where there are fewer, those left out follow, as far away as the last: a vote then gives them no weight.
        """
        order = left_out.byte().argsort(dim=1, stable=True)[:, :count]
        similarities, left_out = self.similarities.gather(1, order), left_out.gather(1, order)
        last = similarities.masked_fill(left_out, torch.inf).amin(dim=1, keepdim=True)
        similarities = torch.where(left_out & (last < torch.inf), last, similarities)
        return Neighbours(similarities, self.positions.gather(1, order))


class Support(NamedTuple):
    """How far neighbours support a label against the strongest other class, and which that is."""

    share: Tensor  # [M], between 0 and 1
    other: Tensor  # [M], a class; the label itself where no neighbour bears another


def find_neighbours(index: Index, queries: Tensor, count: int, progress: bool = False) -> Neighbours:
    """Finds the nearest samples of each sample of a memory, other than itself.

    Args:
        index: A search by cosine similarity.
        queries: The same samples as queries, `[M, D]` of length 1.
        count: How many K, less than M.
        progress: Whether to show a progress bar.
    """
    found = []
    positions = torch.arange(len(queries), device=queries.device).unsqueeze(1)
    block = max(1, _MOST_SCORES // max(1, len(queries)))
    with tqdm(total=len(queries), desc="Neighbours", unit="img", disable=not progress) as bar:
        for rows, own in zip(queries.split(block), positions.split(block), strict=True):
            found.append(index.nearest(rows, count, hidden=own))
            bar.update(len(rows))
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def label_support(neighbours: Neighbours, labels: Tensor) -> Support:
    """Computes how far the neighbours of each sample support its label.

    Neighbours vote, the nearer the more. So that a rare class does not lose for being rare, the votes of a class are
    divided by the root of its size, and each class has a few votes to begin with: that a class of few samples has no
    neighbours somewhere says little. In a second round, a vote counts as far as the voter's own label was
    supported in the first, and so does a sample in the size of its class.

    Args:
        neighbours: The nearest other samples, without duplicates, `[M, K]`.
        labels: Labels `[M]`.
    """
    first = _vote(neighbours, labels, torch.ones_like(neighbours.similarities[:, 0]))
    return _vote(neighbours, labels, first.share)


def _vote(neighbours: Neighbours, labels: Tensor, trust: Tensor) -> Support:
    """Computes the support of each label, with the votes of neighbours weighted by the trust `[M]` in their labels."""
    sizes = trust.new_zeros(int(labels.max()) + 1).index_add_(0, labels, trust)
    parts = [
        _vote_of(rows, neighbours, labels, trust, sizes)
        for rows in torch.arange(len(labels), device=labels.device).split(_ROWS)
    ]
    return Support(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _vote_of(rows: Tensor, neighbours: Neighbours, labels: Tensor, trust: Tensor, sizes: Tensor) -> Support:
    """Computes the support of the labels of some samples, `[B]`."""
    similarities, positions, own = neighbours.similarities[rows], neighbours.positions[rows], labels[rows]
    furthest, spread = similarities[:, -1:], similarities[:, :1] - similarities[:, -1:]
    # From 1 for the nearest to 0 for the furthest; 1 for all where all are as near.
    weights = torch.where(spread > 0, (similarities - furthest) / spread, torch.ones_like(similarities))
    unseen = weights.shape[1] / _FIRST
    first = unseen * weights.mean(dim=1, keepdim=True)
    theirs = labels[positions]
    weights = weights * trust[positions]
    # The votes [B, K] of the class of each neighbour.
    votes = ((theirs.unsqueeze(1) == theirs.unsqueeze(2)) * weights.unsqueeze(1)).sum(dim=2)
    votes = (votes + first) / (sizes[theirs] + unseen).sqrt()
    is_own = theirs == own.unsqueeze(1)
    for_own = (weights * is_own).sum(dim=1) + first.flatten()
    for_own = for_own / (sizes[own] - trust[rows] + unseen).sqrt()
    best, place = votes.masked_fill(is_own, 0.0).max(dim=1)
    other = torch.where(best > 0, theirs.gather(1, place.unsqueeze(1)).flatten(), own)
    return Support(for_own / (for_own + best), other)


def out_of_place(neighbours: Neighbours, support: Tensor) -> Tensor:
    """Returns which samples are unlike their class and unlike everything, bool `[M]`.

    The label of such a sample is supported less than another, and its furthest neighbour is further than Tukey's fence:
    above the third quartile by more than one and a half times the range between the quartiles.

    Args:
        neighbours: The nearest other samples, without duplicates, `[M, K]`.
        support: Support of the labels `[M]`.
    """
    distances = 1 - neighbours.similarities[:, -1]
    low, high = _quartiles(distances)
    return (distances > high + 1.5 * (high - low)) & (support < 0.5)


def _quartiles(values: Tensor) -> tuple[float, float]:
    # torch.quantile takes no more than 16 million values.
    ordered = values.sort().values
    last = len(ordered) - 1
    return float(ordered[round(last / 4)]), float(ordered[round(3 * last / 4)])
