"""What is too large to be made is extrapolated from two sizes that are measured."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from timm_memwrap.experiments.timing import Row

__all__ = ["extrapolated", "measured_or_extrapolated"]

# The two are so far apart.
_STEP = 4
# What seems to grow as a power of the samples that is not above this is taken for linear: noise looks like that too.
_LINEAR_POWER = 1.25


def measured_or_extrapolated(measure: Callable[[int], list[Row]], samples: int, largest: int) -> list[Row]:
    """Measures a memory of so many samples if it is not too large, and else extrapolates."""
    if samples <= largest:
        return measure(samples)
    return extrapolated(measure(largest // _STEP), measure(largest), samples)


def extrapolated(fewer: Sequence[Row], more: Sequence[Row], samples: int) -> list[Row]:
    """Makes the rows of a larger memory, anchors and all, from those of two smaller ones.

    Times grow along the straight line through both, or, if they clearly grow faster than the samples, as the power of
    the samples that they show. What is said of a sample stays.
    """
    found = []
    for few, many in zip(fewer, more, strict=True):
        milliseconds = _grown(few, many, samples, few.milliseconds, many.milliseconds)
        cpu = None
        if few.cpu_milliseconds is not None and many.cpu_milliseconds is not None:
            cpu = _grown(few, many, samples, few.cpu_milliseconds, many.cpu_milliseconds)
        found.append(
            replace(many, milliseconds=milliseconds, cpu_milliseconds=cpu, bank_size=samples, extrapolated=True)
        )
    anchors = {(row.what, row.batch_size): row for row in found}
    return [_divided(row, anchors[row.anchor, row.batch_size]) for row in found]


def _grown(few: Row, many: Row, samples: int, before: float, after: float) -> float:
    assert few.bank_size is not None and many.bank_size is not None
    power = math.log(after / before, many.bank_size / few.bank_size) if min(before, after) > 0 else 0.0
    if power > _LINEAR_POWER:
        return after * (samples / many.bank_size) ** power
    return after + max(0.0, after - before) * (samples - many.bank_size) / (many.bank_size - few.bank_size)


def _divided(row: Row, anchor: Row) -> Row:
    cpu = row.cpu_milliseconds / anchor.cpu_milliseconds if row.cpu_milliseconds and anchor.cpu_milliseconds else None
    return replace(row, ratio=row.milliseconds / anchor.milliseconds, cpu_ratio=cpu)
