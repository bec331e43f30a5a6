"""The read by reconstruction: the sparse mean of memory samples that comes closest to a query.

Shapes: B queries, K candidates per query, D width of a key.
"""

import torch
from torch import Tensor

from timm_memwrap._utils import check_choice

__all__ = ["CANDIDATES", "READS", "check_read", "reconstruction_weights"]

# How a memory is read: by the paper's content weights, or by those of this file.
READS = ("sparsemax", "reconstruction")

# Candidates per query: its nearest samples. Chosen on held-out training images; with more, nothing changes.
CANDIDATES = 64

# Of the solver. Damping is relative to the mean eigenvalue, and none of K eigenvalues is above K times their mean,
# which bounds the steps that the inverse takes: the error of the first guess is at most 0.97, and each step squares it.
_STEPS, _DAMPING, _RELAXATION = 80, 2.0, 1.8
_INVERSE_STEPS = 10
# A smaller share of a sample is rounding, not evidence.
_LEAST_WEIGHT = 1e-4
# Keeps divisors of what may be 0 above it, also squared.
_TINY = 1e-18


def check_read(read: str, distance: str, scale: float | str) -> None:
    """Raises a `ValueError` if a memory cannot be read in this way."""
    check_choice("read", read, READS)
    if read == "reconstruction" and (distance != "cosine" or scale != 1.0):
        raise ValueError(
            f"read='reconstruction' takes keys of length 1 and weighs by no scale, but distance={distance!r} and "
            f"scale={scale!r}. Leave them out, or pass read='sparsemax'."
        )


def reconstruction_weights(queries: Tensor, keys: Tensor, unseen: Tensor | None = None) -> Tensor:
    """Computes the weights `[B, K]` of the candidates whose weighted mean comes closest to a query.

    They minimise `|q - sum w_i k_i|^2` over `w >= 0`, `sum w = 1`, as the corpus decomposition of SimplEx does (Crabbe
    et al. 2021, https://arxiv.org/abs/2110.15355); most are exactly 0. The solver is ADMM (Boyd et al. 2011, Section
    5.2) with a fixed number of steps, of matrix products alone, so that it is deterministic, never waits for the
    device, and can be exported. Gradients reach queries and keys by the implicit function theorem.

    Args:
        queries: Queries `[B, D]`.
        keys: Keys of the candidates, `[B, K, D]`.
        unseen: Candidates `[B, K]` that must have no weight. Where all are, all weights are 0.
    """
    if keys.shape[1] == 0:
        return keys.new_zeros(keys.shape[:2])
    seen = torch.ones_like(keys[..., 0]) if unseen is None else (~unseen).to(keys.dtype)
    # As the weights sum to 1, the distance is the length of the weighted mean of differences.
    differences = keys - queries.unsqueeze(1)
    gram = differences @ differences.mT
    weights = _solve(gram.detach(), seen.unsqueeze(-1))
    if torch.is_grad_enabled() and gram.requires_grad:
        # A Newton step on the support, which ends where it starts: of value 0, and with the gradient of the solution.
        slope = gram @ weights
        weights = weights - _projected_inverse(gram.detach(), (weights > 0).to(gram.dtype)) @ (slope - slope.detach())
    return weights.squeeze(-1)


def _solve(gram: Tensor, seen: Tensor) -> Tensor:
    """Minimises `w' gram w` over the weights `[B, K, 1]` of the candidates that are seen `[B, K, 1]`."""
    count = _count(seen)
    mean = seen / count
    centred = _project(gram, seen)
    # Well above rounding, also where all candidates are one.
    rounding = torch.finfo(gram.dtype).eps ** 0.5 * _trace(gram * seen)
    damping = (_DAMPING * _trace(centred) + rounding) / count + _TINY
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    inverse = _inverse(centred + damping * eye)
    start = _RELAXATION * (mean - inverse @ _centre(gram @ mean, seen))
    step = _RELAXATION * (_project(inverse * damping, seen) - eye / 2)
    # The weights are the positive part of the point, and the dual variables the negative one, so that the sum and the
    # difference of the two are the point and its absolute value. As a row, since a symmetric matrix is multiplied from
    # the left in an eighth of the time.
    start, point = start.mT, mean.mT
    for _ in range(_STEPS):
        point = torch.baddbmm(torch.add(start, point, alpha=1 - _RELAXATION / 2), point.abs(), step)
    weights = point.mT.clamp(min=0)
    # Written so that NaN stays.
    weights = weights.masked_fill(weights < _LEAST_WEIGHT, 0.0)
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=_LEAST_WEIGHT)


def _count(seen: Tensor) -> Tensor:
    return seen.sum(dim=1, keepdim=True).clamp(min=1)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]


def _centre(columns: Tensor, seen: Tensor) -> Tensor:
    """Subtracts from columns `[B, K, N]` their means over what is seen `[B, K, 1]`, and leaves 0 elsewhere."""
    return (columns - (columns * seen).sum(dim=1, keepdim=True) / _count(seen)) * seen


def _project(matrix: Tensor, seen: Tensor) -> Tensor:
    """Projects symmetric matrices `[B, K, K]`, from both sides, to changes of weights that keep their sum."""
    return _centre(_centre(matrix, seen).mT, seen)


def _inverse(matrix: Tensor) -> Tensor:
    """Inverts damped matrices `[B, K, K]` by Newton's iteration, which needs no more than products."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = eye / torch.linalg.matrix_norm(matrix)[:, None, None]
    for _ in range(_INVERSE_STEPS):
        inverse = torch.baddbmm(inverse, inverse @ matrix, inverse, beta=2, alpha=-1)
    return inverse


def _projected_inverse(gram: Tensor, support: Tensor) -> Tensor:
    """Inverts a matrix on the changes of weights within the support `[B, K, 1]` that keep their sum."""
    centred = _project(gram, support)
    size = _trace(centred) + _TINY
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Outside it is the identity, and inside a little more than 0 where samples are copies.
    outside = eye - _project(eye.expand_as(centred), support)
    inverse = torch.linalg.inv_ex(centred / size + outside + torch.finfo(gram.dtype).eps * eye).inverse
    return _project(inverse, support) / size
