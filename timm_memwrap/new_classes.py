"""Rows of a classifier for classes that it was not trained on, computed from samples of them.

Shapes: M samples, R reads, D width of the features, C trained classes, K new ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap.attention import unit

__all__ = ["new_rows"]

# The most that the trained classes may lose to all new ones, as a share of the reads that are right without them: about
# one point of their accuracy. Chosen on other draws of classes than those in hub_configs/README.md.
_LOSS = 0.008
# Of how a row begins, and of how far the fit may take it from there; between 0.3 and 0.7, and 0.0001 and 0.01, little
# changes.
_IMPRINT = 0.5
_PENALTY = 1e-3
_STEPS = 40


def new_rows(
    weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, reads: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Computes rows `[K, D]` and biases `[K]` of new classes, beside those of a trained classifier, which stay.

    A row begins as what the classifier sees in the samples of its class, the mean of its own rows by the probabilities
    that it gives them, and where these samples are: the direction to their mean feature, as imprinting has it (Qi et
    al. 2018, https://arxiv.org/abs/1712.07136), from the mean of the classes that they are taken for. A logistic
    regression of the new rows alone, in which each class counts the same, takes it from there. The biases then are as
    large as the trained classes can bear: they lose less than a hundredth of the reads.

    Args:
        weight: Rows `[C, D]` of the trained classes.
        bias: Their biases `[C]`.
        features: What the classifier sees of the samples in the memory, `[M, D]`.
        labels: Their labels `[M]`, below C + K.
        reads: What it sees of reads of samples of trained classes that it classifies right, `[R, D]`; each was made of
            the other samples, as the reads of new images will be.
        count: Number of new classes K. Each has a sample.
    """
    classes, logits = len(weight), features @ weight.T + bias
    started = _imprint(weight, features, labels, logits, count)
    with torch.inference_mode(False), torch.enable_grad():
        rows = _fit(started.clone(), features.clone(), labels.clone(), logits.clone())
    if not len(reads):
        # There is nothing to lose, so half of the new samples are enough.
        of_new = labels >= classes
        gaps = logits[of_new].amax(dim=1, keepdim=True) - features[of_new] @ rows.T
        return rows, gaps.median(dim=0).values
    gaps = (reads @ weight.T + bias).amax(dim=1, keepdim=True) - reads @ rows.T
    # `torch.quantile` refuses more than 16 million values; here are as many as there are reads.
    return rows, torch.quantile(gaps, _LOSS / count, dim=0)


def _imprint(weight: Tensor, features: Tensor, labels: Tensor, logits: Tensor, count: int) -> Tensor:
    """Returns the rows `[K, D]` that a fit begins with."""
    means = _class_means(unit(features), labels, len(weight) + count)
    taken_for = _class_means(logits.softmax(dim=1), labels, len(weight) + count)[len(weight) :]
    known = torch.bincount(labels, minlength=len(weight))[: len(weight)] > 0
    shares = taken_for * known
    expected = shares @ means[: len(weight)] / shares.sum(dim=1, keepdim=True).clamp(min=1e-12)
    length = (weight - weight.mean(dim=0)).norm(dim=1).mean()
    return taken_for @ weight + _IMPRINT * length * unit(means[len(weight) :] - expected)


def _fit(rows: Tensor, features: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
    """Returns rows `[K, D]` that tell their classes best from the others, near those that it is given."""
    centred = features - features.mean(dim=0)
    scale = centred.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    centred, given = centred / scale, features @ rows.T
    weights = (1.0 / torch.bincount(labels, minlength=logits.shape[1] + len(rows)).clamp(min=1))[labels]
    change = torch.zeros_like(rows, requires_grad=True)
    biases = (logits.amax(dim=1, keepdim=True) - given).amin(dim=0).requires_grad_(True)
    optimizer = torch.optim.LBFGS([change, biases], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with_new = torch.cat([logits, given + centred @ change.T + biases], dim=1)
        error = (F.cross_entropy(with_new, labels, reduction="none") * weights).sum()
        error = error + _PENALTY / 2 * change.square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    return (rows + change / scale).detach()


def _class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the mean of rows `[M, V]` by label, `[classes, V]`; 0 where there are none."""
    sums = values.new_zeros(classes, values.shape[1]).index_add_(0, labels, values)
    return sums / torch.bincount(labels, minlength=classes).clamp(min=1).unsqueeze(1)
