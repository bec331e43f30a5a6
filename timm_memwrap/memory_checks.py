"""Whether a model has a memory to read: one check and one wording for all that read it."""

import logging
from typing import Any

from timm_memwrap.model import MemoryWrapModel

__all__ = ["check_memory", "check_model"]

_logger = logging.getLogger(__name__)


def check_model(model: Any) -> None:
    """Raises a `ValueError` if `model` is not a Memory Wrap model that can classify."""
    if not isinstance(model, MemoryWrapModel):
        raise ValueError(f"{type(model).__name__} is not a Memory Wrap model. Wrap it: timm_memwrap.wrap(model).")
    model.check_head()


def check_memory(model: Any, stale: str = "warn") -> None:
    """Raises a `ValueError` if `model` is not a Memory Wrap model with a memory bank.

    Args:
        model: The model.
        stale: What to do if the weights have changed since the bank was built: `"warn"` or `"refuse"`.
    """
    check_model(model)
    model.memory_bank.filled()
    if model.memory_is_stale():
        text = (
            "The memory bank is stale: the weights have changed since it was built, so its encodings are not theirs. "
            "Call timm_memwrap.build_memory_bank(model, data) again."
        )
        if stale == "refuse":
            raise ValueError(text)
        _logger.warning(text)
