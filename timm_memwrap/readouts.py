"""What a read takes and what it returns.

Shapes: B inputs, M memory samples, D or E width of an encoding, V of a value, K samples kept per input, C outputs.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from timm_memwrap.attention import Keys

__all__ = ["Index", "MemoryReadout", "PreparedMemory", "Read"]


class Index(Protocol):
    """What searches a memory for the samples that a query reads."""

    def search(self, queries: Tensor, scale: float | Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns weights, positions and scaled scores `[B, K]`, strongest first, without gradient."""

    def nearest(self, queries: Tensor, count: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns scores and positions `[B, K]` of the nearest samples, without gradient; hidden ones are masked."""


class PreparedMemory(NamedTuple):
    """A memory set made ready to be read."""

    keys: Keys
    values: Tensor  # what is summed, [M, V]; for a vote the labels [M]
    key_index: Index | None = None  # None to score all keys, which suits a small memory and gradients to it


class Read(NamedTuple):
    """What a query read from a memory.

    Attributes:
        vector: The memory vector `[B, V]`.
        weights: Content weights `[B, K]`, strongest first; rows with less support end in zeros.
        positions: Positions `[B, K]` of these samples in the memory; they mean nothing where the weight is zero.
        similarities: Similarities `[B, K]` to these samples, before the scale: the cosine, the inner product, or minus
            the squared distance.
        remainder: What the samples do not account for, `[B]`: the distance of the query to the weighted mean of their
            keys, 0 if they make up the input. Without gradient.
    """

    vector: Tensor
    weights: Tensor
    positions: Tensor
    similarities: Tensor
    remainder: Tensor


class MemoryReadout(NamedTuple):
    """What a forward read from the memory.

    Attributes:
        logits: Logits `[B, C]`.
        weights: Content weights `[B, K]`, strongest first; rows with less support end in zeros.
        positions: Positions `[B, K]` of those samples in the memory set; they mean nothing where the weight is zero.
        similarities: Similarities `[B, K]` to these samples, in the read's own metric and before its scale.
        remainder: Distance `[B]` of the input to the weighted mean of these samples, in the space of the keys.
        encoding: Encodings of the inputs `[B, E]`.
    """

    logits: Tensor
    weights: Tensor
    positions: Tensor
    similarities: Tensor
    remainder: Tensor
    encoding: Tensor
