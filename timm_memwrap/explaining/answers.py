"""Whether evidence is chosen by what is seen or by the verdict that it is to support.

A query may hold the answer: what the backbone's classifier says of the input. Here the answer is exchanged and the
picture left, and the other way round.

Shapes: B inputs, M memory samples, E width of an encoding, C classes, H hidden samples per input.
"""

import copy
import random

import torch
from torch import Tensor, nn

from timm_memwrap.attention import float32_island, wide
from timm_memwrap.backbone import OwnClassifier
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["answers", "exchange", "holds_answer", "measure_answers", "predict_as_if", "query_as_if"]

# Samples drawn to find one of another class for an input.
_DRAWS = 16


class _Given(nn.Module):
    """A classifier that returns given logits `[B, C]`, whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, encoding: Tensor) -> Tensor:
        return self.logits


def holds_answer(model: MemoryWrapModel) -> bool:
    """Returns whether the model's queries hold what its backbone's classifier says, of two classes at least."""
    return model.num_classes > 1 and any(isinstance(module, OwnClassifier) for module in model.head.head.modules())


def answers(model: MemoryWrapModel, encoding: Tensor) -> Tensor:
    """Returns the logits `[B, C]` of the backbone's classifier that a query of encodings `[B, E]` holds."""
    with float32_island(encoding):
        return model.own_classifier(wide(encoding))


def exchange(logits: Tensor) -> Tensor:
    """Exchanges the best and the second of logits `[B, C]`."""
    best = logits.topk(2, dim=-1).indices
    return logits.scatter(-1, best.flip(-1), logits.gather(-1, best))


def query_as_if(model: MemoryWrapModel, encoding: Tensor, logits: Tensor) -> Tensor:
    """Makes the queries of encodings `[B, E]` as if the classifier had said `logits` `[B, C]` of them.

    The model must hold the answer in its queries, and is not changed.
    """
    layer = copy.copy(model.head)
    layer._modules = {**layer._modules, "head": _answering(layer.head, _Given(logits))}
    return layer.query(encoding)


def _answering(read_head: nn.Module, given: nn.Module) -> nn.Module:
    """Returns a read head in which another module gives the answer.

    Copies are shallow: weights are shared, and other threads may be reading with the model's own layer.
    """
    if isinstance(read_head, OwnClassifier):
        return given
    same = copy.copy(read_head)
    same._modules = {
        name: None if part is None else _answering(part, given) for name, part in read_head._modules.items()
    }
    return same


def predict_as_if(model: MemoryWrapModel, encoding: Tensor, logits: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Predicts classes `[B]` through the bank as `query_as_if` asks for them; -1 where there was nothing to read.

    Args:
        model: A model with a memory bank, in evaluation mode.
        encoding: Encodings `[B, E]`.
        logits: What the classifier is to have said of them, `[B, C]`.
        hidden: Positions `[B, H]` of samples that each input must not see.
    """
    query = query_as_if(model, encoding, logits)
    read = model.head.read(query, model.prepared_bank(encoding).memory, hidden)
    predicted = model.head.classify(encoding, read.vector).argmax(dim=-1)
    return predicted.masked_fill((read.weights == 0).all(dim=1), -1)


def measure_answers(model: MemoryWrapModel, readout: MemoryReadout, rng: random.Random) -> dict[str, Tensor]:
    """Returns by name for which inputs the prediction follows an exchanged answer, and stays with its own.

    Both are empty if the queries hold no answer. The first leaves out inputs whose prediction is not the classifier's
    own, the second those for which no sample of another class was drawn, as from a memory of one class.
    """
    if not holds_answer(model):
        return {name: torch.zeros(0) for name in ("follows_exchanged_answer", "stays_with_answer")}
    encoding, prediction, logits = readout.encoding, readout.logits.argmax(dim=-1), answers(model, readout.encoding)
    encodings, _ = model.memory_bank.filled()
    # As many for each row, so that the size of a batch changes none.
    size = len(encodings)
    draws = [rng.choices(range(size), k=_DRAWS) for _ in range(len(encoding))]
    drawn = torch.tensor(draws, dtype=torch.long, device=encodings.device).view(-1, _DRAWS)
    classes = answers(model, encodings[drawn.flatten()]).argmax(dim=-1).view_as(drawn)
    other = classes != prediction.unsqueeze(1)
    found = other.any(dim=1)
    positions = drawn.gather(1, other.long().argmax(dim=1, keepdim=True))[found]
    pictures = encodings[positions.squeeze(1)].to(encoding.dtype)
    best, second = logits.topk(2).indices.T
    led = best == prediction
    return {
        "follows_exchanged_answer": (predict_as_if(model, encoding, exchange(logits)) == second)[led],
        "stays_with_answer": predict_as_if(model, pictures, logits[found], positions) == prediction[found],
    }
