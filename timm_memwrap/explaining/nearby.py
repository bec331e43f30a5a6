"""The part of a memory in an engine that a batch needs: what it reads and what it is compared to, as a bank.

Shapes: B inputs, E width of an encoding, N samples.
"""

import torch
from torch import Tensor

from timm_memwrap._utils import evaluating
from timm_memwrap.attention import wide
from timm_memwrap.engines.memory import with_bank
from timm_memwrap.familiarity import quantiles_of, read_of, reference_quantiles
from timm_memwrap.model import MemoryWrapModel

__all__ = ["class_counts_of", "memory_size", "nearby", "quantiles_of_memory"]

# Samples of a contender that are shown, and one for those that are as near.
_OF_CLASS = 4
# Copies of a sample that are hidden with it when it is read itself.
_COPIES = 8


@torch.no_grad()
def nearby(model: MemoryWrapModel, encoding: Tensor, contenders: int = 3, hidden: int = 1) -> MemoryWrapModel:
    """Returns the model with the samples of its memory that some inputs need as its bank.

    A model whose bank holds all samples reads that. Else these are the samples that the inputs read, also with up to
    `hidden` of them left out, those of the most probable classes that look most like the inputs, and what the model
    needs to say what these samples are themselves. What the returned model reads has positions in its own bank.

    Args:
        model: A model in evaluation mode.
        encoding: Encodings `[B, E]` of the inputs, as `model.encode` returns them.
        contenders: For how many classes of each input to find samples.
        hidden: How many samples of an input may be left out of a read.
    """
    engine = model.engine
    if engine is None or not len(encoding):
        return model
    if len(model.memory_bank):
        return with_bank(model, model.memory_bank)
    contents, rows = engine.nearest(model, encoding, hidden, images=True)
    near = with_bank(model, engine.bank(model, contents, rows))
    with evaluating(model):
        readout = near.read(encoding)
        classes = readout.logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :contenders]
        rows = engine.of_classes(model, encoding, classes, _OF_CLASS, images=True) | rows
        if model.memory_args["classifier"] != "own":
            # What it says of a sample is read from the memory without the sample.
            support = near.memory_bank.filled()[0][readout.positions[readout.weights > 0].unique()]
            rows = engine.nearest(model, support.to(wide(encoding)), _COPIES + hidden, images=True)[1] | rows
        near = with_bank(model, engine.bank(model, contents, rows))
        near.prepared_bank().quantiles = quantiles_of_memory(model)
    return near


def memory_size(model: MemoryWrapModel) -> int:
    """Returns the number of samples of the memory, wherever it is."""
    return len(model.memory_bank) if model.engine is None else model.engine.open(model).size


def class_counts_of(model: MemoryWrapModel) -> dict[int, int]:
    """Returns the number of samples of the memory by label, wherever it is."""
    return model.memory_bank.class_counts if model.engine is None else model.engine.open(model).class_counts


def quantiles_of_memory(model: MemoryWrapModel) -> Tensor:
    """Returns what `reference_quantiles` does, wherever the memory is."""
    engine = model.engine
    if engine is None:
        return reference_quantiles(model)
    if len(model.memory_bank):
        return reference_quantiles(with_bank(model, model.memory_bank))
    return engine.quantiles(model, lambda: _quantiles(model))


@torch.no_grad()
def _quantiles(model: MemoryWrapModel) -> Tensor:
    """Computes the quantiles of a memory that is in an engine alone: of up to 500 samples, each hidden from itself."""
    engine = model.engine
    assert engine is not None
    chosen = engine.spread(model, 500)
    if chosen.reference.count and chosen.reference.read == read_of(model):
        return reference_quantiles(with_bank(model, chosen))
    device = next(model.parameters()).device
    contents, rows = engine.nearest(model, chosen.filled()[0].to(device).float(), _COPIES)
    near = with_bank(model, engine.bank(model, contents, rows))
    encodings, ids = near.memory_bank.filled()[0], near.memory_bank._meaning.read().ids
    positions = torch.tensor(ids.positions(chosen.ids), device=encodings.device)
    known = near.prepared_bank()
    with evaluating(model):
        parts = [
            near.read(encoding, known.memory, hidden).remainder
            for encoding, hidden in known.left_out(positions, encodings)
        ]
    return torch.tensor(quantiles_of(torch.cat(parts)), device=device)
