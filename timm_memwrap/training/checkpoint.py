"""Checkpoints from which an interrupted training resumes: timm's saver, writing safetensors instead of pickles."""

import json
import os
from pathlib import Path
from typing import Any

from timm.utils import CheckpointSaver
from torch import Tensor

from timm_memwrap._utils import replacing
from timm_memwrap.tensor_files import read_tensors, write_tensors
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.recipes import first_difference, to_dict

__all__ = ["Checkpoints", "SafetensorsSaver", "read_state", "write_state"]

EXTENSION = ".safetensors"
_STATE = "state"
_TENSOR = "__tensor__"
_PAIRS = "__pairs__"
# Options that may change when a training is resumed: those that do not change the result, and its length.
_FREE = {"data": ("workers", "data_dir"), "training": ("device", "tensorboard", "epochs"), "hub": None}


class Checkpoints:
    """The folder of a training's checkpoints, and the state of the last one, from which the training resumes."""

    def __init__(self, folder: Path, recipe: Recipe, resume: bool, overwrite: bool = False) -> None:
        self.folder, self.recipe = folder, to_dict(recipe)
        if resume and overwrite:
            raise ValueError("Both resume and overwrite are set. Pass one of them.")
        if overwrite:
            for file in folder.glob(f"*{EXTENSION}"):
                file.unlink()
        self.state = self.read("last")
        if self.state is not None and not resume:
            raise ValueError(
                f"{str(folder.parent)!r} already holds a training. Pass --resume to continue it, --overwrite to start "
                f"over, or another --out."
            )
        difference = self.state and first_difference(self.state["recipe"], self.recipe, _FREE)
        if difference:
            name, old, value = difference
            raise ValueError(
                f"The training in {str(folder.parent)!r} has {name}={old!r}, now it is {value!r}. Resume with the same "
                f"recipe, or pass another --out."
            )
        if self.state is not None and len(self.state["history"]) > recipe.training.epochs:
            raise ValueError(
                f"The training in {str(folder.parent)!r} has {len(self.state['history'])} epochs already, more than "
                f"training.epochs={recipe.training.epochs}. Pass as many or more, or another --out."
            )
        # How many epochs were done when the length was changed, and what it was: the learning rates until then are not
        # those of a training of the new length.
        self.lengths: list[list[int]] = []
        if self.state is not None:
            done, length = len(self.state["history"]), self.state["recipe"]["training"]["epochs"]
            changed = [[done, length]] if length != recipe.training.epochs else []
            self.lengths = self.state.get("lengths", []) + changed
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> dict[str, Any] | None:
        """Reads the checkpoint `"last"` or `"model_best"`; `None` if there is none."""
        path = self.folder / f"{name}{EXTENSION}"
        return read_state(path) if path.exists() else None


class SafetensorsSaver(CheckpointSaver):
    """timm's `CheckpointSaver`, whose bookkeeping it keeps, with files that hold no pickle and are never half written.

    Each checkpoint holds the history, a row of metrics for each epoch so far, the options of the recipe, and the
    lengths that the training had before.
    """

    def __init__(
        self, *, history: list[dict[str, Any]], recipe: dict[str, Any], lengths: list[list[int]], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.extension = EXTENSION
        self.history, self.recipe, self.lengths = history, recipe, lengths

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        state = {
            "epoch": epoch,
            "history": self.history,
            "recipe": self.recipe,
            "lengths": self.lengths,
            "optimizer": self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn),
            **self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn),
            "saver": self.state_dict(epoch, metric),
        }
        if self.amp_scaler is not None:
            state["amp_scaler"] = self.amp_scaler.state_dict()
        write_state(state, save_path)

    def _replace(self, src: str, dst: str) -> None:
        # timm removes the old file first; a kill between the two would leave none.
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        with replacing(dst) as temporary:
            super()._duplicate(src, str(temporary))


def write_state(state: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes nested dicts and lists of tensors and JSON values to a safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, "", tensors))
    write_tensors(tensors, path, {_STATE: skeleton})


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `write_state` wrote, and raises a `ValueError` if the file is damaged or something else."""
    file = read_tensors(path, f"The checkpoint {str(path)!r}", "Remove it, and resume.")
    if _STATE not in file.metadata:
        raise ValueError(f"{str(path)!r} is not a checkpoint of a training. Remove it, or pass another --out.")
    return _unpack(json.loads(file.metadata[_STATE]), file.tensors)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Returns `value` as JSON, with its tensors moved to `tensors` by name."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        # Pairs, because an optimizer's keys are integers.
        return {_PAIRS: [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{name} is {type(value).__name__}, which a checkpoint cannot hold.")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    return {key: _unpack(item, tensors) for key, item in value[_PAIRS]}
