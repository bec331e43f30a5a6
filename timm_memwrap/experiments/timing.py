"""Times calls in turn, and shows the measurements as a table."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from timm_memwrap.experiments.table import markdown_table

__all__ = ["Call", "Clock", "Row", "Seconds", "clock", "compare_calls", "compare_times", "measure", "table"]

Call = Callable[[], Any]


class Seconds(NamedTuple):
    """How long a call took."""

    wall: float
    process: float | None  # of all threads; None on a device, which does its work outside the process


Clock = Callable[[Call, str], Seconds]


@dataclass(frozen=True)
class Row:
    """One measurement."""

    part: str  # of the benchmark
    what: str  # of the things compared
    milliseconds: float  # wall time, median over rounds
    ratio: float  # median over rounds of the wall time divided by the anchor's in the same round
    anchor: str
    budget: float | None = None  # largest ratio that the project allows itself
    model: str = ""
    img_size: int | None = None
    batch_size: int | None = None  # images, or queries, at a time
    bank_size: int | None = None  # samples in the memory
    recall: float | None = None  # fraction of the exact weights that an approximate read finds
    agreement: float | None = None  # fraction of queries for which it gives most weight to the same class
    cpu_milliseconds: float | None = None  # process time, as milliseconds and ratio; None where it says nothing
    cpu_ratio: float | None = None
    classes: int | None = None
    width: int | None = None  # of an encoding
    bytes_per_sample: float | None = None  # on the disk if it is about saving, else in memory
    peak_ratio: float | None = None  # most memory in use on the way, divided by what stays in use
    extrapolated: bool = False  # from measurements of fewer samples

    @property
    def meets_budget(self) -> bool | None:
        """Whether the ratio is within the budget: that of process time if there is one, as others use the machine."""
        judged = self.ratio if self.cpu_ratio is None else self.cpu_ratio
        return None if self.budget is None else judged <= self.budget


def clock(call: Call, device: str) -> Seconds:
    """Times one call, with what it leaves to the device."""
    start, started = time.perf_counter(), time.process_time()
    call()
    if device == "cpu":
        return Seconds(time.perf_counter() - start, time.process_time() - started)
    torch.accelerator.synchronize()
    return Seconds(time.perf_counter() - start, None)


def measure(
    calls: Mapping[str, Call], rounds: int, device: str = "cpu", clock: Clock = clock
) -> dict[str, list[Seconds]]:
    """Times each call once per round, in turn, after a first round that does not count."""
    times = [{name: clock(call, device) for name, call in calls.items()} for _ in range(rounds + 1)]
    return {name: [found[name] for found in times[1:]] for name in calls}


def compare_calls(
    calls: Mapping[str, Call],
    part: str,
    rounds: int,
    device: str = "cpu",
    budgets: Mapping[str, float | None] | None = None,
    clock: Clock = clock,
    **setting: Any,
) -> list[Row]:
    """Times calls, and makes a row of each; the first is the anchor that the others are divided by."""
    return compare_times(measure(calls, rounds, device, clock), part, budgets, **setting)


def compare_times(
    times: Mapping[str, Sequence[Seconds]], part: str, budgets: Mapping[str, float | None] | None = None, **setting: Any
) -> list[Row]:
    """Makes a row of each thing that was timed, as `compare_calls` does."""
    rows = []
    anchor = next(iter(times))
    for what, values in times.items():
        milliseconds, ratio = _medians([each.wall for each in values], [each.wall for each in times[anchor]])
        row = Row(part, what, milliseconds, ratio, anchor, (budgets or {}).get(what), **setting)
        own, others = ([each.process for each in times[name] if each.process is not None] for name in (what, anchor))
        # A call may be shorter than the resolution of the process's clock.
        if own and all(others):
            milliseconds, ratio = _medians(own, others)
            row = replace(row, cpu_milliseconds=milliseconds, cpu_ratio=ratio)
        rows.append(row)
    return rows


def _medians(seconds: Sequence[float], anchor: Sequence[float]) -> tuple[float, float]:
    """Returns the median in milliseconds, and that of the ratios to the anchor in the same round."""
    ratios = [a / b for a, b in zip(seconds, anchor, strict=True)]
    return 1000 * statistics.median(seconds), statistics.median(ratios)


def table(rows: Sequence[Row]) -> str:
    """Returns the measurements as a Markdown table."""
    header = ("part", "model", "images", "batch", "memory", "what", "ms", "ratio", "CPU ms", "CPU ratio", "remarks")
    return markdown_table(header, [_line(row) for row in rows])


def _line(row: Row) -> tuple[str, ...]:
    return (
        row.part,
        row.model,
        "" if row.img_size is None else f"{row.img_size} px",
        "" if row.batch_size is None else str(row.batch_size),
        _memory(row),
        row.what,
        _milliseconds(row.milliseconds),
        "1" if row.what == row.anchor else f"{row.ratio:.3f}",
        "" if row.cpu_milliseconds is None else _milliseconds(row.cpu_milliseconds),
        "" if row.cpu_ratio is None else "1" if row.what == row.anchor else f"{row.cpu_ratio:.3f}",
        ", ".join(_remarks(row)),
    )


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _memory(row: Row) -> str:
    if row.bank_size is None:
        return ""
    width = "" if row.width is None else f" of {row.width}"
    classes = "" if row.classes is None else f", {row.classes:,} classes"
    return f"{row.bank_size:,}{width}{classes}"


def _remarks(row: Row) -> list[str]:
    remarks = []
    if row.budget is not None:
        remarks.append(f"{row.budget:.4g} {'met' if row.meets_budget else 'MISSED'}")
    if row.recall is not None:
        remarks.append(f"recall {row.recall:.1%}, same class {row.agreement:.0%}")
    if row.bytes_per_sample is not None:
        remarks.append(f"{row.bytes_per_sample:,.0f} bytes a sample")
    if row.peak_ratio is not None:
        remarks.append(f"peak {row.peak_ratio:.2f} of what stays")
    if row.extrapolated:
        remarks.append("extrapolated")
    return remarks
