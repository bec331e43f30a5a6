"""Whether a model has a memory to read: one check and one wording for all that read it."""

import logging
from typing import Any

from timm.utils import unwrap_model

from timm_memwrap.model import MemoryWrapModel

__all__ = ["check_memory", "check_model", "check_single_label", "warn_of_new_classifier"]

_logger = logging.getLogger(__name__)


def check_model(model: Any) -> None:
    """Raises a `ValueError` if `model` is not a Memory Wrap model that can classify."""
    if not isinstance(model, MemoryWrapModel):
        inside = isinstance(unwrap_model(model), MemoryWrapModel)
        cure = "Pass timm.utils.unwrap_model(model)." if inside else "Wrap it: timm_memwrap.wrap(model)."
        raise ValueError(f"{type(model).__name__} is not a Memory Wrap model. {cure}")
    model.check_head()


def check_single_label(model: MemoryWrapModel, what: str) -> None:
    """Raises a `ValueError` if a sample of the model's memory may have several classes, which `what` cannot take."""
    if model.multi_label:
        raise ValueError(
            f"{what} is for classes that exclude each other, but the labels of this memory are multi-hot: a sample may "
            f"have several. Call explain or evaluate_explanations, or build the memory with class indices."
        )


def warn_of_new_classifier(model: MemoryWrapModel) -> None:
    """Warns if the memory is read with a classifier of the backbone's that is as random as it was made."""
    if model.new_classifier is not None and model.new_classifier == model.classifier_fingerprint():
        _logger.warning(
            "The memory is read with the backbone's own classifier, which was made for num_classes=%d and not trained "
            "since: its weights are random. Train it first, or pass read_head='linear' for a new head to train.",
            model.num_classes,
        )


def check_memory(model: Any, stale: str = "warn", rehash: bool = False, whole: bool = True) -> None:
    """Raises a `ValueError` if `model` is not a Memory Wrap model with a memory bank that it can read.

    Args:
        model: The model.
        stale: What to do if the weights have changed since the bank was built: `"warn"` or `"refuse"`.
        rehash: As in `encoder_fingerprint`; for what leaves the process.
        whole: Whether the bank itself is wanted; else an engine may hold the memory.
    """
    check_model(model)
    if model.engine is not None:
        if whole:
            model.engine.check_whole(model.memory_bank)
        if rehash:
            model.encoder_fingerprint(rehash)
        # Of other weights, it finds none.
        model.engine.open(model)
        if not len(model.memory_bank):
            return
    model.check_bank(model.memory_bank.filled()[0], model.memory_bank.largest_label)
    if model.memory_is_stale(rehash):
        text = (
            "The memory bank is stale: the weights have changed since it was built, so its encodings are not theirs. "
            "Call timm_memwrap.build_memory_bank(model, data) again."
        )
        if stale == "refuse":
            raise ValueError(text)
        _logger.warning(text)
