"""What a saved model is and remembers, for people: told by the header of its file, of which no weights are read."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_url, parse_local_safetensors_file_metadata, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError, SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata
from safetensors.torch import _TYPES
from torch import Tensor

from timm_memwrap._utils import printable
from timm_memwrap.bases import Base, parse_base
from timm_memwrap.checks import check_fits, split_bank
from timm_memwrap.constants import CONFIG_FILE, MEMORY_BANK, MEMORY_CONFIG_KEY, WEIGHTS_FILE
from timm_memwrap.factory import build_shell
from timm_memwrap.hub.client import hub_api
from timm_memwrap.hub.loading import find_config
from timm_memwrap.tensor_files import FileError
from timm_memwrap.whole_model import CONFIG_KEY, WholeModel, no_weights, read_config, split_revision, weights_file

__all__ = ["Summary", "summarize"]

_NUMBERS = ("calibrated_on", "population", "seed", "appended", "removed")
_TEXTS = ("dataset", "selection", "image_dataset")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a saved model is and remembers."""

    source: str
    architecture: str
    num_classes: int
    parameters: int
    size: int  # samples in the memory
    multi_label: bool
    memory: dict[str, Any]  # where they are from, as `config.json` says; empty if it does not
    class_counts: list[tuple[str, int]]  # samples in the memory by the name of their class
    weight_bytes: int  # without the memory; with those of the base
    memory_bytes: int  # with the images
    image_bytes: int
    base: str | None  # where the weights are, if they are elsewhere

    def report(self) -> str:
        """Returns the summary as lines of text."""
        total = self.weight_bytes + self.memory_bytes
        where = f", weights from {printable(self.base)}" if self.base else ""
        lines = [
            printable(self.source),
            f"  architecture  {self.architecture}",
            f"  classes       {self.num_classes}",
            f"  parameters    {self.parameters:,}",
            f"  files         {_megabytes(total)}: weights {_megabytes(self.weight_bytes)}, "
            f"memory {_megabytes(self.memory_bytes)}{where}",
        ]
        if not self.size:
            return "\n".join([*lines, "  memory        empty: call timm_memwrap.build_memory_bank(model, data)"])
        pictures = self.memory.get("image_dataset")
        elsewhere = f"; in {printable(pictures)}" if pictures else ""
        lines += [
            f"  memory        {self.size:,} samples, {_megabytes(self.memory_bytes)}",
            *(["  labels        several classes per sample, or none"] if self.multi_label else []),
            f"  from          {self._origin()}",
            f"  images        {_megabytes(self.image_bytes) if self.image_bytes else 'not inside'}{elsewhere}",
            "  fingerprint   not checked; a load checks it",
            f"  calibrated    {self._calibration()}",
        ]
        counts = [(printable(name), count) for name, count in self.class_counts]
        width = max((len(name) for name, _ in counts), default=0)
        return "\n".join(
            [*lines, *(["  by class"] if counts else []), *(f"    {name:{width}}  {count:,}" for name, count in counts)]
        )

    def _origin(self) -> str:
        memory = self.memory
        if not memory:
            return "not recorded"
        source = f"{memory['dataset'] or 'unknown data'}: {memory['selection'] or 'unknown'}"
        population = f" of {memory['population']:,}" if memory["population"] else ""
        seed = f", seed {memory['seed']}" if memory["seed"] is not None else ""
        since = [(what, memory[what]) for what in ("appended", "removed")]
        changes = "".join(f", {count:,} {what} since" for what, count in since if count)
        return f"{printable(source)}{population}{seed}{changes}"

    def _calibration(self) -> str:
        if not self.memory:
            return "not recorded"
        count = self.memory["calibrated_on"]
        return f"on {count:,} images" if count else "no"


def summarize(model_id: str | os.PathLike, *, token: str | bool | None = None) -> Summary:
    """Returns what a model is and remembers without loading it: a few kilobytes of its files are read.

    Whether weights and memory are whole, and of each other, is seen when the model is loaded.

    Args:
        model_id: As in `from_pretrained`.
        token: As in `from_pretrained`.

    Raises:
        ValueError, OSError: As in `from_pretrained`.
    """
    source, name, config_path = find_config(model_id, token)
    file = weights_file(config_path)
    where = f"{file} of {name!r}"
    header = _read_header(source, name, file, token)
    text = header.metadata.get(CONFIG_KEY)
    config = read_config(config_path if text is None else text, f"{CONFIG_FILE} of {where}")
    cfg = {"source": source, ("file" if source == "local-dir" else "hf_hub_id"): name}
    base = parse_base(config, f"The {CONFIG_FILE} of {where}", cfg)
    own, rest = split_bank(tensors := _tensors(header, where)), {}
    if (base is None) != (file == WEIGHTS_FILE):
        raise FileError(f"{where} is not described by its {CONFIG_FILE}. Save or push the model again.")
    if base is not None:
        with base.needed_by(where):
            rest = _tensors(_read_header(*_place(base), token), str(base))
    whole = WholeModel({**rest, **tensors}, config, where, verified=False, base=base)
    shell = build_shell(whole, cfg)
    # A memory alone has of the weights what the base has not.
    check_fits(shell, tensors if base is None else {**shell.state_dict(), **tensors}, where)
    weights, bank = (list(part.values()) for part in own)
    labels, images = (tensors.get(f"{MEMORY_BANK}.{entry}") for entry in ("labels", "images"))
    return Summary(
        source=os.fspath(model_id),
        architecture=shell.pretrained_cfg["architecture"],
        num_classes=shell.num_classes,
        parameters=sum(parameter.numel() for parameter in shell.parameters()),
        size=0 if labels is None or not labels.ndim else len(labels),
        multi_label=labels is not None and labels.ndim == 2,
        memory=_memory(config),
        class_counts=_class_counts(config),
        weight_bytes=sum(tensor.nbytes for tensor in [*weights, *rest.values()]),
        memory_bytes=sum(tensor.nbytes for tensor in bank),
        image_bytes=0 if images is None else images.nbytes,
        base=None if base is None else str(base),
    )


