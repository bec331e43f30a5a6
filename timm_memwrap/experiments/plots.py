"""Draws accuracy by the size of the memory, and the time of a read by it."""

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from timm_memwrap._utils import optional_import
from timm_memwrap.experiments.table import REFERENCE, ComparisonReport
from timm_memwrap.experiments.timing import Row

__all__ = ["plot_growth", "plot_rows"]

_logger = logging.getLogger(__name__)

# Colours that colour-blind people tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_growth(report: ComparisonReport, path: Path) -> Path | None:
    """Draws accuracy by the size of the memory bank, if there are sizes; without matplotlib, logs how to install it."""
    heads = [head for head in report.measures if len(report.growth(head)) > 1]
    if not heads:
        return None
    if find_spec("matplotlib") is None:
        _logger.warning("%s is not drawn: pip install 'timm-memwrap[plot]'.", path.name)
        return None
    figure, axes = _axes((7, 4), "Accuracy by the size of the memory")
    for i, head in enumerate(heads):
        rows = report.growth(head)
        first = rows[0]["selection"]
        line = [(row["memory_size"], row["accuracy"]) for row in rows if row["selection"] in (first, "all")]
        axes.plot(*zip(*line, strict=True), marker="os^Dv<>"[i % 7], color=_COLOURS[i % 7], markersize=4, label=head)
    if REFERENCE in report.measures:
        accuracy = fmean(report.values(REFERENCE, "accuracy"))
        axes.axhline(accuracy, color="#555555", linestyle="--", label=REFERENCE)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    return path


def plot_rows(rows: Sequence[Row], path: str | os.PathLike) -> Path:
    """Draws the time of a read by the size of the memory."""
    reads = [row for row in rows if row.part == "read" and row.anchor == "matrix product"]
    if not reads:
        raise ValueError("There is no read to draw. Measure the part 'read' with several bank_sizes.")
    figure, axes = _axes((6.4, 4), f"A read for {reads[0].batch_size} images, and the matrix product in it")
    styles = {"matrix product": ("#999999", "--", "s"), "exact read": (_COLOURS[0], "-", "o")}
    for what, (color, line, marker) in styles.items():
        points = sorted((row.bank_size or 0, row.milliseconds) for row in reads if row.what == what)
        axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, label=what)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _axes(size: tuple[float, float], title: str) -> tuple[Any, Any]:
    """Returns a figure and its axes, with the size of the memory along the x axis."""
    module = optional_import("matplotlib.figure", extra="plot", what="A plot")
    figure = module.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlabel("samples in the memory")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
