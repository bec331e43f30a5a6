"""What is wrong with a memory: findings about its samples, and which of them mislead or are never read."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timm_memwrap._utils import check_choice, printable
from timm_memwrap.data import Samples, class_names
from timm_memwrap.explaining.findings import KINDS, Finding, write_findings
from timm_memwrap.explaining.inspection import Inspection
from timm_memwrap.explaining.reading import encodings_of, snapshot
from timm_memwrap.explaining.results import Result
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.memory_checks import check_single_label
from timm_memwrap.model import MemoryWrapModel

__all__ = ["MemoryReport", "SampleUse", "memory_report"]

# Rows of each kind in the printed table.
_SHOWN = 10


@dataclass(frozen=True)
class SampleUse(Result):
    """How a memory sample was used over a data set.

    A sample supports the class that the model predicts for it; in a vote, its label.

    Args:
        position: Position in the memory bank.
        id: What names the sample in its data set.
        label: Its label.
        class_name: Name of its label.
        prediction: The model's own prediction for it, as in `MemorySample`.
        predicted_class_name: Name of that class.
        reads: Number of predictions that used it.
        weight: Sum of its weights in them.
        helping: Sum of its weights in right predictions of the class that it supports.
        misleading: Sum of its weights in wrong predictions of the class that it supports.
    """

    position: int
    id: SampleId
    label: int
    class_name: str
    prediction: int
    predicted_class_name: str
    reads: int
    weight: float
    helping: float
    misleading: float

    @property
    def harm(self) -> float:
        """By how much it misleads more than it helps; below 0 for a sample that helps more."""
        return self.misleading - self.helping


@dataclass(frozen=True)
class MemoryReport(Result):
    """What is wrong with the samples of a memory, and how they were used over a data set if one was given.

    Args:
        size: Number of samples in the memory.
        findings: What may be wrong with single samples and what to do about it, by kind, the surest first.
        samples: How each sample was used, in memory order; none without data.
        count: Number of inputs.
        wrong: Number of wrong predictions.
        leaked: Number of inputs whose picture is in the memory.
    """

    size: int
    findings: tuple[Finding, ...]
    samples: tuple[SampleUse, ...] = ()
    count: int = 0
    wrong: int = 0
    leaked: int = 0

    def of_kind(self, kind: str) -> list[Finding]:
        """Returns the findings of a kind: `"label"`, `"duplicate"`, `"leak"` or `"out_of_place"`."""
        check_choice("kind", kind, KINDS)
        return [finding for finding in self.findings if finding.kind == kind]

    @property
    def misleading(self) -> list[SampleUse]:
        """Samples that mislead more than they help, the worst first. Candidates for `bank.remove`."""
        return sorted((sample for sample in self.samples if sample.harm > 0), key=lambda sample: -sample.harm)

    @property
    def never_read(self) -> list[SampleUse]:
        """Samples that no prediction used."""
        return [sample for sample in self.samples if not sample.reads]

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the findings to a CSV file to tick what to apply in, and returns its path: see `ticked`.

        The column `apply` is empty; put an x in the rows to be done. An apostrophe stands before text from outside: it
        keeps a spreadsheet from taking a name for a formula, a number or a date, and tells the id `'7` from 7.
        """
        return write_findings(self.findings, path)

    def __str__(self) -> str:
        """Returns a table of the surest findings and the worst samples."""
        counts = ", ".join(f"{len(self.of_kind(kind))} {title.lower()}" for kind, title in KINDS.items())
        lines = [f"{self.size:,} samples: {counts}."]
        if self.count:
            lines.append(
                f"{self.count:,} inputs, {self.wrong:,} wrong predictions, {self.leaked:,} inputs that are in the "
                f"memory: {len(self.misleading):,} samples mislead more than they help, {len(self.never_read):,} were "
                f"never read."
            )
        for kind, title in KINDS.items():
            found = self.of_kind(kind)[:_SHOWN]
            lines += [f"{title:32} {'label':16} {'what to do':40} {'score':>6}"] if found else []
            lines += [f"{str(f.id)[-32:]:32} {f.class_name[:16]:16} {_to_do(f)[:40]:40} {f.score:6.3f}" for f in found]
        if self.misleading:
            lines.append(
                f"{'Misleading':32} {'label':16} {'model says':16} {'reads':>6} {'helping':>8} {'misleading':>10}"
            )
            lines += [
                f"{str(s.id)[-32:]:32} {s.class_name[:16]:16} {s.predicted_class_name[:16]:16} "
                f"{s.reads:6d} {s.helping:8.2f} {s.misleading:10.2f}"
                for s in self.misleading[:_SHOWN]
            ]
        return "\n".join(map(printable, lines))


