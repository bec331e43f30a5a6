"""Files with bits flipped, cut, blanked or swapped: read as what they are, or refused by a line that names them."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save

import timm_memwrap
from timm_memwrap.attention import make_keys
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.search import FaissIndex
from timm_memwrap.training.checkpoint import read_state, write_state
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.recipes import load_recipe, to_dict, write_recipe

# Kind of file: how many are damaged by default. A damaged configuration is mended, and so a model is loaded.
COUNTS = {"weights": 12, "bank": 12, "config": 3, "index": 12, "checkpoint": 12, "recipe": 12}
SLOW = [pytest.mark.slow, pytest.mark.timeout(3000)]


class Subject:
    """A file of one kind, and what reading it gives."""

    def __init__(self, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.kind = kind
        model = timm.create_model("memwrap_evidence_test_resnet", num_classes=3).eval()
        self.images = torch.randn(2, 3, 32, 32)
        data = torch.utils.data.TensorDataset(torch.randn(9, 3, 32, 32), torch.arange(9) % 3)
        timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
        names = {"weights": "model.safetensors", "config": "config.json", "index": "memory.faiss", "recipe": "r.yaml"}
        self.path = folder / names.get(kind, f"{kind}.safetensors")
        self.keys, self.queries = make_keys(torch.randn(200, 16), "l2"), torch.randn(3, 16)
        match kind:
            case "weights" | "config":
                timm_memwrap.save_pretrained(model, folder)
            case "bank":
                model.memory_bank.save(self.path)
            case "checkpoint":
                state = {"history": [{"loss": 0.5}], "optimizer": {0: torch.randn(64, 9), 1: [torch.ones(3), True]}}
                write_state(state, self.path)
            case "recipe":
                write_recipe(Recipe(), self.path)
        self.expected = self.read()
        self.whole = self.path.read_bytes()

    def read(self) -> str:
        """Reads the file and returns a digest of all that it says."""
        match self.kind:
            case "weights" | "config":
                model = timm_memwrap.from_pretrained(self.path.parent)
                with torch.no_grad():
                    found: Any = [model.state_dict(), model.memory_args, model(self.images)]
            case "bank":
                found = MemoryBank().load(self.path).state_dict()
            case "index":
                found = FaissIndex(self.keys, "hnsw", path=self.path).search(self.queries)
            case "checkpoint":
                found = read_state(self.path)
            case _:
                found = to_dict(load_recipe(self.path))
        return hashlib.sha256(repr(_plain(found)).encode()).hexdigest()

    def outcome(self, content: bytes) -> str:
        """Writes this content, and returns whether it reads as the whole file, is refused, or what else happens."""
        self.path.write_bytes(content)
        try:
            digest = self.read()
        except (ValueError, OSError) as error:
            line = str(error)
            named = self.path.name in line or str(self.path.parent) in line
            return (
                "refused"
                if named and line.replace("\n", "").isprintable()
                else f"{type(error).__name__}: {line[:200]!r}"
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        # A recipe has no checksum: another value is another recipe, if it is the value that it gets.
        if digest == self.expected or (self.kind == "recipe" and self._says(content)):
            return "identical"
        return "read as something else"

    def _says(self, content: bytes) -> bool:
        loaded = json.loads(json.dumps(to_dict(load_recipe(self.path))))
        for section, options in yaml.safe_load(content).items():
            for name, value in options.items():
                if loaded[section][name] != json.loads(json.dumps(value)):
                    return False
        return True


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def damaged(content: bytes, random: Random) -> bytes:
    """Returns content with a fault of a disk, a network or an editor, half of the time in the header."""
    at = random.randrange(len(content) if random.random() < 0.5 else min(len(content), 2000))
    length = random.choice([1, 8, 512, 4096])
    new = random.randbytes(length)
    changes: list[Callable[[], bytes]] = [
        lambda: content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :],
        lambda: content[:at],
        lambda: content[:at] + bytes(length) + content[at + length :],
        lambda: content[:at] + new + content[at + length :],
        lambda: content[:at] + new + content[at:],
        lambda: content[:at] + content[at + length :],
        lambda: content[at:] + content[:at],
        lambda: content + new,
        lambda: save({"a": torch.ones(2)}),
    ]
    return random.choice(changes)()


@pytest.mark.parametrize(
    ("kind", "count"), [*COUNTS.items(), *(pytest.param(kind, 350, marks=SLOW) for kind in COUNTS)]
)
def test_a_damaged_file_is_read_as_it_was_or_refused(
    kind: str, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "index":
        pytest.importorskip("faiss")
    caplog.set_level(logging.CRITICAL)
    subject, random = Subject(kind, tmp_path), Random(0)
    outcomes: Counter[str] = Counter(subject.outcome(damaged(subject.whole, random)) for _ in range(count))
    print(kind, dict(outcomes))  # noqa: T201
    assert not outcomes.keys() - {"identical", "refused"}
