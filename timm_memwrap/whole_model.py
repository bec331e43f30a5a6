"""The files of a whole model: found in a folder or on the Hub, verified, and told apart from those of another save."""

import json
import logging
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import _hub
from torch import Tensor

from timm_memwrap._utils import write_text
from timm_memwrap.constants import CONFIG_FILE, WEIGHTS_FILE
from timm_memwrap.tensor_files import FileError, read_tensors

__all__ = ["CONFIG_KEY", "WholeModel", "find_weights", "no_weights", "parse_json", "read_json", "split_revision"]

_logger = logging.getLogger(__name__)

# Key of the text of `config.json` in the metadata of the weights.
CONFIG_KEY = "config"

_PICKLES = (".bin", ".pt", ".pth", ".tar", ".ckpt", ".pkl")


@dataclass
class WholeModel:
    """The weights of a whole model and its configuration.

    Attributes:
        tensors: The weights and the memory, mapped into memory.
        config: What `config.json` says; where the weights hold a copy of it, the copy.
        name: What to call the weights in an error: file and source.
        verified: Whether the weights have the checksum that they were saved with.
        complete: Whether `config` is from inside the weights, and so certainly belongs to them.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    name: str
    verified: bool
    complete: bool

    @property
    def base_model(self) -> str | None:
        """Id of the model on the Hub that the backbone's weights were of before training, if known."""
        value = self.config.get("base_model")
        return value if isinstance(value, str) else None

    def described(self, source: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Returns architecture, pretrained cfg and model arguments, as timm makes them of a `config.json`.

        Args:
            source: A pretrained cfg that says where the model is from.
        """
        place = {key: source[key] for key in ("source", "file", "hf_hub_id") if source.get(key)}
        cfg, architecture, args = _hub._parse_model_cfg(deepcopy(self.config), place)
        return architecture, cfg, dict(args)

    def arguments(
        self, cfg: Mapping[str, Any], kwargs: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Returns architecture, pretrained cfg and arguments of the entrypoint, whatever `config.json` timm has read.

        It may be of another save: one was killed between its two files, or a branch moved between two downloads.

        Args:
            cfg: The pretrained cfg that timm read.
            kwargs: The arguments that timm made of it, and among them those of the user, which stay.
        """
        architecture, own_cfg, own_args = self.described(cfg)
        read = dict(kwargs.get("pretrained_model_args") or {})
        given = {key: value for key, value in kwargs.items() if key not in read or read[key] != value}
        return architecture, own_cfg, {**own_args, **given, "pretrained_model_args": own_args}


def find_weights(cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> WholeModel:
    """Finds and verifies the weights that a whole model's `pretrained_cfg` points to, downloaded if need be.

    If the `config.json` of a folder is not the one that its weights were saved with, it is replaced by that.

    Raises:
        FileError: If there are none, only a pickle, or they are damaged.
    """
    if cfg["source"] == "local-dir":
        return _find_local(Path(cfg["file"]))
    model_id = cfg["hf_hub_id"]
    try:
        path = Path(_hub.download_from_hf(model_id, WEIGHTS_FILE, cache_dir=cache_dir))
    except _hub.EntryNotFoundError as error:
        # Not in the cache and not to be had says nothing about the repository.
        if isinstance(error, FileNotFoundError):
            raise
        repo_id, revision = split_revision(model_id)
        siblings = _hub.model_info(repo_id, revision=revision).siblings or []
        raise no_weights(model_id, [sibling.rfilename for sibling in siblings]) from error
    name = f"{WEIGHTS_FILE} of {model_id!r}, cached as {str(path)!r}"
    whole = _open(path, name, "Delete it and load the model again, to download it again.")
    if not whole.complete:
        whole.config = read_json(
            Path(_hub.download_from_hf(model_id, CONFIG_FILE, cache_dir=cache_dir)), f"{CONFIG_FILE} of {model_id!r}"
        )
    return whole


def _find_local(folder: Path) -> WholeModel:
    path, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    name = f"{WEIGHTS_FILE} in {str(folder)!r}"
    try:
        whole = _open(path, name, "Copy or save the model again.")
    except FileNotFoundError as error:
        raise no_weights(str(folder), [file.name for file in folder.glob("*")]) from error
    if not whole.complete:
        whole.config = read_json(config, f"{CONFIG_FILE} in {str(folder)!r}")
    else:
        _mend(config, whole.config)
    return whole


def _open(path: Path, name: str, cure: str) -> WholeModel:
    file = read_tensors(path, name, cure)
    text = file.metadata.get(CONFIG_KEY)
    config = {} if text is None else parse_json(text, f"The {CONFIG_FILE} in the metadata of {name}")
    return WholeModel(file.tensors, config, name, file.verified, complete=text is not None)


def _mend(path: Path, config: dict[str, Any]) -> None:
    """Makes a `config.json` what the weights beside it say."""
    try:
        if json.loads(path.read_text(encoding="utf-8")) == config:
            return
    except (OSError, ValueError, RecursionError):
        pass
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
    pickles = sorted(file for file in files if file.endswith(_PICKLES))
    if not pickles:
        return FileError(
            f"{source!r} has no {WEIGHTS_FILE}. Save a model with timm_memwrap.save_pretrained or push_to_hub."
        )
    return FileError(
        f"{source!r} has no {WEIGHTS_FILE}, only {', '.join(pickles[:3])}: a pickle, which can run any code when it "
        f"is opened, and is never loaded. Ask its author for safetensors, or save the model with "
        f"timm_memwrap.save_pretrained."
    )


def split_revision(model_id: str) -> tuple[str, str | None]:
    """Splits `"me/model@revision"`."""
    repo_id, _, revision = model_id.partition("@")
    return repo_id, revision or None


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        FileError: If there is no such file, or it holds something else.
    """
    try:
        return parse_json(path.read_bytes(), name)
    except OSError as error:
        raise FileError(
            f"{name} cannot be read ({error}). Load the model from another copy, or save it again."
        ) from error


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        FileError: If it is something else.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name} is not JSON ({error}). Load the model from another copy, or save it again.") from error
    if not isinstance(data, dict):
        raise FileError(f"{name} holds a {type(data).__name__}, not the configuration of a model.")
    return data
