"""Similarity scores and the sparse read, as pure tensor functions.

Shapes: B queries, M memory samples, D width of a key, V width of a value, K samples kept per query.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from entmax import sparsemax
from torch import Tensor

__all__ = ["DISTANCES", "Keys", "content_weights", "float32_island", "prepare_keys", "read", "scores", "top_weights"]

DISTANCES = ("cosine", "l2", "dot")

# Far below any score, and still finite: entmax turns an infinite score into NaN.
MASKED = -1e30


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


def _unit(x: Tensor) -> Tensor:
    """Scales rows to length 1, and leaves zero rows at zero with a finite gradient.

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
        return Keys(_unit(encodings), None, None)
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


def scores(queries: Tensor, keys: Keys, distance: str, scale: float = 1.0) -> Tensor:
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
    if distance == "cosine":
        queries = _unit(queries)
    if keys.centre is not None:
        queries = queries - keys.centre
    similarity = queries @ keys.vectors.T
    if keys.offsets is not None:
        similarity = similarity + keys.offsets
    return similarity if scale == 1.0 else similarity * scale


def content_weights(similarity: Tensor) -> Tensor:
    """Turns scores `[B, M]` into the paper's content weights `[B, M]`: sparse, non-negative, of sum 1 (sparsemax).

    An empty memory (`M = 0`) has no weights: `[B, 0]`.
    """
    if similarity.shape[-1] == 0:
        return similarity
    # The compiler cannot trace the class methods of entmax's function.
    return _sparsemax(similarity) if torch.compiler.is_compiling() else sparsemax(similarity, dim=-1)


def _sparsemax(similarity: Tensor) -> Tensor:
    """Computes entmax's sparsemax over the last dimension by operations that have a gradient of their own."""
    similarity = similarity - similarity.detach().amax(dim=-1, keepdim=True)
    ordered = similarity.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(dim=-1) - 1
    rank = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device, dtype=ordered.dtype)
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support
    return (similarity - threshold).clamp(min=0)


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
    support = int((weights > 0).sum(dim=-1).amax()) if weights.numel() else 0
    return weights[:, :support], indices[:, :support]


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
