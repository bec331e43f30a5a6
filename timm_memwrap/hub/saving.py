"""Writes a model to a folder: weights, memory, configuration and model card."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf

from timm_memwrap.constants import (
    CARD_FIGURE_FILE,
    CARD_FILE,
    CONFIG_FILE,
    CONFIG_FORMAT_VERSION,
    MEMORY_BANK,
    MEMORY_CONFIG_KEY,
    WEIGHTS_FILE,
)
from timm_memwrap.factory import check_whole
from timm_memwrap.hub.model_card import CardDetails, make_card
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.memory_checks import check_memory, check_model
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.tensor_files import write_tensors
from timm_memwrap.whole_model import CONFIG_KEY, WholeModel

__all__ = ["save_pretrained"]

_STAGING = ".saving-model-"


def save_pretrained(
    model: MemoryWrapModel,
    save_directory: str | os.PathLike,
    *,
    allow_empty_memory: bool = False,
    model_card: CardDetails = None,
    overwrite_card: bool = False,
) -> Path:
    """Writes a model with its memory bank to a folder that stock timm loads.

    The folder gets `model.safetensors`, `config.json` and, if it has none, a `README.md`. The model is whole or as
    before, whenever the process is stopped. `timm.create_model("local-dir:" + folder, pretrained=True)` loads it once
    `timm_memwrap` is imported. Images in the bank are written too; only a push leaves them out.

    Args:
        model: The model to save.
        save_directory: Folder to write to; made if it does not exist. Other files in it stay.
        allow_empty_memory: Whether to save a model whose bank is empty.
        model_card: What the card is to say beside what the model knows, as in `push_to_hub`.
        overwrite_card: Whether to replace a `README.md` that is there.

    Returns:
        The folder.

    Raises:
        ValueError: If the bank is empty or stale, or the model is not one that could be loaded again.
        OSError: If the disk is full, or the folder cannot be written.
    """
    check_saveable(model, allow_empty_memory)
    directory = Path(save_directory).expanduser()
    with staging(directory) as folder:
        files = write_model(model, folder, model.memory_bank)
        if overwrite_card or not (directory / CARD_FILE).exists():
            files += write_card(model, folder, model.memory_bank, local_source(directory), model_card)
        for file in files:
            os.replace(file, directory / file.name)
    return directory


def check_saveable(model: MemoryWrapModel, allow_empty_memory: bool = False) -> None:
    """Raises if a model has no memory that is true to its weights.

    Raises:
        ValueError: If `model` is not a Memory Wrap model, or its bank is empty or stale.
    """
    check_model(model)
    if len(model.memory_bank):
        check_memory(model, stale="refuse")
    elif not allow_empty_memory:
        raise ValueError(
            "The memory bank is empty: the model would come back without evidence. Call "
            "timm_memwrap.build_memory_bank(model, data) first, or pass allow_empty_memory=True."
        )


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder inside `directory`, on the same disk, and removes what killed saves left there.

    Saves into the same folder wait for each other.
    """
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(directory):
            for leftover in directory.glob(f"{_STAGING}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=directory, prefix=_STAGING) as folder:
                yield Path(folder)
    except BaseException:
        if not existed:
            with suppress(OSError):
                directory.rmdir()
        raise


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Locks a folder against other saves, where the system can. The lock ends with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        # Some network file systems have no locks.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_model(model: MemoryWrapModel, folder: Path, bank: MemoryBank) -> list[Path]:
    """Writes a model with this bank into an empty folder, and returns the files, the weights first.

    Raises:
        ValueError: If what would be written is not what loading accepts.
    """
    prefix = f"{MEMORY_BANK}."
    # Kept as they are: a state dict otherwise holds copies of a bank, which may be large.
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if not name.startswith(prefix)}
    tensors |= {prefix + name: value for name, value in bank.state_dict(keep_vars=True).items()}
    extra: dict[str, Any] = {MEMORY_CONFIG_KEY: {"format_version": CONFIG_FORMAT_VERSION, **describe_memory(bank)}}
    if bank.class_names:
        extra["label_names"] = bank.class_names
    if model.base_model:
        extra["base_model"] = model.base_model
    weights, path = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    save_config_for_hf(model, str(path), model_config=extra, model_args=dict(model.memory_args))
    config = json.loads(path.read_text(encoding="utf-8"))
    if "label_names" in config:
        # timm repeats the names that a model was loaded with here, whatever they are now.
        config["pretrained_cfg"].pop("label_names", None)
    # In one order, however the model was made: what was loaded is saved as the same bytes.
    config["model_args"] = dict(sorted(config["model_args"].items()))
    path.write_text(text := json.dumps(config, indent=2), encoding="utf-8")
    check_whole(WholeModel(tensors, config, "The model to save", verified=True, complete=True))
    # The configuration lies in the weights too, so that no kill parts what must agree.
    write_tensors(tensors, weights, {CONFIG_KEY: text})
    return [weights, path]


def write_card(
    model: MemoryWrapModel, folder: Path, bank: MemoryBank, source: str, model_card: CardDetails
) -> list[Path]:
    """Writes the model card, and its figure if it has one."""
    path = folder / CARD_FILE
    text = model_card if isinstance(model_card, str) else make_card(model, source, model_card, bank)
    path.write_text(text, encoding="utf-8", newline="")
    figure = model_card.get("figure") if isinstance(model_card, Mapping) else None
    if figure is None:
        return [path]
    if Path(figure).suffix.lower() != ".png" or not Path(figure).is_file():
        raise ValueError(f"model_card['figure'] is {str(figure)!r}, which is not a PNG file. Save one there.")
    shutil.copyfile(figure, folder / CARD_FIGURE_FILE)
    return [path, folder / CARD_FIGURE_FILE]


def describe_memory(bank: MemoryBank) -> dict[str, Any]:
    """Returns what a bank holds as JSON, for people who read `config.json`; nothing is loaded from it."""
    if not len(bank):
        return {"size": 0}
    counts = {str(label): count for label, count in bank.class_counts.items()}
    images = bank.images is not None
    return {"size": len(bank), "class_counts": counts, "images": images, **asdict(bank.provenance)}


def local_source(directory: Path) -> str:
    """Returns how a card says that timm loads a folder: by its name, without the path to it."""
    return f"local-dir:{directory.resolve().name}"
