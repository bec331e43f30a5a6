"""Writes the metrics of each epoch, as a CSV file and as TensorBoard events."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm_memwrap._utils import optional_import, write_text

__all__ = ["tensorboard", "write_metrics"]

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
    """Returns a function that writes the newest row of metrics as TensorBoard events.

    Raises:
        ImportError: If TensorBoard is not installed.
    """
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
