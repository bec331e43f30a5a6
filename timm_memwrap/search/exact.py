"""The exact search: block by block over the memory, without ever holding all scores.

Shapes: B queries, M memory samples, D width of a key, H samples hidden from a query, K samples kept per query.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap.attention import MASKED, Keys, content_weights, threshold, trim

__all__ = ["ExactIndex"]

# Scores that are in memory at a time. With fewer, the many small steps cost more than the product does; with more, it
# costs to get the memory (measured on a CPU: 2 million are within 1.1 of the time of the product at any M).
_BLOCK_SCORES = 2**21


class ExactIndex:
    """Finds exactly the samples of a memory that a query reads.

    The sparsemax threshold of some of the scores is a lower bound of that of all, so a score below it is out, whatever
    the rest of the memory holds. Of each block the `at_least` best are looked at; only for rows whose worst of these is
    above the bound there may be more, and only for them more are.

    Args:
        keys: Prepared keys of the memory.
        at_least: How many scores per row of a block to look at first.
        block_size: Samples in a block; `None` for what suits the number of queries.
    """

    def __init__(self, keys: Keys, at_least: int = 64, block_size: int | None = None) -> None:
        self.keys, self.at_least, self.block_size = keys, at_least, block_size

    @torch.no_grad()
    def search(
        self, queries: Tensor, scale: float | Tensor = 1.0, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the samples with positive weight, without gradient.

        Args:
            queries: Projected input encodings `[B, D]`, as in `attention.scores`.
            scale: Factor on the scores; larger reads fewer samples.
            hidden: Positions `[B, H]` of samples that a row must not see.

        Returns:
            Weights `[B, K]`, strongest first, positions `[B, K]` of their samples, and their scaled scores `[B, K]`.
            Where a row ends in zeros, the positions mean nothing.
        """
        rows = len(queries)
        best = queries.new_empty(rows, 0)
        positions = torch.empty(rows, 0, dtype=torch.long, device=queries.device)
        bound = queries.new_full((rows, 1), -torch.inf)
        for start, block in self._blocks(queries, scale, hidden):
            found, where = _best_of_block(block, bound, self.at_least)
            if start and not bool((found[:, :1] > bound).any()):
                continue
            best, order = torch.cat([best, found], dim=1).sort(dim=-1, descending=True, stable=True)
            positions = torch.cat([positions, where + start], dim=1).gather(1, order)
            bound = threshold(best)
            # One at least, so that NaN in a query gives weights that are NaN.
            support = max(1, int((best > bound).sum(dim=-1).amax())) if rows else 0
            best, positions = best[:, :support], positions[:, :support]
        weights, positions, best = trim(content_weights(best), positions, best)
        return weights, positions, best

    @torch.no_grad()
    def nearest(self, queries: Tensor, count: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Finds the samples with the highest scores, without gradient.

        Args:
            queries: As in `search`.
            count: How many K; all, if there are fewer.
            hidden: As in `search`; where a row sees fewer than K, hidden ones follow with a masked score.

        Returns:
            Scores `[B, K]`, highest first, and positions `[B, K]`.
        """
        best = queries.new_empty(len(queries), 0)
        positions = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        for start, block in self._blocks(queries, 1.0, hidden):
            found, where = block.topk(min(count, block.shape[1]), dim=-1)
            if best.shape[1] == count and not bool((found[:, :1] > best[:, -1:]).any()):
                continue
            best, order = torch.cat([best, found], dim=1).sort(dim=-1, descending=True, stable=True)
            positions = torch.cat([positions, where + start], dim=1).gather(1, order)
            best, positions = best[:, :count], positions[:, :count]
        return best, positions

    def _blocks(self, queries: Tensor, scale: float | Tensor, hidden: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Yields where each block of samples begins, and the scaled scores of its samples, until the next is made."""
        keys, rows, size = self.keys, len(queries), len(self.keys.vectors)
        block_size = max(4 * self.at_least, self.block_size or _BLOCK_SCORES // max(1, rows))
        if keys.centre is not None:
            queries = queries - keys.centre
        buffer = queries.new_empty(rows, min(block_size, size))
        for start in range(0, size, block_size):
            vectors = keys.vectors[start : start + block_size]
            block = torch.mm(queries, vectors.T, out=buffer[:, : len(vectors)])
            if keys.offsets is not None:
                block += keys.offsets[start : start + block_size]
            if not isinstance(scale, float) or scale != 1.0:
                block *= scale
            if hidden is not None:
                _hide(block, hidden, start)
            yield start, block


def _best_of_block(block: Tensor, bound: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    """Returns the best scores of a block, sorted, and all that are above the threshold that they make."""
    size = block.shape[-1]
    k = min(at_least, size)
    best, where = block.topk(k, dim=-1)
    while k < size:
        needed = (best[:, -1:] > torch.maximum(bound, threshold(best))).flatten()
        if not bool(needed.any()):
            break
        before, k = k, min(4 * k, size)
        best, where = F.pad(best, (0, k - before), value=MASKED), F.pad(where, (0, k - before))
        best[needed], where[needed] = block[needed].topk(k, dim=-1)
    return best, where


def _hide(block: Tensor, hidden: Tensor, start: int) -> None:
    """Masks what a row must not see in a block of scores that begins with sample `start`."""
    inside = (hidden >= start) & (hidden < start + block.shape[-1])
    rows = torch.arange(len(block), device=block.device).unsqueeze(1).expand_as(hidden)
    block[rows[inside], hidden[inside] - start] = MASKED
