"""Similarities and sparse weights, as pure tensor functions.

Shapes: B queries, M memory samples, D width of a key, V width of a value, K samples kept per query.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from entmax import sparsemax
from torch import Tensor

from timm_memwrap._utils import is_exporting

__all__ = [
    "DISTANCES",
    "MASKED",
    "Keys",
    "content_weights",
    "distances",
    "float32_island",
    "make_keys",
    "scores",
    "scores_once",
    "similarities",
    "sum_values",
    "threshold",
    "trim",
    "unit",
    "wide",
]

DISTANCES = ("cosine", "l2", "dot")

# Scores that are looked at first, instead of sorting all.
_STRONGEST = 256

# Of encodings whose length is what it seems to be.
_SHORTEST = 1e-12

# Far below any score, and still finite: entmax turns an infinite score into NaN.
MASKED = -1e30


class Keys(NamedTuple):
    """Memory encodings made ready for scoring, so that this is done once and not at each read."""

    vectors: Tensor  # [M, D]
    offsets: Tensor | None = None  # [M], added to the scores
    centre: Tensor | None = None  # [D], subtracted from the queries
    constant: Tensor | None = None  # [], what the scores are above minus the squared length of a centred query


def float32_island(tensor: Tensor) -> AbstractContextManager:
    """Returns a context in which autocast leaves the read alone, on the device of `tensor`."""
    device_type = tensor.device.type
    # torch.amp.is_autocast_available would tell as well, but torch.compile cannot trace it before torch 2.14.
    if device_type == "meta":
        return nullcontext()
    # In an exported graph the context is a node, which torch.export.load cannot always read back.
    if is_exporting() and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32, or in float64 if it is: a read is computed in no less."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def unit(x: Tensor) -> Tensor:
    """Scales rows `[N, D]` to length 1, and leaves zero rows at zero with a finite gradient.

    The row is divided by its largest entry first: the square of a tiny entry underflows.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest == 0, torch.ones_like(largest), largest)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def make_keys(encodings: Tensor, distance: str) -> Keys:
    """Makes projected memory encodings `[M, D]` ready to be scored."""
    if distance == "cosine":
        return Keys(unit(encodings))
    if distance == "dot" or not len(encodings):
        return Keys(encodings)
    assert distance == "l2", distance
    # -|q - k|^2 = 2 q.k - |k|^2 - |q|^2, where the last term is the same for all samples and changes no weight.
    # Distances do not change when both sides move, and rounding is least near the origin.
    centre = encodings.detach().mean(dim=0)
    encodings = encodings - centre
    squares = encodings.square()
    # Nor does a constant change a weight: without their mean the sums are small, and so is their rounding.
    mean_squares = squares.detach().mean(dim=0)
    return Keys(2 * encodings, -(squares - mean_squares).sum(dim=-1), centre, mean_squares.sum())


def scores(queries: Tensor, keys: Keys) -> Tensor:
    """Computes how alike each query `[B, D]` is to each key, `[B, M]`; larger is closer.

    The cosine similarity (of queries of length 1), the inner product, or the negative squared distance up to a constant
    per query, which no weight depends on. As in `memorywrap`, whose weights are the sparsemax of minus the distance.
    """
    if keys.centre is not None:
        queries = queries - keys.centre
    products = queries @ keys.vectors.T
    return products if keys.offsets is None else products + keys.offsets


def scores_once(queries: Tensor, encodings: Tensor, distance: str) -> Tensor:
    """Computes `scores` of projected memory encodings `[M, D]`, without the copy that keys would be where it can."""
    if distance == "cosine" and encodings.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = torch.linalg.vector_norm(encodings, dim=-1)
        # Beyond, squares underflow or overflow. On a device, to ask would be to wait.
        if bool(((lengths > _SHORTEST) & (lengths < 1 / _SHORTEST)).all()):
            return queries @ encodings.T / lengths
    return scores(queries, make_keys(encodings, distance))


