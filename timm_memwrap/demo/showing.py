"""What the page shows of a model: markup whose text is escaped, and pictures with captions."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from timm_memwrap.attention import unit, wide
from timm_memwrap.data import class_names, picture_of
from timm_memwrap.demo.visitor import Asked
from timm_memwrap.explaining.explanation import Explanation
from timm_memwrap.explaining.figures.beside import MEANINGS, shown_findings
from timm_memwrap.explaining.figures.html import match_rows
from timm_memwrap.explaining.figures.markup import data_url, template
from timm_memwrap.explaining.figures.page import percent
from timm_memwrap.explaining.figures.pictures import MATCHES
from timm_memwrap.explaining.findings import KINDS
from timm_memwrap.explaining.report import MemoryReport
from timm_memwrap.explaining.verdicts import classes_of_samples
from timm_memwrap.labels import multi_hot
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel

__all__ = [
    "answer",
    "caption",
    "findings",
    "matches",
    "name_of",
    "note",
    "pictures_of",
    "positions_of_class",
    "similar",
]

# Pixels a side.
_PICTURE = 160
# Findings of a kind, and bars of probabilities.
_FINDINGS, _BARS = 24, 3
# Encodings compared at a time.
_ROWS = 2**14

Item = tuple[Image.Image, str]


def answer(asked: Asked, stored: Any) -> str:
    """Returns the prediction for a picture, and what it may be instead, as markup."""
    model, explanation = asked.model, asked.explanation
    probabilities, names = asked.probabilities(), class_names(model)
    top = probabilities.topk(min(_BARS, len(probabilities)))
    bars = [(names[i], value) for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    contenders = [
        {
            "contender": contender,
            "alike": contender == explanation.most_alike,
            "rows": [(sample, _url(model, sample.image, sample.id, stored)) for sample in contender.samples],
        }
        for contender in explanation.contenders
    ]
    return _render(
        "answer.html.jinja",
        explanation=explanation,
        bars=bars,
        left_out=len(asked.left_out),
        familiarity=_familiarity(explanation),
        contenders=contenders,
        several=model.multi_label,
    )


def _familiarity(explanation: Explanation) -> str:
    share = explanation.familiarity
    if share < 0.05:
        return "It looks like nothing that the model remembers: do not rely on the answer."
    if share < 0.25:
        return "It looks rather unlike what the model remembers."
    return "It looks like what the model remembers."


def caption(explanation: Explanation, left_out: list[int], position: int) -> str:
    """Returns what stands below a sample that an answer used."""
    sample = next(sample for sample in explanation.samples if sample.position == position)
    if position in left_out:
        return f"left out: {sample.class_name}"
    return f"{percent(sample.weight)} {sample.class_name}"


def name_of(model: MemoryWrapModel, position: int) -> str:
    """Returns the class names of a sample, and its id."""
    names = [class_names(model)[label] for label in classes_of_samples(model, torch.tensor([position]))[0][0]]
    return f"{', '.join(names) or 'none'} ({model.memory_bank.ids[position]})"


def matches(model: MemoryWrapModel, stored: Any, picture: Any, explanation: Explanation) -> str:
    """Returns the places that a picture has in common with samples, as markup."""
    return _render("matches.html.jinja", matches=match_rows(model, stored, picture, explanation), colors=MATCHES)


def findings(model: MemoryWrapModel, report: MemoryReport, dataset: Any, data: Any) -> str:
    """Returns what a report finds, with pictures, as markup."""
    shown = shown_findings(model, report, dataset, data, _FINDINGS)
    sections = [
        {
            "title": title,
            "meaning": MEANINGS[kind],
            "count": len(report.of_kind(kind)),
            "rows": [
                {
                    "finding": row.finding,
                    "pictures": [(row.finding.class_name, _small(row.picture), row.finding.id)]
                    + [(other.class_name or "in the data", _small(other.picture), other.id) for other in row.beside],
                }
                for row in shown[kind]
            ],
        }
        for kind, title in KINDS.items()
    ]
    never = len(report.never_read) if report.count else None
    return _render("findings.html.jinja", sections=sections, size=report.size, never=never)


def note(text: str, kind: str = "note") -> str:
    """Returns a line of text as markup."""
    return f'<p class="mw-{kind}" role="status">{html.escape(text)}</p>'


def pictures_of(model: MemoryWrapModel, positions: list[int], stored: Any) -> list[Image.Image]:
    """Returns the pictures of samples at positions; where there is none, its name on grey."""
    bank = model.memory_bank
    ids, found = bank.ids, []
    for position in positions:
        thumbnail = None if bank.images is None else bank.images[position]
        picture = picture_of(model, thumbnail, ids[position], stored)
        found.append(_absent(ids[position]) if picture is None else _enlarged(Image.fromarray(picture)))
    return found


def positions_of_class(model: MemoryWrapModel, label: int | None) -> list[int]:
    """Returns the positions of the samples of a class; of all, if it is `None`."""
    _, labels = model.memory_bank.filled()
    if label is None:
        return list(range(len(labels)))
    has = multi_hot(labels, model.num_classes)[:, label] if labels.ndim == 2 else labels == label
    return has.nonzero().flatten().tolist()


@torch.no_grad()
def similar(model: MemoryWrapModel, encoding: Tensor, count: int) -> list[tuple[int, float]]:
    """Returns positions and similarities of the samples whose features are most like those of `[1, E]`."""
    encodings, _ = model.memory_bank.filled()
    width = model.head_hidden_size
    query = unit(wide(encoding)[:, :width])
    parts = [(unit(wide(part)[:, :width]) @ query.to(part.device).T).flatten() for part in encodings.split(_ROWS)]
    best = torch.cat(parts).topk(min(count, len(encodings)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _render(name: str, **values: Any) -> str:
    return template(name, Path(__file__).parent).render(**values)


def _url(model: MemoryWrapModel, thumbnail: Tensor | None, sample_id: SampleId, stored: Any) -> str | None:
    return _small(picture_of(model, thumbnail, sample_id, stored))


def _small(picture: np.ndarray | None) -> str | None:
    return None if picture is None else data_url(picture, _PICTURE, "jpeg")


def _enlarged(image: Image.Image) -> Image.Image:
    # A browser would smooth the few pixels of a small picture.
    factor = _PICTURE // max(image.size)
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image


def _absent(sample_id: SampleId) -> Image.Image:
    image = Image.new("RGB", (_PICTURE, _PICTURE), (224, 224, 224))
    text = "".join(char if char.isascii() and char.isprintable() else "?" for char in str(sample_id))
    lines = ["no picture", *(text[i : i + 22] for i in range(0, min(len(text), 110), 22))]
    ImageDraw.Draw(image).multiline_text((8, 8), "\n".join(lines), fill=(70, 70, 70))
    return image
