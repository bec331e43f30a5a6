"""What a model says of inputs and of memory samples: one class of each, or several, or none.

Shapes: B inputs, C classes, K samples read per input, P pairs of an input and a class, or positions.
"""

import torch
from torch import Tensor

from timm_memwrap.explaining.reading import own_predictions
from timm_memwrap.labels import multi_hot, present
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["classes_of_samples", "classes_said", "own_present", "says_class"]


def classes_said(logits: Tensor, order: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Returns which classes logits `[B, C]` say of which inputs, as pairs: inputs `[P]` and classes `[P]`.

    Pairs of an input follow each other, the most probable class first. Where several are possible and none is present,
    the most probable one is returned.

    Args:
        logits: What the model says.
        order: Classes `[B, C]`, the most probable first.
        multi_label: Whether several are possible.
    """
    if not multi_label:
        return torch.arange(len(logits), device=logits.device), order[:, 0]
    said = present(logits).gather(1, order)
    said[:, 0] = True
    inputs, places = said.nonzero(as_tuple=True)
    return inputs, order[inputs, places]


def own_present(model: MemoryWrapModel, readout: MemoryReadout) -> Tensor:
    """Returns which classes the model itself says the samples have that were read, bool `[B, K, C]`; none if unused."""
    used = readout.weights > 0
    said = torch.zeros(*used.shape, model.num_classes, dtype=torch.bool, device=used.device)
    asked, back = readout.positions[used].unique(return_inverse=True)
    if len(asked):
        said[used] = present(model.own_logits(asked))[back]
    return said


def says_class(model: MemoryWrapModel, readout: MemoryReadout, inputs: Tensor, classes: Tensor) -> Tensor:
    """Returns for pairs of an input and a class which samples the model itself puts in the class, bool `[P, K]`.

    A sample that was not used is in none.
    """
    if model.multi_label:
        return own_present(model, readout)[inputs, :, classes]
    return own_predictions(model, readout)[inputs] == classes.unsqueeze(1)


def classes_of_samples(
    model: MemoryWrapModel, positions: Tensor
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Returns the labels of memory samples at positions `[P]`, and the classes that the model itself says they have."""
    labels = model.memory_bank.filled()[1][positions]
    if not model.multi_label:
        return _ones(labels), _ones(model.own_predictions(positions))
    asked, back = positions.unique(return_inverse=True)
    if not len(asked):
        return [], []
    return _several(multi_hot(labels, model.num_classes)), _several(present(model.own_logits(asked))[back])


def _ones(classes: Tensor) -> list[tuple[int, ...]]:
    return [(label,) for label in classes.tolist()]


def _several(classes: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row.nonzero().flatten().tolist()) for row in classes.cpu()]
