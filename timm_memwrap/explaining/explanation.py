"""Explains predictions by the memory samples that they used.

Shapes: B inputs, M memory samples, D width of an encoding, C classes, K samples read per input.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from timm_memwrap.explaining.inputs import batches_of, check_model, evaluating, one_by_one
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryReadout, MemoryWrapModel
from timm_memwrap.text import printable

__all__ = ["Explanation", "MemorySample", "explain"]

_logger = logging.getLogger(__name__)

# Scores computed at a time when samples are left out one by one: 64 MB of float32.
_MOST_SCORES = 2**24


@dataclass(frozen=True)
class MemorySample:
    """A memory sample that a prediction used.

    Args:
        position: Position in the memory bank.
        id: What names the sample in its data set.
        weight: Its share of what was read; the weights of all samples that a prediction used sum to 1.
        label: Its label.
        class_name: Name of its label.
        prediction: The model's own prediction for it, made without the sample itself.
        predicted_class_name: Name of that class.
        is_example: Whether the model puts it in the class that it predicts for the input.
        influence: Probability of the predicted class minus what it would be without this sample.
        prediction_without: The prediction without this sample; `None` if no class is then ahead of the others.
        image: Its picture, uint8 `[3 or 1, H, W]`, if the bank holds one.
    """

    position: int
    id: SampleId
    weight: float
    label: int
    class_name: str
    prediction: int
    predicted_class_name: str
    is_example: bool
    influence: float
    prediction_without: int | None
    image: Tensor | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold: all but the image."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "image"}


@dataclass(frozen=True)
class Explanation:
    """A prediction and the memory samples that it used.

    Args:
        prediction: The predicted class.
        class_name: Its name.
        probability: Its probability.
        samples: The samples with the largest weights, strongest first.
        examples: Those that the model puts in the predicted class, strongest first (explanation by example).
        counterfactuals: Those that the model puts in another class, strongest first.
        support_size: Number of samples that the prediction used, shown or not.
        prediction_without_memory: The prediction if nothing were read; `None` if no class is then ahead of the others,
            as for a model that predicts from its memory alone.
        probability_without_memory: Probability of the predicted class if nothing were read.
    """

    prediction: int
    class_name: str
    probability: float
    samples: tuple[MemorySample, ...]
    examples: tuple[MemorySample, ...]
    counterfactuals: tuple[MemorySample, ...]
    support_size: int
    prediction_without_memory: int | None
    probability_without_memory: float

    def __str__(self) -> str:
        """Says it in a line."""
        shown = ", ".join(
            f"{sample.id!r} ({sample.class_name}, {sample.weight:.0%}{'' if sample.is_example else ', counterfactual'})"
            for sample in self.samples
        )
        more = self.support_size - len(self.samples)
        text = f"{self.class_name} ({self.probability:.0%}) from {shown}{f' and {more} more' if more > 0 else ''}"
        return printable(text)

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold: all but the images."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: [s.to_dict() for s in v] if isinstance(v, tuple) else v for k, v in values.items()}

    def to_json(self, indent: int | None = None) -> str:
        """Returns `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)


def explain(model: MemoryWrapModel, images: Any, top_k: int = 5) -> list[Explanation]:
    """Explains predictions by the memory samples that they used.

    Runs in evaluation mode without gradients, and restores the model's mode. The images are encoded once: what the
    prediction would be without a sample takes a second read, not a second encoding.

    Args:
        model: A model with a memory bank.
        images: A batch `[B, C, H, W]` or an image `[C, H, W]`, normalised as in training; PIL images or paths, which
            get the model's own evaluation transform; or a list of images, PIL images or paths.
        top_k: How many samples to give, and how many examples and counterfactuals.

    Returns:
        One explanation per image.

    Raises:
        ValueError: If the bank is empty, or the images or `top_k` are none.

    Example:
        ```python
        >>> import timm, timm_memwrap, torch
        >>> model = timm.create_model("memwrap_test_resnet", num_classes=2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 2)
        >>> bank = timm_memwrap.build_memory_bank(model, data, size=4, progress=False)
        >>> explanation = timm_memwrap.explain(model, torch.randn(3, 64, 64), top_k=2)[0]
        >>> len(explanation.samples), explanation.support_size
        (2, 4)

        ```
    """
    check_model(model)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k={top_k!r} is not a number of samples. Pass an integer of at least 1.")
    if model.memory_is_stale():
        _logger.warning(
            "The memory bank is stale: the weights have changed since it was built, so these explanations are not "
            "true to the model. Call timm_memwrap.build_memory_bank(model, data) again."
        )
    with evaluating(model):
        return [
            explanation
            for batch in batches_of(model, images)
            for explanation in _explain_batch(model, model.read_memory(batch), top_k)
        ]


def class_names(model: MemoryWrapModel) -> list[str]:
    """Names the model's classes: as `known_class_names` does, else by number."""
    names = known_class_names(model)
    return [*names, *(f"class {i}" for i in range(len(names), model.num_classes))]


def known_class_names(model: MemoryWrapModel) -> list[str]:
    """Names the model's classes as the bank does, else as its pretrained cfg does; empty if neither names them."""
    known = model.memory_bank.class_names or model.pretrained_cfg.get("label_names") or []
    return [str(name) for name in (known.values() if isinstance(known, dict) else known)]


def aligned(
    model: MemoryWrapModel,
    images: Any,
    explanations: Sequence[Explanation] | None,
    labels: Sequence[int] | Tensor | None,
    top_k: int,
) -> tuple[list[Any], list[Explanation], list[int | None]]:
    """Lists images with their explanations, made if `None`, and their labels, `None` if unknown.

    Raises:
        ValueError: If they differ in number, or there are none.
    """
    if explanations is None:
        explanations = explain(model, images, top_k)
    several = one_by_one(images)
    true: list[int | None] = [None] * len(several) if labels is None else [int(label) for label in labels]
    if not len(several) == len(explanations) == len(true) or not several:
        raise ValueError(
            f"{len(several)} images, {len(explanations)} explanations and {len(true)} labels. Pass one explanation, "
            f"and one label if any, for each image, and at least one image."
        )
    return several, list(explanations), true


def read_without(model: MemoryWrapModel, encoding: Tensor, hidden: Tensor) -> Tensor:
    """Computes logits `[B, C]` in float32 with the samples at positions `hidden` `[B, H]` left out, block by block."""
    block = max(1, _MOST_SCORES // len(model.memory_bank))
    pairs = zip(encoding.split(block), hidden.split(block), strict=True)
    logits = [model.read_encoding(rows, hidden=positions).logits.float() for rows, positions in pairs]
    return torch.cat(logits) if logits else encoding.new_zeros(0, model.num_classes, dtype=torch.float32)


def read_nothing(model: MemoryWrapModel, encoding: Tensor) -> Tensor:
    """Computes logits `[B, C]` in float32 with nothing read from the memory."""
    everything = torch.arange(len(model.memory_bank), device=encoding.device)
    return read_without(model, encoding, everything.expand(len(encoding), -1))


def _explain_batch(model: MemoryWrapModel, readout: MemoryReadout, top_k: int) -> list[Explanation]:
    bank, names = model.memory_bank, class_names(model)
    assert bank.labels is not None and bank.predictions is not None
    weights, indices, encoding = readout.weights.float(), readout.indices, readout.encoding
    probabilities = readout.logits.float().softmax(dim=-1)
    probability, prediction = probabilities.max(dim=-1)
    used = weights > 0
    same = bank.predictions[indices] == prediction.unsqueeze(1)

    # Rank among all samples that the input used, and among those of its kind.
    rank = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    rank_of_kind = torch.where(same, (used & same).cumsum(1), (used & ~same).cumsum(1)) - 1
    shown = used & ((rank < top_k) | (rank_of_kind < top_k))
    rows, columns = shown.nonzero(as_tuple=True)
    without = read_without(model, encoding[rows], indices[rows, columns].unsqueeze(1))
    loss = probability[rows] - without.softmax(dim=-1).gather(1, prediction[rows].unsqueeze(1)).squeeze(1)
    nothing = read_nothing(model, encoding)

    positions = indices[rows, columns]
    samples: list[list[MemorySample]] = [[] for _ in range(len(encoding))]
    images = None if bank.images is None else bank.images[positions].cpu()
    ids = bank.ids
    table = zip(
        rows.tolist(),
        positions.tolist(),
        weights[rows, columns].tolist(),
        bank.labels[positions].tolist(),
        bank.predictions[positions].tolist(),
        same[rows, columns].tolist(),
        loss.tolist(),
        _leaders(without),
        strict=True,
    )
    for i, (row, position, weight, label, own, is_example, influence, prediction_without) in enumerate(table):
        samples[row].append(
            MemorySample(
                position=position,
                id=ids[position],
                weight=weight,
                label=label,
                class_name=names[label],
                prediction=own,
                predicted_class_name=names[own],
                is_example=is_example,
                influence=influence,
                prediction_without=prediction_without,
                image=None if images is None else images[i],
            )
        )
    alone = nothing.softmax(dim=-1).gather(1, prediction.unsqueeze(1)).squeeze(1)
    per_row = zip(
        prediction.tolist(),
        probability.tolist(),
        samples,
        used.sum(dim=1).tolist(),
        _leaders(nothing),
        alone.tolist(),
        strict=True,
    )
    return [
        Explanation(
            prediction=predicted,
            class_name=names[predicted],
            probability=probability_of,
            samples=tuple(read[:top_k]),
            examples=tuple([sample for sample in read if sample.is_example][:top_k]),
            counterfactuals=tuple([sample for sample in read if not sample.is_example][:top_k]),
            support_size=support,
            prediction_without_memory=leader,
            probability_without_memory=probability_alone,
        )
        for predicted, probability_of, read, support, leader, probability_alone in per_row
    ]


def _leaders(logits: Tensor) -> list[int | None]:
    """Returns the predicted class of each row, or `None` where all classes are level."""
    level = logits.amax(dim=-1) == logits.amin(dim=-1)
    return [
        None if tied else leader for leader, tied in zip(logits.argmax(dim=-1).tolist(), level.tolist(), strict=True)
    ]
