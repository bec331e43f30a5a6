"""Figures of explanations, with matplotlib. Frames and words tell examples from counterfactuals, not colour alone."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from timm_memwrap.data import class_names, picture_of, to_picture
from timm_memwrap.explaining.explanation import Explanation, MemorySample
from timm_memwrap.explaining.figures.page import BLUE, GREY, LINE, ORANGE, PALE, Card, Line, Page, percent, short
from timm_memwrap.explaining.figures.pictures import HEAT, aligned, each_class, overlays
from timm_memwrap.explaining.heatmaps import Attribution
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.familiarity import UNFAMILIAR
from timm_memwrap.model import MemoryWrapModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "draw_legend",
    "draw_titles",
    "input_card",
    "plot_explanation",
    "plot_explanations",
    "plot_heatmaps",
    "sample_card",
]

# In inches: between pictures, around the page, and pictures of an input in a grid, a memory sample, either above its
# heatmap, and an input alone.
_GAP, _MARGIN, _INPUT, _SAMPLE, _HEAT, _ALONE = 0.3, 0.25, 1.25, 0.95, 1.2, 1.7


def plot_explanations(
    model: MemoryWrapModel,
    images: Any,
    explanations: Sequence[Explanation] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    path: str | os.PathLike | None = None,
    dataset: Any = None,
    top_k: int = 5,
    dpi: int = 150,
) -> "Figure":
    """Draws a grid: a row per input, with the memory samples that its prediction used, strongest first.

    Where images may have several classes, each that is present has a row.

    Args:
        model: The model that was explained.
        images: What was explained: see `explain`. Float tensors are model inputs, and their normalisation is undone;
            uint8 tensors, PIL images and paths are shown as they are.
        explanations: What `explain` returned for them; `None` to call it.
        labels: True classes of the inputs, if known; not where images may have several.
        path: File to write the figure to, by its suffix a PNG, PDF or SVG; `None` to write none.
        dataset: Where to find the memory samples' pictures by id, if the bank has none: the dataset that it was built
            from, or a mapping from id to image. Without it, they are fetched from the data set on the Hub that
            `push_memory_images` made; a tile without a picture shows the sample's id.
        top_k: How many samples to draw for an input.
        dpi: Resolution of the file.

    Returns:
        The matplotlib figure, which belongs to no pyplot state.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If images, explanations and labels differ in number.
    """
    several, explanations, true = aligned(model, images, explanations, labels, top_k)
    stored, names = stored_images(model, dataset), class_names(model)
    rows = each_class(several, explanations, true)
    columns = max(1, min(top_k, max(len(explanation.samples) for explanation in explanations)))
    left, row_height = _MARGIN + _INPUT + 2.2 * _GAP, _INPUT + 3.4 * LINE + 0.16
    width = left + columns * (_SAMPLE + _GAP) + 0.35 + _MARGIN
    page = Page(max(width, 7.2), 0.5 + len(rows) * row_height + 0.62)
    draw_titles(page, left)
    for row, (image, explanation, label) in enumerate(rows):
        top, x = 0.5 + row * row_height, left
        page.card(_MARGIN, top, _INPUT, to_picture(model, image), input_card(explanation, label, names))
        page.text(left - 1.1 * _GAP, top + _INPUT / 2, "←", size=16, color=GREY, ha="center", va="center")
        drawn = explanation.samples[:columns]
        for sample in drawn:
            picture = picture_of(model, sample.image, sample.id, stored)
            page.card(x, top, _SAMPLE, picture, sample_card(sample))
            x += _SAMPLE + _GAP
        rest = explanation.support_size - len(drawn)
        if rest:
            share = max(0.0, 1 - sum(sample.weight for sample in drawn))
            text = f"+ {rest}\nmore\n{share:.0%}"
            page.text(x - 0.5 * _GAP + 0.05, top + _SAMPLE / 2, text, size=7, color=GREY, va="center")
    draw_legend(page)
    return page.finish(path, dpi)


def plot_explanation(
    model: MemoryWrapModel,
    image: Any,
    explanation: Explanation | None = None,
    label: int | None = None,
    path: str | os.PathLike | None = None,
    dataset: Any = None,
    top_k: int = 5,
    dpi: int = 150,
) -> "Figure":
    """Draws one explanation: examples above, counterfactuals below, and what each sample changed.

    Arguments, return value and errors are as in `plot_explanations`, for one image. Where it may have several classes,
    pass one of `explanation.classes` to draw another than the most probable one.
    """
    one = image.unsqueeze(0) if isinstance(image, Tensor) and image.ndim == 3 else image
    given = None if explanation is None else [explanation]
    several, (explanation, *more), (true, *_) = aligned(model, one, given, None if label is None else [label], top_k)
    if more:
        raise ValueError(f"{1 + len(more)} images for one explanation. Call plot_explanations for several.")
    stored, names = stored_images(model, dataset), class_names(model)
    groups = (
        (f"Examples: the model sees “{short(explanation.class_name, 24)}” in them too", explanation.examples, BLUE),
        ("Counterfactuals: it sees another class in them", explanation.counterfactuals, ORANGE),
    )
    columns = max(1, *(min(top_k, len(samples)) for _, samples, _ in groups))
    left, row_height = _MARGIN + _ALONE + 2 * _GAP, _SAMPLE + 5.3 * LINE + 0.45
    page = Page(max(left + columns * (_SAMPLE + _GAP) + _MARGIN, 7.2), 0.22 + 2 * row_height + 0.55)
    page.card(_MARGIN, 0.45, _ALONE, to_picture(model, several[0]), input_card(explanation, true, names))
    page.text(_MARGIN, 0.45 + _ALONE + 3.6 * LINE, _without_memory(explanation, names), size=7.5, color=GREY)
    for row, (title, samples, color) in enumerate(groups):
        top = 0.22 + row * row_height
        page.text(left, top - 0.08, title, size=9, weight="bold", color=color)
        if not samples:
            page.text(left, top + 0.25, "None among the samples that the prediction used.", size=8, color=GREY)
        for column, sample in enumerate(samples[:columns]):
            card, picture = sample_card(sample), picture_of(model, sample.image, sample.id, stored)
            flips = sample.prediction_without != explanation.prediction
            style = ("black", "bold") if flips else (GREY, "normal")
            card.lines.append(Line(f"without it:\n{_without(explanation, sample, names)}", 7, *style, gap=1.05))
            page.card(left + column * (_SAMPLE + _GAP), top + 0.23, _SAMPLE, picture, card)
    draw_legend(page)
    return page.finish(path, dpi)


def plot_heatmaps(
    model: MemoryWrapModel,
    attributions: Sequence[Attribution],
    labels: Sequence[int] | Tensor | None = None,
    path: str | os.PathLike | None = None,
    dpi: int = 150,
) -> "Figure":
    """Draws what `attribute` found: each input and the memory samples that it read, and below each its heatmap.

    What is not listed is as in `plot_explanations`.

    Args:
        attributions: What `attribute` returned.

    Raises:
        ValueError: If there are no attributions, or labels differ in number.
    """
    images = [attribution.image for attribution in attributions]
    given = [attribution.explanation for attribution in attributions]
    _, explanations, true = aligned(model, images, given, labels)
    names, columns = class_names(model), max(len(explanation.samples) for explanation in explanations)
    left, row_height = _MARGIN + _HEAT + 2.2 * _GAP, 2 * _HEAT + 5.4 * LINE + 0.3
    width = left + columns * (_HEAT + _GAP) + _MARGIN
    page = Page(max(width, 7.6), 0.5 + len(attributions) * row_height + 0.4)
    draw_titles(page, left)
    for row, (attribution, explanation, label) in enumerate(zip(attributions, explanations, true, strict=True)):
        top = 0.5 + row * row_height
        page.text(left - 1.1 * _GAP, top + _HEAT / 2, "←", size=16, color=GREY, ha="center", va="center")
        inputs = (attribution.image, *attribution.memory_images)
        cards = (input_card(explanation, label, names), *map(sample_card, explanation.samples))
        heat = zip(inputs, cards, overlays(model, attribution), attribution.shares, strict=True)
        for column, (image, card, overlay, share) in enumerate(heat):
            x = left + (column - 1) * (_HEAT + _GAP) if column else _MARGIN
            page.card(x, top, _HEAT, to_picture(model, image), card)
            below = Card([Line(f"{share:.0%} of the heat", color=GREY)])
            page.card(x, top + _HEAT + 3.5 * LINE, _HEAT, overlay, below)
    draw_legend(page, heat=True)
    return page.finish(path, dpi)


def input_card(explanation: Explanation, label: int | None, names: list[str]) -> Card:
    """Makes the card of an input: the predicted class, whether it is right if the label is known, and what says so."""
    probability = f" {explanation.probability:.0%}"
    title = explanation.class_name
    if explanation.unfamiliar or explanation.classes:
        title, probability = explanation.title, ""
    lines = [Line(f"{short(title)}{probability}", 9, weight="bold")]
    if not (explanation.present or explanation.classes):
        lines.append(Line("not predicted", 7.5, GREY, gap=1.15))
    if label is not None:
        right = label == explanation.prediction
        true = names[label] if 0 <= label < len(names) else f"class {label}"
        verdict = "✓ right" if right else f"✗ wrong, it is {short(true, 14)}"
        lines.append(Line(verdict, 8, BLUE if right else ORANGE, gap=1.15))
    unlike = explanation.familiarity < UNFAMILIAR
    sure = []
    if explanation.confidence is not None and not explanation.unfamiliar:
        sure = [f"{percent(explanation.confidence)} likely right"]
    known = [f"familiarity {percent(explanation.familiarity)}"] if unlike else []
    if sure or known:
        lines.append(Line(", ".join([*sure, *known]), 7, ORANGE if unlike else GREY, gap=1.05))
    return Card(lines)


def sample_card(sample: MemorySample) -> Card:
    """Makes the card of a memory sample: its weight and the class that the model sees in it."""
    color, mark = (BLUE, "") if sample.is_example else (ORANGE, "≠ ")
    labelled = f"labelled {short(sample.class_name, 14)}" if sample.disputed else ""
    lines = [
        Line(percent(sample.weight), 7.5, color, share=sample.weight),
        Line(f"{mark}{short(sample.predicted_class_name, 15)}", 8, color, gap=0.9),
        Line(labelled, 7, GREY),
    ]
    return Card(lines, short(str(sample.id), 40), color, dashed=not sample.is_example)


def draw_titles(page: Page, left: float) -> None:
    """Writes what stands in the rows: inputs, and from `left` on memory samples."""
    page.text(_MARGIN, 0.14, "Predicted", size=9, weight="bold")
    page.text(left, 0.14, "from these remembered training images, strongest first", size=9, weight="bold")


def draw_legend(page: Page, heat: bool = False) -> None:
    """Draws what the frames mean, and either the bars or the heat."""
    y, box = page.height - 0.42, LINE
    page.frame(_MARGIN, y, box, BLUE, dashed=False)
    page.frame(_MARGIN + 2.6, y, box, ORANGE, dashed=True)
    if heat:
        page.block(_MARGIN + 5.25, y, box, box, facecolor="#{:02x}{:02x}{:02x}".format(*HEAT))
    else:
        page.block(_MARGIN + 5.25, y + 0.035, 0.25, 0.09, facecolor=PALE)
        page.block(_MARGIN + 5.25, y + 0.035, 0.12, 0.09, facecolor=GREY)
    for x, text in (
        (0.25, "example: the model sees the same class"),
        (2.85, "≠ counterfactual: it sees another class"),
        (5.5, "source of the prediction") if heat else (5.57, "share of the evidence"),
    ):
        page.text(_MARGIN + x, y + box / 2, text, size=7.5, va="center")


def _without(explanation: Explanation, sample: MemorySample, names: list[str]) -> str:
    if sample.prediction_without is None:
        return "no class"
    if sample.prediction_without != explanation.prediction:
        return short(names[sample.prediction_without], 15)
    return f"{short(explanation.class_name, 12)} {explanation.probability - sample.influence:.0%}"


def _without_memory(explanation: Explanation, names: list[str]) -> str:
    if explanation.prediction_without_memory is None:
        return "Without its memory\nit could not tell."
    without = short(names[explanation.prediction_without_memory])
    if explanation.prediction_without_memory != explanation.prediction:
        return f"Without its memory\n“{without}”."
    return f"Without its memory\nstill “{without}” ({explanation.probability_without_memory:.0%})."
