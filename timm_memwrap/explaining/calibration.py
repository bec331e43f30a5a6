"""How sure a model may be: the temperature that makes its probabilities fit the data.

Shapes: N images, C classes.
"""

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from timm_memwrap.explaining.inputs import check_model, encoded_batches, evaluating, size_of
from timm_memwrap.model import MemoryWrapModel

__all__ = ["calibrate", "fit_temperature"]

_logger = logging.getLogger(__name__)

# Between these the temperature is searched, by its logarithm.
_LOWEST, _HIGHEST = 0.01, 100.0
_STEPS = 60


def calibrate(model: MemoryWrapModel, data: Any, progress: bool = True) -> float:
    """Sets a model's temperature to the one that gives labelled images the highest likelihood.

    Which class wins and which samples are read does not change; how sure the model is does (temperature scaling,
    Guo et al. 2017, https://arxiv.org/abs/1706.04599, Section 4.2). A memory of training images is surer of new images
    than it should be, since the classifier was fitted to it.

    Args:
        model: A model with a memory bank.
        data: Images that the model was not trained on and its bank does not hold: a dataset or loader of
            `(image, label)`. See `evaluate_explanations`.
        progress: Whether to show a progress bar.

    Returns:
        The temperature, which is now `model.temperature`. With no image classified wrongly there is none that fits
        best, and it stays as it is; a warning says so.

    Raises:
        ValueError: If the bank or the data is empty, or a label is outside `num_classes`.

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
    check_model(model)
    logits, labels = [], []
    with (
        torch.no_grad(),
        evaluating(model),
        tqdm(total=size_of(data), desc="Temperature", unit="img", disable=not progress) as bar,
    ):
        for encoding, targets in encoded_batches(model, data):
            logits.append(model.read_encoding(encoding).logits.float() * model.temperature)
            labels.append(targets)
            bar.update(len(targets))
    if not labels:
        raise ValueError("The data is empty, so there is nothing to calibrate with. Check its path and split.")
    joined, right = torch.cat(logits), torch.cat(labels)
    if bool((joined.argmax(dim=-1) == right).all()):
        _logger.warning(
            "All %d images are classified rightly, which any temperature near 0 fits: it stays at %g. Calibrate with "
            "more images, or harder ones.",
            len(right),
            model.temperature,
        )
        return model.temperature
    model.temperature = fit_temperature(joined, right)
    return model.temperature


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Finds the temperature that minimises the cross-entropy of logits `[N, C]` with labels `[N]`.

    The cross-entropy is convex in the inverse temperature, so a golden-section search over the temperature's logarithm
    finds its minimum. It lies at the end of the range, 0.01 or 100, where the labels are always or never predicted.
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2)
