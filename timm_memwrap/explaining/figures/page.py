"""A page to draw figures on, with matplotlib: pictures, frames, bars and text at places given in inches."""

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from timm_memwrap._utils import optional_import, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "LINE", "ORANGE", "PALE", "Card", "Line", "Page", "percent", "short"]

# Okabe and Ito's palette: told apart with any common colour vision, and in grey by their brightness.
BLUE, ORANGE, GREY, PALE = "#0072B2", "#D55E00", "#666666", "#EEEEEE"

# Height of a line, in inches.
LINE = 0.155


class Line(NamedTuple):
    """A line of text below a picture, `gap` lines under the one before; with a share of 1, a bar before the text."""

    text: str
    size: float = 7.5
    color: str = "black"
    weight: str = "normal"
    share: float | None = None
    gap: float = 0.95


class Card(NamedTuple):
    """What stands at a picture: lines below it, the name that stands for a missing one, and the colour of its frame."""

    lines: list[Line]
    name: str = ""
    frame: str | None = None
    dashed: bool = False


class Page:
    """A figure addressed in inches from its top left corner, so that sizes do not depend on the number of rows."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        module = optional_import("matplotlib.figure", extra="plot", what="A figure")
        self.figure = module.Figure(figsize=(width, height), facecolor="white")

    def _box(self, x: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        return x / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height

    def frame(self, x: float, top: float, size: float, color: str, dashed: bool) -> None:
        """Frames a square."""
        style: Any = (0, (3, 1.5)) if dashed else "solid"
        self.block(x, top, size, size, fill=False, edgecolor=color, linewidth=2.2, linestyle=style)

    def block(self, x: float, top: float, width: float, height: float, **style: Any) -> None:
        """Draws a rectangle in matplotlib's `style`."""
        from matplotlib.patches import Rectangle

        left, bottom, *size = self._box(x, top, width, height)
        self.figure.add_artist(Rectangle((left, bottom), *size, transform=self.figure.transFigure, **style))

    def text(self, x: float, top: float, text: str, size: float, color: str = "black", **style: Any) -> None:
        """Writes plain text in matplotlib's `style`, by default to the right of `x` and below `top`."""
        style = {"va": "top", **style, "size": size, "color": color}
        # Class names may come from outside: a dollar sign must not start a formula.
        self.figure.text(x / self.width, 1 - top / self.height, text, parse_math=False, **style)

    def card(self, x: float, top: float, size: float, picture: np.ndarray | None, card: Card) -> None:
        """Draws a picture, or its name if there is none, its frame if it has one, and lines below it."""
        if picture is None:
            self.block(x, top, size, size, facecolor=PALE)
            parts = card.name.replace("/", "/\n").split("\n")
            lines = ["no picture", *(part[i : i + 12] for part in parts for i in range(0, len(part), 12))]
            self.text(x + size / 2, top + size / 2, "\n".join(lines), 6.5, GREY, ha="center", va="center")
        else:
            axes = self.figure.add_axes(self._box(x, top, size, size))
            axes.set_axis_off()
            # Small pictures keep their pixels: smoothed, they would look out of focus.
            axes.imshow(picture, interpolation="nearest" if max(picture.shape[:2]) < 100 else "antialiased")
        if card.frame is not None:
            self.frame(x, top, size, card.frame, card.dashed)
        y = top + size + 0.07 - (card.lines[0].gap * LINE if card.lines else 0)
        for line in card.lines:
            y += line.gap * LINE
            if line.share is None:
                self.text(x, y, line.text, line.size, line.color, weight=line.weight)
            else:
                self.block(x, y, size - 0.36, 0.09, facecolor=PALE)
                self.block(x, y, (size - 0.36) * min(1.0, line.share), 0.09, facecolor=line.color)
                self.text(x + size, y + 0.045, line.text, line.size, ha="right", va="center")

    def finish(self, path: str | os.PathLike | None, dpi: int) -> "Figure":
        """Writes the figure to a file, if there is one, whole or not at all, and returns it."""
        if path is not None:
            with replacing(path) as temporary:
                self.figure.savefig(temporary, dpi=dpi)
        return self.figure


def percent(value: float) -> str:
    """Returns a share in percent, without making a little of it none."""
    return "<1%" if 0 < value < 0.01 else f"{value:.0%}"


def short(text: str, most: int = 18) -> str:
    """Returns text on one line, with an ellipsis in place of what is beyond `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
