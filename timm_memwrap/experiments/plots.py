"""Draws accuracy by the size of the memory and by what evidence follows, and the time of a read."""

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from timm_memwrap._utils import optional_import
from timm_memwrap.experiments.table import REFERENCE, ComparisonReport, Statistic
from timm_memwrap.experiments.timing import Row

__all__ = ["plot_frontier", "plot_growth", "plot_rows"]

_logger = logging.getLogger(__name__)

# Colours that colour-blind people tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Where a label may stand beside its point, in points, the first choice first.
_BESIDE = [(7, 8), (7, -8), (-7, 8), (-7, -8), (7, 18), (7, -18), (-7, 18), (-7, -18)]
_BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}


def plot_growth(report: ComparisonReport, path: Path) -> Path | None:
    """Draws accuracy by the size of the memory bank, if there are sizes; without matplotlib, logs how to install it."""
    heads = [head for head in report.measures if len(report.growth(head)) > 1]
    if not heads or not _can_draw(path):
        return None
    figure, axes = _axes_by_size((7, 4), "Accuracy by the size of the memory")
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


def plot_frontier(report: ComparisonReport, path: Path) -> Path | None:
    """Draws accuracy by how often a prediction follows an exchanged answer; without matplotlib, does as `plot_growth`.

    It is drawn if two heads have this measure, and there is the reference to compare their accuracy with. A head whose
    query holds no answer, so that the measure does not apply, stands at 0.
    """
    measure, drawn = "follows_exchanged_answer", dict[str, tuple[float, Statistic]]()
    applies = {head: bool(report.values(head, measure)) for head in report.measures}
    for head, by_seed in report.measures.items():
        difference = report.difference(head)
        # A measure that is absent was not taken, as by an earlier version.
        if difference is not None and any(measure in found for found in by_seed.values()):
            drawn[head] = (100 * fmean(report.values(head, measure) or [0.0]), difference)
    if sum(applies[head] for head in drawn) < 2 or not _can_draw(path):
        return None
    figure, axes = _axes((8, 5), "Evidence is chosen by what is seen (left) or by the verdict (right)")
    axes.set_xlabel(
        "predictions that follow when the classifier's best and second class\nare exchanged in the query, %"
    )
    axes.set_ylabel(f"accuracy minus that of {REFERENCE}, points\n(mean and standard deviation over seeds)")
    axes.axhline(0, color="#555555", linestyle="--", linewidth=1, label=f"{REFERENCE}, without a memory")
    axes.margins(0.1)
    labels = []
    for heads, color in zip(_series([head for head in drawn if applies[head]]), cycle(_COLOURS), strict=False):
        option = next(iter(heads)).rpartition("=")[0]
        title = f"{option}, its value at the point" if len(heads) > 1 else None
        _draw_heads(axes, [drawn[head] for head in heads], "o-", color, title)
        labels += [(*drawn[head], text, color) for head, text in heads.items()]
    if without := [head for head in drawn if not applies[head]]:
        color, title = "#555555", "query without an answer to exchange"
        _draw_heads(axes, [drawn[head] for head in without], "D", color, title)
        labels += [(*drawn[head], head, color) for head in without]
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _label(axes, [(x, 100 * difference.mean, text, color) for x, difference, text, color in labels])
    figure.savefig(path, dpi=150)
    return path


def plot_rows(rows: Sequence[Row], path: str | os.PathLike) -> Path:
    """Draws the time of a read by the size of the memory."""
    reads = [row for row in rows if row.part == "read" and row.anchor == "matrix product"]
    if not reads:
        raise ValueError("There is no read to draw. Measure the part 'read' with several bank_sizes.")
    batch_size = max(row.batch_size or 0 for row in reads)
    reads = [row for row in reads if row.batch_size == batch_size]
    figure, axes = _axes_by_size((6.4, 4), f"A read for {batch_size} images, and the matrix product in it")
    styles = {"matrix product": ("#999999", "--", "s"), "exact read": (_COLOURS[0], "-", "o")}
    for what, (color, line, marker) in styles.items():
        points = sorted((row.bank_size or 0, row.milliseconds) for row in reads if row.what == what)
        axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, label=what)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _series(heads: Sequence[str]) -> list[dict[str, str]]:
    """Groups heads that differ in the number that ends their name, in order of it, each with its label."""
    groups: dict[str, dict[float, str]] = {}
    for head in heads:
        option, _, value = head.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            option, number = head, 0.0
        groups.setdefault(option, {})[number] = head
    series = ({head: f"{value:g}" for value, head in sorted(group.items())} for group in groups.values())
    return [labels if len(labels) > 1 else {head: head for head in labels} for labels in series]


def _draw_heads(
    axes: Any, points: Sequence[tuple[float, Statistic]], style: str, color: str, title: str | None
) -> None:
    """Draws heads at their x and their difference in accuracy in points, with an error bar if it has a deviation."""
    x, statistics = zip(*points, strict=True)
    means, errors = [100 * each.mean for each in statistics], [100 * (each.deviation or 0.0) for each in statistics]
    axes.errorbar(x, means, errors, fmt=style, color=color, markersize=5, elinewidth=0.8, linewidth=1.2, label=title)


def _label(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes text in a colour beside points, each where it covers no other text or point if there is such a place."""
    from matplotlib.transforms import Bbox

    # Lays the figure out, so that places on it are known.
    axes.figure.draw_without_rendering()
    places = axes.transData.transform([(x, y) for x, y, *_ in points])
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for x, y, text, color in points:
        style = {"va": "center", "fontsize": 8, "color": color, "bbox": _BEHIND_TEXT}
        for offset in _BESIDE:
            side = "left" if offset[0] > 0 else "right"
            note = axes.annotate(text, (x, y), offset, textcoords="offset points", ha=side, **style)
            box = note.get_window_extent()
            if offset == _BESIDE[-1] or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def _can_draw(path: Path) -> bool:
    if find_spec("matplotlib") is None:
        _logger.warning("%s is not drawn: pip install 'timm-memwrap[plot]'.", path.name)
        return False
    return True


def _axes(size: tuple[float, float], title: str) -> tuple[Any, Any]:
    """Returns a figure and its axes."""
    module = optional_import("matplotlib.figure", extra="plot", what="A plot")
    figure = module.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _axes_by_size(size: tuple[float, float], title: str) -> tuple[Any, Any]:
    """Returns a figure and its axes, with the size of the memory along the x axis."""
    figure, axes = _axes(size, title)
    axes.set_xscale("log")
    axes.set_xlabel("samples in the memory")
    return figure, axes
