"""Similarity scores and the sparse read, as pure tensor functions.

Shapes: B queries, M memory samples, D width of a key, V width of a value, K samples kept per query.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from entmax import sparsemax
from torch import Tensor

__all__ = [
    "DISTANCES",
    "Keys",
    "content_weights",
    "float32_island",
    "prepare_keys",
    "read",
    "ready_queries",
    "scores",
    "search",
    "threshold",
    "top_weights",
    "trim",
    "unit",
]

DISTANCES = ("cosine", "l2", "dot")

# Far below any score, and still finite: entmax turns an infinite score into NaN.
MASKED = -1e30

# Scores that are in memory at a time. With fewer, the many small steps cost more than the product does; with more, it
# costs to get the memory (measured on a CPU: 2 million are within 1.1 of the time of the product at any M).
_BLOCK_SCORES = 2**21


class Keys(NamedTuple):
    """Memory encodings made ready for scoring, so that this is done once and not at each read."""

    vectors: Tensor  # [M, D]
    offsets: Tensor | None  # [M], added to the scores
    centre: Tensor | None  # [D], subtracted from the queries


def float32_island(tensor: Tensor) -> AbstractContextManager:
    """Returns a context in which autocast leaves the read alone, on the device of `tensor`."""
    device_type = tensor.device.type
    # torch.amp.is_autocast_available would say so too, but torch.compile cannot trace it before torch 2.14.
    if device_type == "meta":
        return nullcontext()
    # In an exported graph the context is a node, which torch.export.load cannot always read back.
    if torch.compiler.is_exporting() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)


def unit(x: Tensor) -> Tensor:
    """Scales rows `[N, D]` to length 1, and leaves zero rows at zero with a finite gradient.

    The row is divided by its largest entry first: the square of a tiny entry underflows.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest == 0, torch.ones_like(largest), largest)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def prepare_keys(encodings: Tensor, distance: str) -> Keys:
    """Makes memory encodings `[M, D]` ready to be scored.

    Args:
        encodings: Projected memory encodings, `[M, D]`.
        distance: One of `DISTANCES`.
    """
    if distance == "cosine":
        return Keys(unit(encodings), None, None)
    if distance == "dot":
        return Keys(encodings, None, None)
    assert distance == "l2", distance
    # -|q - k|^2 = 2 q.k - |k|^2 - |q|^2, where the last term is the same for all samples and changes no weight.
    # Distances do not change when both sides move, and rounding is least near the origin.
    if not len(encodings):
        return Keys(encodings, None, None)
    centre = encodings.detach().mean(dim=0)
    encodings = encodings - centre
    squares = encodings.square()
    # Nor does a constant change a weight: without their mean the sums are small, and so is their rounding.
    squares = squares - squares.detach().mean(dim=0)
    return Keys(2 * encodings, -squares.sum(dim=-1), centre)


def ready_queries(queries: Tensor, keys: Keys, distance: str) -> Tensor:
    """Makes queries `[B, D]` ready for the inner product with `keys`."""
    if distance == "cosine":
        queries = unit(queries)
    return queries if keys.centre is None else queries - keys.centre


def scores(queries: Tensor, keys: Keys, distance: str, scale: float | Tensor = 1.0) -> Tensor:
    """Computes the similarity of each query to each key; larger is closer.

    `cosine` is the cosine similarity, `dot` the inner product, `l2` the negative squared distance up to a constant
    per query, which no weight depends on. As in `memorywrap`, whose weights are the sparsemax of minus the distance.

    Args:
        queries: Projected input encodings, `[B, D]`.
        keys: What `prepare_keys` made of the memory encodings.
        distance: The distance that `keys` were prepared for.
        scale: Factor on the similarities; larger reads fewer samples.

    Returns:
        Scores `[B, M]`.
    """
    similarity = ready_queries(queries, keys, distance) @ keys.vectors.T
    if keys.offsets is not None:
        similarity = similarity + keys.offsets
    return similarity if isinstance(scale, float) and scale == 1.0 else similarity * scale


def content_weights(similarity: Tensor) -> Tensor:
    """Turns scores `[B, M]` into the paper's content weights `[B, M]`: sparse, non-negative, of sum 1 (sparsemax).

    An empty memory (`M = 0`) has no weights: `[B, 0]`. Scores that are not numbers give weights that are none.
    """
    if similarity.shape[-1] == 0:
        return similarity
    # The compiler cannot trace the class methods of entmax's function.
    if torch.compiler.is_compiling():
        return _sparsemax(similarity)
    # entmax stops at NaN, with an error about an index that says nothing of it.
    broken = similarity.isnan().any(dim=-1, keepdim=True)
    return sparsemax(similarity.masked_fill(broken, 0.0), dim=-1).masked_fill(broken, torch.nan)


def _sparsemax(similarity: Tensor) -> Tensor:
    """Computes entmax's sparsemax over the last dimension by operations that have a gradient of their own."""
    similarity = similarity - similarity.detach().amax(dim=-1, keepdim=True)
    return (similarity - _threshold_below_zero(similarity.sort(dim=-1, descending=True).values)).clamp(min=0)


