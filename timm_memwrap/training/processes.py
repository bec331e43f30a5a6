"""The processes of a training: one, or several that `torchrun` started."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env

__all__ = ["Processes", "find_device", "processes"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """This process among all processes of a training."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    distributed: bool = False  # whether they form a process group

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all processes have made this call."""
        if self.distributed:
            dist.barrier()


def find_device(device: str | None, option: str = "device") -> torch.device:
    """Returns the device that `option` names, or CUDA if available, else the CPU, and raises if it cannot be used."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{option}={wanted!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def processes(device: str | None) -> Iterator[Processes]:
    """Joins the process group that `torchrun` (or Slurm) describes, through timm, and leaves it at the end.

    Until then, a SIGTERM interrupts as Ctrl-C does.
    """
    wanted = find_device(device, "training.device")
    with _terminated_as_interrupted():
        if not is_distributed_env():
            yield Processes(wanted)
            return
        started = not dist.is_initialized()
        found = init_distributed_device_so(device=str(wanted))
        joined = Processes(torch.device(found["device"]), found["global_rank"], found["world_size"], True)
        if not joined.first:
            logging.getLogger("timm_memwrap").setLevel(logging.ERROR)
        _logger.info("Process %d of %d on %s, pid %d.", joined.rank, joined.world_size, joined.device, os.getpid())
        try:
            yield joined
        finally:
            if started:
                dist.destroy_process_group()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    # Python delivers signals to the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
