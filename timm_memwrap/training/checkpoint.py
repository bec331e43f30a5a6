"""Checkpoints for going on after an interruption: timm's saver, writing safetensors instead of a pickle."""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils import CheckpointSaver
from torch import Tensor, nn

__all__ = ["SafetensorsSaver", "read_state", "restore", "write_state"]

EXTENSION = ".safetensors"
_STATE = "state"
_TENSOR = "__tensor__"
_PAIRS = "__pairs__"


def write_state(state: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes nested dicts and lists of tensors and JSON values to a safetensors file, whole or not at all.

    Raises:
        TypeError: If a value is neither.
        OSError: If the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, "", tensors))
    folder, name = os.path.split(os.fspath(path))
    with tempfile.TemporaryDirectory(dir=folder or ".", prefix=".saving-") as temporary:
        file = os.path.join(temporary, name)
        try:
            save_file(tensors, file, metadata={"format": "pt", _STATE: skeleton})
        except SafetensorError as error:
            raise OSError(
                errno.ENOSPC if "os error 28" in str(error) else errno.EIO,
                f"Could not write the checkpoint ({error}). Free some space on the disk, and resume; the one before is "
                f"kept",
                os.fspath(path),
            ) from error
        os.replace(file, path)


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `write_state` wrote.

    Raises:
        ValueError: If the file is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = (file.metadata() or {}).get(_STATE)
            if skeleton is None:
                raise ValueError(f"{str(path)!r} holds no state of a training. Pass what a training left.")
            return _unpack(json.loads(skeleton), file.get_tensor)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole checkpoint: {error}. Remove it, and resume.") from error


class SafetensorsSaver(CheckpointSaver):
    """timm's `CheckpointSaver`, whose bookkeeping it keeps, with files that hold no pickle and are never half written.

    Args:
        history: Rows of metrics so far, which belong to a checkpoint.
        recipe: The recipe as a dict, which a resumed training is compared with.
        **kwargs: As of `timm.utils.CheckpointSaver`.
    """

    def __init__(self, *, history: list[dict[str, Any]], recipe: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extension = EXTENSION
        self.history, self.recipe = history, recipe

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        state = {
            "epoch": epoch,
            "history": self.history,
            "recipe": self.recipe,
            "optimizer": self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn),
            **self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn),
            "saver": self.state_dict(epoch, metric),
        }
        if self.amp_scaler is not None:
            state["amp_scaler"] = self.amp_scaler.state_dict()
        write_state(state, save_path)

    def _replace(self, src: str, dst: str) -> None:
        # timm removes the old file first, and between the two there would be none.
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f"{dst}.tmp"
        Path(temporary).unlink(missing_ok=True)
        super()._duplicate(src, temporary)
        os.replace(temporary, dst)


def restore(state: dict[str, Any], task: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's weights into a task, and its moments into the optimizer."""
    task.load_checkpoint_state(state["state_dict"], state.get("task_state"))  # type: ignore[operator]
    if "state_dict_ema" in state:
        task.load_checkpoint_state(state["state_dict_ema"], ema=True)  # type: ignore[operator]
    optimizer.load_state_dict(state["optimizer"])


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Returns `value` as JSON, its tensors put aside by name."""
    if isinstance(value, Tensor):
        # A copy: safetensors refuses tensors that share memory, as those of tied weights do.
        tensors[name] = value.detach().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        # Pairs, since an optimizer's keys are numbers.
        return {_PAIRS: [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{name} is {type(value).__name__}, which a checkpoint cannot hold.")


def _unpack(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensor(value[_TENSOR])
        return {key: _unpack(item, tensor) for key, item in value[_PAIRS]}
    if isinstance(value, list):
        return [_unpack(item, tensor) for item in value]
    return value
