"""Says of a training what others need to repeat it: the command, its whole recipe, the data and the versions."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from timm_memwrap import __version__
from timm_memwrap.data import Images
from timm_memwrap.sample_ids import short_name
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.creation import source_of
from timm_memwrap.training.fitting import Fitted
from timm_memwrap.training.recipes import to_dict

__all__ = ["reproduction"]

# What the numbers of a training are made by. The last two decode and augment the images.
_PACKAGES = ("timm", "torch", "huggingface_hub", "torchvision", "pillow")
# A path of any system that starts at a root, at home, or here.
_PATH = re.compile(r"(~|\.{0,2})[/\\]|[A-Za-z]:[/\\]|\\\\")
_COMMIT = re.compile("[0-9a-f]{40}")


def reproduction(fitted: Fitted, name: str) -> dict[str, Any]:
    """Returns what a model card says of a training, as `training` in `push_to_hub`'s `model_card`.

    Args:
        fitted: The training.
        name: Folder that the command writes to.
    """
    count, recipe = fitted.processes.world_size, _portable(fitted.recipe)
    dataset = fitted.recipe.data.dataset or short_name(fitted.images.name)
    command = "timm-memwrap train"
    if count > 1:
        command = f"torchrun --nproc-per-node={count} -m timm_memwrap.cli train"
    return {
        "command": f"{command} --config recipe.yaml --out {name}",
        "recipe": yaml.safe_dump(recipe, sort_keys=False),
        "data": f"{dataset}, {_describe(fitted.images)} for training and {_describe(fitted.held_out)} for validation",
        "device": fitted.processes.device.type,
        "versions": {"timm_memwrap": __version__, **{name: _version(name) for name in _PACKAGES}},
    }


def _version(package: str) -> str:
    # With its build, which the metadata of the package does not have.
    return torch.__version__ if package == "torch" else version(package)


def _portable(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Returns all options of a recipe without the paths of this machine, and without the repository to push to."""
    options = to_dict(recipe)
    options["hub"]["push"] = None
    local = [("data", "data_dir"), ("model", "pretrained_path")]
    if (source_of(recipe.model.name) or "").startswith("local-dir:"):
        local.append(("model", "name"))
    for section, key in local:
        options[section][key] = options[section][key] and short_name(options[section][key])
    return _without_paths(options)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return short_name(value) if isinstance(value, str) and _PATH.match(value) else value


def _describe(images: Images) -> str:
    """Returns how many images are used, of how many, and the commit of a data set on the Hub."""
    of = "" if len(images) == len(images.source) else f" of {len(images.source):,}"
    commit = _commit(images.source)
    return f"{len(images):,}{of} images{f' of commit {commit}' if commit else ''}"


def _commit(source: Any) -> str | None:
    """Returns the commit of a data set on the Hub, which `datasets` names the folder of its files after."""
    files = getattr(getattr(getattr(source, "reader", None), "dataset", None), "cache_files", [])
    folders = {Path(file["filename"]).parent.name for file in files}
    return folders.pop() if len(folders) == 1 and all(map(_COMMIT.fullmatch, folders)) else None
