"""The base of a repository that holds a memory alone: where its weights are, and that they are still the same."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import _hub
from torch import Tensor

from timm_memwrap.constants import BASELINE_PREFIX, EVIDENCE_PREFIX, PREFIX, WEIGHTS_FILE
from timm_memwrap.tensor_files import FileError, read_tensors

__all__ = ["Base", "BaseWeights", "parse_base"]

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_KINDS = ("hf_hub_id", "local_dir", "file")


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a base and how timm builds a model of them."""

    tensors: dict[str, Tensor]
    architecture: str
    cfg: dict[str, Any]  # pretrained cfg
    args: dict[str, Any]  # model arguments


@dataclass(frozen=True)
class Base:
    """Weights that a memory was made with, as `config.json` names them.

    Args:
        kind: `"hf_hub_id"` for a repository, `"local_dir"` for a folder, `"file"` for a safetensors file.
        name: The repo id or path.
        sha256: Hash of the file.
        revision: Commit of a repository.
    """

    kind: str
    name: str
    sha256: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def to_dict(self) -> dict[str, str]:
        """Returns it as JSON."""
        revision = {"revision": self.revision} if self.revision else {}
        return {self.kind: self.name, **revision, "sha256": self.sha256}

    @contextmanager
    def needed_by(self, name: str) -> Iterator[None]:
        """Says in an `OSError` that it is of the base, and what needs it."""
        try:
            yield
        except OSError as error:
            # The error's own type tells what to do: log in, ask for access, go online.
            error.args = (f"{name} holds a memory for {str(self)!r}, which is not to be had: {error}",)
            raise

    def load(self, needed_by: str, backbone: str, tag: str | None, cache_dir: str | Path | None = None) -> BaseWeights:
        """Finds the weights, downloaded if need be, and reads them if they are still the same.

        Args:
            needed_by: What needs them, for errors.
            backbone: Name of the architecture that they are to be of.
            tag: timm's tag of the weights, which says what a bare file holds.
            cache_dir: As of `timm.create_model`.

        Raises:
            FileError: If they have changed, or are of another architecture.
            OSError: `huggingface_hub`'s own, if the Hub does not give them.
        """
        with self.needed_by(needed_by):
            path, config = self._find(cache_dir, backbone, tag)
        cfg, architecture, args = config
        plain = architecture
        for prefix in (EVIDENCE_PREFIX, BASELINE_PREFIX, PREFIX):
            plain = plain.removeprefix(prefix)
        if plain != backbone:
            raise FileError(f"{needed_by} holds a memory for a {backbone!r}, but {str(self)!r} is a {architecture!r}.")
        name, cure = f"{path.name} of {str(self)!r}, which {needed_by} holds a memory for,", "Download it again."
        tensors = read_tensors(path, name, cure, self.sha256).tensors
        if self.kind == "file" and (classes := _classes(tensors, cfg)) is not None:
            cfg = {**cfg, "num_classes": classes}
        return BaseWeights(tensors, architecture, cfg, args or {})

    def _find(self, cache_dir: str | Path | None, backbone: str, tag: str | None) -> tuple[Path, tuple[Any, str, Any]]:
        if self.kind == "file":
            return Path(self.name), (timm.models.resolve_pretrained_cfg(backbone, tag).to_dict(), backbone, {})
        if self.kind == "local_dir":
            return Path(self.name, WEIGHTS_FILE), _hub.load_model_config_from_path(self.name)
        source = str(self)
        path = Path(_hub.download_from_hf(source, WEIGHTS_FILE, cache_dir=cache_dir))
        return path, _hub.load_model_config_from_hf(source, cache_dir)


def _classes(tensors: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> int | None:
    """Returns the number of classes that weights are for, which nothing beside a bare file says."""
    names = cfg["classifier"] if isinstance(cfg["classifier"], tuple | list) else [cfg["classifier"]]
    weight = tensors.get(f"{names[0]}.weight")
    return None if weight is None else len(weight)


def parse_base(config: Mapping[str, Any], name: str, source: Mapping[str, Any]) -> Base | None:
    """Returns the base that a `config.json` from `source`, a pretrained cfg, names; `None` if it is of a whole model.

    Raises:
        FileError: If it is not one, or a repository names files of this machine.
    """
    found = config.get("base")
    if found is None:
        return None
    kinds = [kind for kind in _KINDS if isinstance(found, dict) and isinstance(found.get(kind), str)]
    wrong = len(kinds) != 1 or not _SHA256.fullmatch(str(found.get("sha256")))
    if not wrong and kinds == ["hf_hub_id"]:
        wrong = not _COMMIT.fullmatch(str(found.get("revision"))) or not re.fullmatch(r"[\w./-]+", found["hf_hub_id"])
    if wrong:
        raise FileError(f"{name}: base is {str(found)[:200]!r}, not a repository and commit. The file is damaged.")
    if source.get("source") == "hf-hub" and kinds != ["hf_hub_id"]:
        raise FileError(f"{name}: base names {kinds[0]}, a file of this machine. It is not to be trusted.")
    return Base(kinds[0], os.path.expanduser(found[kinds[0]]), found["sha256"], str(found.get("revision", "")))
