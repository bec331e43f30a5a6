"""Classes that a model was not trained on: what it knows of them is computed from the samples in its memory.

Shapes: M memory samples, R of them that are read, E width of an encoding, D of what the last layer sees.
"""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap.attention import wide
from timm_memwrap.backbone import OwnClassifier, last_layer, replace_rows
from timm_memwrap.bank_memory import BankMemory, spread
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.new_classes import new_rows

__all__ = ["check_can_add", "learn_classes"]

# Encodings that a classifier looks at at a time.
_ROWS = 2**12


def check_can_add(model: MemoryWrapModel, name: str) -> None:
    """Raises a `ValueError` if a class of this name cannot be added to a model without training."""
    if model.keeps_classifier and (model.encodes_logits or last_layer(model.backbone) is None):
        raise ValueError(
            f"{name!r} is not a class of the model, and cannot be added: the classifier of "
            f"{type(model.backbone).__name__} is not one layer on its pre-logits. Train a model with this class."
        )
    if not model.keeps_classifier and model.memory_args["classifier"] != "vote":
        raise ValueError(
            f"{name!r} is not a class of the model, and cannot be added: its head "
            f"(classifier={model.memory_args['classifier']!r}) only learns a class by training. Train it with this "
            f"class, or use a model that needs no training: timm_memwrap.wrap(classifier), or classifier='vote'."
        )


def learn_classes(model: MemoryWrapModel, num_classes: int, added: int, encodings: Tensor, labels: Tensor) -> None:
    """Gives a model this many classes, of which the last were added, and computes what it knows of those.

    A vote by the backbone's features has nothing to compute. Where the backbone's own classifier is kept, it gets rows
    of weights for the added classes (`new_rows`), which depend on the samples alone, and not on earlier rows.

    Args:
        model: The model.
        num_classes: Number of its classes from now on.
        added: Number of the last of them that it was not trained on.
        encodings: Encodings `[M, E]` of the samples in its memory.
        labels: Their labels `[M]`. Each added class has a sample.
    """
    if model.keeps_classifier:
        rows = _rows(model, num_classes - added, added, encodings, labels)
        replace_rows(model.backbone, num_classes - added, *rows)
    if num_classes != model.num_classes:
        model.num_classes = model.head.output_dim = num_classes
        # It was fitted to other classes.
        model.calibration.confidence.zero_()


def _rows(model: MemoryWrapModel, first: int, added: int, encodings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    trained = _with_first_classes(model, first)
    own, layer = OwnClassifier(trained, False), last_layer(trained)
    assert layer is not None
    weight = layer.weight.detach().flatten(1).float()
    bias = weight.new_zeros(first) if layer.bias is None else layer.bias.detach().float()
    if not added:
        return weight[:0], bias[:0]
    with torch.no_grad():
        features = _inputs_of(layer, own, encodings)
        reads = _inputs_of(layer, own, _right_reads(model, trained, first, encodings, labels))
    return new_rows(weight, bias, features, labels, reads, added)


def _with_first_classes(model: MemoryWrapModel, count: int) -> Any:
    """Returns what stands for the backbone, in evaluation, with the classes alone that it was trained on."""
    classifier = copy.deepcopy(model.backbone.get_classifier()).eval()
    size = model.backbone.head_hidden_size
    trained = SimpleNamespace(get_classifier=lambda: classifier, head_hidden_size=size, num_classes=model.num_classes)
    nothing = next(classifier.parameters()).new_zeros(0)
    replace_rows(trained, count, nothing, nothing)
    return trained


def _right_reads(model: MemoryWrapModel, trained: Any, first: int, encodings: Tensor, labels: Tensor) -> Tensor:
    """Reads up to 500 samples of trained classes, each from all others: vectors `[R, E]` that are classified right.

    A vote has no such vectors, so there it is the samples themselves.
    """
    old = (labels < first).nonzero().flatten()
    chosen, own = spread(old), OwnClassifier(trained, False)
    if model.memory_args["classifier"] == "vote":
        vectors = encodings[chosen]
    else:
        # The head, with the classifier as it was trained in place of the model's.
        head = copy.deepcopy(model.head, {id(model.backbone): trained}).eval()
        known = BankMemory(head, head.prepare(wide(encodings), labels), None)
        blocks = known.left_out(chosen, encodings)
        vectors = torch.cat([head.read(head.query(part), known.memory, hidden).vector for part, hidden in blocks])
    return vectors[own(vectors).argmax(dim=1) == labels[chosen]]


def _inputs_of(layer: nn.Module, classifier: nn.Module, encodings: Tensor) -> Tensor:
    """Returns what the last layer sees of encodings `[M, E]`, `[M, D]`: a norm may come before it."""
    seen = list[Tensor]()
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).float()))
    try:
        for part in encodings.split(_ROWS):
            classifier(part)
    finally:
        hook.remove()
    return torch.cat(seen)
