"""Safetensors files with a checksum: what was written is what is read, whatever its type, or an error that names it."""

import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from timm_memwrap.tensor_files import FileError, read_tensors, write_tensors

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "f32": torch.randn(5, 3),
    "f16": torch.randn(3, 1).half(),
    "bf16": torch.randn(7).bfloat16(),
    "f64": torch.randn(2, 2, dtype=torch.float64),
    "bool": torch.tensor([True, False, True]),
    "i64": torch.tensor(-5),
    "c64": torch.randn(3, dtype=torch.complex64),
    "f8": torch.randn(5).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(4, 3).t(),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tensors(TENSORS, tmp_path / "x.safetensors", {"config": 'a "text" \n of any kind \u00e9'})


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second) if tensor.numel()]
    return first.dtype == second.dtype and first.shape == second.shape and (not bits or torch.equal(*bits))


def test_every_type_comes_back(path: Path) -> None:
    file = read_tensors(path, "x")
    assert file.verified
    assert file.metadata == {"format": "pt", "config": 'a "text" \n of any kind \u00e9'}
    assert file.tensors.keys() == TENSORS.keys()
    assert all(same(file.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_the_library_reads_the_file(tmp_path: Path) -> None:
    loaded = load_file(write_tensors(TENSORS, tmp_path / "x.safetensors"))
    assert all(same(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_tensors_are_aligned_to_their_type(path: Path) -> None:
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in read_tensors(path, "x").tensors.values())


def test_a_file_of_the_library_is_read_without_a_checksum(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert not read_tensors(tmp_path / "x.safetensors", "x").verified


def test_any_flipped_bit_is_found(path: Path) -> None:
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for at in [*range(0, start, 7), *range(start, len(content))]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(FileError, match=r"^the weights (is damaged|is not a whole)"):
            read_tensors(path, "the weights")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_cut_file_is_refused(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileError, match=r"the weights is not a whole safetensors file .*Save it again"):
        read_tensors(path, "the weights", "Save it again.")


def test_what_was_read_outlives_the_file(path: Path) -> None:
    tensors = read_tensors(path, "x").tensors
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.flush()
        assert all(same(tensors[name], tensor) for name, tensor in TENSORS.items())
        file.truncate(0)
    assert all(same(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "x", "x")


def test_what_the_format_cannot_hold_is_refused(path: Path) -> None:
    before = path.read_bytes()
    for tensor in (torch.randn(2, 2).to_sparse(), torch.randn(2, dtype=torch.complex128)):
        with pytest.raises(ValueError, match="wrong is a tensor of"):
            write_tensors({"wrong": tensor}, path)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        write_tensors({}, path, {"config": "\ud800"})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


ROOT = pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")


@pytest.mark.parametrize("error", [IsADirectoryError, FileNotFoundError, pytest.param(PermissionError, marks=ROOT)])
def test_the_systems_own_error_names_the_file(path: Path, error: type[OSError]) -> None:
    if error is PermissionError:
        path.chmod(0)
    else:
        path.unlink()
    if error is IsADirectoryError:
        path.mkdir()
    with pytest.raises(error) as caught:
        read_tensors(path, "x")
    assert caught.value.filename == str(path)
