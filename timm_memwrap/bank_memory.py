"""A bank made ready to be read: once for these weights and samples, and dropped when either changes.

Shapes: M memory samples, P of them asked for, C classes.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap._utils import is_exporting
from timm_memwrap.attention import Keys
from timm_memwrap.fingerprint import Watch
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.memory_layer import LARGE, MemoryLayer
from timm_memwrap.readouts import PreparedMemory
from timm_memwrap.search import ClassIndex, FaissIndex, exact_index

__all__ = ["BankMemory", "are_same", "bank_memory", "empty_memory", "spread", "warn_of_empty_memory"]

_logger = logging.getLogger(__name__)

# Scores computed at a time when memory samples are read themselves: 64 MB of float32.
_MOST_SCORES = 2**24
# As many of them at most stand for all.
_SPREAD = 500

# Encodings compared at a time.
_ROWS = 2**14
# Relative distance of two encodings of one picture, which a batch of another size changes.
_SAME = 1e-5


@dataclass
class BankMemory:
    """What a layer made of a bank. The bank keeps it, and drops it when it changes."""

    head: nn.Module
    memory: PreparedMemory
    watch: Watch | None  # None under torch.compile, which cannot watch
    predictions: Tensor | None = None  # [M], -1 where nobody has asked
    groups: Tensor | None = None  # [M], the same number for samples that are identical; None where nobody has asked
    classes: ClassIndex | None = None  # its samples by class; None where nobody has asked
    quantiles: Tensor | None = None  # of what reads of its own samples leave out; None where nobody has asked

    def predict(self, positions: Tensor, own_logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns predictions for positions of any shape, made once for each from the logits `[P, C]` of `[P]`."""
        if self.predictions is None:
            self.predictions = torch.full((len(self.memory.keys.vectors),), -1, device=positions.device)
        asked = positions.unique()
        new = asked[self.predictions[asked] < 0]
        if len(new):
            self.predictions[new] = own_logits(new).argmax(dim=-1)
        return self.predictions[positions]

    def alike(self, positions: Tensor, encodings: Tensor) -> Tensor:
        """Returns which samples are identical to those at positions `[P]`: positions `[P, 1]`, or a mask `[P, M]`."""
        if self.groups is None:
            self.groups = groups_of(encodings)
        if int(self.groups.max()) == len(self.groups) - 1:
            return positions.unsqueeze(1)
        return self.groups[positions].unsqueeze(1) == self.groups

    def blocks(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Splits positions `[P]` into blocks that can be read at a time."""
        return positions.split(max(1, _MOST_SCORES // len(self.memory.keys.vectors)))

    def left_out(self, positions: Tensor, encodings: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields what to read samples at positions `[P]` with, each without itself and its copies, block by block.

        Args:
            positions: The samples.
            encodings: Encodings `[M, E]` of all samples.

        Yields:
            Encodings `[B, E]` in the precision of the keys, and what is hidden from each, as `alike` returns it.
        """
        for part in self.blocks(positions):
            yield encodings[part].to(self.memory.keys.vectors.dtype), self.alike(part, encodings)


def spread(positions: Tensor) -> Tensor:
    """Returns up to 500 of positions `[P]`, spread evenly over them."""
    count = min(_SPREAD, len(positions))
    return positions[torch.linspace(0, len(positions) - 1, count, device=positions.device).long()]


def groups_of(encodings: Tensor) -> Tensor:
    """Returns a number `[M]` for each encoding `[M, E]`, which those of one picture share.

    A picture is not encoded to the same digits in each batch.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(encodings.shape[1], generator=generator).to(encodings.device)
    # Where one sample is another's copy, nothing lies between the two on a random line.
    order = torch.cat([part.float() @ direction for part in encodings.split(_ROWS)]).argsort()
    new = torch.ones(len(order), dtype=torch.bool, device=order.device)
    for start in range(1, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        new[start : start + _ROWS] = ~are_same(encodings[rows], encodings[order[start - 1 : start - 1 + len(rows)]])
    return torch.empty_like(order).scatter(0, order, new.cumsum(0) - 1)


def are_same(encodings: Tensor, others: Tensor) -> Tensor:
    """Returns for which rows `[N]` two encodings `[N, E]` are of one picture, up to their precision."""
    tolerance = max(_SAME, *(2 * torch.finfo(part.dtype).eps for part in (encodings, others)))
    return (encodings.float() - others.float()).norm(dim=1) <= tolerance * others.float().norm(dim=1)


def bank_memory(
    bank: MemoryBank,
    head: MemoryLayer,
    others: Iterable[nn.Module],
    dtype: torch.dtype,
    index_args: dict[str, Any] | None,
    check: Callable[[Tensor, int], None],
) -> BankMemory:
    """Returns the bank ready to be read by a layer; `others` are modules whose weights its keys are made with too.

    Before that, `check` is given its encodings and largest label, to raise if they are another model's.
    """
    encodings, labels = bank.filled()
    tensors = [tensor for module in (head, *others) for tensor in (*module.parameters(), *module.buffers())]
    tensors += [encodings, labels]
    known, compiling = bank.derived, torch.compiler.is_compiling()
    if (
        isinstance(known, BankMemory)
        and known.memory.keys.vectors.dtype == dtype
        # A compiled model cannot watch; training it or changing the bank drops what is known all the same.
        and (compiling or (known.head is head and known.watch is not None and known.watch.unchanged(tensors)))
    ):
        return known
    check(encodings, bank.largest_label)
    # Not in inference mode, whose tensors a later backward could not use.
    with torch.inference_mode(False), torch.no_grad():
        keys, values = head.keys_of_bank(encodings, dtype), head.value(encodings, labels)
        index = None if compiling else _new_index(keys, index_args)
        # A dense read sums all values at each forward.
        values = values.to(dtype) if index is None and values is encodings else values
        # In one call: the compiler of PyTorch 2.9 cannot keep what `_replace` returns.
        memory = PreparedMemory(keys, values, index)
    made = BankMemory(head, memory, None if compiling else Watch(tensors))
    # An exported graph must not change the model that it was made of.
    if not is_exporting():
        bank.derived = made
    return made


def _new_index(keys: Keys, index_args: dict[str, Any] | None) -> Any:
    if index_args is not None:
        return FaissIndex(keys, **index_args)
    # On a device, a search that depends on what it finds would have to wait for it.
    searched = len(keys.vectors) > LARGE and keys.vectors.device.type == "cpu"
    return exact_index(keys) if searched else None


def empty_memory(head: MemoryLayer, encoding: Tensor) -> PreparedMemory:
    """Returns a memory of no samples for inputs of this device and precision: a layer reads the zero vector from it."""
    nothing = encoding.new_zeros(0, head.encoder_output_dim)
    return head.prepare(nothing, torch.zeros(0, dtype=torch.long, device=encoding.device))


@torch.compiler.assume_constant_result
def warn_of_empty_memory() -> bool:
    """Warns, and returns that it has. The compiler calls it while it traces, where a call of the logger would break."""
    _logger.warning(
        "The memory is empty, so the model reads nothing from it. Call timm_memwrap.build_memory_bank(model, data) "
        "before evaluation."
    )
    return True
