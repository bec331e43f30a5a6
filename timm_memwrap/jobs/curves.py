"""Draws the learning curves of a training."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["plot_curves"]

_logger = logging.getLogger(__name__)


def plot_curves(rows: list[dict[str, Any]], path: Path, memory_accuracy: float | None = None) -> Path | None:
    """Draws loss and accuracy by epoch; without matplotlib, logs how to install it and returns `None`.

    Args:
        rows: A row of metrics for each epoch.
        path: The file.
        memory_accuracy: Accuracy through the memory, if the rows are of the plain classifier.
    """
    if find_spec("matplotlib") is None:
        _logger.warning("%s is not drawn: pip install 'timm-memwrap[plot]'.", path.name)
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    # Colours that colour-blind people tell apart (Okabe and Ito), and different line styles.
    styles: dict[str, dict[str, Any]] = {
        "train": {"color": "#0072B2", "linestyle": "-", "label": "training"},
        "val": {"color": "#D55E00", "linestyle": "--", "label": "validation"},
    }
    marker = "o" if len(rows) < 30 else None
    for axes, metric, title in ((losses, "loss", "Loss"), (accuracies, "accuracy", "Accuracy")):
        for split, style in styles.items():
            points = [(row["epoch"], row[f"{split}_{metric}"]) for row in rows if f"{split}_{metric}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, **style)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    losses.set_ylim(bottom=0)
    accuracies.set_ylim(0, 1.02)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0))
    if memory_accuracy is not None and rows:
        accuracies.plot(
            rows[-1]["epoch"],
            memory_accuracy,
            "D",
            color="#009E73",
            markersize=7,
            label=f"through the memory alone: {memory_accuracy:.1%}",
            clip_on=False,
        )
    for axes in (losses, accuracies):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path
