"""Measures what a memory costs, beside the plain backbone and the published layer, as timm's `benchmark.py` does.

All that is compared runs in one process, in turn within each round, and what counts is the median over rounds of the
ratio within a round: machines differ from each other, and from one minute to the next. On a CPU that others use, ratios
of process time are the ones to trust; wall time says what one waits for.
"""

import logging
from collections.abc import Callable
from typing import Any

from timm_memwrap._utils import check_choice
from timm_memwrap.experiments.benchmark.compiling import measure_compiled, measure_onnx
from timm_memwrap.experiments.benchmark.disk import measure_pushing, measure_saving
from timm_memwrap.experiments.benchmark.explaining import measure_explaining
from timm_memwrap.experiments.benchmark.importing import measure_importing
from timm_memwrap.experiments.benchmark.inference import measure_inference
from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.benchmark.reading import measure_reading
from timm_memwrap.experiments.benchmark.sizes import measure_sizes
from timm_memwrap.experiments.benchmark.stateless import measure_stateless
from timm_memwrap.experiments.benchmark.training import measure_training
from timm_memwrap.experiments.timing import Row

__all__ = ["PARTS", "benchmark"]

_logger = logging.getLogger(__name__)

PARTS: dict[str, Callable[[Options], list[Row]]] = {
    "inference": measure_inference,
    "compiled": measure_compiled,
    "onnx": measure_onnx,
    "read": measure_reading,
    "stateless": measure_stateless,
    "sizes": measure_sizes,
    "training": measure_training,
    "explain": measure_explaining,
    "import": measure_importing,
    "save": measure_saving,
    "push": measure_pushing,
}


def benchmark(*args: Any, **options: Any) -> list[Row]:
    """Measures what a memory costs.

    Args:
        *args: As of Options.
        **options: As of Options.

    Raises:
        ValueError: If a part or an option is not valid.
    """
    chosen = Options(*args, **options)
    # All but the push, which needs a Hub.
    parts = chosen.parts or list(PARTS)[:-1]
    for part in parts:
        check_choice("part", part, PARTS)
    rows = list[Row]()
    for part, measure in PARTS.items():
        if part in parts:
            _logger.info("Measuring %s", part)
            rows += measure(chosen)
    return rows
