"""Engines that hold a memory outside of the process: one that is too large for it, or shared by several."""

from timm_memwrap.engines.memory import MilvusMemory as MilvusMemory

__all__ = ["MilvusMemory"]
