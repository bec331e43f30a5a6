"""What is measured of a head on encodings that are computed once.

Shapes: N inputs, B inputs of a batch, M memory samples, D width of an encoding, C classes.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap.attention import read
from timm_memwrap.building import own_predictions
from timm_memwrap.explaining.calibration import fit_temperature
from timm_memwrap.explaining.metrics import ExplanationMeter, expected_calibration_error
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["Encoded", "classification_measures", "memory_measures", "redrawn_measures", "remember"]

_BATCH = 256

Measures = dict[str, float]


class Encoded:
    """Encodings `[N, D]` of images, and their labels `[N]`."""

    def __init__(self, encodings: Tensor, labels: Tensor) -> None:
        self.encodings, self.labels = encodings, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = _BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields encodings and labels in order."""
        yield from zip(self.encodings.split(size), self.labels.split(size), strict=True)


def classification_measures(logits: Tensor, labels: Tensor, seed: int) -> Measures:
    """Measures predictions alone: accuracy, calibration as it is, and calibration and likelihood after scaling.

    A head that is equally sure of everything can be calibrated and yet say little, which the likelihood tells. The
    temperature of each half of the images is fitted on the other half, so that no image is scaled by what it chose.

    Args:
        logits: Logits `[N, C]`.
        labels: Labels `[N]`.
        seed: Seed of the halves.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
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
    """Measures predictions and how far they are made of the memory that they show."""
    return _measures(model, inputs.batches(), seed)


def redrawn_measures(
    model: MemoryWrapModel, inputs: Encoded, memory: Encoded, size: int, batch_size: int, draws: int, seed: int
) -> Measures:
    """Measures as `memory_measures`, with the memory drawn anew for each batch (paper, Section 4).

    Args:
        model: The model; its bank is replaced.
        inputs: The inputs.
        memory: The training images that memories are drawn from.
        size: How many are drawn.
        batch_size: Inputs that share a memory.
        draws: How often all inputs are evaluated. Their measures are averaged.
        seed: Seed of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for encodings, labels in inputs.batches(batch_size):
            remember(model, memory, torch.randperm(len(memory), generator=generator)[:size].tolist())
            yield encodings, labels

    found = [_measures(model, batches(), seed) for _ in range(draws)]
    return {name: sum(measures[name] for measures in found) / draws for name in found[0]}


def remember(model: MemoryWrapModel, memory: Encoded, positions: list[int]) -> None:
    """Fills a model's bank with some of the encoded training images."""
    index = torch.tensor(positions)
    labels = memory.labels[index]
    model.memory_bank.replace(memory.encodings[index], labels, torch.zeros_like(labels), positions)
    model.memory_bank.set_predictions(own_predictions(model))


@torch.no_grad()
def _measures(model: MemoryWrapModel, batches: Iterator[tuple[Tensor, Tensor]], seed: int) -> Measures:
    meter = ExplanationMeter(model, deleted=1, seed=seed)
    rng = random.Random(seed)
    logits, shuffled, labels = [], [], []
    for encodings, targets in batches:
        readout = meter.update(encodings, targets)
        logits.append(readout.logits)
        shuffled.append(_read_shuffled(model, readout, rng))
        labels.append(targets)
    target, predicted = torch.cat(labels), torch.cat(logits)
    metrics = meter.compute()
    others = torch.cat(shuffled).argmax(dim=-1)
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


def _read_shuffled(model: MemoryWrapModel, readout: MemoryReadout, rng: random.Random) -> Tensor:
    """Computes logits `[B, C]` with each sample found as before, but read as a sample of another class."""
    bank = model.memory_bank
    assert bank.encodings is not None and bank.labels is not None
    labels: list[Any] = bank.labels.tolist()
    by_class = {label: [i for i, other in enumerate(labels) if other != label] for label in set(labels)}
    # Of one class only, there is no other to take.
    order = torch.tensor([rng.choice(by_class[label] or [i]) for i, label in enumerate(labels)])
    values = model.head.values(bank.encodings, bank.labels)[order]
    return model.head.classify(readout.encoding, read(readout.weights, readout.indices, values))


def _calibration_error(logits: Tensor, right: Tensor) -> float:
    return expected_calibration_error(logits.softmax(dim=-1).amax(dim=-1), right)
