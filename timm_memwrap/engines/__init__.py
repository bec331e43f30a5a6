"""Engines that hold a memory outside of the process: one that is too large for it, or shared by several."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_memwrap.engines.memory import MilvusMemory

__all__ = ["open_memory"]


def open_memory(model: Any, **options: Any) -> "MilvusMemory":
    """Returns the memory of a model in Milvus, once there is one that it can read; `options` are `MilvusMemory`'s.

    Raises:
        ValueError: As `MilvusMemory` and its `open` do.
        ConnectionError: If Milvus cannot be reached.
    """
    # Few models need it, and all import this.
    from timm_memwrap.engines.memory import MilvusMemory

    memory = MilvusMemory(**options)
    memory.open(model)
    return memory
