"""Finds what is wrong with a memory: samples that mislead, that are never read, or whose label the model disputes."""

from dataclasses import dataclass
from typing import Any

import torch

from timm_memwrap._utils import printable
from timm_memwrap.data import class_names
from timm_memwrap.explaining.reading import encodings_of, snapshot
from timm_memwrap.explaining.results import Result
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel

__all__ = ["MemoryReport", "SampleUse", "memory_report"]


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
    def disputed(self) -> bool:
        """Whether its label is not what the model predicts for it."""
        return self.label != self.prediction

    @property
    def harm(self) -> float:
        """By how much it misleads more than it helps; below 0 for a sample that helps more."""
        return self.misleading - self.helping


@dataclass(frozen=True)
class MemoryReport(Result):
    """How the samples of a memory were used over a data set.

    Args:
        samples: All samples, in memory order.
        count: Number of inputs.
        wrong: Number of wrong predictions.
    """

    samples: tuple[SampleUse, ...]
    count: int
    wrong: int

    @property
    def misleading(self) -> list[SampleUse]:
        """Samples that mislead more than they help, the worst first. Candidates for `bank.remove`."""
        return sorted((sample for sample in self.samples if sample.harm > 0), key=lambda sample: -sample.harm)

    @property
    def never_read(self) -> list[SampleUse]:
        """Samples that no prediction used."""
        return [sample for sample in self.samples if not sample.reads]

    @property
    def disputed(self) -> list[SampleUse]:
        """Samples whose label is not what the model predicts for them, the most used first."""
        return sorted((sample for sample in self.samples if sample.disputed), key=lambda sample: -sample.weight)

    def __str__(self) -> str:
        """Returns a table of the worst samples."""
        lines = [
            f"{len(self.samples)} samples, {self.count} inputs, {self.wrong} wrong predictions: "
            f"{len(self.misleading)} mislead more than they help, {len(self.never_read)} never read, "
            f"{len(self.disputed)} with a label that the model disputes."
        ]
        for title, samples in (("Misleading", self.misleading), ("Disputed", self.disputed)):
            header = f"{title:24} {'label':16} {'model says':16} {'reads':>6} {'helping':>8} {'misleading':>10}"
            lines += [header] if samples else []
            lines += [
                f"{str(s.id)[-24:]:24} {s.class_name[:16]:16} {s.predicted_class_name[:16]:16} "
                f"{s.reads:6d} {s.helping:8.2f} {s.misleading:10.2f}"
                for s in samples[:10]
            ]
        return "\n".join(map(printable, lines))


def memory_report(model: MemoryWrapModel, data: Any, progress: bool = True) -> MemoryReport:
    """Finds memory samples that mislead, that are never read, or whose label the model disputes.

    `model.memory_bank.remove(ids)` then forgets the worst, and the accuracy changes without training. Judge that on
    data other than `data`, or the memory is fitted to it.

    Args:
        model: A model with a memory bank.
        data: As in `evaluate_explanations`, with labels.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the bank or the data is empty, or a label is outside `num_classes`.
    """
    model, count, wrong = snapshot(model), 0, 0
    with encodings_of(model, data, "Memory report", progress) as batches:
        names, own, bank = class_names(model), model.own_predictions(), model.memory_bank
        _, bank_labels = bank.filled()
        supports = bank_labels if model.memory_args["classifier"] == "vote" else own
        reads = torch.zeros_like(own)
        weight, helping, misleading = (reads.double() for _ in range(3))
        for encoding, labels in batches:
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
    return MemoryReport(tuple(samples), count, wrong)
