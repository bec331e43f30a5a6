"""Figures of contenders: what an input may be, side by side, and which of it the memory says it looks most like."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from timm_memwrap.data import class_names, picture_of, to_picture
from timm_memwrap.explaining.contenders import Contender
from timm_memwrap.explaining.explanation import Explanation
from timm_memwrap.explaining.figures.page import BLUE, GREY, LINE, ORANGE, PALE, Card, Line, Page, percent, short
from timm_memwrap.explaining.figures.pictures import aligned
from timm_memwrap.explaining.figures.plots import input_card
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.model import MemoryWrapModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_contenders"]

# In inches: around the page, between panels, more of it between inputs, around what stands in a panel, between its
# pictures, and the pictures.
_MARGIN, _GAP, _EXTRA, _PADDING, _SPACE, _INPUT, _SAMPLE = 0.25, 0.2, 0.2, 0.12, 0.1, 1.5, 0.85
# Panels in a line, and pictures in a panel.
_PANELS, _COLUMNS = 3, 3
_WIDTH = 2 * _PADDING + _COLUMNS * _SAMPLE + (_COLUMNS - 1) * _SPACE
_HEIGHT = _PADDING + 0.56 + _SAMPLE + 2.6 * LINE
_BLUE_TINT, _ORANGE_TINT = "#E8F1F8", "#FCEBE0"


def plot_contenders(
    model: MemoryWrapModel,
    images: Any,
    explanations: Sequence[Explanation] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    path: str | os.PathLike | None = None,
    dataset: Any = None,
    dpi: int = 150,
) -> "Figure":
    """Draws what each input may be, most probable class first, and the memory samples of it that look most like it.

    The class whose samples look most like the input is marked, in another colour where it is not the predicted one.
    What is not listed is as in `plot_explanations`.

    Raises:
        ValueError: If there are no contenders, or images, explanations and labels differ in number.
    """
    several, explanations, true = aligned(model, images, explanations, labels)
    if not all(explanation.contenders for explanation in explanations):
        raise ValueError("The explanations have no contenders. Call explain(..., contenders=3).")
    stored, names = stored_images(model, dataset), class_names(model)
    panels = min(_PANELS, max(len(explanation.contenders) for explanation in explanations))
    left, first = _MARGIN + _INPUT + 0.35, 0.64
    lines = [-(-len(explanation.contenders) // panels) for explanation in explanations]
    height = first + sum(lines) * (_HEIGHT + _GAP) + len(lines) * _EXTRA + 0.62
    page = Page(max(left + panels * (_WIDTH + _GAP) - _GAP + _MARGIN, 7.6), height)
    page.text(_MARGIN, 0.14, "Predicted", size=9, weight="bold")
    page.text(left, 0.14, "The most probable classes", size=9, weight="bold")
    page.text(left, 0.34, "and the remembered training images of each that look most like the input", 8, GREY)
    top = first
    for image, explanation, label, count in zip(several, explanations, true, lines, strict=True):
        card = input_card(explanation, label, names)
        best = explanation.most_alike
        if best is not None and best.prediction != explanation.prediction:
            card.lines.insert(1, Line(f"but looks more like {short(best.class_name, 12)}", 7.5, ORANGE, gap=1.15))
        page.card(_MARGIN, top, _INPUT, to_picture(model, image), card)
        for i, contender in enumerate(explanation.contenders):
            x, y = left + i % panels * (_WIDTH + _GAP), top + i // panels * (_HEIGHT + _GAP)
            pictures = [picture_of(model, sample.image, sample.id, stored) for sample in contender.samples]
            _draw_panel(page, x, y, contender, pictures, explanation)
        top += count * (_HEIGHT + _GAP) + _EXTRA
    _draw_legend(page)
    return page.finish(path, dpi)


def _draw_panel(
    page: Page, x: float, top: float, contender: Contender, pictures: list[Any], explanation: Explanation
) -> None:
    """Draws a class, its probability, its samples, and whether they look more like the input than those of others."""
    predicted, best = contender.prediction == explanation.prediction, contender == explanation.most_alike
    color, tint = (BLUE, _BLUE_TINT) if predicted else (ORANGE, _ORANGE_TINT)
    page.block(x, top, _WIDTH, _HEIGHT, zorder=-1, facecolor=tint if best else "#F7F7F7")
    if best:
        page.block(x, top, _WIDTH, _HEIGHT, **_edge(predicted))
    inside, left = _WIDTH - 2 * _PADDING, x + _PADDING
    page.text(left, top + 0.1, short(contender.class_name, 22), 10, weight="bold")
    page.text(left + inside, top + 0.1, percent(contender.probability), 10, weight="bold", ha="right")
    page.block(left, top + 0.36, inside, 0.09, facecolor=PALE)
    page.block(left, top + 0.36, inside * contender.probability, 0.09, facecolor=GREY)
    y = top + 0.56
    for i, (sample, picture) in enumerate(zip(contender.samples, pictures, strict=True)):
        card = Card([Line(f"{sample.similarity:.2f}", 8)], short(str(sample.id), 40))
        page.card(left + i * (_SAMPLE + _SPACE), y, _SAMPLE, picture, card)
    if contender.similarity is None:
        page.text(left, y + 0.1, "The memory has no image of this class.", 8, GREY)
        return
    text = f"{'looks most like the input' if best else 'on average'}: {contender.similarity:.3f}"
    page.text(left, y + _SAMPLE + 1.75 * LINE, text, 8, color if best else GREY, weight="bold" if best else "normal")


def _edge(predicted: bool) -> dict[str, Any]:
    """Returns the style of the frame around the most alike class: dashed and orange if it is not the predicted one."""
    style: dict[str, Any] = {"edgecolor": BLUE} if predicted else {"edgecolor": ORANGE, "linestyle": (0, (3, 1.5))}
    return {"fill": False, "linewidth": 2.2, **style}


def _draw_legend(page: Page) -> None:
    y, x = page.height - 0.58, _MARGIN
    for predicted, text, width in (
        (True, "the predicted class looks most like the input", 3.3),
        (False, "another class does: a reason to doubt the prediction", 0.0),
    ):
        page.block(x, y, LINE, LINE, **_edge(predicted))
        page.text(x + 0.25, y + LINE / 2, text, size=7.5, va="center")
        x += width
    page.text(_MARGIN, y + 0.3, "75%", size=7.5, va="center", weight="bold")
    page.text(_MARGIN + 0.32, y + 0.3, "probability of the class", size=7.5, va="center")
    page.text(_MARGIN + 3.3, y + 0.3, "0.75", size=7.5, va="center")
    text = "similarity to the input, from -1 to 1, by what the backbone sees and not by what it predicts"
    page.text(_MARGIN + 3.62, y + 0.3, text, size=7.5, va="center")
