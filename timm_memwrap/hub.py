"""Saves to disk, loads from disk or the Hub. Saving never touches the network."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from timm_memwrap.constants import (
    CONFIG_FILE,
    MEMORY_CONFIG_KEY,
    SAFETENSORS_METADATA,
    WEIGHTS_FILE,
)
from timm_memwrap.memory_bank import MemoryBank
from timm_memwrap.model import MemoryWrapModel

__all__ = ["from_pretrained", "save_pretrained"]

_logger = logging.getLogger(__name__)


def save_pretrained(
    model: MemoryWrapModel, save_directory: str | os.PathLike, *, allow_empty_memory: bool = False
) -> Path:
    """Writes a model with its memory bank to a folder that stock timm loads.

    The folder gets `model.safetensors` and `config.json`, timm's own files; each is written whole or not at all.
    `timm.create_model("local-dir:" + folder, pretrained=True)` brings the model back once `timm_memwrap` is imported.

    Args:
        model: The model to save.
        save_directory: Folder to write to; made if absent. Other files in it stay.
        allow_empty_memory: Whether to save a model whose bank is empty.

    Returns:
        The folder.

    Raises:
        ValueError: If the bank is empty or stale.
    """
    check_memory(model, allow_empty_memory)
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as folder:
        written = write_files(model, Path(folder))
        for file in written:
            os.replace(file, directory / file.name)
    return directory


def from_pretrained(model_id: str | os.PathLike, **kwargs: Any) -> MemoryWrapModel:
    """Loads a model with its memory bank from a folder or the Hugging Face Hub.

    The same as `timm.create_model(..., pretrained=True)` with `import timm_memwrap` done.

    Args:
        model_id: A folder, a Hub repository (`"me/model"`, `"me/model@revision"`), or either with timm's prefix
            (`"local-dir:..."`, `"hf-hub:..."`).
        **kwargs: Passed to `timm.create_model`, e.g. `num_classes` or `cache_dir`.
    """
    name = os.fspath(model_id)
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        name = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
    return timm.create_model(name, pretrained=True, **kwargs)  # type: ignore[return-value]


def check_memory(model: MemoryWrapModel, allow_empty_memory: bool = False) -> None:
    """Refuses a model whose memory could not be true to its weights.

    Raises:
        ValueError: If `model` is no Memory Wrap model, or its bank is empty or stale.
    """
    if not isinstance(model, MemoryWrapModel):
        raise ValueError(f"{type(model).__name__} is not a Memory Wrap model. Wrap it: timm_memwrap.wrap(model).")
    if not len(model.memory_bank) and not allow_empty_memory:
        raise ValueError(
            "The memory bank is empty: the model would come back without evidence. Call "
            "timm_memwrap.build_memory_bank(model, data) first, or pass allow_empty_memory=True."
        )
    if model.memory_is_stale():
        raise ValueError(
            "The memory bank is stale: the weights have changed since it was built, so its encodings are not theirs. "
            "Call timm_memwrap.build_memory_bank(model, data) again."
        )


def write_files(model: MemoryWrapModel, folder: Path) -> list[Path]:
    """Writes the files of a repository into an empty folder, and returns them, the weights first."""
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, weights, metadata=SAFETENSORS_METADATA)
    extra: dict[str, Any] = {MEMORY_CONFIG_KEY: describe_memory(model.memory_bank)}
    if model.memory_bank.class_names:
        extra["label_names"] = model.memory_bank.class_names
    save_config_for_hf(model, str(config), model_config=extra)
    return [weights, config]


def describe_memory(bank: MemoryBank) -> dict[str, Any]:
    """Says in JSON what a bank holds, for people who read `config.json`; nothing is loaded from it."""
    if not len(bank):
        return {"size": 0}
    provenance = bank.provenance
    return {
        "size": len(bank),
        "class_counts": {str(label): count for label, count in bank.class_counts.items()},
        "dataset": provenance.dataset,
        "selection": provenance.selection,
        "seed": provenance.seed,
        "population": provenance.population,
        "images": bank.images is not None,
        "encoder": provenance.encoder,
    }
