"""Familiarity: where an input stands among held-out images, by how near the samples come to it that it reads.

Shapes: B inputs, N reference images.
"""

import json

import torch
from torch import Tensor

from timm_memwrap._utils import evaluating
from timm_memwrap.bank_memory import BankMemory, spread
from timm_memwrap.meaning import QUANTILES
from timm_memwrap.memory_bank import Reference
from timm_memwrap.model import MemoryWrapModel

__all__ = ["UNFAMILIAR", "familiarity", "fit_reference", "quantiles_of", "read_of", "reference_quantiles"]

# An input below this familiarity is counted as unfamiliar.
UNFAMILIAR = 0.05
# Keeps the width of an interval of equal quantiles above 0.
_TINY = 1e-12


def familiarity(remainders: Tensor, quantiles: Tensor) -> Tensor:
    """Computes for each input the share of the reference images that are less familiar, `[B]`, between 0 and 1.

    An input is the less familiar, the further the samples that it reads stay from it.

    Args:
        remainders: `MemoryReadout.remainder` of the inputs, `[B]`.
        quantiles: Quantiles of the remainder over the reference images, as `reference_quantiles` returns them.
    """
    low, high = quantiles[:-1], quantiles[1:]
    return 1 - ((remainders.unsqueeze(1) - low) / (high - low).clamp(min=_TINY)).clamp(0, 1).mean(dim=1)


def reference_quantiles(model: MemoryWrapModel) -> Tensor:
    """Returns 101 quantiles of the remainder: of what `calibrate` was given, else of the memory itself.

    In the latter case each of up to 500 memory samples is read with itself hidden. The model was trained on them, so
    that new images of the same kind come out less familiar than they are.
    """
    bank = model.memory_bank
    device = bank.filled()[1].device
    if bank.reference.count and bank.reference.read == read_of(model):
        return torch.tensor(bank.reference.quantiles, device=device)
    known = model.prepared_bank()
    if known.quantiles is None:
        known.quantiles = torch.tensor(quantiles_of(_remainders_of_samples(model, known)), device=device)
    return known.quantiles


def fit_reference(model: MemoryWrapModel, remainders: Tensor) -> Reference:
    """Makes a reference of the remainders `[N]` of held-out images, for this model's way to read."""
    return Reference(read_of(model), len(remainders), quantiles_of(remainders))


def quantiles_of(remainders: Tensor) -> list[float]:
    """Computes 101 quantiles of remainders `[N]`, at least one, from the least to the largest."""
    levels = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    return torch.quantile(remainders.double().cpu(), levels).tolist()


def read_of(model: MemoryWrapModel) -> str:
    """Returns how a model reads: a reference of another way says nothing."""
    return json.dumps(model.memory_args, sort_keys=True)


def _remainders_of_samples(model: MemoryWrapModel, known: BankMemory) -> Tensor:
    """Returns the remainders `[N]` of up to 500 memory samples, spread over the memory, each hidden from itself."""
    encodings, labels = model.memory_bank.filled()
    chosen = spread(torch.arange(len(labels), device=labels.device))
    with evaluating(model):
        blocks = known.left_out(chosen, encodings)
        return torch.cat([model.read(encoding, known.memory, hidden).remainder for encoding, hidden in blocks])
