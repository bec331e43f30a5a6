"""Figures of explanations, with matplotlib. Frames and words tell examples from counterfactuals, not colour alone."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from timm_memwrap.explaining.explanation import Explanation, MemorySample, aligned, class_names
from timm_memwrap.explaining.heatmaps import HEAT, Attribution, overlays
from timm_memwrap.explaining.inputs import SampleImages, picture_of, to_picture
from timm_memwrap.explaining.page import BLUE, GREY, ORANGE, PALE, Page
from timm_memwrap.explaining.report import MemoryReport, SampleUse
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_explanation", "plot_explanations", "plot_heatmaps", "plot_memory_report"]

# In inches.
_INPUT, _SAMPLE, _GAP, _MARGIN = 1.25, 0.95, 0.3, 0.25
_LINE = 0.155
_HEAT = 1.2


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

    Args:
        model: The model that was explained.
        images: What was explained: see `explain`. Float tensors are model inputs, and their normalisation is undone;
            uint8 tensors, PIL images and paths are shown as they are.
        explanations: What `explain` returned for them; `None` to call it.
        labels: True classes of the inputs, if known.
        path: File to write the figure to, by its suffix a PNG, PDF or SVG; `None` to write none.
        dataset: Where the memory samples' pictures are to be fetched by id, if the bank holds none: the dataset that
            it was built from, or a mapping from id to image. Without, a tile names the sample.
        top_k: How many samples to draw for an input.
        dpi: Resolution of the file.

    Returns:
        The matplotlib figure, which belongs to no pyplot state.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If images, explanations and labels differ in number.
    """
    pictures, explanations, true = _aligned(model, images, explanations, labels, top_k)
    stored = None if dataset is None else SampleImages(model, dataset)
    columns = max(1, min(top_k, max(len(explanation.samples) for explanation in explanations)))
    left = _MARGIN + _INPUT + 2.2 * _GAP
    row_height = _INPUT + 3 * _LINE + 0.12
    width = left + columns * (_SAMPLE + _GAP) + 0.35 + _MARGIN
    page = Page(max(width, 7.2), 0.5 + len(pictures) * row_height + 0.62)
    page.text(_MARGIN, 0.14, "Predicted", size=9, weight="bold")
    page.text(left, 0.14, "from these remembered training images, strongest first", size=9, weight="bold")

    for row, (picture, explanation, label) in enumerate(zip(pictures, explanations, true, strict=True)):
        top = 0.5 + row * row_height
        _draw_input(page, model, _MARGIN, top, picture, explanation, label)
        page.text(left - 1.1 * _GAP, top + _INPUT / 2, "←", size=16, color=GREY, align="center", middle=True)
        for column, sample in enumerate(explanation.samples[:columns]):
            x = left + column * (_SAMPLE + _GAP)
            _draw_sample(page, x, top, _SAMPLE, sample, picture_of(model, sample.image, sample.id, stored))
        drawn = explanation.samples[:columns]
        rest = explanation.support_size - len(drawn)
        if rest:
            share = max(0.0, 1 - sum(sample.weight for sample in drawn))
            x = left + len(drawn) * (_SAMPLE + _GAP) - 0.5 * _GAP + 0.05
            page.text(x, top + _SAMPLE / 2, f"+ {rest}\nmore\n{share:.0%}", size=7, color=GREY, middle=True)
    _draw_legend(page)
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

    Arguments, return value and errors are as in `plot_explanations`, for one image.
    """
    several = image.unsqueeze(0) if isinstance(image, Tensor) and image.ndim == 3 else image
    pictures, (explanation, *more), labels = _aligned(
        model,
        several,
        None if explanation is None else [explanation],
        None if label is None else [label],
        top_k,
    )
    if more:
        raise ValueError(f"{1 + len(more)} images for one explanation. Call plot_explanations for several.")
    stored = None if dataset is None else SampleImages(model, dataset)
    groups = (
        (f"Examples: the model sees “{_short(explanation.class_name, 24)}” in them too", explanation.examples),
        ("Counterfactuals: it sees another class in them", explanation.counterfactuals),
    )
    columns = max(1, *(min(top_k, len(samples)) for _, samples in groups))
    size = 1.7
    left = _MARGIN + size + 2 * _GAP
    row_height = _SAMPLE + 5.3 * _LINE + 0.25
    page = Page(max(left + columns * (_SAMPLE + _GAP) + _MARGIN, 7.2), 0.22 + 2 * (row_height + 0.2) + 0.55)
    _draw_input(page, model, _MARGIN, 0.45, pictures[0], explanation, labels[0], size)
    page.text(_MARGIN, 0.45 + size + 3.6 * _LINE, _without_memory(model, explanation), size=7.5, color=GREY)
    for row, (title, samples) in enumerate(groups):
        top = 0.22 + row * (row_height + 0.2)
        page.text(left, top - 0.08, title, size=9, weight="bold", color=(BLUE, ORANGE)[row])
        if not samples:
            page.text(left, top + 0.25, "None among the samples that the prediction used.", size=8, color=GREY)
        for column, sample in enumerate(samples[:columns]):
            x = left + column * (_SAMPLE + _GAP)
            _draw_sample(page, x, top + 0.23, _SAMPLE, sample, picture_of(model, sample.image, sample.id, stored))
            flips = sample.prediction_without != explanation.prediction
            page.text(
                x,
                top + 0.23 + _SAMPLE + 3.3 * _LINE,
                f"without it:\n{_without(model, explanation, sample)}",
                size=7,
                color="black" if flips else GREY,
                weight="bold" if flips else "normal",
            )
    _draw_legend(page)
    return page.finish(path, dpi)


def plot_memory_report(
    model: MemoryWrapModel,
    report: MemoryReport,
    path: str | os.PathLike | None = None,
    dataset: Any = None,
    top_k: int = 6,
    dpi: int = 150,
) -> "Figure":
    """Draws the memory samples that mislead most, and those whose label the model disputes.

    Args:
        model: The model that the report is on.
        report: What `memory_report` returned, for the bank as it is.
        path: As in `plot_explanations`.
        dataset: As in `plot_explanations`.
        top_k: How many samples of each kind to draw.
        dpi: As in `plot_explanations`.

    Returns:
        The matplotlib figure, which belongs to no pyplot state.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If the bank has changed since the report.
    """
    bank = model.memory_bank
    if [sample.id for sample in report.samples] != bank.ids:
        raise ValueError(
            f"The report is on {len(report.samples)} samples that are not those of {bank!r}. Call memory_report again."
        )
    stored = None if dataset is None else SampleImages(model, dataset)
    groups = (
        (f"Misleading: {len(report.misleading)} of {len(report.samples)} remembered images",
         "Read more by wrong predictions of what they stand for than by right ones: remove the worst, or look at why.",
         report.misleading, ORANGE),
        (f"Disputed: {len(report.disputed)} of {len(report.samples)} remembered images",
         "The model, without the image itself, sees another class in it than its label says: is the label wrong?",
         report.disputed, BLUE),
    )  # fmt: skip
    columns = max(1, *(min(top_k, len(samples)) for _, _, samples, _ in groups))
    row_height = _SAMPLE + 5.4 * _LINE + 0.75
    page = Page(max(_MARGIN + columns * (_SAMPLE + _GAP) + _MARGIN, 6.8), 0.18 + 2 * row_height + 0.5)
    drawn = [*report.misleading[:top_k], *report.disputed[:top_k]]
    most = max((max(sample.misleading, sample.helping) for sample in drawn), default=0.0)
    for row, (title, meaning, samples, color) in enumerate(groups):
        top = 0.18 + row * row_height
        page.text(_MARGIN, top, title, size=9, weight="bold", color=color)
        page.text(_MARGIN, top + 0.19, meaning if samples else "None.", size=7.5, color=GREY)
        for column, sample in enumerate(samples[:top_k]):
            x, y = _MARGIN + column * (_SAMPLE + _GAP), top + 0.45
            thumbnail = None if bank.images is None else bank.images[sample.position]
            _draw_picture(page, x, y, _SAMPLE, sample.id, picture_of(model, thumbnail, sample.id, stored))
            page.frame(x, y, _SAMPLE, color, dashed=row == 0)
            _draw_use(page, x, y + _SAMPLE + 0.07, sample, most)
    y = page.height - 0.52
    for x, width, color, text in (
        (_MARGIN, 0.25, ORANGE, "weight in wrong predictions of its class"),
        (_MARGIN + 2.9, 0.25, BLUE, "weight in right ones"),
    ):
        page.block(x, y + 0.01, width, 0.09, color)
        page.text(x + width + 0.07, y, text, size=7.5)
    page.text(
        _MARGIN,
        y + 0.2,
        f"{report.wrong} of {report.count} predictions are wrong; {len(report.never_read)} remembered images were "
        f"never read.",
        size=7.5,
        color=GREY,
    )
    return page.finish(path, dpi)


def plot_heatmaps(
    model: MemoryWrapModel,
    attributions: Sequence[Attribution],
    labels: Sequence[int] | Tensor | None = None,
    path: str | os.PathLike | None = None,
    dpi: int = 150,
) -> "Figure":
    """Draws what `attribute` found: each input and the memory samples that it read, and below each its heatmap.

    Args:
        model: The model that was explained.
        attributions: What `attribute` returned.
        labels: As in `plot_explanations`.
        path: As in `plot_explanations`.
        dpi: As in `plot_explanations`.

    Returns:
        The matplotlib figure, which belongs to no pyplot state.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there are no attributions, or labels differ in number.
    """
    true: list[int | None] = [None] * len(attributions) if labels is None else [int(label) for label in labels]
    if not attributions or len(true) != len(attributions):
        raise ValueError(
            f"{len(attributions)} attributions and {len(true)} labels. Pass at least one attribution, and one label, "
            f"if any, for each."
        )
    columns = max(len(attribution.explanation.samples) for attribution in attributions)
    left = _MARGIN + _HEAT + 2.2 * _GAP
    row_height = 2 * _HEAT + 5.4 * _LINE + 0.3
    page = Page(max(left + columns * (_HEAT + _GAP) + _MARGIN, 7.6), 0.5 + len(attributions) * row_height + 0.4)
    page.text(_MARGIN, 0.14, "Predicted", size=9, weight="bold")
    page.text(left, 0.14, "from these remembered training images, strongest first", size=9, weight="bold")
    for row, (attribution, label) in enumerate(zip(attributions, true, strict=True)):
        top = 0.5 + row * row_height
        below = top + _HEAT + 3.5 * _LINE
        explanation = attribution.explanation
        _draw_input(page, model, _MARGIN, top, to_picture(model, attribution.image), explanation, label, _HEAT)
        page.text(left - 1.1 * _GAP, top + _HEAT / 2, "←", size=16, color=GREY, align="center", middle=True)
        places = [left + column * (_HEAT + _GAP) for column in range(len(explanation.samples))]
        for x, image, sample in zip(places, attribution.memory_images, explanation.samples, strict=True):
            _draw_sample(page, x, top, _HEAT, sample, to_picture(model, image))
        heat = zip([_MARGIN, *places], overlays(model, attribution), attribution.shares, strict=True)
        for x, picture, share in heat:
            page.picture(x, below, _HEAT, picture)
            page.text(x, below + _HEAT + 0.06, f"{share:.0%} of the heat", size=7.5, color=GREY)
    _draw_heat_legend(page)
    return page.finish(path, dpi)


def _aligned(
    model: MemoryWrapModel,
    images: Any,
    explanations: Sequence[Explanation] | None,
    labels: Sequence[int] | Tensor | None,
    top_k: int,
) -> tuple[list[np.ndarray], list[Explanation], list[int | None]]:
    one_by_one, explanations, true = aligned(model, images, explanations, labels, top_k)
    return [to_picture(model, image) for image in one_by_one], explanations, true


def _name(model: MemoryWrapModel, label: int, most: int = 18) -> str:
    names = class_names(model)
    return _short(names[label] if 0 <= label < len(names) else f"class {label}", most)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _without(model: MemoryWrapModel, explanation: Explanation, sample: MemorySample) -> str:
    if sample.prediction_without is None:
        return "no class"
    if sample.prediction_without != explanation.prediction:
        return _name(model, sample.prediction_without, 15)
    return f"{_short(explanation.class_name, 12)} {explanation.probability - sample.influence:.0%}"


def _without_memory(model: MemoryWrapModel, explanation: Explanation) -> str:
    if explanation.prediction_without_memory is None:
        return "Without its memory\nit could not tell."
    without = _name(model, explanation.prediction_without_memory)
    if explanation.prediction_without_memory == explanation.prediction:
        return f"Without its memory\nstill “{without}” ({explanation.probability_without_memory:.0%})."
    return f"Without its memory\n“{without}”."


def _draw_input(
    page: Page,
    model: MemoryWrapModel,
    x: float,
    top: float,
    picture: np.ndarray,
    explanation: Explanation,
    label: int | None,
    size: float = _INPUT,
) -> None:
    page.picture(x, top, size, picture)
    line = top + size + 0.07
    page.text(x, line, f"{_short(explanation.class_name, 18)} {explanation.probability:.0%}", size=9, weight="bold")
    if label is not None:
        right = label == explanation.prediction
        verdict = "✓ right" if right else f"✗ wrong, it is {_name(model, label, 14)}"
        page.text(x, line + 1.15 * _LINE, verdict, size=8, color=BLUE if right else ORANGE)


def _draw_sample(
    page: Page, x: float, top: float, size: float, sample: MemorySample, picture: np.ndarray | None
) -> None:
    color = BLUE if sample.is_example else ORANGE
    _draw_picture(page, x, top, size, sample.id, picture)
    page.frame(x, top, size, color, dashed=not sample.is_example)
    line = top + size + 0.07
    page.bar(x, line, size, sample.weight, color)
    line += 0.9 * _LINE
    mark = "" if sample.is_example else "≠ "
    page.text(x, line, f"{mark}{_short(sample.predicted_class_name, 15)}", size=8, color=color)
    if sample.label != sample.prediction:
        page.text(x, line + 0.95 * _LINE, f"labelled {_short(sample.class_name, 14)}", size=7, color=GREY)


def _draw_picture(
    page: Page, x: float, top: float, size: float, sample_id: SampleId, picture: np.ndarray | None
) -> None:
    if picture is None:
        page.tile(x, top, size, _short(str(sample_id), 40))
    else:
        page.picture(x, top, size, picture)


def _draw_use(page: Page, x: float, top: float, sample: SampleUse, most: float) -> None:
    """Says what a memory sample is and was used for, with bars of which the longest stands for `most`."""
    page.text(x, top, f"labelled {_short(sample.class_name, 13)}", size=7.5)
    seen = _short(sample.predicted_class_name, 14) if sample.disputed else "the same"
    page.text(x, top + 0.95 * _LINE, f"seen as {seen}", size=7.5, color="black" if sample.disputed else GREY)
    for line, (value, color) in enumerate(((sample.misleading, ORANGE), (sample.helping, BLUE))):
        bar = top + (2.15 + 0.9 * line) * _LINE
        length = _SAMPLE - 0.3
        page.block(x, bar, length, 0.09, PALE)
        page.block(x, bar, length * (value / most if most else 0.0), 0.09, color)
        page.text(x + _SAMPLE, bar + 0.045, f"{value:.1f}", size=7.5, align="right", middle=True)
    page.text(x, top + 4.1 * _LINE, _short(str(sample.id), 17), size=6.5, color=GREY)


def _draw_legend(page: Page) -> None:
    y, box = page.height - 0.42, 0.16
    page.frame(_MARGIN, y, box, BLUE, dashed=False)
    page.text(_MARGIN + 0.25, y + box / 2, "example: the model sees the same class", size=7.5, middle=True)
    page.frame(_MARGIN + 2.6, y, box, ORANGE, dashed=True)
    page.text(_MARGIN + 2.85, y + box / 2, "≠ counterfactual: it sees another class", size=7.5, middle=True)
    page.block(_MARGIN + 5.25, y + 0.035, 0.25, 0.09, PALE)
    page.block(_MARGIN + 5.25, y + 0.035, 0.12, 0.09, GREY)
    page.text(_MARGIN + 5.57, y + box / 2, "share of the evidence", size=7.5, middle=True)


def _draw_heat_legend(page: Page) -> None:
    y, box = page.height - 0.36, 0.16
    page.block(_MARGIN, y, box, box, "#{:02x}{:02x}{:02x}".format(*HEAT))
    page.text(_MARGIN + 0.25, y + box / 2, "where the prediction comes from", size=7.5, middle=True)
    page.frame(_MARGIN + 2.2, y, box, BLUE, dashed=False)
    page.text(_MARGIN + 2.45, y + box / 2, "example: same class to the model", size=7.5, middle=True)
    page.frame(_MARGIN + 4.5, y, box, ORANGE, dashed=True)
    page.text(_MARGIN + 4.75, y + box / 2, "≠ counterfactual: another class to it", size=7.5, middle=True)
