"""The exact search of a large memory: int8 copies of the keys rule out nearly all samples, and the rest are scored.

Shapes: B queries, M memory samples, D width of a key, P of its int8 copy, C chunks of samples, H samples hidden from a
query, K samples kept per query, N pairs of a query and a sample.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from timm_memwrap.attention import MASKED, Keys, content_weights, scores_at, threshold, trim
from timm_memwrap.search.exact import ExactIndex

__all__ = ["QuantizedIndex", "exact_index"]

# Samples whose largest score stands for them.
_CHUNK = 64
# How many of the best chunks at least show how high scores go.
_SEEDS = 64
# Scores that are in memory at a time; a power of two, so that chunks fit.
_BLOCK_SCORES = 2**22
# Below so many scores the steps around the product cost more than they spare.
_LEAST_SCORES = 2**15
# Rows made at a time when the copies are: they stay in the cache.
_ROWS = 2**10
# The kernel is at its best with rows of whole registers.
_ALIGNMENT = 16
# Rounding of float32 in scores of keys and queries of length 1: far more than is seen.
_ROUNDING = 1e-5
# Where more of the memory is left than a sample in so many, scoring all of it is quicker.
_MOST_LEFT = 16

_Bound = Callable[[Tensor], Tensor]


def exact_index(keys: Keys) -> "ExactIndex | QuantizedIndex":
    """Returns what searches these keys exactly, and on this processor in the least time."""
    return QuantizedIndex(keys) if _can_quantize(keys) else ExactIndex(keys)


def _can_quantize(keys: Keys) -> bool:
    if keys.offsets is not None or keys.vectors.device.type != "cpu" or keys.vectors.dtype != torch.float32:
        return False
    # Private names of PyTorch: without them, or without an instruction for int8, the search is in float32.
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and supported is not None and supported()


class QuantizedIndex:
    """Finds exactly the samples of a memory that a query reads, and scores only those that may be among them.

    Keys and queries are rotated, so that no entry is much larger than others, and rounded to int8. The Cauchy-Schwarz
    inequality bounds what rounding changes in a score: a sample whose rounded score is further than that below what a
    query reads is out. It is the result of `ExactIndex`, at a fourth of the price of the float32 product.

    Args:
        keys: Prepared keys of the memory, without offsets.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys, self._plain = keys, ExactIndex(keys)
        self._copies: _Copies | None = None

    @torch.no_grad()
    def search(
        self, queries: Tensor, scale: float | Tensor = 1.0, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the samples with positive weight, as `ExactIndex.search` does."""

        def bound(best: Tensor) -> Tensor:
            return threshold(best * scale) / scale if best.shape[1] else best.new_full((len(best), 1), -torch.inf)

        found = self._find(queries, bound, _SEEDS, hidden)
        if found is None:
            return self._plain.search(queries, scale, hidden)
        best, positions = found
        weights, positions, best = trim(content_weights(best * scale), positions, best * scale)
        return weights, positions, best

    @torch.no_grad()
    def nearest(self, queries: Tensor, count: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Finds the samples with the highest scores, as `ExactIndex.nearest` does."""

        def bound(best: Tensor) -> Tensor:
            if best.shape[1] < count:
                return best.new_full((len(best), 1), -torch.inf)
            return best[:, count - 1 : count]

        found = self._find(queries, bound, max(_SEEDS, count), hidden)
        if found is None:
            return self._plain.nearest(queries, count, hidden)
        best, positions = found
        return best[:, :count], positions[:, :count]

    def _find(self, queries: Tensor, bound: _Bound, seeds: int, hidden: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Returns sorted scores and positions `[B, K]` of all samples that are not below a bound, and of some that are.

        Args:
            queries: Queries `[B, D]`.
            bound: Tells from scores of some samples, sorted, what a score must at least be to count, `[B, 1]`.
            seeds: How many samples to score first, for a bound of a block.
            hidden: Positions `[B, H]` of samples that a row must not see.

        Returns:
            `None` where it is quicker to score all samples.
        """
        rows, size = len(queries), len(self.keys.vectors)
        if rows * size < _LEAST_SCORES or not bool(queries.isfinite().all()):
            return None
        if self._copies is None:
            self._copies = _Copies(self.keys.vectors)
        most, left = rows * max(4 * seeds, size // _MOST_LEFT), 0
        best, positions = queries.new_empty(rows, 0), torch.empty(rows, 0, dtype=torch.long)
        rounded, steps, slack = self._copies.rounded(queries)
        for start, block in self._copies.blocks(rounded, hidden):
            peaks = block.amax(dim=-1)
            known = best
            if int((peaks * steps >= bound(best) - slack).sum()) > rows * seeds:
                chunks = peaks.topk(min(seeds, peaks.shape[1]), sorted=False).indices
                known = self._scores_of_best(queries, block, chunks, start, hidden)
                known = torch.cat([best, known], dim=1).sort(dim=-1, descending=True).values
            # Finite, so that what is hidden stays out.
            limit = ((bound(known) - slack) / steps).clamp(min=MASKED)
            row, chunk = (peaks >= limit).nonzero(as_tuple=True)
            inside = block[row, chunk]
            pair, offset = (inside >= limit[row]).nonzero(as_tuple=True)
            left += len(pair)
            if left > most:
                return None
            if not len(pair):
                continue
            found = (start + chunk[pair] * _CHUNK + offset).split(row[pair].bincount(minlength=rows).tolist())
            vectors = (self.keys.vectors.index_select(0, where) for where in found)
            scores = [rows_of @ query for rows_of, query in zip(vectors, queries, strict=True)]
            best = torch.cat([best, pad_sequence(scores, True, MASKED)], dim=1)
            best, order = best.sort(dim=-1, descending=True, stable=True)
            positions = torch.cat([positions, pad_sequence(list(found), True)], dim=1).gather(1, order)
            kept = int((best >= bound(best)).sum(dim=-1).amax())
            best, positions = best[:, :kept], positions[:, :kept]
        return best, positions

    def _scores_of_best(
        self, queries: Tensor, block: Tensor, chunks: Tensor, start: int, hidden: Tensor | None
    ) -> Tensor:
        """Returns scores `[B, S]` of the best samples of chunks `[B, S]` of a block."""
        rows = torch.arange(len(queries)).unsqueeze(1)
        positions = start + chunks * _CHUNK + block[rows, chunks].argmax(dim=-1)
        scores = scores_at(queries, self.keys, positions)
        if hidden is None:
            return scores
        return scores.masked_fill((positions.unsqueeze(-1) == hidden.unsqueeze(1)).any(dim=-1), MASKED)


class _Copies:
    """Keys `[M, D]` rotated and rounded to int8."""

    def __init__(self, vectors: Tensor) -> None:
        size, width = vectors.shape
        self._size, self._width = size, -(-width // _ALIGNMENT) * _ALIGNMENT
        self._left, self._right = _rotations(self._width)
        # Samples of no score fill the last chunk.
        self._values = torch.zeros(-(-size // _CHUNK) * _CHUNK, self._width, dtype=torch.int8)
        self._steps = torch.zeros(len(self._values))
        self._error = self._longest = 0.0
        for start in range(0, size, _ROWS):
            rows = slice(start, min(start + _ROWS, size))
            values, steps, lost, lengths = self._round(vectors[rows])
            self._values[rows], self._steps[rows] = values, steps.flatten()
            self._error, self._longest = max(self._error, float(lost.max())), max(self._longest, float(lengths.max()))

    def _round(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns vectors `[N, D]` rotated as int8 `[N, P]`, their steps, and lengths of what is lost and of all."""
        rotated = F.pad(vectors, (0, self._width - vectors.shape[1])).unflatten(1, (len(self._left), -1))
        # By two products of many rows: a batch of small ones would take ten times as long.
        rotated = ((rotated @ self._right).mT @ self._left).flatten(1)
        steps = rotated.abs().amax(dim=1, keepdim=True) / 127
        steps = torch.where(steps == 0, torch.ones_like(steps), steps)
        values = rotated.div_(steps).round()
        lost = steps * torch.linalg.vector_norm(rotated.sub_(values), dim=1, keepdim=True)
        return values.to(torch.int8), steps, lost, torch.linalg.vector_norm(vectors, dim=1, keepdim=True)

    def rounded(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries `[B, D]` as int8 `[B, P]`, their steps `[B, 1]`, and how far scores may be off `[B, 1]`."""
        values, steps, lost, lengths = self._round(queries)
        return (
            values,
            steps,
            lengths * self._error + lost * (self._longest + self._error) + _ROUNDING * (lengths * self._longest),
        )

    def blocks(self, queries: Tensor, hidden: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Yields where each block of samples begins, and its rounded scores `[B, C, 64]` in steps of the queries."""
        rows, total = len(queries), len(self._values)
        size = min(max(_CHUNK, _BLOCK_SCORES // rows // _CHUNK * _CHUNK), total)
        products, scores = torch.empty(rows * size, dtype=torch.int32), torch.empty(rows * size)
        for start in range(0, total, size):
            end = min(start + size, total)
            whole = (slice(rows * (end - start)), (rows, end - start))
            product = torch._int_mm(queries, self._values[start:end].T, out=products[whole[0]].view(whole[1]))
            block = torch.mul(product, self._steps[start:end], out=scores[whole[0]].view(whole[1]))
            block[:, max(0, self._size - start) :] = -torch.inf
            if hidden is not None:
                inside = (hidden >= start) & (hidden < end)
                block[inside.nonzero()[:, 0], hidden[inside] - start] = -torch.inf
            yield start, block.unflatten(1, (-1, _CHUNK))


def _rotations(width: int) -> tuple[Tensor, Tensor]:
    """Returns orthogonal matrices, drawn at random but always the same, whose Kronecker product rotates `width`."""
    left = max(n for n in range(1, math.isqrt(width) + 1) if width % n == 0)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (left, width // left))
    return first, second
