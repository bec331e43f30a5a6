"""Says over a data set how usual the images are that serve as counterfactuals.

Shapes: N counterfactuals, K samples read per input, C channels.
"""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from timm_memwrap.explaining.explanation import class_names
from timm_memwrap.explaining.inputs import BATCH_SIZE, SampleImages, check_model, encoded_batches, evaluating, size_of
from timm_memwrap.explaining.metrics import Autoencoder, im1, im2
from timm_memwrap.model import MemoryWrapModel

__all__ = ["CounterfactualMetrics", "evaluate_counterfactuals"]


@dataclass(frozen=True)
class CounterfactualMetrics:
    """What `evaluate_counterfactuals` found over a data set. `None` means no counterfactual to measure.

    Args:
        count: Number of inputs.
        with_counterfactual: Number of inputs of which a sample with positive weight is a counterfactual.
        im1: Mean IM1 of the strongest counterfactuals of these inputs. Lower is better.
        im2: Their mean IM2. Lower is better.
    """

    count: int
    with_counterfactual: int
    im1: float | None
    im2: float | None

    def __str__(self) -> str:
        """Says it as a table."""
        width = max(len(f.name) for f in fields(self))
        return "\n".join(
            f"{name.replace('_', ' '):{width}}  {value if value is None or isinstance(value, int) else f'{value:.4g}'}"
            for name, value in asdict(self).items()
        )

    def to_dict(self) -> dict[str, float | int | None]:
        """Returns the numbers by name."""
        return asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        """Returns `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def evaluate_counterfactuals(
    model: MemoryWrapModel,
    data: Any,
    memory: Any,
    autoencoders: Mapping[int, Autoencoder],
    autoencoder_of_all: Autoencoder,
    progress: bool = True,
) -> CounterfactualMetrics:
    """Measures by IM1 and IM2 how usual the strongest counterfactuals of predictions are (see `im1` and `im2`).

    Each is measured for the class that the model predicts for it, and against the class that it predicts for the input,
    as in La Rosa et al. 2022. Models and autoencoders run in evaluation mode without gradients, and their modes are
    restored.

    Args:
        model: A model with a memory bank.
        data: As in `evaluate_explanations`; its labels play no part.
        memory: The dataset that the bank was built from, or a mapping from id to image.
        autoencoders: By class, what was trained on images of that class. They map model inputs `[N, C, H, W]` to
            their reconstructions.
        autoencoder_of_all: What was trained on images of all classes.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the bank or the data is empty, a class that is met has no autoencoder, or a counterfactual is not
            in `memory`.
    """
    check_model(model)
    bank = model.memory_bank
    assert bank.predictions is not None
    count, pairs = 0, Counter[tuple[int, int]]()
    with ExitStack() as stack:
        for module in (model, autoencoder_of_all, *autoencoders.values()):
            if isinstance(module, nn.Module):
                stack.enter_context(evaluating(module))
        bar = stack.enter_context(tqdm(total=size_of(data), desc="Counterfactuals", unit="img", disable=not progress))
        for encoding, labels in encoded_batches(model, data):
            readout = model.read_encoding(encoding)
            prediction = readout.logits.argmax(dim=-1)
            other = (bank.predictions[readout.indices] != prediction.unsqueeze(1)) & (readout.weights > 0)
            if other.shape[1]:
                has = other.any(dim=1)
                # The first is the strongest.
                strongest = readout.indices.gather(1, other.long().argmax(dim=1, keepdim=True)).squeeze(1)
                pairs.update(zip(strongest[has].tolist(), prediction[has].tolist(), strict=True))
            count += len(labels)
            bar.update(len(labels))
        if not count:
            raise ValueError("The data is empty, so there is nothing to evaluate. Check its path and split.")
        total = sum(pairs.values())
        sums = _sums(model, memory, pairs, autoencoders, autoencoder_of_all)
    return CounterfactualMetrics(count, total, *((value / total for value in sums) if total else (None, None)))


def _sums(
    model: MemoryWrapModel,
    memory: Any,
    pairs: Counter[tuple[int, int]],
    autoencoders: Mapping[int, Autoencoder],
    autoencoder_of_all: Autoencoder,
) -> tuple[float, float]:
    """Sums IM1 and IM2 over pairs of a counterfactual's position and the input's class, of equal classes at a time."""
    bank, samples = model.memory_bank, SampleImages(model, memory)
    assert bank.predictions is not None
    own, ids = bank.predictions.tolist(), bank.ids
    groups: dict[tuple[int, int], list[int]] = {}
    for position, prediction in sorted(pairs):
        groups.setdefault((own[position], prediction), []).append(position)
    names = class_names(model)
    for label in sorted({label for group in groups for label in group}):
        if label not in autoencoders:
            raise ValueError(
                f"There is no autoencoder for class {label} ({names[label]!r}). Pass one for each class: "
                f"autoencoders={{class: autoencoder}}."
            )
    first = second = 0.0
    for (label, prediction), positions in groups.items():
        for start in range(0, len(positions), BATCH_SIZE):
            part = positions[start : start + BATCH_SIZE]
            images = torch.stack([samples.input(ids[position]) for position in part])
            times = torch.tensor([pairs[position, prediction] for position in part], dtype=torch.float64)
            ratios = im1(images, autoencoders[label], autoencoders[prediction])
            distances = im2(images, autoencoders[label], autoencoder_of_all)
            first += float(ratios.double().cpu() @ times)
            second += float(distances.double().cpu() @ times)
    return first, second
