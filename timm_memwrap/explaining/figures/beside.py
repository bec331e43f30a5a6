"""Findings about memory samples with the pictures that a person compares: the sample, and those beside it."""

from typing import Any, NamedTuple

import numpy as np

from timm_memwrap.data import SampleImages, class_names, picture_of
from timm_memwrap.explaining.findings import KINDS, Finding
from timm_memwrap.explaining.report import MemoryReport
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel

__all__ = ["MEANINGS", "Beside", "Shown", "shown_findings"]

MEANINGS = {
    "label": "Its neighbours do not share its label, its copies left out: is the label wrong?",
    "duplicate": "The same picture is in the memory again: keep one, with the right label.",
    "leak": "The same picture is in the data that the model is evaluated with, so the result is too good.",
    "out_of_place": "It is unlike its class and unlike everything else: does it belong here?",
}


class Beside(NamedTuple):
    """A sample to look at beside another; without a class if it is one of the data."""

    id: SampleId
    class_name: str
    similarity: float
    picture: np.ndarray | None


class Shown(NamedTuple):
    """A finding with pictures."""

    finding: Finding
    picture: np.ndarray | None
    beside: list[Beside]


def shown_findings(
    model: MemoryWrapModel, report: MemoryReport, dataset: Any, data: Any, top_k: int
) -> dict[str, list[Shown]]:
    """Returns the surest `top_k` findings of each kind with their pictures.

    Args:
        model: The model that the report is on.
        report: What `memory_report` returned, for the bank as it is.
        dataset: Where to find pictures of the memory that the bank does not hold, as in `plot_explanations`.
        data: The data that the report was made with, for the pictures of leaks; `None` to show their ids.
        top_k: How many of each kind.

    Raises:
        ValueError: If the bank has changed since the report.
    """
    bank, names = model.memory_bank, class_names(model)
    ids, labels = bank.ids, bank.filled()[1].tolist()
    about = [(finding.position, finding.id) for finding in report.findings]
    about += [(use.position, use.id) for use in report.samples]
    if report.size != len(ids) or any(ids[position] != sample_id for position, sample_id in about):
        raise ValueError(
            f"The report is on {report.size} samples that are not those of {bank!r}. Call memory_report again."
        )
    stored, given = stored_images(model, dataset), None if data is None else SampleImages(model, data)
    positions = {sample_id: i for i, sample_id in enumerate(ids)}

    def remembered(position: int) -> np.ndarray | None:
        return picture_of(model, None if bank.images is None else bank.images[position], ids[position], stored)

    def beside(finding: Finding) -> list[Beside]:
        pairs = zip(finding.neighbours, finding.similarities, strict=True)
        if finding.kind == "leak":
            return [Beside(each, "", value, None if given is None else given.picture(each)) for each, value in pairs]
        near = [(positions[each], value) for each, value in pairs]
        return [Beside(ids[at], names[labels[at]], value, remembered(at)) for at, value in near]

    return {kind: [Shown(f, remembered(f.position), beside(f)) for f in report.of_kind(kind)[:top_k]] for kind in KINDS}
