"""How a model is run over images: the options that all commands with a model share."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from timm_memwrap._utils import check_choice, check_count
from timm_memwrap.data import BATCH_SIZE, Images, data_config
from timm_memwrap.data.transforms import as_batch
from timm_memwrap.training.processes import find_device

__all__ = ["Inference"]


@dataclass(frozen=True)
class Inference:
    """How a model is run over images.

    Args:
        device: A torch device; null for cuda if available, else cpu.
        batch_size: Images at a time.
        workers: Processes that load images.
        unreadable: What to do with images that cannot be read: fail, or skip them and log which.
    """

    device: str | None = None
    batch_size: int = BATCH_SIZE
    workers: int = 0
    unreadable: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("workers", self.workers, at_least=0)
        check_choice("unreadable", self.unreadable, ("fail", "skip"))

    def find_device(self) -> torch.device:
        """Returns the device."""
        return find_device(self.device)

    def readable(self, images: Images, progress: bool = True) -> Images:
        """Returns the images that are not to be skipped."""
        return images.readable(progress) if self.unreadable == "skip" else images

    def batches(self, data: Any) -> DataLoader:
        """Makes batches of a data set in order."""
        return DataLoader(data, self.batch_size, num_workers=self.workers)

    def inputs(self, model: nn.Module, paths: Any) -> DataLoader:
        """Makes inputs of a model from image files, in order."""
        collate = partial(as_batch, data_config(model))
        return DataLoader(paths, self.batch_size, num_workers=self.workers, collate_fn=collate)
