"""What one visitor of the page has: a picture that was asked about, and a memory that only they change."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from timm_memwrap._utils import plain_state
from timm_memwrap.backbone import classifiers_of
from timm_memwrap.explaining.explanation import Explanation, explain_batch
from timm_memwrap.explaining.reading import read_without, snapshot
from timm_memwrap.model import MemoryWrapModel

__all__ = ["Asked", "Visitor", "own_copy"]

# Edits that can be undone. A version of the memory holds its encodings.
_HISTORY = 10
SAMPLES = 8


@dataclass
class Asked:
    """A picture that was asked about, encoded once."""

    picture: Any
    model: MemoryWrapModel  # as it was then
    encoding: Tensor
    explanation: Explanation
    left_out: list[int] = field(default_factory=list)  # positions in the memory

    def probabilities(self) -> Tensor:
        """Returns the probabilities `[C]` that are read without what is left out."""
        hidden = torch.tensor([self.left_out], dtype=torch.long, device=self.encoding.device)
        with torch.no_grad():
            logits = read_without(self.model, self.encoding, hidden)[0]
        return logits.sigmoid() if self.model.multi_label else logits.softmax(dim=-1)


@dataclass
class Visitor:
    """A visitor's version of the model, and those before it."""

    model: MemoryWrapModel
    history: list[MemoryWrapModel] = field(default_factory=list)
    asked: Asked | None = None

    def ask(self, picture: Any, inputs: Tensor) -> Asked:
        """Explains a picture by the model input `[1, C, H, W]` that was made of it."""
        model = snapshot(self.model)
        with torch.no_grad():
            encoding = model.encode(inputs)
            (explanation,) = explain_batch(model, inputs, SAMPLES, encoding=encoding)
        self.asked = Asked(picture, model, encoding, explanation)
        return self.asked

    def edit(self, change: Callable[[MemoryWrapModel], object]) -> None:
        """Changes a copy of the model, which is the visitor's from then on if the change succeeds."""
        changed = own_copy(self.model)
        change(changed)
        self.history = [*self.history[-_HISTORY + 1 :], self.model]
        self.model, self.asked = changed, None

    def undo(self) -> bool:
        """Takes the last change back, and returns whether there was one."""
        if not self.history:
            return False
        self.model, self.asked = self.history.pop(), None
        return True


def own_copy(model: MemoryWrapModel) -> MemoryWrapModel:
    """Returns a copy with a memory and a classifier of its own, which shares the weights of the encoder.

    The page never trains, so nobody writes to them.
    """
    own = {id(tensor) for tensor in classifiers_of(model.backbone).state_dict(keep_vars=True).values()}
    encoder = [tensor for tensor in plain_state(model.backbone).values() if id(tensor) not in own]
    shared: dict[int, object] = {id(tensor): tensor for tensor in encoder}
    # A snapshot shares the samples until it is changed.
    shared[id(model.memory_bank)] = model.memory_bank.snapshot()
    return copy.deepcopy(model, shared)
