"""Which samples to remember.

Shapes: N samples of the data, K candidates, D width of a point.
"""

import random

import torch
from torch import Tensor

from timm_memwrap.attention import unit
from timm_memwrap.balancing import balance

__all__ = ["CANDIDATES_PER_CLASS", "SELECTIONS", "find_candidates", "herd", "select"]

SELECTIONS = ("random", "balanced", "herding", "all")

# Herding looks at this many samples of a class, drawn at random, or at as many as it is to choose. Each has to be
# encoded, and all of them choose no better (hub_configs/README.md).
CANDIDATES_PER_CLASS = 100


def select(selection: str, labels: Tensor, points: Tensor, size: int | None, seed: int) -> list[int]:
    """Returns the positions of samples to remember, in increasing order: at most `size`, or all for `None`.

    They are chosen by one of `SELECTIONS` from labels `[N]`, or multi-hot `[N, C]`, and points `[N, D]`, of which
    herding compares directions.
    """
    candidates = find_candidates(selection, labels, size, seed)
    if size is None or len(candidates) <= size:
        return candidates
    return [candidates[i] for i in herd(labels[candidates], points[candidates], size)]


def find_candidates(selection: str, labels: Tensor, size: int | None, seed: int) -> list[int]:
    """Returns the positions of the samples that a choice looks at, in increasing order.

    For herding these are the ones to `herd` from, for the other `SELECTIONS` the chosen ones: at most `size`, or all
    for `None`.
    """
    if selection == "all" or size is None or size >= len(labels):
        return list(range(len(labels)))
    rng = random.Random(seed)
    if selection == "random":
        return sorted(rng.sample(range(len(labels)), size))
    if labels.ndim == 2:
        count = max(size, CANDIDATES_PER_CLASS * labels.shape[1]) if selection == "herding" else size
        return sorted(balance(labels, count, rng))
    by_class = _by_class(labels)
    counts = _shares(by_class, size)
    if selection == "herding":
        for label, count in counts.items():
            counts[label] = min(max(count, CANDIDATES_PER_CLASS), len(by_class[label])) if count else 0
    return sorted(i for label, count in counts.items() for i in rng.sample(by_class[label], count))


def herd(labels: Tensor, points: Tensor, size: int) -> list[int]:
    """Returns which of the candidates to remember, as positions among them, in increasing order.

    Args:
        labels: Labels `[K]` of the candidates, or multi-hot `[K, C]`: they are then chosen as if of one class.
        points: Points `[K, D]`. Only their directions count.
        size: Number of samples to remember, at most K.
    """
    if labels.ndim == 2:
        return sorted(_herd(unit(points), size))
    by_class = _by_class(labels)
    chosen = list[int]()
    for label, count in _shares(by_class, size).items():
        members = by_class[label]
        chosen += [members[i] for i in _herd(unit(points[members]), count)]
    return sorted(chosen)


def _herd(points: Tensor, count: int) -> list[int]:
    """Chooses rows of points of length 1 `[K, D]` one after the other, so that their mean stays close to that of all.

    This is the herding of Welling (2009), with which iCaRL (Rebuffi et al. 2017, https://arxiv.org/abs/1611.07725)
    chooses its exemplars.
    """
    mean = points.mean(dim=0)
    missing = mean.clone()  # the next point that would make both means equal
    taken = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    chosen = []
    for _ in range(count):
        best = int((points @ missing).masked_fill(taken, -torch.inf).argmax())
        taken[best] = True
        chosen.append(best)
        missing += mean - points[best]
    return chosen


def _by_class(labels: Tensor) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(i)
    return dict(sorted(groups.items()))


def _shares(by_class: dict[int, list[int]], size: int) -> dict[int, int]:
    """Divides `size` over the classes as evenly as their numbers of samples allow: no class gives more than it has."""
    shares = dict.fromkeys(by_class, 0)
    left = size
    while left:
        open_classes = [label for label in by_class if shares[label] < len(by_class[label])]
        each = max(1, left // len(open_classes))
        for label in open_classes:
            take = min(each, left, len(by_class[label]) - shares[label])
            shares[label] += take
            left -= take
    return shares
