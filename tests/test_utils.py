"""What every room uses: files that are whole or absent."""

import errno
from pathlib import Path

import pytest

from timm_memwrap._utils import replacing


def _fill_the_disk(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the new one")
        # As the system says it of a write: without the name of a file.
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(OSError, match=r"No space left.*Could not write model\.onnx; free some space") as caught:
        _fill_the_disk(path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_error_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert caught.value.filename == str(tmp_path / "b")
