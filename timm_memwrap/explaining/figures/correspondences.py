"""Figures of correspondences: the same place in an input and in a memory sample bears the same number and colour."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from timm_memwrap.data import batches_of, class_names, to_picture
from timm_memwrap.explaining.correspondences import Box, sample_input
from timm_memwrap.explaining.explanation import Explanation, explain
from timm_memwrap.explaining.figures.page import GREY, LINE, Card, Page
from timm_memwrap.explaining.figures.pictures import MATCHES, aligned
from timm_memwrap.explaining.figures.plots import draw_legend, draw_titles, input_card, sample_card
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.model import MemoryWrapModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_correspondences"]

# In inches: between pictures, around the page, and the pictures.
_GAP, _MARGIN, _INPUT, _PICTURE = 0.3, 0.25, 1.25, 1.75


def plot_correspondences(
    model: MemoryWrapModel,
    images: Any,
    explanations: Sequence[Explanation] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    path: str | os.PathLike | None = None,
    dataset: Any = None,
    top_k: int = 3,
    dpi: int = 150,
) -> "Figure":
    """Draws where inputs and the memory samples that they read look alike: a row per input, a column per sample.

    Pictures are the model's inputs: what the evaluation transform crops is not shown. What is not listed is as in
    `plot_explanations`.

    Args:
        explanations: What `explain` returned for the images with `correspondences` above 0; `None` to call it.
        dataset: Where to find the samples' pictures, as in `explain`.

    Raises:
        ValueError: If there are no correspondences, or images, explanations and labels differ in number.
    """
    if explanations is None:
        explanations = explain(model, images, top_k, correspondences=len(MATCHES), dataset=dataset)
    _, explanations, true = aligned(model, images, explanations, labels, top_k)
    if not any(sample.correspondences for explanation in explanations for sample in explanation.samples):
        raise ValueError("The explanations have no correspondences. Call explain(..., correspondences=5).")
    inputs = torch.cat(batches_of(model, images))
    stored, names = stored_images(model, dataset), class_names(model)
    columns = max(1, min(top_k, max(len(explanation.samples) for explanation in explanations)))
    # Each input stands above each of its samples, so that both can be compared at one look.
    left, row_height = _MARGIN + _INPUT + 1.6 * _GAP, 2 * _PICTURE + 4 * LINE + 0.3
    page = Page(max(left + columns * (_PICTURE + _GAP) + _MARGIN, 7.6), 0.72 + len(inputs) * row_height + 0.4)
    draw_titles(page, left)
    page.text(left, 0.36, "Boxes with the same number: places that look alike to the model", size=8, color=GREY)
    for row, (image, explanation, label) in enumerate(zip(inputs, explanations, true, strict=True)):
        top = 0.72 + row * row_height
        page.card(_MARGIN, top, _INPUT, to_picture(model, image), input_card(explanation, label, names))
        for middle, name in ((top + _PICTURE / 2, "the input"), (top + 1.5 * _PICTURE + 0.08, "remembered")):
            page.text(left - 0.05, middle, name, 7.5, GREY, rotation=90, ha="right", va="center")
        for column, sample in enumerate(explanation.samples[:columns]):
            x, below = left + column * (_PICTURE + _GAP), top + _PICTURE + 0.08
            stored_image = sample_input(model, stored, sample.position, (image.shape[-2], image.shape[-1]))
            page.card(x, top, _PICTURE, to_picture(model, image), Card([]))
            picture = None if stored_image is None else to_picture(model, stored_image)
            page.card(x, below, _PICTURE, picture, sample_card(sample))
            for number, match in enumerate(sample.correspondences, start=1):
                _mark(page, x, top, match.box, number)
                _mark(page, x, below, match.sample_box, number)
    draw_legend(page)
    return page.finish(path, dpi)


def _mark(page: Page, x: float, top: float, box: Box, number: int) -> None:
    """Draws a numbered box on a picture, with a dark edge so that it is seen on any."""
    color, tag = MATCHES[(number - 1) % len(MATCHES)], 0.13
    left, upper, right, lower = (side * _PICTURE for side in box)
    x, top = x + left, top + upper
    for edge, width in (("black", 2.8), (color, 1.6)):
        page.block(x, top, right - left, lower - upper, fill=False, edgecolor=edge, linewidth=width)
    # At the corner, so that it hides little of the place.
    page.block(x - tag / 2, top - tag / 2, tag, tag, facecolor=color, edgecolor="black", linewidth=0.6)
    page.text(x, top + 0.005, str(number), 6.5, ha="center", va="center", weight="bold")
