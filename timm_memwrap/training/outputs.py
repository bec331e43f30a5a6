"""What a training leaves for people to follow it by: a CSV file, TensorBoard events and learning curves."""

import csv
import io
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm_memwrap._utils import optional_import, write_text

__all__ = ["plot_curves", "tensorboard", "write_metrics"]

_logger = logging.getLogger(__name__)

Row = dict[str, Any]


def write_metrics(rows: list[Row], folder: Path) -> Path:
    """Writes a row for each epoch to `metrics.csv`, whole or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return write_text(folder / "metrics.csv", text.getvalue())


def tensorboard(folder: Path) -> Callable[[list[Row]], None]:
    """Returns a function that writes the newest row of metrics as TensorBoard events."""
    optional_import("tensorboard", extra="tensorboard", what="training.tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(rows: list[Row]) -> None:
        row = rows[-1]
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        writer.flush()

    return write


def plot_curves(rows: list[Row], path: Path, memory_accuracy: float | None = None) -> Path | None:
    """Draws loss and accuracy by epoch, and a mark for the accuracy through the memory of a model that had none.

    Without matplotlib, it logs how to install it and returns `None`.
    """
    if find_spec("matplotlib") is None:
        _logger.warning("%s is not drawn: pip install 'timm-memwrap[plot]'.", path.name)
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    # Colours that colour-blind people tell apart (Okabe and Ito), and different line styles.
    splits = (("train", "training", "#0072B2", "-"), ("val", "validation", "#D55E00", "--"))
    marker = "o" if len(rows) < 30 else None
    for axes, metric in ((losses, "loss"), (accuracies, "accuracy")):
        for split, label, color, line in splits:
            points = [(row["epoch"], row[f"{split}_{metric}"]) for row in rows if f"{split}_{metric}" in row]
            if points:
                style = {"marker": marker, "markersize": 3, "label": label, "color": color, "linestyle": line}
                axes.plot(*zip(*points, strict=True), **style)
        axes.set_title(metric.capitalize(), loc="left", fontweight="bold")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    losses.set_ylim(bottom=0)
    accuracies.set_ylim(0, 1.02)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0))
    if memory_accuracy is not None and rows:
        label = f"through the memory alone: {memory_accuracy:.1%}"
        style = {"marker": "D", "markersize": 7, "label": label, "color": "#009E73", "linestyle": "", "clip_on": False}
        accuracies.plot(rows[-1]["epoch"], memory_accuracy, **style)
    for axes in (losses, accuracies):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path
