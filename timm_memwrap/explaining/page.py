"""A page to draw figures on, with matplotlib: pictures, frames, bars and text at places given in inches."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "ORANGE", "PALE", "Page"]

# Okabe and Ito's palette: told apart with any common colour vision, and in grey by their brightness.
BLUE, ORANGE, GREY, PALE = "#0072B2", "#D55E00", "#666666", "#EEEEEE"


class Page:
    """A figure addressed in inches from its top left corner, so that sizes do not depend on the number of rows."""

    def __init__(self, width: float, height: float) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Figures need matplotlib: pip install 'timm-memwrap[plot]'.") from error
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")

    def _axes(self, x: float, top: float, width: float, height: float) -> "Axes":
        box = (x / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.set_axis_off()
        return axes

    def picture(self, x: float, top: float, size: float, picture: np.ndarray) -> None:
        """Shows an array `[H, W, 3]` in a square."""
        axes = self._axes(x, top, size, size)
        # Few pixels are shown as such: smoothed, they would look like a blur of the camera.
        axes.imshow(picture, interpolation="nearest" if max(picture.shape[:2]) < 100 else "antialiased")

    def tile(self, x: float, top: float, size: float, text: str) -> None:
        """Draws what stands for a picture that is not there."""
        self.block(x, top, size, size, PALE)
        lines = [line[i : i + 12] for line in text.replace("/", "/\n").split("\n") for i in range(0, len(line), 12)]
        label = "\n".join(["no picture", *lines])
        self.text(x + size / 2, top + size / 2, label, size=6.5, color=GREY, align="center", middle=True)

    def frame(self, x: float, top: float, size: float, color: str, dashed: bool) -> None:
        """Frames a square."""
        style: Any = (0, (3, 1.5)) if dashed else "solid"
        self._rectangle(x, top, size, size, fill=False, edgecolor=color, linewidth=2.2, linestyle=style)

    def block(self, x: float, top: float, width: float, height: float, color: str) -> None:
        """Fills a rectangle."""
        self._rectangle(x, top, width, height, facecolor=color)

    def _rectangle(self, x: float, top: float, width: float, height: float, **style: Any) -> None:
        from matplotlib.patches import Rectangle

        corner = (x / self.width, 1 - (top + height) / self.height)
        size = (width / self.width, height / self.height)
        self.figure.add_artist(Rectangle(corner, *size, transform=self.figure.transFigure, **style))

    def bar(self, x: float, top: float, width: float, share: float, color: str) -> None:
        """Draws a share of 1 as a bar with its number behind it."""
        length = width - 0.36
        self.block(x, top, length, 0.09, PALE)
        self.block(x, top, length * min(1.0, share), 0.09, color)
        number = f"{share:.0%}" if share >= 0.01 else "<1%"
        self.text(x + width, top + 0.045, number, size=7.5, align="right", middle=True)

    def text(
        self,
        x: float,
        top: float,
        text: str,
        size: float,
        color: str = "black",
        weight: str = "normal",
        align: str = "left",
        middle: bool = False,
    ) -> None:
        """Writes text as it is, from `x` on or centred there, below `top` or in its middle."""
        # Class names are a stranger's: a dollar sign must not start a formula.
        self.figure.text(
            x / self.width, 1 - top / self.height, text, size=size, color=color, weight=weight, ha=align,
            va="center" if middle else "top", parse_math=False,
        )  # fmt: skip

    def finish(self, path: str | os.PathLike | None, dpi: int) -> "Figure":
        """Writes the figure, whole or not at all."""
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".plot-") as folder:
                temporary = Path(folder) / path.name
                self.figure.savefig(temporary, dpi=dpi)
                os.replace(temporary, path)
        return self.figure