def _place(base: Base) -> tuple[str, str, str]:
    """Returns where the weights of a base are: a prefix of timm, a folder or repository, and a file in it."""
    if base.kind == "file":
        return "local-dir", str(Path(base.name).parent), Path(base.name).name
    return ("hf-hub" if base.kind == "hf_hub_id" else "local-dir"), str(base), WEIGHTS_FILE


def _read_header(source: str, name: str, file: str, token: str | bool | None) -> SafetensorsFileMetadata:
    """Reads the header of a safetensors file in a folder or repository, and nothing else of it."""
    repo_id, revision = split_revision(name)
    api = hub_api(token)
    cached = None if source == "local-dir" else try_to_load_from_cache(repo_id, file, revision=revision)
    if isinstance(cached, str):
        # Without a connection too, what was downloaded can be shown.
        source, name = "local-dir", str(Path(cached).parent)
    try:
        if source == "local-dir":
            header, size = parse_local_safetensors_file_metadata(path := Path(name, file)), path.stat().st_size
        else:
            header = api.parse_safetensors_file_metadata(repo_id, file, revision=revision)
            size = api.get_hf_file_metadata(url=hf_hub_url(repo_id, file, revision=revision)).size or 0
        # A header may claim what the file does not hold, and a model of that size would be described.
        if max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0) > size:
            raise SafetensorsParsingError(f"it is cut: it has {size:,} bytes")
        if not all(isinstance(text, str) for text in header.metadata.values()):
            raise SafetensorsParsingError("its metadata is not text")
    except FileNotFoundError as error:
        raise no_weights(name, os.listdir(name)) from error
    except RemoteEntryNotFoundError as error:
        raise no_weights(name, api.list_repo_files(repo_id, revision=revision)) from error
    except (SafetensorsParsingError, AttributeError, IndexError, TypeError, ValueError, RecursionError) as error:
        # The others where the header is JSON of another form.
        raise FileError(f"{file} of {name!r} is not a whole safetensors file ({error}).") from error
    return header


def _tensors(header: SafetensorsFileMetadata, name: str) -> dict[str, Tensor]:
    """Returns tensors of the types and shapes that a header lists, without storage."""
    found = {}
    places = []
    try:
        for key, listed in header.tensors.items():
            found[key] = torch.empty(listed.shape, dtype=_TYPES[listed.dtype], device="meta")
            start, end = listed.data_offsets
            if found[key].nbytes != end - start or type(start) is not int:
                raise ValueError(f"{key} has {end - start} bytes")
            places.append((start, end))
        # As a load demands: side by side, from the first byte on.
        places.sort()
        if [start for start, _ in places] != [0, *(end for _, end in places)][: len(places)]:
            raise ValueError("they overlap, or have room between them")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileError(f"The header of {name} lists no tensors that could be loaded ({error}).") from error
    return found


def _memory(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `config.json` says of where a memory is from, as far as it is of the kind that it should be."""
    block = config.get(MEMORY_CONFIG_KEY) or {}
    numbers = {key: value if type(value := block.get(key)) is int else None for key in _NUMBERS}
    texts = {key: value if isinstance(value := block.get(key), str) else "" for key in _TEXTS}
    return {**numbers, **texts} if block else {}


def _class_counts(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    counts, names = (config.get(MEMORY_CONFIG_KEY) or {}).get("class_counts"), config.get("label_names")
    if not isinstance(counts, dict) or not all(
        re.fullmatch("[0-9]{1,9}", key) and type(n) is int for key, n in counts.items()
    ):
        return []
    names = names if isinstance(names, list) else []
    numbered = sorted((int(key), count) for key, count in counts.items())
    return [(str(names[i]) if i < len(names) else str(i), count) for i, count in numbered]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"
