"""Measures a head on encodings that are computed once.

Shapes: N inputs, E width of an encoding, C classes.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap._utils import evaluating
from timm_memwrap.explaining.calibration import fit_temperature
from timm_memwrap.explaining.metrics import ExplanationMeter, expected_calibration_error
from timm_memwrap.model import MemoryWrapModel

__all__ = ["Encoded", "classification_measures", "memory_measures", "redrawn_measures", "remember"]

Measures = dict[str, float | None]  # None for what does not apply to a head
# What is taken over of the metrics of explanations.
_EVIDENCE = (
    "accuracy_without_memory",
    "follows_exchanged_answer",
    "deletion_flip_rate",
    "random_flip_rate",
    "explanation_accuracy",
    "identical_class_rate",
    "support_size",
)


class Encoded(NamedTuple):
    """Encodings `[N, E]` of images, and their labels `[N]`."""

    encodings: Tensor
    labels: Tensor

    @property
    def size(self) -> int:
        """Number of images N."""
        return len(self.labels)

    def batches(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields encodings and labels in order."""
        yield from zip(self.encodings.split(size), self.labels.split(size), strict=True)


def classification_measures(logits: Tensor, labels: Tensor, seed: int) -> Measures:
    """Measures predictions alone: accuracy, calibration, and calibration and likelihood after temperature scaling.

    A head that is equally confident in everything can be calibrated and yet say little, which the likelihood shows. The
    temperature of each half of the images, drawn by the seed, is fitted to the other half, so that no image is scaled
    by a temperature that it was fitted to.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    scaled, temperatures = torch.empty_like(logits), []
    for fitted, held_out in (halves, halves[::-1]):
        temperatures.append(fit_temperature(logits[fitted], labels[fitted]))
        scaled[held_out] = logits[held_out] / temperatures[-1]
    right = logits.argmax(dim=-1) == labels
    return {
        "accuracy": float(right.double().mean()),
        "calibration_error": expected_calibration_error(logits.softmax(dim=-1).amax(dim=-1), right),
        "calibration_error_scaled": expected_calibration_error(scaled.softmax(dim=-1).amax(dim=-1), right),
        "negative_log_likelihood_scaled": float(F.cross_entropy(scaled, labels)),
        "temperature_factor": sum(temperatures) / 2,
    }


def memory_measures(model: MemoryWrapModel, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> Measures:
    """Measures predictions for encodings with labels, and how far they are made of the samples that they show."""
    meter = ExplanationMeter(model, deleted=1, seed=seed)
    rng = random.Random(seed)
    found = []
    for encodings, labels in batches:
        logits = meter.update(encodings, labels).logits
        found.append((logits, _shuffled_logits(model, encodings, rng), labels))
    predicted, shuffled, target = map(torch.cat, zip(*found, strict=True))
    metrics, others = meter.compute(), shuffled.argmax(dim=-1)
    return {
        **classification_measures(predicted, target, seed),
        "accuracy_shuffled": float((others == target).double().mean()),
        "shuffled_flip_rate": float((others != predicted.argmax(dim=-1)).double().mean()),
        **{name: getattr(metrics, name) for name in _EVIDENCE},
    }


def redrawn_measures(
    model: MemoryWrapModel, inputs: Encoded, memory: Encoded, size: int, batch_size: int, draws: int, seed: int
) -> Measures:
    """Returns means over evaluations that draw `size` images from `memory` for each batch (paper, Section 4)."""
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for encodings, labels in inputs.batches(batch_size):
            remember(model, memory, torch.randperm(memory.size, generator=generator)[:size].tolist())
            yield encodings, labels

    found = [memory_measures(model, batches(), seed) for _ in range(draws)]
    return {name: _mean([measures[name] for measures in found]) for name in found[0]}


def remember(model: MemoryWrapModel, memory: Encoded, positions: Sequence[int]) -> None:
    """Fills a model's bank with some of the encoded training images."""
    index = torch.tensor(positions, device=memory.labels.device)
    model.memory_bank.replace(memory.encodings[index], memory.labels[index], positions)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shuffled_logits(model: MemoryWrapModel, encodings: Tensor, rng: random.Random) -> Tensor:
    """Computes logits `[N, C]` with each sample found as before, but read as a sample of another class."""
    known, targets = model.memory_bank.filled()
    labels: list[int] = targets.tolist()
    others = {label: [i for i, other in enumerate(labels) if other != label] for label in set(labels)}
    # In a memory of one class only, there is no other to take.
    order = torch.tensor([rng.choice(others[label] or [i]) for i, label in enumerate(labels)], device=encodings.device)
    with evaluating(model):
        memory = model.head.prepare(known, targets)
        return model.read(encodings, memory._replace(values=memory.values[order])).logits
