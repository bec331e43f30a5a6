"""The nearest samples of some classes, of which alone the samples are scored.

Shapes: B queries, M memory samples, D width of a query, E of a stored encoding, R classes asked for per query, C
classes, K samples kept per class, N queries that ask for one class.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from timm_memwrap.attention import float32_island, unit

__all__ = ["ClassIndex"]

# Samples that are scored at a time: they stay in the cache.
_BLOCK = 2**11


class ClassIndex:
    """Finds the samples of a class with the highest cosine similarity, exactly.

    Args:
        encodings: The memory `[M, E]` in any precision.
        labels: Labels `[M]`, or multi-hot `[M, C]`: a sample is then found for each of its classes.
        width: How many columns D of the encodings are compared.
        dtype: The precision in which they are.
    """

    @torch.no_grad()
    def __init__(self, encodings: Tensor, labels: Tensor, width: int, dtype: torch.dtype) -> None:
        self._encodings, self._width, self._dtype = encodings, width, dtype
        parts = (part[:, :width].to(dtype) for part in encodings.split(_BLOCK))
        lengths = torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts])
        self._lengths = torch.where(lengths == 0, torch.ones_like(lengths), lengths)
        classes, samples = labels.T.nonzero().T if labels.ndim == 2 else labels.sort(stable=True)
        # The samples of each class, in the order of the memory.
        self._samples = samples.split(classes.bincount().tolist())

    @torch.no_grad()
    def nearest(self, queries: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Finds for each query the nearest samples of each of some classes.

        Of equal samples the first in the memory comes first.

        Args:
            queries: Vectors `[B, D]`.
            classes: Different classes `[B, R]`, of at least 0.
            count: How many samples K to find of each.

        Returns:
            Similarities `[B, R, K]`, highest first, and positions `[B, R, K]`, -1 where a class has fewer.
        """
        queries = unit(queries.to(self._dtype))
        best = queries.new_full((*classes.shape, count), -torch.inf)
        positions = classes.new_full(best.shape, -1)
        for label in classes.unique().tolist():
            if label >= len(self._samples) or not len(samples := self._samples[label]):
                continue
            rows, places = (classes == label).nonzero(as_tuple=True)
            found, where = self._nearest_of(samples, queries[rows], count)
            best[rows, places, : found.shape[1]], positions[rows, places, : found.shape[1]] = found, where
        return best, positions

    def _nearest_of(self, samples: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns similarities `[N, K]` and positions of the nearest of samples, for queries `[N, D]` of length 1."""
        best, positions = queries.new_empty(len(queries), 0), samples.new_empty(len(queries), 0)
        for part in samples.split(_BLOCK):
            encodings = self._encodings.index_select(0, part)[:, : self._width].to(self._dtype)
            with float32_island(queries):
                similarities = queries @ encodings.T / self._lengths[part]
            if best.shape[1] == count and not bool((similarities > best[:, -1:]).any()):
                continue
            # What was found before comes first, so that it stays so where two are equal.
            found = torch.cat([best, similarities], dim=1)
            where = torch.cat([positions, part.expand(len(queries), -1)], dim=1)
            least = found.topk(min(count, found.shape[1]), dim=1).values[:, -1:]
            row, column = (found >= least).nonzero(as_tuple=True)
            counts = row.bincount(minlength=len(queries)).tolist()
            kept = pad_sequence(column.split(counts), batch_first=True, padding_value=-1)
            found = found.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, -torch.inf)
            best, order = (each[:, :count] for each in found.sort(dim=1, descending=True, stable=True))
            positions = where.gather(1, kept.clamp(min=0)).gather(1, order)
        return best, positions
