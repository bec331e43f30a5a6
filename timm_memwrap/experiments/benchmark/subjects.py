"""What is measured: backbones, models with a filled memory, and the published layer."""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import timm
from torch import nn

from timm_memwrap.experiments.benchmark.encodings import synthetic_encodings
from timm_memwrap.memory_bank import Provenance
from timm_memwrap.model import MemoryWrapModel

__all__ = ["CLASSES", "PUBLISHED_LIMIT", "PUBLISHED_MEMORY", "backbone", "filled", "missing_of", "published_layer"]

_logger = logging.getLogger(__name__)

CLASSES = 10
# Memory images of the published protocol.
PUBLISHED_MEMORY = 100
# With more samples, the published layer's scores and their sort take too much time and memory.
PUBLISHED_LIMIT = 10_000


def backbone(name: str, img_size: int, classes: int = CLASSES, prefix: str = "", **options: Any) -> Any:
    """Creates a timm model, or with a prefix one with a memory, that takes images of this size."""
    cfg = timm.get_pretrained_cfg(name)
    # Others take images of any size, and know no such argument.
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = img_size
    return timm.create_model(prefix + name, num_classes=classes, **options)


def filled(model: nn.Module, size: int, classes: int = CLASSES) -> MemoryWrapModel:
    """Fills the memory of a model, and puts it into evaluation mode."""
    assert isinstance(model, MemoryWrapModel)
    encodings, labels = synthetic_encodings(size, model.encoding_size, classes, seed=1)
    provenance = Provenance(encoder=model.encoder_fingerprint())
    model.memory_bank.replace(encodings, labels, range(size), provenance=provenance)
    return model.to(next(model.parameters()).device).eval()


def published_layer(width: int, distance: str) -> nn.Module | None:
    """Returns the published layer; `None` if `memorywrap` is not installed."""
    if missing_of("memorywrap"):
        return None
    from memorywrap import MemoryWrapLayer as PublishedLayer

    return PublishedLayer(width, CLASSES, distance=distance).eval()


@cache
def missing_of(*packages: str) -> list[str]:
    """Returns which of these packages cannot be imported, after a line in the log about them the first time."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        _logger.warning("Not installed, so not measured: %s.", ", ".join(missing))
    return missing