def top_weights(similarity: Tensor, at_least: int = 64) -> tuple[Tensor, Tensor]:
    """Computes the same weights as `content_weights` without sorting or keeping all of them.

    Sparsemax of the k best scores is sparsemax of all scores as soon as the worst of the k has weight zero: a score
    below it then has none either. Otherwise k grows.

    Args:
        similarity: Scores `[B, M]`.
        at_least: How many scores per row to look at first.

    Returns:
        Weights `[B, K]`, strongest first, and the positions `[B, K]` of their samples. K is the largest support in the
        batch; shorter rows end in zeros.
    """
    size = similarity.shape[-1]
    k = min(at_least, size)
    while True:
        best, indices = similarity.topk(k, dim=-1)
        weights = content_weights(best)
        if k == size or not bool((weights[:, -1] > 0).any()):
            break
        k = min(4 * k, size)
    return trim(weights, indices)


def trim(weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves out the columns behind the largest support of sorted weights `[B, K]`, and of their positions."""
    # Other than zero, not above it: what is no number must not pass as nothing.
    support = int((weights != 0).sum(dim=-1).amax()) if weights.numel() else 0
    return weights[:, :support], positions[:, :support]


@torch.no_grad()
def search(
    queries: Tensor,
    keys: Keys,
    distance: str,
    scale: float | Tensor = 1.0,
    hidden: Tensor | None = None,
    at_least: int = 64,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the samples with positive weight, and their weights, without ever holding all scores.

    The same as `top_weights(scores(...))`, block by block over the memory and without gradient. The sparsemax threshold
    of some of the scores is a lower bound of that of all, so a score below it is out, whatever the rest of the memory
    holds. Of each block the `at_least` best are looked at; only for rows whose worst of these is above the bound there
    may be more, and only for them more are.

    Args:
        queries: Projected input encodings `[B, D]`.
        keys: As in `scores`.
        distance: As in `scores`.
        scale: As in `scores`.
        hidden: Samples that a row must not see: a mask `[B, M]`, or positions `[B, H]`.
        at_least: How many scores per row of a block to look at first.
        block_size: Samples in a block; `None` for what suits the number of queries.

    Returns:
        Weights `[B, K]`, strongest first, and the positions `[B, K]` of their samples, as `top_weights` does. Where a
        row ends in zeros, the positions mean nothing.
    """
    rows, size = len(queries), len(keys.vectors)
    block_size = max(4 * at_least, block_size or _BLOCK_SCORES // max(1, rows))
    if size <= block_size:
        similarity = scores(queries, keys, distance, scale)
        if hidden is not None:
            _hide(similarity, hidden, 0)
        return top_weights(similarity, at_least)
    queries = ready_queries(queries, keys, distance)
    best = queries.new_empty(rows, 0)
    positions = torch.empty(rows, 0, dtype=torch.long, device=queries.device)
    bound = queries.new_full((rows, 1), -torch.inf)
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
        found, where = _best_of_block(block, bound, at_least)
        if start and not bool((found[:, :1] > bound).any()):
            continue
        best, order = torch.cat([best, found], dim=1).sort(dim=-1, descending=True, stable=True)
        positions = torch.cat([positions, where + start], dim=1).gather(1, order)
        bound = threshold(best)
        # One at least, so that a query that is not a number gives weights that are none.
        support = max(1, int((best > bound).sum(dim=-1).amax())) if rows else 0
        best, positions = best[:, :support], positions[:, :support]
    return trim(content_weights(best), positions)


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


def threshold(ordered: Tensor) -> Tensor:
    """Computes the sparsemax threshold `[B, 1]` of scores `[B, K]` in descending order (Martins and Astudillo 2016)."""
    largest = ordered[:, :1]
    return largest + _threshold_below_zero(ordered - largest)


def _threshold_below_zero(ordered: Tensor) -> Tensor:
    """Computes the threshold of scores in descending order of which the largest is 0, where rounding is least."""
    excess = ordered.cumsum(dim=-1) - 1
    rank = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device, dtype=ordered.dtype)
    # At least 1, which only rows that are not numbers fall short of.
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    return excess.gather(-1, support - 1) / support


def _hide(block: Tensor, hidden: Tensor, start: int) -> None:
    """Masks what a row must not see in a block of scores that begins with sample `start`."""
    size = block.shape[-1]
    if hidden.dtype == torch.bool:
        block.masked_fill_(hidden[:, start : start + size], MASKED)
        return
    inside = (hidden >= start) & (hidden < start + size)
    rows = torch.arange(len(block), device=block.device).unsqueeze(1).expand_as(hidden)
    block[rows[inside], hidden[inside] - start] = MASKED


def read(weights: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Sums memory values by sparse weights: the paper's memory vector, `[B, V]`.

    Args:
        weights: Weights `[B, K]`.
        indices: Positions `[B, K]` in the memory.
        values: Memory values `[M, V]`.
    """
    if indices.shape[-1] == 0:
        return values.new_zeros(len(indices), values.shape[-1])
    # Unlike values[indices], it never makes a [B, K, V] intermediate.
    return F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")
