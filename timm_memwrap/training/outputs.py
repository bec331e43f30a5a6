"""What a training leaves for people and programs beside the model: metrics, learning curves, a summary."""

import csv
import io
import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm_memwrap.files import write_text

__all__ = [
    "CURVES_FILE",
    "METRICS_FILE",
    "SUMMARY_FILE",
    "plot_curves",
    "tensorboard",
    "write_metrics",
    "write_summary",
]

_logger = logging.getLogger(__name__)

METRICS_FILE, SUMMARY_FILE, CURVES_FILE = "metrics.csv", "summary.json", "curves.png"

Row = dict[str, Any]


def write_metrics(rows: list[Row], folder: Path) -> Path:
    """Writes a row for each epoch as CSV, whole or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return write_text(folder / METRICS_FILE, text.getvalue())


def write_summary(summary: dict[str, Any], folder: Path) -> Path:
    """Writes what a training came to as JSON, whole or not at all."""
    return write_text(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def plot_curves(rows: list[Row], folder: Path, memory_accuracy: float | None = None) -> Path | None:
    """Draws loss and accuracy by epoch, or says what is missing to draw them.

    Args:
        rows: A row of metrics for each epoch.
        folder: Where to.
        memory_accuracy: Accuracy through the memory, where the rows are of the plain classifier.
    """
    if find_spec("matplotlib") is None:
        _logger.warning("%s is not drawn: pip install 'timm-memwrap[plot]'.", CURVES_FILE)
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    # Colours that colour-blind people tell apart (Okabe and Ito), and another line style.
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
    path = folder / CURVES_FILE
    figure.savefig(path, dpi=150)
    return path


def tensorboard(folder: Path) -> Callable[[list[Row]], None]:
    """Returns a function that writes the newest row of metrics as TensorBoard events.

    Raises:
        ImportError: If TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("training.tensorboard needs TensorBoard: pip install 'timm-memwrap[tensorboard]'") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(rows: list[Row]) -> None:
        row = rows[-1]
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        writer.flush()

    return write
