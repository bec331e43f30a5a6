"""A tar file is read whole or refused by name."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from timm_memwrap.data import open_dataset
from timm_memwrap.data.tars import members


def _tar(path: Path, count: int = 4) -> Path:
    with tarfile.open(path, "w") as file:
        for i in range(count):
            _add(file, f"train/cat/{i}.png", bytes([i]) * 600)
    return path


def _add(file: tarfile.TarFile, name: str, content: bytes = b"") -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def test_members_are_read_where_they_lie(tmp_path: Path) -> None:
    found = list(members(_tar(tmp_path / "a.tar")))
    assert [str(member.name) for member in found] == [f"train/cat/{i}.png" for i in range(4)]
    assert [member.open().read() for member in found] == [bytes([i]) * 600 for i in range(4)]


def test_tars_in_a_tar_are_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as file:
        for name in ("n01", "n02"):
            _add(file, f"{name}.tar", _tar(tmp_path / f"{name}.tar", 2).read_bytes())
        _add(file, "last.txt", b"end")
    found = list(members(tmp_path / "all.tar"))
    names = [f"{name}/train/cat/{i}.png" for name in ("n01", "n02") for i in range(2)]
    assert [str(member.name) for member in found] == [*names, "last.txt"]
    assert found[3].open().read() == b"\x01" * 600


def test_hidden_members_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name in ("./cat/1.png", "cat/._1.png", ".git/1.png"):
            _add(file, name)
    assert [str(member.name) for member in members(tmp_path / "a.tar")] == ["cat/1.png"]


def _flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda content, i=i: _flip(content, 1536 * i + 5) for i in range(4)),  # a header's name
        lambda content: _flip(content, 1536 + 130),  # its size
        lambda content: content[:1000],
        lambda content: content[: 1536 * 2],
        lambda content: content[: 1536 * 2 + 100],
        lambda content: content[: 1536 * 4],
        lambda content: content + content,
        lambda content: b"",
        lambda content: b"no tar file" * 100,
    ],
)
def test_a_tar_that_is_not_whole_is_refused_and_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tar"):
        list(members(path))


def _link(file: tarfile.TarFile) -> None:
    member = tarfile.TarInfo("cat/2.png")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    file.addfile(member)


def _sparse(file: tarfile.TarFile) -> None:
    member = tarfile.TarInfo("cat/2.png")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    content = b"0\n".ljust(512, b"\0")
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("add", [_link, _sparse])
def test_what_is_not_in_the_file_is_refused_by_name(add: Callable[[tarfile.TarFile], None], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        _add(file, "cat/1.png")
        add(file)
    with pytest.raises(ValueError, match=r"'cat/2\.png' in '.*a\.tar' is a link or sparse"):
        list(members(tmp_path / "a.tar"))


@pytest.mark.parametrize(("label", "why"), [(b"1000000000", "label 1000000000"), (b"1" * 2000, "it is no label")])
def test_a_label_that_is_no_class_is_refused(label: bytes, why: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x-train.tar", "w") as file:
        _add(file, "0.png")
        _add(file, "0.cls", label)
    with pytest.raises(ValueError, match=why):
        open_dataset("wds/x", tmp_path, "train")
