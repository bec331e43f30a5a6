"""Saving, loading and pushing, beside timm's own of the backbone and a raw write and read of the bank."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.benchmark.subjects import CLASSES, filled
from timm_memwrap.experiments.timing import Call, Row, compare_calls
from timm_memwrap.hub import from_pretrained, push_to_hub, save_pretrained
from timm_memwrap.model import MemoryWrapModel

__all__ = ["DISK_BUDGET", "Folder", "measure_pushing", "measure_saving", "read_raw"]

# For saving and for loading alike.
DISK_BUDGET = 1.3
_BANK_SIZE = 10_000


def read_raw(path: Path) -> dict[str, Tensor]:
    """Reads tensors from a file. They are copies: safetensors maps the file, and reads nothing until one looks."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


class Folder:
    """A folder with a model as it is saved, and beside it what timm saves of the backbone and the bank raw."""

    anchor, what = "timm, and the bank raw", "model with its memory"

    def __init__(self, path: str, plain: nn.Module, model: MemoryWrapModel) -> None:
        self._plain, self._model = plain, model
        self.theirs, self.ours, self.bank = Path(path, "theirs"), Path(path, "ours"), Path(path, "bank.safetensors")

    def saves(self) -> dict[str, Call]:
        """Returns calls that save, the anchor first."""
        return {f"save: {self.anchor}": self._save_raw, f"save: {self.what}": self._save}

    def loads(self) -> dict[str, Call]:
        """Returns calls that load what has been saved, the anchor first."""
        return {f"load: {self.anchor}": self._load_raw, f"load: {self.what}": lambda: from_pretrained(self.ours)}

    def _save_raw(self) -> None:
        save_for_hf(self._plain, str(self.theirs), safe_serialization=True)
        encodings, labels = self._model.memory_bank.filled()
        save_file({"encodings": encodings, "labels": labels}, self.bank)

    def _save(self) -> None:
        save_pretrained(self._model, self.ours)

    def _load_raw(self) -> tuple[nn.Module, dict[str, Tensor]]:
        return timm.create_model(f"local-dir:{self.theirs}", pretrained=True), read_raw(self.bank)


def measure_saving(options: Options) -> list[Row]:
    """Times saving and loading."""
    rows = []
    for name in options.backbones:
        plain = timm.create_model(name, num_classes=CLASSES).eval()
        # Without a head of its own, it holds what the two files beside it hold.
        own: Mapping[str, Any] = {"num_classes": CLASSES, "read_head": "identity", "classifier": "linear"}
        model = filled(timm.create_model(f"memwrap_baseline_{name}", **own), _BANK_SIZE)
        with tempfile.TemporaryDirectory() as path:
            folder = Folder(path, plain, model)
            for calls in (folder.saves(), folder.loads()):
                budgets = dict.fromkeys(list(calls)[1:], DISK_BUDGET)
                rows += compare_calls(calls, "save", options.rounds, budgets=budgets, model=name, bank_size=_BANK_SIZE)
    return rows


def measure_pushing(options: Options) -> list[Row]:
    """Times a push beside saving the same to the disk."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if not endpoint.startswith(("http://127.", "http://localhost")):
        raise ValueError(
            f"HF_ENDPOINT={endpoint!r}: the benchmark pushes to a Hub on loopback only. Start one, and set HF_ENDPOINT."
        )
    rows = []
    for name in options.backbones:
        model = filled(timm.create_model(f"memwrap_{name}", num_classes=CLASSES), _BANK_SIZE)
        repos = (f"{options.namespace}/benchmark-{number}" for number in count())
        with tempfile.TemporaryDirectory() as path:
            calls: dict[str, Call] = {
                "save": partial(save_pretrained, model, path),
                "push": partial(_push, model, repos),
            }
            rows += compare_calls(calls, "push", options.rounds, model=name, bank_size=_BANK_SIZE)
    return rows


def _push(model: MemoryWrapModel, repos: Iterator[str]) -> None:
    push_to_hub(model, next(repos))
