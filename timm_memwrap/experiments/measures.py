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

Measures = dict[str, float]


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
    temperature of each half of the images is fitted to the other half, so that no image is scaled by a temperature that
    it was fitted to.

    Args:
        logits: Logits `[N, C]`.
        labels: Labels `[N]`.
        seed: Seed of the halves.
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
        "calibration_error": _calibration_error(logits, right),
        "calibration_error_scaled": _calibration_error(scaled, right),
        "negative_log_likelihood_scaled": float(F.cross_entropy(scaled, labels)),
        "temperature_factor": sum(temperatures) / 2,
    }


def memory_measures(model: MemoryWrapModel, inputs: Encoded, seed: int) -> Measures:
    """Measures predictions, and how far they are made of the memory samples that they show."""
    return _measures(model, inputs.batches(), seed)


def redrawn_measures(
    model: MemoryWrapModel, inputs: Encoded, memory: Encoded, size: int, batch_size: int, draws: int, seed: int
) -> Measures:
    """Measures as `memory_measures`, with `size` images drawn from `memory` for each batch (paper, Section 4).

    The measures are averaged over `draws` evaluations of all inputs.
    """
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for encodings, labels in inputs.batches(batch_size):
            remember(model, memory, torch.randperm(memory.size, generator=generator)[:size].tolist())
            yield encodings, labels

    found = [_measures(model, batches(), seed) for _ in range(draws)]
    return {name: sum(measures[name] for measures in found) / draws for name in found[0]}


def remember(model: MemoryWrapModel, memory: Encoded, positions: Sequence[int]) -> None:
    """Fills a model's bank with some of the encoded training images."""
    index = torch.tensor(positions, device=memory.labels.device)
    model.memory_bank.replace(memory.encodings[index], memory.labels[index], positions)


def _measures(model: MemoryWrapModel, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> Measures:
    meter = ExplanationMeter(model, deleted=1, seed=seed)
    rng = random.Random(seed)
    found = []
    for encodings, labels in batches:
        logits = meter.update(encodings, labels).logits
        found.append((logits, _shuffled_logits(model, encodings, rng), labels))
    predicted, shuffled, target = map(torch.cat, zip(*found, strict=True))
    metrics = meter.compute()
    others = shuffled.argmax(dim=-1)
    return {
        **classification_measures(predicted, target, seed),
        "accuracy_without_memory": metrics.accuracy_without_memory,
        "accuracy_shuffled": float((others == target).double().mean()),
        "shuffled_flip_rate": float((others != predicted.argmax(dim=-1)).double().mean()),
        "deletion_flip_rate": metrics.deletion_flip_rate,
        "random_flip_rate": metrics.random_flip_rate,
        "explanation_accuracy": metrics.explanation_accuracy,
        "identical_class_rate": metrics.identical_class_rate,
        "support_size": metrics.support_size,
    }


def _shuffled_logits(model: MemoryWrapModel, encodings: Tensor, rng: random.Random) -> Tensor:
    """Computes logits `[N, C]` with each sample found as before, but read as a sample of another class."""
    bank = model.memory_bank
    assert bank.encodings is not None and bank.labels is not None
    labels: list[int] = bank.labels.tolist()
    others = {label: [i for i, other in enumerate(labels) if other != label] for label in set(labels)}
    # In a memory of one class only, there is no other to take.
    order = torch.tensor([rng.choice(others[label] or [i]) for i, label in enumerate(labels)], device=encodings.device)
    with evaluating(model):
        memory = model.head.prepare(bank.encodings, bank.labels)
        return model.read(encodings, memory._replace(values=memory.values[order])).logits


def _calibration_error(logits: Tensor, right: Tensor) -> float:
    return expected_calibration_error(logits.softmax(dim=-1).amax(dim=-1), right)
