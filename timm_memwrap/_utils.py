"""Small helpers that every room uses: files that are whole or absent, checks of arguments, evaluation mode."""

import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = [
    "check_choice",
    "check_count",
    "evaluating",
    "is_exporting",
    "locked",
    "naming",
    "optional_import",
    "plain_state",
    "printable",
    "replacing",
    "write_text",
]

_YOUNG = 60.0  # seconds


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` on success, so that a file is written whole or not at all.

    The folder is made if it does not exist. An error leaves the old file as it was, and nothing beside it. What an
    earlier write left there when it was killed is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".saving-{path.name}-"
    for leftover in [entry.path for entry in os.scandir(path.parent) if entry.name.startswith(prefix)]:
        with suppress(FileNotFoundError), locked(leftover, wait=False) as unused:
            # One that was just made is locked in a moment.
            if unused and time.time() - os.stat(leftover).st_mtime > _YOUNG:
                shutil.rmtree(leftover, ignore_errors=True)
    # In a folder of its own, a file gets the permissions that the user's other files get.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as folder, locked(folder):
        temporary = Path(folder, path.name)
        with naming(path):
            yield temporary
        os.replace(temporary, path)


@contextmanager
def locked(directory: str | os.PathLike, wait: bool = True) -> Iterator[bool]:
    """Locks a folder against others who do, where the system can, and yields whether it has. It ends with the process.

    If another has the lock, waits for it, or yields `False`.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            has = True
        except OSError:  # another has it, or a network file system has no locks
            has = False
        yield has
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says in an `OSError` what could not be written: of a full disk, the system names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        reason = f"{error.strerror}. Could not write {path.name}; free some space, or save elsewhere"
        raise OSError(error.errno, reason, str(path)) from error


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes text as UTF-8, whole or not at all, and returns the path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def printable(text: str) -> str:
    """Replaces characters that could steer a terminal: names in files from outside may hold anything."""
    return "".join(character if character.isprintable() else "?" for character in text)


def is_exporting() -> bool:
    """Returns whether `torch.export` is tracing.

    Before torch 2.12, `torch.compiler.is_exporting` says so of every compiled model too; the flag behind it is right.
    """
    return torch.compiler._is_exporting_flag


def plain_state(module: nn.Module) -> dict[str, Any]:
    """Returns a module's state dict, without copies, under the names that it has if no part of it is compiled."""
    return {name.replace("_orig_mod.", ""): value for name, value in module.state_dict(keep_vars=True).items()}


def check_count(name: str, value: Any, at_least: int = 1, none: bool = False) -> None:
    """Raises a `ValueError` if `value` is not an integer of at least `at_least`, or `None` where `none` allows it."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(
            f"{name}={value!r} is not valid. Pass an integer of at least {at_least}{', or None' if none else ''}."
        )


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises a `ValueError` if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"Unknown {name}={value!r}. Pass one of {', '.join(map(repr, choices))}.")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode without gradients, and restores the mode of each of its submodules."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, was_training in training.items():
            part.training = was_training


def optional_import(module: str, extra: str, what: str) -> Any:
    """Imports a module of an optional dependency, or raises an `ImportError` that names what needs it and the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {module.split('.')[0]}: pip install 'timm-memwrap[{extra}]'.", name=error.name
        ) from error
