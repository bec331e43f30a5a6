"""Reads of the memory that all measures of explanations share.

Shapes: B inputs, E width of an encoding, C classes, K samples read per input, H hidden samples per input.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timm_memwrap._utils import evaluating
from timm_memwrap.bank_memory import empty_memory
from timm_memwrap.constants import MEMORY_BANK
from timm_memwrap.data import encoded_batches, size_of
from timm_memwrap.engines.memory import with_bank
from timm_memwrap.memory_checks import check_memory
from timm_memwrap.model import MemoryReadout, MemoryWrapModel
from timm_memwrap.reconstruction import CANDIDATES
from timm_memwrap.search import SearchAgain

__all__ = [
    "encodings_of",
    "no_class_leads",
    "own_predictions",
    "read_nothing",
    "read_with_deletions",
    "read_without",
    "snapshot",
]

# Scores computed at a time when samples are left out one by one: 64 MB of float32.
_MOST_SCORES = 2**24
# Reads at a time where the memory is not searched again.
_MOST_READS = 256


def snapshot(model: MemoryWrapModel, whole: bool = True) -> MemoryWrapModel:
    """Returns the model with the memory bank that it has now, whatever another thread does to `model.memory_bank`.

    What is read and what is shown of a sample are then of one bank. The two share weights and mode. Raises a
    `ValueError` if there is no model with a memory bank; unless `whole`, an engine may hold the memory: see `nearby`.
    """
    check_memory(model, whole=whole)
    if model.engine is not None and len(model.memory_bank):
        # What is elsewhere is here as well, at the positions that it is shown by.
        return with_bank(model, model.memory_bank.snapshot())
    same = copy.copy(model)
    same._modules = {**model._modules, MEMORY_BANK: model.memory_bank.snapshot()}
    return same


@contextmanager
def encodings_of(
    model: MemoryWrapModel, data: Any, title: str, progress: bool
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Opens a pass over labelled data in evaluation mode: encodings `[B, E]` and labels `[B]`, at least one batch."""
    with evaluating(model), tqdm(total=size_of(data), desc=title, unit="img", disable=not progress) as bar:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            empty = True
            for encoding, labels in encoded_batches(model, data):
                yield encoding, labels
                empty = False
                bar.update(len(labels))
            if empty:
                raise ValueError("The data is empty, so there is nothing to measure. Check its path and split.")

        yield batches()


def own_predictions(model: MemoryWrapModel, readout: MemoryReadout) -> Tensor:
    """Returns the model's own predictions `[B, K]` for the samples that were read, and -1 where the weight is zero."""
    used = readout.weights > 0
    own = torch.full_like(readout.positions, -1)
    own[used] = model.own_predictions(readout.positions[used])
    return own


def read_without(model: MemoryWrapModel, encoding: Tensor, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
    """Computes logits `[B, C]` in float32 with the samples at positions `hidden` `[B, H]` left out.

    `encoding` is `[B, E]`, or, with `rows` `[B]`, of the inputs that these count: the memory is then searched once for
    each of them, however many reads there are.
    """
    rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
    memory = model.prepared_bank(encoding).memory
    index, size = memory.key_index, max(1, _MOST_SCORES // len(model.memory_bank))
    if index is not None:
        near, size = index.nearest(model.head.query(encoding), CANDIDATES + hidden.shape[1], None), _MOST_READS
    logits = []
    for part, positions in zip(rows.split(size), hidden.split(size), strict=True):
        if index is not None:
            memory = memory._replace(key_index=SearchAgain(index, *(each[part] for each in near)))
        logits.append(_logits(model, model.read(encoding[part], memory, positions)))
    return torch.cat(logits) if len(rows) else encoding.new_zeros(0, model.num_classes, dtype=torch.float32)


def read_with_deletions(
    model: MemoryWrapModel, readout: MemoryReadout, deleted: int, rng: random.Random
) -> dict[str, Tensor]:
    """Computes by name logits `[B, C]` without the `deleted` strongest samples, and without as many drawn at random."""
    counts = (readout.weights > 0).sum(dim=1).clamp(max=deleted)
    left_out = {name: torch.zeros_like(readout.logits, dtype=torch.float32) for name in ("deletion", "random")}
    # Row by row, so that the size of a batch changes none.
    draws = [rng.sample(range(len(model.memory_bank)), count) for count in counts.tolist()]
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().squeeze(1)
        drawn = torch.tensor([draws[row] for row in rows.tolist()], device=rows.device)
        left_out["deletion"][rows] = read_without(model, readout.encoding[rows], readout.positions[rows, :count])
        left_out["random"][rows] = read_without(model, readout.encoding[rows], drawn)
    return left_out


def read_nothing(model: MemoryWrapModel, encoding: Tensor) -> Tensor:
    """Computes logits `[B, C]` in float32 with nothing read from the memory."""
    return _logits(model, model.read(encoding, memory=empty_memory(model.head, encoding)))


def _logits(model: MemoryWrapModel, readout: MemoryReadout) -> Tensor:
    """Returns logits in float32; 0 for all classes where the backbone's classifier has no sample to judge.

    What it then computes is its bias, which says nothing of the input: `sum w_i C(f_i)` over no samples is 0.
    """
    logits = readout.logits.float()
    if model.memory_args["classifier"] != "own":
        return logits
    return logits.masked_fill((readout.weights == 0).all(dim=1, keepdim=True), 0.0)


def no_class_leads(logits: Tensor) -> Tensor:
    """Returns for which rows `[B]` all classes have the same logit, so that nothing is predicted."""
    return logits.amax(dim=-1) == logits.amin(dim=-1)
