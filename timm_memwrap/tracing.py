"""What `torch.fx` sees of the model, as of timm's feature extraction: the backbone, and the head as one call."""

from typing import Any

import torch
from timm.models import register_notrace_module
from torch.fx import Proxy

from timm_memwrap.heads import Calibration
from timm_memwrap.layers import BaselineMemory, LabelVote, MemoryWrapLayer
from timm_memwrap.memory_bank import MemoryBank

__all__ = ["forward_features", "is_traced", "trace_read"]

# What they do depends on values, which a tracer has not.
for _module in (BaselineMemory, LabelVote, MemoryWrapLayer, Calibration):
    register_notrace_module(_module)


def is_traced(x: Any) -> bool:
    """Returns whether a value stands for one that a graph computes later."""
    return isinstance(x, Proxy)


def forward_features(backbone: Any, x: Any) -> Any:
    """Computes the backbone's unpooled features of images, traced or not."""
    if not is_traced(x):
        return backbone.forward_features(x)
    # Of the functions that timm lets no tracer enter, torch.fx knows those in the files of modules that are called.
    backbone.forward = backbone.forward_features
    try:
        return backbone(x)
    finally:
        del backbone.forward


def trace_read(head: Any, bank: MemoryBank, encoding: Any, training: bool) -> Any:
    """Returns the head's logits for a traced encoding, read from the rest of its batch or else from the bank."""
    if training:
        positions = torch.ones_like(encoding[:, :1], dtype=torch.long).cumsum(dim=0) - 1
        return head(encoding, encoding, hidden=positions)
    if len(bank):
        memory, labels = bank.filled()
        return head(encoding, memory, labels=labels)
    return head(encoding, encoding[:0], labels=torch.zeros(0, dtype=torch.long))
