"""Says of a training what others need to repeat it: the command, its whole recipe, the data and the versions."""

import os
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from timm_memwrap import __version__
from timm_memwrap.data import Images
from timm_memwrap.hub import cached_commit
from timm_memwrap.sample_ids import short_name
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.creation import source_of
from timm_memwrap.training.fitting import Fitted
from timm_memwrap.training.recipes import to_dict
from timm_memwrap.whole_model import split_revision

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
    recipe = fitted.recipe
    dataset = recipe.data.dataset or short_name(fitted.images.name)
    return {
        "command": "\n".join(_commands(fitted, name)),
        "recipe": yaml.safe_dump(_portable(recipe), sort_keys=False),
        "caveat": _caveat(fitted.lengths, recipe.training.epochs),
        "seed": recipe.training.seed,
        "data": f"{dataset}, {_describe(fitted.images)} for training and {_describe(fitted.held_out)} for validation",
        "device": _device(fitted.processes.device.type),
        "versions": {"timm_memwrap": __version__, **{name: _version(name) for name in _PACKAGES}},
    }


def _commands(fitted: Fitted, name: str) -> list[str]:
    """Returns the command that repeats a training; of one that went on when it was finished, one for each part."""
    count = fitted.processes.world_size
    program = "timm-memwrap" if count == 1 else f"torchrun --nproc-per-node={count} -m timm_memwrap.cli"
    if fitted.processes.device.type == "cpu":
        # Sums are made in parts, one for each thread, and rounded.
        program = f"OMP_NUM_THREADS={torch.get_num_threads()} {program}"
    command = f"{program} train --config recipe.yaml --out {shlex.quote(name)}"
    lengths = [] if _broken_off(fitted.lengths) else [f" --training.epochs {length}" for _, length in fitted.lengths]
    return [command + length + (" --resume" if part else "") for part, length in enumerate([*lengths, ""])]


def _broken_off(lengths: list[list[int]]) -> bool:
    """Returns whether the length of a training was changed before it was over."""
    return any(done != length for done, length in lengths)


def _caveat(lengths: list[list[int]], epochs: int) -> str:
    if not _broken_off(lengths):
        return ""
    changes = ", ".join(f"{length} epochs until epoch {done}" for done, length in lengths)
    return (
        f"The length of the training was changed before it was over: {changes}, then {epochs} epochs. The recipe below "
        f"has the last length from the start, and so other learning rates: it gives another model."
    )


def _device(kind: str) -> str:
    if kind != "cpu":
        return kind
    threads = torch.get_num_threads()
    return f"{kind} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'' if threads == 1 else 's'}"


def _version(package: str) -> str:
    # With its build, which the metadata of the package does not have.
    return torch.__version__ if package == "torch" else version(package)


def _portable(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Returns all options of a recipe without the paths of this machine, and without the repository to push to."""
    options = to_dict(recipe)
    options["hub"]["push"] = None
    local, source = [("data", "data_dir"), ("model", "pretrained_path")], source_of(recipe.model.name) or ""
    if source.startswith("local-dir:"):
        options["model"]["name"] = source.removeprefix("local-dir:")
        local.append(("model", "name"))
    elif source:
        options["model"]["name"] = _pinned(source)
    for section, key in local:
        path = options[section][key]
        # Also of a folder that is here, or one above.
        options[section][key] = path and short_name(path if "://" in path else os.path.abspath(path))
    return _without_paths(options)


def _pinned(source: str) -> str:
    """Names a model on the Hub at the commit that was loaded: the repository may be the one that is pushed to."""
    prefix, _, name = source.partition(":")
    repo_id, revision = split_revision(name)
    commit = cached_commit(repo_id, revision) or revision
    return f"{prefix}:{repo_id}@{commit}" if commit else source


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
