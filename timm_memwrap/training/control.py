"""A head with a memory that is given none: what its layers alone can do."""

from typing import Any

from torch import Tensor, nn

__all__ = ["WithoutMemory"]


class WithoutMemory(nn.Module):
    """Classifies inputs `[B, ...]` with nothing read: the control for a head with a memory.

    The same layers and parameters, trained on the same images; only the memory vector is always zero.

    Args:
        model: A `MemoryWrapModel`, or a `FrozenMemory`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._size = getattr(model, "memory_model", model).encoding_size

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images, or encodings if the model takes those."""
        return self.model(x, memory_encoding=x.new_zeros(0, self._size))
