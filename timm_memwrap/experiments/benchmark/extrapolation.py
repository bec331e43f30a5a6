"""What is too large to be made is extrapolated from two sizes that are measured."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from timm_memwrap.experiments.timing import Row

__all__ = ["extrapolated", "measured_or_extrapolated"]

# The two are so far apart that noise in the smaller hardly matters, nor that a search may go another way there.
_STEP = 16
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
    the samples that they show. Wall time grows as the process's does, which others on the machine do not disturb. What
    is said of a sample stays.
    """
    found = []
    for few, many in zip(fewer, more, strict=True):
        growth = _growth(few, many, samples)
        cpu = None if many.cpu_milliseconds is None else many.cpu_milliseconds * growth
        milliseconds = many.milliseconds * growth
        found.append(
            replace(many, milliseconds=milliseconds, cpu_milliseconds=cpu, bank_size=samples, extrapolated=True)
        )
    anchors = {(row.what, row.batch_size): row for row in found}
    return [_divided(row, anchors[row.anchor, row.batch_size]) for row in found]


def _growth(few: Row, many: Row, samples: int) -> float:
    """Returns how many times as long a memory of so many samples takes as the larger of two that were measured."""
    assert few.bank_size is not None and many.bank_size is not None
    before, after = few.milliseconds, many.milliseconds
    if few.cpu_milliseconds and many.cpu_milliseconds:
        before, after = few.cpu_milliseconds, many.cpu_milliseconds
    power = math.log(after / before, many.bank_size / few.bank_size)
    if power > _LINEAR_POWER:
        return (samples / many.bank_size) ** power
    slope = max(0.0, after - before) / (many.bank_size - few.bank_size)
    return 1 + slope * (samples - many.bank_size) / after


def _divided(row: Row, anchor: Row) -> Row:
    cpu = row.cpu_milliseconds / anchor.cpu_milliseconds if row.cpu_milliseconds and anchor.cpu_milliseconds else None
    return replace(row, ratio=row.milliseconds / anchor.milliseconds, cpu_ratio=cpu)
