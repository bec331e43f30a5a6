"""The processes of a training: one, or several that `torchrun` started."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env

__all__ = ["Processes", "processes"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """Which process this is.

    Args:
        device: Where this process computes.
        rank: Its number.
        world_size: How many there are.
        distributed: Whether they form a process group.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    distributed: bool = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.distributed:
            dist.barrier()


@contextmanager
def processes(device: str | None) -> Iterator[Processes]:
    """Joins the process group that `torchrun` (or Slurm) describes, through timm, and leaves it at the end.

    Args:
        device: A torch device; `None` for `cuda` if there is one, else `cpu`.

    Raises:
        ValueError: If there is no such device.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"training.device={wanted!r} cannot be used: {error}") from error
    if not is_distributed_env():
        yield Processes(torch.device(wanted))
        return
    started = not dist.is_initialized()
    found = init_distributed_device_so(device=wanted)
    joined = Processes(torch.device(found["device"]), found["global_rank"], found["world_size"], True)
    if not joined.first:
        logging.getLogger("timm_memwrap").setLevel(logging.ERROR)
    _logger.info("Process %d of %d on %s, pid %d.", joined.rank, joined.world_size, joined.device, os.getpid())
    try:
        yield joined
    finally:
        if started:
            dist.destroy_process_group()
