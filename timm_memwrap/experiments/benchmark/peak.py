"""What a new process needs to load a model and to read its memory once: a process that did more shows less."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from timm_memwrap.hub import from_pretrained
from timm_memwrap.model import MemoryWrapModel

__all__ = ["Needed", "measure_peak", "report"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEASURABLE = os.access(_STATUS, os.R_OK) and os.access(_RESET, os.W_OK)


class Needed(NamedTuple):
    """What was needed."""

    loading: float | None  # most memory in use, divided by what stays in use; None where the system does not say
    reading: float | None  # likewise from loading to the end of the first read
    bytes: int  # of all tensors but the parameters, after the first read


def measure_peak(small: Path, folder: Path) -> Needed:
    """Loads and reads the model of a folder in a new process, after a small one, so that all is imported."""
    code = f"import sys; from {__name__} import report; sys.stdout.write(report(*sys.argv[1:]))"
    args = [sys.executable, "-c", code, str(small), str(folder)]
    return Needed(*json.loads(subprocess.run(args, capture_output=True, text=True, check=True).stdout))


def report(small: str, folder: str) -> str:
    """Returns as JSON what this process needs."""
    _read(from_pretrained(small))
    gc.collect()
    if _MEASURABLE:
        # Lets the most memory in use begin with what is in use now.
        _RESET.write_text("5")
    before = _in_use("VmRSS")
    model = from_pretrained(folder)
    loading = _ratio(before)
    _read(model)
    return json.dumps([loading, _ratio(before), _tensor_bytes() - sum(p.nbytes for p in model.parameters())])


def _read(model: MemoryWrapModel) -> None:
    with torch.no_grad():
        model.read(torch.rand(32, model.encoding_size))


def _ratio(before: int | None) -> float | None:
    """Returns the most memory in use since the start over what is in use now, both without what was there before."""
    gc.collect()
    most, now = _in_use("VmHWM"), _in_use("VmRSS")
    return None if before is None or most is None or now is None else (most - before) / (now - before)


def _in_use(name: str) -> int | None:
    """Returns kB of memory in use, or the most that was; `None` on systems other than Linux."""
    found = re.search(rf"{name}:\s+(\d+)", _STATUS.read_text()) if _MEASURABLE else None
    return None if found is None else int(found[1])


def _tensor_bytes() -> int:
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())
