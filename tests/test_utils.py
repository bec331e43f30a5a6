"""What every room uses: files that are whole or absent."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from timm_memwrap._utils import locked, replacing, write_text


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


_HANG = """
import sys, time
from timm_memwrap._utils import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_write_left_is_removed_by_the_next_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    process = subprocess.Popen([sys.executable, "-c", _HANG, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    (left,) = tmp_path.iterdir()
    old = time.time() - 3600
    os.utime(left, (old, old))
    write_text(path, "mine")
    assert left.is_dir(), "it is in use"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    write_text(tmp_path / "other", "another file")
    os.utime(left, (time.time(), time.time()))
    write_text(path, "mine")
    assert left.is_dir(), "it could just have been made"
    os.utime(left, (old, old))
    write_text(path, "mine again")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bank.safetensors", "other"]


def test_a_lock_is_had_by_one(tmp_path: Path) -> None:
    with locked(tmp_path) as first, locked(tmp_path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(tmp_path, wait=False) as again:
        assert again
