"""The files of a whole model: found in a folder or on the Hub, verified, and told apart from those of another save."""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import _hub
from torch import Tensor

from timm_memwrap._utils import write_text
from timm_memwrap.bases import Base, parse_base
from timm_memwrap.checks import parse_config
from timm_memwrap.constants import CONFIG_FILE, MEMORY_FILE, WEIGHTS_FILE
from timm_memwrap.tensor_files import FileError, read_tensors

__all__ = [
    "CONFIG_KEY",
    "WholeModel",
    "find_weights",
    "no_weights",
    "read_base",
    "read_config",
    "split_revision",
    "weights_file",
]

_logger = logging.getLogger(__name__)

# Key of the text of `config.json` in the metadata of the weights.
CONFIG_KEY = "config"

_PICKLES = (".bin", ".pt", ".pth", ".tar", ".ckpt", ".pkl")


@dataclass
class WholeModel:
    """The weights of a whole model and its configuration; or what a memory alone adds to those of its base."""

    tensors: dict[str, Tensor]  # the weights and the memory
    config: dict[str, Any]  # what `config.json` says; where the weights hold a copy of it, the copy
    name: str  # what to call the weights in an error: file and source
    verified: bool  # whether the weights have the checksum that they were saved with
    base: Base | None = None  # where the rest of the weights is

    def described(self, source: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Returns architecture, pretrained cfg and model arguments of a model from `source`, a pretrained cfg."""
        return parse_config(self.config, f"The {CONFIG_FILE} of {self.name}", source)

    def arguments(
        self, cfg: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Returns architecture, pretrained cfg and arguments of the entrypoint, whatever `config.json` timm has read.

        It may be of another save: one was killed between its two files, or a branch moved between two downloads. Of
        the arguments that timm made of it, those that the user gave stay.
        """
        architecture, own_cfg, own_args = self.described(cfg)
        read = dict(kwargs.get("pretrained_model_args") or {})
        # By identity: NaN, which JSON may hold, is never equal to itself.
        given = {key: value for key, value in kwargs.items() if key not in read or read[key] is not value}
        return architecture, own_cfg, {**own_args, **given, "pretrained_model_args": own_args}


def find_weights(cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> WholeModel:
    """Finds and verifies the weights that a whole model's `pretrained_cfg` points to, downloaded if need be.

    Of a memory alone it finds what that holds, and where its base is. If the `config.json` of a folder is not the one
    that its weights were saved with, it is replaced by that.
    """
    local = cfg["source"] == "local-dir"
    source = str(cfg["file"] if local else cfg["hf_hub_id"])

    def find(file: str) -> Path:
        return Path(source, file) if local else Path(_hub.download_from_hf(source, file, cache_dir=cache_dir))

    where = f"in {source!r}" if local else f"of {source!r}"
    file_name = weights_file(find(CONFIG_FILE))
    name, cure = f"{file_name} {where}", "Copy or save the model again."
    try:
        path = find(file_name)
        if not local:
            name, cure = f"{name}, cached as {str(path)!r}", "Delete it and load the model again, to download it again."
        file = read_tensors(path, name, cure)
    except (FileNotFoundError, _hub.EntryNotFoundError) as error:
        if local:
            raise no_weights(source, os.listdir(source)) from error
        # Not in the cache and not to be had says nothing about the repository.
        if isinstance(error, FileNotFoundError):
            raise
        repo_id, revision = split_revision(source)
        siblings = _hub.model_info(repo_id, revision=revision).siblings or []
        raise no_weights(source, [sibling.rfilename for sibling in siblings]) from error
    text = file.metadata.get(CONFIG_KEY)
    if text is None:
        config = read_config(find(CONFIG_FILE), f"{CONFIG_FILE} {where}")
    else:
        config = read_config(text, f"The {CONFIG_FILE} in the metadata of {name}")
        if local:
            _mend(path.with_name(CONFIG_FILE), config)
    base = parse_base(config, f"The {CONFIG_FILE} of {name}", cfg)
    if (base is None) != (file_name == WEIGHTS_FILE):
        raise FileError(f"{name} is not described by its {CONFIG_FILE}. {cure}")
    return WholeModel(file.tensors, config, name, file.verified, base)


def weights_file(config: Path) -> str:
    """Returns the name of the weights beside a `config.json`: those of a whole model, or what a memory alone holds."""
    return WEIGHTS_FILE if read_base(config) is None else MEMORY_FILE


def read_base(config: Path) -> Base | None:
    """Returns the base that a `config.json` names; `None` if it is of a whole model, or not of ours."""
    if config.is_file():
        with suppress(FileError):
            return parse_base(read_config(config, str(config)), str(config), {})
    return None


def _mend(path: Path, config: dict[str, Any]) -> None:
    """Makes a `config.json` what the weights beside it say."""
    with suppress(FileError):
        if read_config(path, "") == config:
            return
    # A link leads into the cache of the Hub, which stays as it was downloaded.
    if not path.is_symlink() and os.access(path.parent, os.W_OK):
        write_text(path, json.dumps(config, indent=2))
    _logger.warning(
        "%s is not the one that the weights beside it were saved with, as after a save that was interrupted. The copy "
        "of it inside the weights is used.",
        path,
    )


def no_weights(source: str, files: list[str]) -> FileError:
    """Returns the error for a folder or repository without safetensors; names the pickles in it."""
    pickles = ", ".join(sorted(file for file in files if file.endswith(_PICKLES))[:3])
    only = (
        f", only {pickles}: a pickle, which can run any code when it is opened, and is never loaded" if pickles else ""
    )
    return FileError(
        f"{source!r} has no {WEIGHTS_FILE}{only}. Save the model with timm_memwrap.save_pretrained or push_to_hub, or "
        f"ask its author for safetensors."
    )


def split_revision(model_id: str) -> tuple[str, str | None]:
    """Splits `"me/model@revision"`."""
    repo_id, _, revision = model_id.partition("@")
    return repo_id, revision or None


def read_config(source: Path | str, name: str) -> dict[str, Any]:
    """Reads a `config.json` from a file or text, or raises a `FileError` if it is not of a model of ours."""
    try:
        config = json.loads(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except (OSError, ValueError, RecursionError) as error:
        wrong = "cannot be read" if isinstance(error, OSError) else "is not JSON"
        raise FileError(f"{name} {wrong} ({error}). Load the model from another copy, or save it again.") from error
    if not isinstance(config, dict):
        raise FileError(f"{name} holds a {type(config).__name__}, not the configuration of a model.")
    parse_config(config, name, {})
    return config
