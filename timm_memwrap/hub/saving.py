"""Writes a model to a folder: weights, memory, configuration and model card."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import Tensor

from timm_memwrap._utils import locked, naming, plain_state, write_text
from timm_memwrap.backbone import classifiers_of
from timm_memwrap.bases import Base
from timm_memwrap.checks import misfits, split_bank
from timm_memwrap.constants import (
    BACKBONE,
    CARD_FILE,
    CONFIG_FILE,
    MEMORY_BANK,
    MEMORY_CONFIG_KEY,
    MEMORY_FILE,
    WEIGHTS_FILE,
)
from timm_memwrap.factory import base_tensors, build_shell
from timm_memwrap.hub.adapters import find_base
from timm_memwrap.hub.model_card import CardDetails, describe_memory, update_memory, write_card
from timm_memwrap.memory_args import LAYOUT_ARG
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.memory_checks import check_memory, check_model, warn_of_new_classifier
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.tensor_files import same_bits, write_tensors
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
    memory_only: bool = False,
) -> Path:
    """Writes a model with its memory bank to a folder that stock timm loads, and returns the folder.

    The folder gets `model.safetensors`, `config.json` and a `README.md`; of one that is there, only the part about the
    memory that this package wrote into it is brought up to date. The model is whole or as before, whenever the process
    is stopped. `timm.create_model("local-dir:" + folder, pretrained=True)` loads it once `timm_memwrap` is imported.
    Images in the bank are written too; only a push leaves them out.

    Args:
        model: The model to save.
        save_directory: Folder to write to; made if it does not exist. Other files in it stay.
        allow_empty_memory: Whether to save a model whose bank is empty.
        model_card: What the card is to say beside what the model knows, as in `push_to_hub`.
        overwrite_card: Whether to replace a `README.md` that is there.
        memory_only: Whether to write `memory.safetensors` in place of the weights: the memory, and what of the model is
            not in the repository or folder that its weights are from, which a load then takes the rest from.

    Raises:
        ValueError: If the bank is empty or stale, or the model is not one that could be loaded again; with
            `memory_only`, if its encoder is not the one that it was loaded with.
        OSError: If the disk is full, or the folder cannot be written; with `memory_only`, `huggingface_hub`'s own.
    """
    check_saveable(model, allow_empty_memory)
    base = find_base(model, public=False) if memory_only else None
    directory = Path(save_directory).expanduser()
    with staging(directory) as folder:
        files = write_model(model, folder, model.memory_bank, base)
        card = directory / CARD_FILE
        # Its bytes: line ends and what is not Unicode stay as they are.
        known = None if overwrite_card or not card.exists() else card.read_bytes().decode(errors="surrogateescape")
        if known is None:
            files += write_card(model, folder, model.memory_bank, local_source(directory), model_card, base)
        elif (updated := update_memory(known, model.memory_bank)) != known:
            files += write_card(model, folder, model.memory_bank, local_source(directory), updated)
        for file in files:
            os.replace(file, directory / file.name)
    return directory


def check_saveable(model: MemoryWrapModel, allow_empty_memory: bool = False) -> None:
    """Raises a `ValueError` if a model has no memory that is true to its weights."""
    check_model(model)
    warn_of_new_classifier(model)
    if len(model.memory_bank):
        check_memory(model, stale="refuse")
    elif not allow_empty_memory:
        if model.engine is not None:
            model.engine.check_whole(model.memory_bank)
        raise ValueError(
            "The memory bank is empty: the model would come back without evidence. Call "
            "timm_memwrap.build_memory_bank(model, data) first, or pass allow_empty_memory=True."
        )


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder inside `directory`, on the same disk, while other saves into it wait.

    What killed saves left there is removed.
    """
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory):
            for leftover in directory.glob(f"{_STAGING}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=directory, prefix=_STAGING) as folder:
                yield Path(folder)
    finally:
        if not existed:
            # Only an empty folder can be removed: that of a save that failed.
            with suppress(OSError):
                directory.rmdir()


def write_model(model: MemoryWrapModel, folder: Path, bank: MemoryBank, base: Base | None = None) -> list[Path]:
    """Writes a model with this bank into an empty folder, if it could be loaded, and returns weights and config.

    With a base, only the memory is written, and what of the model is not as its base makes it.
    """
    _check_writable(model)
    # Without copies: a bank may be large.
    tensors, _ = split_bank(plain_state(model))
    tensors |= {f"{MEMORY_BANK}.{name}": value for name, value in plain_state(bank).items()}
    extra: dict[str, Any] = {MEMORY_CONFIG_KEY: describe_memory(bank), "label_names": bank.class_names}
    if model.base_model:
        extra["base_model"] = model.base_model
    if base is not None:
        extra["base"] = base.to_dict()
    weights, path = folder / (WEIGHTS_FILE if base is None else MEMORY_FILE), folder / CONFIG_FILE
    with naming(path):
        # The layout is of this bank, and not of the model's, which may have images and paths.
        args = {**model.memory_args, LAYOUT_ARG: model.memory_layout(bank)}
        save_config_for_hf(model, str(path), model_config=extra, model_args=args)
    config = json.loads(path.read_text(encoding="utf-8"))
    if "label_names" in config:
        # timm repeats the names that a model was loaded with here, whatever they are now.
        config["pretrained_cfg"].pop("label_names", None)
    # transformers gives the number of classes beside these arguments. In one order, however the model was made: what
    # was loaded is saved as the same bytes.
    config["model_args"] = {key: value for key, value in sorted(config["model_args"].items()) if key != "num_classes"}
    write_text(path, text := json.dumps(config, indent=2))
    whole = WholeModel(tensors, config, "The model to save", verified=True)
    _check_loadable(model, whole)
    if base is not None:
        tensors = _beside_base(model, whole, base)
    with ThreadPoolExecutor(1) as thread:
        # For what was not watched, in the time that the disk takes.
        thread.submit(model.encoder_fingerprint, rehash=True)
        # The configuration lies in the weights too, so that no kill parts what must agree.
        write_tensors(tensors, weights, {CONFIG_KEY: text})
    if len(bank):
        check_memory(model, stale="refuse")
    return [weights, path]


def _beside_base(model: MemoryWrapModel, whole: WholeModel, base: Base) -> dict[str, Tensor]:
    """Returns the tensors that differ from those of the base, or raises a `ValueError` if the encoder's do."""
    known = base_tensors(whole, base, {})
    different = {
        name: value for name, value in whole.tensors.items() if name not in known or not same_bits(value, known[name])
    }
    own = {id(tensor) for tensor in classifiers_of(model.backbone).state_dict(keep_vars=True).values()}
    encoder = [f"{BACKBONE}.{name}" for name, tensor in plain_state(model.backbone).items() if id(tensor) not in own]
    changed = [name for name in encoder if name in different]
    if changed:
        raise ValueError(
            f"The memory was not encoded with the weights of {str(base)!r}: {len(changed)} tensors differ, e.g. "
            f"{changed[0]!r}. Push the whole model with timm_memwrap.push_to_hub, or pass another base_model."
        )
    return different


def _check_writable(model: MemoryWrapModel) -> None:
    """Raises a `ValueError` if the state or the arguments of a model are of kinds that our files do not hold."""
    for name, value in plain_state(model).items():
        if not isinstance(value, Tensor) or value.is_quantized:
            kind = "quantised tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name} is a {kind}, which safetensors does not hold. Save the model before it is quantised, or make "
                f"the state a buffer."
            )
    for name, value in model._model_args.items():
        if callable(value):
            shown = getattr(value, "__name__", type(value).__name__)
            raise ValueError(
                f"{name}={shown} cannot be written to {CONFIG_FILE}. Create the model with what timm has a name for, "
                f"e.g. {name}={shown.lower()!r}, and load the weights into it."
            )


def _check_loadable(model: MemoryWrapModel, whole: WholeModel) -> None:
    """Raises a `ValueError` if what is to be written is not what its config describes, which loading would refuse."""
    shell = build_shell(whole, {})
    wrong = misfits(split_bank(shell.state_dict())[0], split_bank(whole.tensors)[0])
    if not wrong:
        return
    expected = {name: type(module).__name__ for name, module in shell.named_modules()}
    found = {name.replace("_orig_mod.", ""): type(module).__name__ for name, module in model.named_modules()}
    replaced = [
        f"{name} is a {kind}, timm's a {expected[name]}."
        for name, kind in found.items()
        if name and kind not in (expected.get(name, kind), "OptimizedModule")
    ]
    raise ValueError(
        f"The model could not be loaded again, since it is not as timm creates "
        f"{model.pretrained_cfg['architecture']!r} with its arguments: {' '.join((replaced or wrong)[:5])} Put timm's "
        f"modules back before it is saved: merge adapters into the weights, remove parametrizations, and change the "
        f"number of classes with model.reset_classifier(n)."
    )


def local_source(directory: Path) -> str:
    """Returns how a card says that timm loads a folder: by its name, without the path to it."""
    return f"local-dir:{directory.resolve().name}"
