"""Safetensors files with a checksum inside: written whole or not at all, verified when they are read."""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, load
from torch import Tensor

from timm_memwrap._utils import printable, replacing

__all__ = ["FileError", "TensorFile", "checksum", "raw_bytes", "read_tensors", "same_bits", "write_tensors"]

# The key in the file's metadata. It guards against damage, not against an attacker, who could compute it as well:
# CRC-32 reads at twice the speed of SHA-256.
_CHECKSUM = "crc32"

_DTYPES = {dtype: name for name, dtype in _TYPES.items()}


class FileError(ValueError):
    """A file is damaged, or is not one that this package can load. What it quotes of the file is made printable."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.splitlines())))


@dataclass
class TensorFile:
    """Tensors of a file, read into memory."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # the text in the file's header
    verified: bool  # whether it has a checksum, which fits; files of other writers have none


# The library's own writer would wait for the checksum, which is 18 ms of a save of 78 ms (resnet18 and 10,000 samples,
# of which the disk takes 40), and makes files that only their owner can read.
def write_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes tensors from any device to a safetensors file, whole or not at all, and returns the path."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise ValueError(
                f"{name} is a tensor of {tensor.dtype} and {tensor.layout}, which a safetensors file cannot hold. "
                f"Convert it to a dense tensor of a plain type."
            )
    # Wide types first, so that every tensor is aligned to its type when the file is mapped.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ready = {name: tensors[name].detach().cpu().contiguous() for name in order}
    # transformers cannot open a file without the format.
    text = {"format": "pt", **(metadata or {})}
    entries: dict[str, object] = {}
    end = 0
    for name, tensor in ready.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}

    def header(digest: str) -> bytes:
        encoded = json.dumps({"__metadata__": {**text, _CHECKSUM: digest}, **entries}, ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded

    # The checksum is computed while the disk is busy, and so written last.
    with replacing(path) as temporary, ThreadPoolExecutor(1) as thread:
        digest = thread.submit(checksum, ready, text)
        with temporary.open("wb") as file:
            file.seek(len(header("0" * 8)))
            for tensor in ready.values():
                file.write(raw_bytes(tensor))
            file.seek(0)
            file.write(header(digest.result()))
    return Path(path)


def read_tensors(
    path: str | os.PathLike, name: str, cure: str = "Copy or save it again.", sha256: str | None = None
) -> TensorFile:
    """Reads a safetensors file and compares it with its checksum; `name` and `cure` are for its errors.

    With `sha256`, nothing of the file is parsed unless it has this hash.
    """
    # The library's own error for a file that cannot be opened has neither its name nor a number.
    with Path(path).open("rb") as opened:
        # What is parsed is then what was hashed, whoever writes to the file meanwhile.
        content = None if sha256 is None else opened.read()
    if content is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise FileError(f"{name} has changed: its SHA-256 is {found}, expected {sha256}. {cure}")
    try:
        tensors, metadata = _parsed(path) if content is None else _parsed_bytes(content)
    except (SafetensorError, RuntimeError, UnicodeError) as error:
        raise FileError(f"{name} is not a whole safetensors file ({error}). {cure}") from error
    expected = metadata.pop(_CHECKSUM, None)
    if expected is not None and checksum(tensors, metadata) != expected:
        raise FileError(f"{name} is damaged: it does not have the checksum that it was written with. {cure}")
    return TensorFile(tensors, metadata, verified=expected is not None)


def _parsed(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    # Not mapped: a file that is overwritten or cut would change the tensors, or kill the process.
    with safe_open(path, framework="pt", backend="pread") as opened:
        return opened.get_tensors(), opened.metadata() or {}


def _parsed_bytes(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__", {})


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns a checksum of all that a file says: names, types, shapes and values of tensors, and its metadata."""
    crc = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode(), crc)
        crc = zlib.crc32(raw_bytes(tensor), crc)
    return f"{crc:08x}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors have the same type, shape and bits; a NaN is then equal to itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def raw_bytes(tensor: Tensor) -> memoryview | bytes:
    """Returns the values of a tensor as bytes, without a copy if it is contiguous and on the CPU."""
    # reshape: a tensor without dimensions has no view as bytes.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
