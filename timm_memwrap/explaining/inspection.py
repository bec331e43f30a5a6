"""Finds what is wrong with the samples of a memory by their nearest neighbours alone: no classifier is asked.

A classifier that was trained on a wrong label agrees with it. Shapes: M memory samples, B inputs, K neighbours.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from timm_memwrap.attention import make_keys, unit, wide
from timm_memwrap.data import class_names
from timm_memwrap.explaining.duplicates import Sameness, keep_one
from timm_memwrap.explaining.findings import DUPLICATE_OF, RELABEL_AS, REMOVE, Finding
from timm_memwrap.explaining.neighbours import NEIGHBOURS, Neighbours, find_neighbours, label_support, out_of_place
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.search import exact_index

__all__ = ["Inspection"]

# Below this share of the support, the label is suspected.
_SUSPECT = 0.3
# Copies that a sample may have without losing neighbours that judge it.
_COPIES = 14
# Samples to look at beside one.
_SHOWN = 3


class Inspection:
    """The memory of a model, inspected; and data of which copies may be in it.

    Args:
        model: A model with a memory bank of two samples at least.
        progress: Whether to show a progress bar.
    """

    def __init__(self, model: MemoryWrapModel, progress: bool = True) -> None:
        self._bank, self._names, self._width = model.memory_bank, class_names(model), model.head_hidden_size
        encodings, self._labels = self._bank.filled()
        self._keys = make_keys(wide(encodings)[:, : self._width], "cosine")
        self._index, size = exact_index(self._keys), len(encodings)
        # Not so many that the furthest are just anywhere.
        self._count = max(1, min(NEIGHBOURS, (size - 1) // 2))
        found = find_neighbours(self._index, self._keys.vectors, min(size - 1, self._count + _COPIES), progress)
        self._all = found
        self._sameness = Sameness.of(found, self._labels, self._count)
        self._furthest = self._sameness.furthest(found, self._labels)
        self._copies = self._sameness.same(found.similarities, self._furthest)
        # Its copies would support any label that they share with it.
        self._neighbours = found.without(self._copies, self._count)
        self._support = label_support(self._neighbours, self._labels)
        self._leaks: dict[int, list[tuple[float, int, float]]] = defaultdict(list)
        self.leaked = 0

    def add(self, encodings: Tensor, start: int) -> None:
        """Looks for copies of a batch of the data, `[B, E]`, whose first image is at position `start`."""
        found = Neighbours(*self._index.nearest(unit(wide(encodings)[:, : self._width]), self._count))
        similarities, positions = found
        furthest = self._sameness.furthest(found, self._labels[positions[:, 0]])
        same = self._sameness.same(similarities, furthest)
        closeness = self._sameness.closeness(similarities, furthest)
        self.leaked += int(same.any(dim=1).sum())
        rows, columns = same.nonzero(as_tuple=True)
        parts = (rows, *(part[rows, columns] for part in (positions, closeness, similarities)))
        for row, position, close, similarity in zip(*(part.tolist() for part in parts), strict=True):
            self._leaks[position].append((close, start + row, similarity))

    @property
    def found_leaks(self) -> bool:
        """Whether there are copies of images of the data."""
        return bool(self._leaks)

    def findings(self, data_ids: Sequence[SampleId] = ()) -> tuple[Finding, ...]:
        """Returns all that was found: by kind, and within a kind the surest first.

        Args:
            data_ids: Ids of the images of the data, if there are leaks.
        """
        found = (self._suspected_labels(), self._duplicates(), self._leaked(data_ids), self._out_of_place())
        return tuple(finding for kind in found for finding in sorted(kind, key=lambda finding: -finding.score))

    def _suspected_labels(self) -> Iterable[Finding]:
        share, other = self._support
        for i in ((share < _SUSPECT) & (other != self._labels)).nonzero().flatten().tolist():
            yield self._finding("label", i, RELABEL_AS, self._names[int(other[i])], 1 - float(share[i]), *self._near(i))

    def _duplicates(self) -> Iterable[Finding]:
        kept, ids = keep_one(self._all, self._copies, self._support.share), self._bank.ids
        vectors, own = self._keys.vectors, torch.arange(len(kept), device=kept.device)
        for i in (kept != own).nonzero().flatten().tolist():
            keep = int(kept[i])
            similarity = (vectors[i] @ vectors[keep]).reshape(1, 1)
            score = float(self._sameness.closeness(similarity, self._furthest[i].reshape(1)).clamp(min=0))
            yield self._finding("duplicate", i, DUPLICATE_OF, ids[keep], score, (ids[keep],), (float(similarity),))

    def _leaked(self, data_ids: Sequence[SampleId]) -> Iterable[Finding]:
        for i, copies in self._leaks.items():
            near = sorted(copies, reverse=True)[:_SHOWN]
            shown = tuple(data_ids[at] for _, at, _ in near)
            yield self._finding("leak", i, REMOVE, None, near[0][0], shown, tuple(part[2] for part in near))

    def _out_of_place(self) -> Iterable[Finding]:
        for i in out_of_place(self._neighbours, self._support.share).nonzero().flatten().tolist():
            score = min(1.0, 1 - float(self._neighbours.similarities[i, -1]))
            yield self._finding("out_of_place", i, REMOVE, None, score, *self._near(i))

    def _near(self, position: int) -> tuple[tuple[SampleId, ...], tuple[float, ...]]:
        """Returns the ids of the nearest samples and their similarities."""
        similarities, positions = (part[position, :_SHOWN].tolist() for part in self._neighbours)
        ids = self._bank.ids
        return tuple(ids[i] for i in positions), tuple(similarities)

    def _finding(
        self,
        kind: str,
        position: int,
        action: str,
        target: SampleId | None,
        score: float,
        neighbours: tuple[SampleId, ...],
        similarities: tuple[float, ...],
    ) -> Finding:
        sample_id, name = self._bank.ids[position], self._names[int(self._labels[position])]
        return Finding(kind, position, sample_id, name, action, target, score, neighbours, similarities)
