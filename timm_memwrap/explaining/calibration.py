"""Makes a model's probabilities and its familiarity fit images that it was not trained on.

Shapes: N images, C classes.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from timm_memwrap.engines import changes
from timm_memwrap.explaining.confidence import confidence_features, fit_confidence, log_odds
from timm_memwrap.explaining.nearby import nearby
from timm_memwrap.explaining.reading import encodings_of, snapshot
from timm_memwrap.familiarity import fit_reference
from timm_memwrap.labels import present, probabilities
from timm_memwrap.model import MemoryWrapModel

__all__ = ["calibrate", "fit_temperature"]

_logger = logging.getLogger(__name__)

# The range that is searched, and in how many halvings of its logarithm.
_LOWEST, _HIGHEST, _STEPS = 0.01, 100.0, 60


def calibrate(model: MemoryWrapModel, data: Any, progress: bool = True) -> float:
    """Fits a model's temperature, its confidence and the familiarity of its inputs to labelled images.

    The temperature becomes the one that maximises their likelihood, and `explain` then says how likely a prediction is
    right, and how familiar an input is by where it stands among these images.

    Predictions and the samples they read do not change, only their probabilities do (temperature scaling, Guo et al.
    2017, https://arxiv.org/abs/1706.04599, Section 4.2). With a memory of training images a model is overconfident on
    new images, since the classifier was fitted to the memory.

    `Explanation.confidence` is the probability that a prediction is right, by a logistic regression on the log odds of
    the predicted class, in the read and as the backbone's own classifier sees the input, and on how much more the input
    looks like samples of that class than like those of another. It ranks errors at least as well as the plain
    classifier does, which the probabilities alone do not; of fewer than about 400 images, it may not. Where images may
    have several classes it is not fitted, and the temperature is that of all classes together.

    Args:
        model: A model with a memory bank.
        data: As in `evaluate_explanations`, of images that the model was not trained on: some hundreds at least, and
            of the kind that it is to be used for.
        progress: Whether to show a progress bar.

    Returns:
        The temperature, now `model.temperature`. All is left unchanged, with a warning, if no prediction is wrong; if
        none is right, only the confidence is not fitted.

    Raises:
        ValueError: If the bank or the data is empty, a label is outside `num_classes`, or the bank changes meanwhile.

    Example:
        ```python
        >>> import timm, timm_memwrap, torch
        >>> model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=2))
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 2)
        >>> bank = timm_memwrap.build_memory_bank(model, data, size=4, progress=False)
        >>> timm_memwrap.calibrate(model, data, progress=False) == model.temperature
        True

        ```
    """
    bank, model = model.memory_bank, snapshot(model, whole=False)
    with encodings_of(model, data, "Calibration", progress) as batches:
        parts = []
        for encoding, targets in batches:
            near = nearby(model, encoding)
            readout = near.read(encoding)
            features = torch.zeros(len(targets), 0) if near.multi_label else confidence_features(near, readout)
            parts.append((readout.logits.float() * model.temperature, features, readout.remainder, targets))
    logits, features, remainders, labels = map(torch.cat, zip(*parts, strict=True))
    if bank.encodings is not model.memory_bank.encodings:
        raise ValueError(
            "The memory bank changed while its model was calibrated, so that what was fitted is of other samples. Call "
            "calibrate again."
        )
    reference = fit_reference(model, remainders)
    if len(bank):
        bank.set_reference(reference)
    else:
        assert model.engine is not None
        changes.describe(model.engine, model, reference=reference)
    right = (present(logits) == labels.bool()).all(dim=1) if model.multi_label else logits.argmax(dim=-1) == labels
    if bool(right.all()):
        _logger.warning(
            f"All {len(labels)} images are classified correctly, which any temperature near 0 fits, so it stays at "
            f"{model.temperature:g}. Calibrate with more images, or harder ones."
        )
    else:
        model.temperature = fit_temperature(logits, labels)
        if bool(right.any()) and not model.multi_label:
            # As `explain` will see them, at the new temperature.
            features[:, 0] = log_odds(logits / model.temperature, logits.argmax(dim=-1)).cpu()
            model.calibration.confidence.copy_(fit_confidence(features, right.cpu()))
    return model.temperature


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Finds the temperature that minimises the cross-entropy of logits `[N, C]` with labels.

    Of class indices `[N]` it is that of the softmax, of multi-hot labels `[N, C]` the mean binary one. It is an end of
    the range, 0.01 or 100, if the labels are always or never predicted.
    """
    logits, several = logits.double(), labels.ndim == 2
    of_labels = (logits * labels).sum(dim=1) if several else logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        expected = (probabilities(logits / math.exp(middle), several) * logits).sum(dim=-1)
        # The cross-entropy is convex in the inverse temperature, and this is its slope: above 0, that is too large.
        low, high = (middle, high) if float((expected - of_labels).mean()) > 0 else (low, middle)
    return math.exp((low + high) / 2)
