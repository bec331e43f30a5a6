"""How well a number ranks: right predictions before wrong ones, known images before unknown ones.

Shapes: N images.
"""

import torch
from torch import Tensor

__all__ = ["area_under_risk_coverage", "auroc", "average_precision", "expected_calibration_error", "fpr_at_95"]


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Computes how often a positive has a higher score than a negative, ties counting half; 0.5 is chance.

    That is the area under the ROC curve (Hanley and McNeil 1982). `None` if all are positive, or all negative.

    Args:
        scores: Scores `[N]`.
        positive: Which are positive, bool `[N]`.
    """
    count = int(positive.sum())
    pairs = count * (len(positive) - count)
    if not pairs:
        return None
    _, place, ties = scores.unique(return_inverse=True, return_counts=True)
    # Equal scores share the mean of their ranks.
    ranks = ties.cumsum(0).double() - (ties - 1).double() / 2
    return float((ranks[place[positive]].sum() - count * (count + 1) / 2) / pairs)


def average_precision(scores: Tensor, positive: Tensor) -> float | None:
    """Computes the mean precision of the images down to each positive, highest score first (AP; higher is better).

    As scikit-learn's and timm's: not interpolated, and equal scores are one threshold. `None` if none is positive.

    Args:
        scores: Scores `[N]`.
        positive: Which are positive, bool `[N]`.
    """
    if not bool(positive.any()):
        return None
    _, place, ties = (-scores).unique(return_inverse=True, return_counts=True)
    found = torch.zeros(len(ties), dtype=torch.float64).index_add_(0, place, positive.double())
    return float((found * found.cumsum(0) / ties.cumsum(0)).sum() / found.sum())


def area_under_risk_coverage(confidence: Tensor, right: Tensor) -> float:
    """Computes the mean share of wrong predictions among the k most confident, over all k (AURC; lower is better).

    Source: Geifman et al. 2019, https://arxiv.org/abs/1805.08206. Among equal confidences the order is not defined, so
    each has the same share of errors.

    Args:
        confidence: Confidences `[N]`, at least one.
        right: Which predictions are right, bool `[N]`.
    """
    _, place, ties = (-confidence).unique(return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(ties), dtype=torch.float64).index_add_(0, place, (~right).double())
    errors = (wrong / ties).repeat_interleave(ties).cumsum(0)
    return float((errors / torch.arange(1, len(errors) + 1)).mean())


def fpr_at_95(scores: Tensor, positive: Tensor) -> float:
    """Computes the share of negatives that reach a threshold which 95 % of the positives reach; lower is better.

    Args:
        scores: Scores `[N]`.
        positive: Which are positive, bool `[N]`: at least one is, and one is not.
    """
    ordered = scores[positive].sort().values
    threshold = ordered[len(ordered) // 20]
    return float((scores[~positive] >= threshold).double().mean())


def expected_calibration_error(probabilities: Tensor, right: Tensor, bins: int = 15) -> float:
    """Computes the mean gap between probabilities `[N]` of predictions and how often they are right `[N]`, by bins."""
    index = (probabilities * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right.double() - probabilities.double())
    return float(gap.abs().sum() / len(right))