def scores_at(queries: Tensor, keys: Keys, positions: Tensor) -> Tensor:
    """Computes the scores of the samples at positions `[B, K]` alone, `[B, K]`."""
    if keys.centre is not None:
        queries = queries - keys.centre
    products = (F.embedding(positions, keys.vectors) @ queries.unsqueeze(-1)).squeeze(-1)
    return products if keys.offsets is None else products + keys.offsets[positions]


def similarities(scores: Tensor, queries: Tensor, keys: Keys) -> Tensor:
    """Makes similarities of scores `[B, K]`: with the distance `l2` the constant per query is put back."""
    if keys.constant is None:
        return scores
    assert keys.centre is not None
    return scores - keys.constant - (queries - keys.centre).square().sum(dim=-1, keepdim=True)


def distances(queries: Tensor, keys: Keys, sums: Tensor) -> Tensor:
    """Computes how far queries `[B, D]` are from the weighted means of keys whose sums `[B, D]` are given, `[B]`."""
    if keys.centre is not None:
        # The vectors are twice the encodings; see `make_keys`.
        queries, sums = queries - keys.centre, sums / 2
    return torch.linalg.vector_norm(queries - sums, dim=-1)


def content_weights(similarity: Tensor) -> Tensor:
    """Turns scores `[B, M]` into the paper's content weights `[B, M]`: sparse, non-negative, of sum 1 (sparsemax).

    An empty memory (`M = 0`) has no weights: `[B, 0]`. NaN in a row of scores makes all of its weights NaN.
    """
    if similarity.shape[-1] == 0:
        return similarity
    # The compiler cannot trace the class methods of entmax's function.
    if torch.compiler.is_compiling():
        return _sparsemax(similarity)
    # entmax stops at NaN, with an error about an index.
    broken = similarity.isnan().any(dim=-1, keepdim=True)
    # With the strongest alone it is exact too, since it looks at more where these do not do; on a device it would wait.
    few = similarity.device.type == "cpu" and similarity.shape[-1] > 16 * _STRONGEST
    weights = sparsemax(similarity.masked_fill(broken, 0.0), dim=-1, k=_STRONGEST if few else None)
    return weights.masked_fill(broken, torch.nan)


def _sparsemax(similarity: Tensor) -> Tensor:
    """Computes entmax's sparsemax over the last dimension by operations that have a gradient of their own."""
    similarity = similarity - similarity.detach().amax(dim=-1, keepdim=True)
    return (similarity - _threshold_below_zero(similarity.sort(dim=-1, descending=True).values)).clamp(min=0)


def trim(weights: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Cuts sorted weights `[B, K]`, and tensors of the same shape, to the columns that some row reads.

    How many there are depends on the data, so this waits for the device.
    """
    # Not equal to zero rather than above it: NaN must not be dropped.
    support = int((weights != 0).sum(dim=-1).amax()) if weights.numel() else 0
    return tuple(tensor[:, :support] for tensor in (weights, *others))


def threshold(ordered: Tensor) -> Tensor:
    """Computes the sparsemax threshold `[B, 1]` of scores `[B, K]` in descending order (Martins and Astudillo 2016)."""
    largest = ordered[:, :1]
    return largest + _threshold_below_zero(ordered - largest)


def _threshold_below_zero(ordered: Tensor) -> Tensor:
    """Computes the threshold of scores in descending order of which the largest is 0, where rounding is least."""
    excess = ordered.cumsum(dim=-1) - 1
    rank = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device, dtype=ordered.dtype)
    # At least 1, which only rows with NaN fall short of.
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)
    return excess.gather(-1, support - 1) / support


def sum_values(weights: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Sums memory values `[M, V]` by weights `[B, K]` at positions `[B, K]`: the paper's memory vector, `[B, V]`."""
    if positions.shape[-1] == 0:
        return weights.new_zeros(positions.shape[0], values.shape[-1])
    if values.dtype != weights.dtype:
        # Stored in fewer digits: only what is read is widened.
        read, positions = positions.unique(return_inverse=True)
        values = values[read].to(weights.dtype)
    # Unlike values[positions], it never makes a [B, K, V] intermediate.
    return F.embedding_bag(positions, values, per_sample_weights=weights, mode="sum")
