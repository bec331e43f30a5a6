"""Draws what is wrong with a memory, as a figure and as an HTML page: each sample beside what it is compared with."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_memwrap._utils import write_text
from timm_memwrap.data import picture_of
from timm_memwrap.explaining.figures.beside import MEANINGS, Shown, shown_findings
from timm_memwrap.explaining.figures.markup import data_url, template
from timm_memwrap.explaining.figures.page import BLUE, GREY, LINE, ORANGE, Card, Line, Page, short
from timm_memwrap.explaining.findings import KINDS
from timm_memwrap.explaining.report import MemoryReport, SampleUse
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.model import MemoryWrapModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_memory_report", "write_memory_report"]

# In inches: around the page, between pictures, between a sample and those beside it, between findings, and a picture.
_MARGIN, _GAP, _BESIDE, _BETWEEN, _SIZE = 0.25, 0.1, 0.22, 0.4, 0.85
# Pictures of a finding, findings in a line, and the height of a line and of a heading.
_PICTURES, _COLUMNS = 4, 2
_WIDTH = _PICTURES * _SIZE + _BESIDE + (_PICTURES - 2) * _GAP
_HEIGHT, _HEADING = _SIZE + 3.6 * LINE + 0.22, 0.5
# Of a picture on the page, in pixels.
_PIXELS = 192


def plot_memory_report(
    model: MemoryWrapModel,
    report: MemoryReport,
    path: str | os.PathLike | None = None,
    dataset: Any = None,
    data: Any = None,
    top_k: int = 6,
    dpi: int = 150,
) -> "Figure":
    """Draws the surest findings of each kind, each sample beside what it is compared with, and what misleads most.

    What is not listed is as in `plot_explanations`.

    Args:
        model: The model that the report is on.
        report: What `memory_report` returned, for the bank as it is.
        data: The data that the report was made with, for the pictures of leaks; `None` to show their ids.
        top_k: How many findings of each kind to draw.

    Raises:
        ValueError: If the bank has changed since the report.
    """
    found = {kind: rows for kind, rows in shown_findings(model, report, dataset, data, top_k).items() if rows}
    misleading = report.misleading[: _COLUMNS * _PICTURES]
    lines = sum(-(-len(rows) // _COLUMNS) for rows in found.values()) + bool(misleading)
    height = 0.6 + lines * _HEIGHT + (len(found) + bool(misleading)) * _HEADING + 0.4
    page = Page(2 * _MARGIN + _COLUMNS * _WIDTH + (_COLUMNS - 1) * _BETWEEN, height)
    page.text(_MARGIN, 0.14, _summary(report), 8)
    top = 0.5
    for kind, rows in found.items():
        top = _draw_heading(page, top, f"{KINDS[kind]}: {len(report.of_kind(kind)):,}", MEANINGS[kind])
        for i, row in enumerate(rows):
            x = _MARGIN + i % _COLUMNS * (_WIDTH + _BETWEEN)
            _draw_finding(page, x, top + i // _COLUMNS * _HEIGHT, row)
        top += -(-len(rows) // _COLUMNS) * _HEIGHT
    if misleading:
        meaning = "Used more by wrong predictions of the class they support than by right ones: look why."
        top = _draw_heading(page, top, f"Misleading: {len(report.misleading):,}", meaning)
        bank, stored = model.memory_bank, stored_images(model, dataset)
        for i, use in enumerate(misleading):
            thumbnail = None if bank.images is None else bank.images[use.position]
            x = _MARGIN + i * (_SIZE + _GAP)
            page.card(x, top, _SIZE, picture_of(model, thumbnail, use.id, stored), _use_card(use))
    page.text(
        _MARGIN,
        page.height - 0.32,
        "Dashed: the sample in question. Below those beside it: similarity to it.",
        7.5,
        GREY,
    )
    return page.finish(path, dpi)


def write_memory_report(
    model: MemoryWrapModel,
    report: MemoryReport,
    path: str | os.PathLike,
    dataset: Any = None,
    data: Any = None,
    top_k: int = 60,
    title: str = "What is wrong with the memory",
) -> Path:
    """Writes the findings as one HTML file with pictures side by side, and returns its path.

    It has no scripts, and does not let the browser load anything. Class names and ids are shown as text. The file holds
    pictures of the memory, so share it as you would share those. Arguments and errors are as in `plot_memory_report`.
    """
    found = shown_findings(model, report, dataset, data, top_k)
    sections = [
        {
            "kind": kind,
            "title": title_of_kind,
            "meaning": MEANINGS[kind],
            "count": len(report.of_kind(kind)),
            "rows": [_row(row) for row in found[kind]],
        }
        for kind, title_of_kind in KINDS.items()
    ]
    html = template("memory_report.html.jinja").render(
        title=title,
        architecture=model.pretrained_cfg.get("architecture", type(model.backbone).__name__),
        report=report,
        stale=model.memory_is_stale(),
        sections=sections,
        misleading=report.misleading[:top_k],
    )
    return write_text(path, html)


def _row(shown: Shown) -> dict[str, Any]:
    beside = [{**other._asdict(), "picture": _url(other.picture)} for other in shown.beside]
    return {"finding": shown.finding, "picture": _url(shown.picture), "beside": beside}


def _url(picture: Any) -> str | None:
    return None if picture is None else data_url(picture, _PIXELS, "jpeg")


def _summary(report: MemoryReport) -> str:
    text = f"{report.size:,} remembered images."
    if not report.count:
        return text
    return (
        f"{text} {report.wrong:,} of {report.count:,} predictions are wrong, {report.leaked:,} of these images are in "
        f"the memory; {len(report.never_read):,} remembered images were never read."
    )


def _draw_heading(page: Page, top: float, title: str, meaning: str) -> float:
    """Draws a heading, and returns where what is below it begins."""
    page.text(_MARGIN, top, title, 9.5, BLUE, weight="bold")
    page.text(_MARGIN, top + 0.19, meaning, 7.5, GREY)
    return top + _HEADING


def _draw_finding(page: Page, x: float, top: float, shown: Shown) -> None:
    finding = shown.finding
    todo = finding.action if finding.kind != "label" else f"{finding.action} {short(str(finding.target), 16)}"
    lines = [Line(short(finding.class_name, 14), 8, weight="bold"), Line(short(str(finding.id)[-15:], 15), 6.5, GREY)]
    page.card(x, top, _SIZE, shown.picture, Card(lines, short(str(finding.id), 40), ORANGE, dashed=True))
    page.text(x, top + _SIZE + 2.7 * LINE, short(todo, 40), 8, ORANGE, weight="bold")
    x += _SIZE + _BESIDE
    for other in shown.beside:
        differs = other.class_name and other.class_name != finding.class_name
        color = ORANGE if differs else GREY
        lines = [
            Line(short(other.class_name or "in the data", 14), 7.5, color),
            Line(f"{other.similarity:.2f}", 7, GREY),
        ]
        page.card(x, top, _SIZE, other.picture, Card(lines, short(str(other.id), 40)))
        x += _SIZE + _GAP


def _use_card(sample: SampleUse) -> Card:
    """Makes the card of a memory sample with its weight in wrong and in right predictions."""
    lines = [
        Line(short(sample.class_name, 14), 8),
        Line(f"{sample.misleading:.1f} wrong", 7, ORANGE),
        Line(f"{sample.helping:.1f} right", 7, BLUE),
    ]
    return Card(lines, short(str(sample.id), 40), ORANGE, dashed=True)
