"""Times calls in turn, and shows the measurements as a table."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from timm_memwrap.experiments.table import markdown_table

__all__ = ["Call", "Row", "compare_calls", "measure", "table"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One measurement."""

    part: str  # of the benchmark
    what: str  # of the things compared
    milliseconds: float  # median over rounds
    ratio: float  # median over rounds of the time divided by the anchor's in the same round
    anchor: str
    budget: float | None = None  # largest ratio that the project allows itself
    model: str = ""
    img_size: int | None = None
    batch_size: int | None = None  # images, or queries, at a time
    bank_size: int | None = None  # samples in the memory
    recall: float | None = None  # fraction of the exact weights that an approximate read finds
    agreement: float | None = None  # fraction of queries for which it gives most weight to the same class


def _seconds(call: Call, device: str) -> float:
    """Times one call, with what it leaves to the device."""
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    calls: Mapping[str, Call], rounds: int, device: str = "cpu", clock: Callable[[Call, str], float] = _seconds
) -> dict[str, list[float]]:
    """Times each call once per round, in turn, after a first round that does not count; in milliseconds."""
    times = [{name: 1000 * clock(call, device) for name, call in calls.items()} for _ in range(rounds + 1)]
    return {name: [found[name] for found in times[1:]] for name in calls}


def compare_calls(
    calls: Mapping[str, Call],
    part: str,
    rounds: int,
    device: str = "cpu",
    budgets: Mapping[str, float | None] | None = None,
    clock: Callable[[Call, str], float] = _seconds,
    **setting: Any,
) -> list[Row]:
    """Times calls, and makes a row of each; the first is the anchor that the others are divided by."""
    times, rows = measure(calls, rounds, device, clock), []
    anchor = next(iter(times))
    for what, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times[anchor], strict=True))
        rows.append(Row(part, what, statistics.median(values), ratio, anchor, (budgets or {}).get(what), **setting))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Returns the measurements as a Markdown table."""
    header = ("part", "model", "images", "batch", "memory", "what", "ms", "ratio", "budget or recall")
    lines = [
        (
            row.part,
            row.model,
            "" if row.img_size is None else f"{row.img_size} px",
            "" if row.batch_size is None else str(row.batch_size),
            "" if row.bank_size is None else f"{row.bank_size:,}",
            row.what,
            f"{row.milliseconds:.2f}",
            "1" if row.what == row.anchor else f"{row.ratio:.3f}",
            _remark(row),
        )
        for row in rows
    ]
    return markdown_table(header, lines)


def _remark(row: Row) -> str:
    if row.budget is not None:
        return f"{row.budget:.3g} {'met' if row.ratio <= row.budget else 'MISSED'}"
    return "" if row.recall is None else f"recall {row.recall:.1%}, same class {row.agreement:.0%}"
