"""How a model is run over images: the options that all commands with a model share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from timm_memwrap._utils import check_count
from timm_memwrap.data import BATCH_SIZE
from timm_memwrap.training.processes import find_device

__all__ = ["Inference"]


@dataclass(frozen=True)
class Inference:
    """How a model is run over images.

    Args:
        device: A torch device; null for cuda if available, else cpu.
        batch_size: Images at a time.
        workers: Processes that load images.
    """

    device: str | None = None
    batch_size: int = BATCH_SIZE
    workers: int = 0

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("workers", self.workers, at_least=0)

    def find_device(self) -> torch.device:
        """Returns the device."""
        return find_device(self.device)

    def batches(self, data: Any, collate: Callable[[list[Any]], Any] | None = None) -> DataLoader:
        """Makes batches of a data set in order."""
        return DataLoader(data, self.batch_size, num_workers=self.workers, collate_fn=collate)