def memory_report(model: MemoryWrapModel, data: Any = None, progress: bool = True) -> MemoryReport:
    """Finds what is wrong with the samples of a memory: labels, copies, strangers, and what misleads.

    What the neighbours of a sample say, by what the backbone sees and with its copies left out, finds suspected labels,
    duplicates and samples out of place. With `data`, its images that are in the memory are found too, and which samples
    mislead or are never read. `report.save("report.csv")` writes a table in which to tick what is to be done.

    `model.memory_bank.remove(ids)` forgets samples, and the accuracy changes without training. Judge that on data other
    than `data`, or the memory is fitted to it.

    Args:
        model: A model with a memory bank of two samples at least.
        data: As in `evaluate_explanations`, with labels; `None` to look at the memory alone.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the bank has fewer than two samples, the data is empty, a label is outside `num_classes`, or
            samples may have several classes.
    """
    model = snapshot(model)
    check_single_label(model, "memory_report")
    if len(model.memory_bank) < 2:
        raise ValueError(f"{model.memory_bank!r} has one sample, which has no neighbours. Remember two at least.")
    with torch.no_grad():
        inspection = Inspection(model, progress)
    if data is None:
        return MemoryReport(len(model.memory_bank), inspection.findings())
    samples, count, wrong = _use(model, data, inspection, progress)
    ids = Samples(data, model).ids(range(count)) if inspection.found_leaks else ()
    return MemoryReport(len(samples), inspection.findings(ids), samples, count, wrong, inspection.leaked)


def _use(
    model: MemoryWrapModel, data: Any, inspection: Inspection, progress: bool
) -> tuple[tuple[SampleUse, ...], int, int]:
    """Counts how each sample is used over data, and inputs and wrong predictions. Shows the inspection all inputs."""
    count, wrong = 0, 0
    with encodings_of(model, data, "Memory report", progress) as batches:
        names, own, bank = class_names(model), model.own_predictions(), model.memory_bank
        _, bank_labels = bank.filled()
        supports = bank_labels if model.memory_args["classifier"] == "vote" else own
        reads = torch.zeros_like(own)
        weight, helping, misleading = (reads.double() for _ in range(3))
        for encoding, labels in batches:
            inspection.add(encoding, count)
            readout = model.read(encoding)
            prediction = readout.logits.argmax(dim=-1)
            right = (prediction == labels).unsqueeze(1)
            supported = supports[readout.positions] == prediction.unsqueeze(1)
            weights, position = readout.weights.double(), readout.positions.flatten()
            reads.index_add_(0, position, (weights > 0).long().flatten())
            weight.index_add_(0, position, weights.flatten())
            helping.index_add_(0, position, (weights * (supported & right)).flatten())
            misleading.index_add_(0, position, (weights * (supported & ~right)).flatten())
            count += len(labels)
            wrong += int((~right).sum())
    columns = (column.tolist() for column in (bank_labels, own, reads, weight, helping, misleading))
    samples = (
        SampleUse(position, sample_id, label, names[label], predicted, names[predicted], *use)
        for position, (sample_id, label, predicted, *use) in enumerate(zip(bank.ids, *columns, strict=True))
    )
    return tuple(samples), count, wrong


def _to_do(finding: Finding) -> str:
    return finding.action if finding.target is None else f"{finding.action} {finding.target}"
