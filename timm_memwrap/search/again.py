"""Searches again for queries of which it is known what they find, each time without some of it.

Shapes: B queries, H samples hidden from each, K samples kept per query.
"""

import torch
from torch import Tensor

from timm_memwrap.attention import MASKED, content_weights, threshold, trim
from timm_memwrap.readouts import Index

__all__ = ["SearchAgain"]


class SearchAgain:
    """Finds what an index finds, from the nearest samples of each query: the memory is searched once and not B times.

    Args:
        index: What searches the memory.
        found: Scores of the nearest samples of each query, `[B, K]`, as the index returns them.
        positions: Positions `[B, K]` of these samples.
    """

    def __init__(self, index: Index, found: Tensor, positions: Tensor) -> None:
        self._index, self._found, self._positions = index, found, positions

    @torch.no_grad()
    def search(self, queries: Tensor, scale: float | Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the samples with positive weight, as the index does."""
        found, positions = self._seen(hidden)
        # The threshold of some scores bounds that of all from below; samples that were not kept are below the last.
        if bool((threshold(found * scale) < self._found[:, -1:] * scale).any()):
            return self._index.search(queries, scale, hidden)
        weights, positions, found = trim(content_weights(found * scale), positions, found * scale)
        return weights, positions, found

    @torch.no_grad()
    def nearest(self, queries: Tensor, count: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Finds the samples with the highest scores, as the index does."""
        hides = 0 if hidden is None else hidden.shape[1]
        if count + hides > self._found.shape[1]:
            return self._index.nearest(queries, count, hidden)
        found, positions = self._seen(hidden)
        return found[:, :count], positions[:, :count]

    def _seen(self, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        if hidden is None:
            return self._found, self._positions
        unseen = (self._positions.unsqueeze(-1) == hidden.unsqueeze(1)).any(dim=-1)
        found, order = self._found.masked_fill(unseen, MASKED).sort(dim=-1, descending=True, stable=True)
        return found, self._positions.gather(1, order)
