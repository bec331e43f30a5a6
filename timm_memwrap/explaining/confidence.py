"""The probability that a prediction is right: a logistic regression on what the memory and the classifier say of it.

The probability that is read through the memory ranks errors worse than the plain classifier's, since a few samples tell
less of how hard an image is than all logits do. The three together rank them at least as well as either.

Shapes: B inputs, C classes, R classes searched per input, K samples per class, N images, F features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap.explaining.contenders import nearest_samples
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["CONFIDENCE_CLASSES", "class_gap", "confidence_features", "fit_confidence", "log_odds", "read_confidence"]

# The predicted class and the most probable others, of which the most alike is compared with it. As many as `explain`
# shows by default, so that it searches once for both.
CONFIDENCE_CLASSES = 3

# Newton steps that are enough for any data, and the size of one that changes nothing any more.
_STEPS, _SMALLEST = 100, 1e-10
# A feature that varies less tells nothing, and a weight that makes up for that would not fit into half precision.
_LEAST_SPREAD = 1e-4


def confidence_features(model: MemoryWrapModel, readout: MemoryReadout, similarities: Tensor | None = None) -> Tensor:
    """Computes what tells right predictions from wrong ones, `[B, F]` in float64 on the CPU.

    These are the log odds of the predicted class in the read and as the backbone's own classifier sees the input, and
    how much more the input looks like samples of that class than like those of another. A model without a classifier of
    its own has 0 for the second.

    Args:
        model: A model with a memory bank.
        readout: What `model.read` returned.
        similarities: Those of the samples of at least `CONFIDENCE_CLASSES` classes, if they were searched for already:
            see `class_gap`.
    """
    logits = readout.logits.float()
    # In the order of `explain`, which also says which of equal classes is predicted.
    classes = logits.sort(dim=-1, descending=True, stable=True).indices
    if similarities is None:
        similarities, _ = nearest_samples(model, readout.encoding, classes[:, :CONFIDENCE_CLASSES])
    columns = [log_odds(logits, classes[:, 0]), logits.new_zeros(len(logits)), class_gap(similarities)]
    if model.keeps_classifier:
        columns[1] = log_odds(model.own_classifier(readout.encoding).float(), classes[:, 0])
    return torch.stack([column.cpu().double() for column in columns], dim=1)


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """Computes the log odds `[B]` of classes `[B]` by logits `[B, C]`, also where the probability rounds to 0 or 1."""
    index = classes.unsqueeze(1)
    others = logits.scatter(1, index, -torch.inf).logsumexp(dim=-1)
    return logits.gather(1, index).squeeze(1) - others


def class_gap(similarities: Tensor) -> Tensor:
    """Computes the mean similarity of the first class's samples minus that of the most alike other class's, `[B]`.

    It is 0, as for an input that is between both, if there are no samples of the one or of the other.

    Args:
        similarities: Similarities `[B, R, K]` of the nearest samples of each class, `-inf` where it has fewer. Classes
            beyond the first `CONFIDENCE_CLASSES` play no part.
    """
    similarities = similarities[:, :CONFIDENCE_CLASSES]
    found = similarities.isfinite()
    alike = similarities.masked_fill(~found, 0.0).sum(dim=-1) / found.sum(dim=-1)
    alike = alike.masked_fill(~found.any(dim=-1), -torch.inf)
    gap = alike[:, 0] - alike[:, 1:].amax(dim=-1)
    return gap.masked_fill(~gap.isfinite(), 0.0)


def fit_confidence(features: Tensor, right: Tensor) -> Tensor:
    """Fits a logistic regression, and returns its intercept and weights `[1 + F]`.

    It maximises the likelihood, with a standard normal prior of the weights of standardised features: of data that it
    can separate, the weights stay finite. They are found by Newton's method, and are those of the features as given.

    Args:
        features: Features `[N, F]`.
        right: Which predictions are right, bool `[N]`. Some are and some are not.
    """
    features, target = features.double(), right.to(features.device, torch.float64)
    mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
    varies = spread > _LEAST_SPREAD
    scaled = (features - mean) / spread.where(varies, 1.0) * varies
    inputs = F.pad(scaled, (1, 0), value=1.0)
    prior = F.pad(torch.ones_like(mean), (1, 0))
    fitted = torch.zeros_like(prior)

    def loss(weights: Tensor) -> Tensor:
        logits = inputs @ weights
        return (F.softplus(logits) - target * logits).sum() + (prior * weights.square()).sum() / 2

    for _ in range(_STEPS):
        expected = (inputs @ fitted).sigmoid()
        slope = inputs.T @ (expected - target) + prior * fitted
        curvature = (inputs.T * (expected * (1 - expected))) @ inputs + prior.diag()
        step = torch.linalg.solve(curvature, slope)
        # A full step may overshoot where the curvature changes.
        while loss(fitted - step) > loss(fitted):
            step = step / 2
        fitted = fitted - step
        if float(step.abs().max()) < _SMALLEST:
            break
    weights = fitted[1:] / spread.where(varies, 1.0) * varies
    return torch.cat([fitted[:1] - (weights * mean).sum(), weights])


def read_confidence(
    model: MemoryWrapModel, readout: MemoryReadout, similarities: Tensor | None = None
) -> Tensor | None:
    """Computes the probability `[B]` that a prediction is right; `None` until `calibrate` has fitted it.

    Arguments are as in `confidence_features`.
    """
    coefficients = model.calibration.confidence.cpu().double()
    if not coefficients.any():
        return None
    features = confidence_features(model, readout, similarities)
    return (coefficients[0] + features @ coefficients[1:]).sigmoid()
