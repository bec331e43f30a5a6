"""Which samples to remember."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SELECTIONS", "needs_encodings", "select"]


def select(selection: str, labels: Tensor, encodings: Tensor | None, size: int | None, seed: int) -> list[int]:
    """Returns the positions of samples to remember, in increasing order.

    They are chosen by one of `SELECTIONS` from labels `[N]` and, where it needs them, encodings `[N, D]`: at most
    `size`, or all for `None`.
    """
    if size is None or size >= len(labels):
        return list(range(len(labels)))
    return sorted(_SELECTORS[selection](labels, encodings, size, random.Random(seed)))


def needs_encodings(selection: str) -> bool:
    """Returns whether the choice can only be made once all samples are encoded."""
    return selection == "kmeans"


def _random(labels: Tensor, encodings: Tensor | None, size: int, rng: random.Random) -> list[int]:
    return rng.sample(range(len(labels)), size)


def _balanced(labels: Tensor, encodings: Tensor | None, size: int, rng: random.Random) -> list[int]:
    by_class = _by_class(labels)
    return [i for label, count in _shares(by_class, size).items() for i in rng.sample(by_class[label], count)]


def _kmeans(labels: Tensor, encodings: Tensor | None, size: int, rng: random.Random) -> list[int]:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("selection='kmeans' needs scikit-learn: pip install 'timm-memwrap[kmeans]'") from error
    assert encodings is not None
    by_class = _by_class(labels)
    chosen = []
    for label, count in _shares(by_class, size).items():
        members = by_class[label]
        points = encodings[torch.tensor(members)].double()
        if count == len(members):
            chosen += members
            continue
        if count == 0:
            continue
        kmeans = KMeans(count, n_init=1, random_state=rng.randrange(2**31)).fit(points.numpy())
        centres = torch.from_numpy(kmeans.cluster_centers_)
        distances = torch.cdist(centres, points)
        free = torch.ones(len(members), dtype=torch.bool)
        # Two centres may share their nearest sample (equal encodings); the second takes its nearest free one.
        for row in distances:
            nearest = int(row.masked_fill(~free, float("inf")).argmin())
            free[nearest] = False
            chosen.append(members[nearest])
    return chosen


_SELECTORS: dict[str, Callable[[Tensor, Tensor | None, int, random.Random], list[int]]] = {
    "random": _random,
    "balanced": _balanced,
    "kmeans": _kmeans,
}
SELECTIONS = (*_SELECTORS, "all")


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
