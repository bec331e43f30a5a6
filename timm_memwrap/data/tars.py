"""Lists tar files strictly: what is cut, damaged or not in the file itself is an error, and never left out."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

__all__ = ["Member", "members"]

_BLOCK = 512


class Member(NamedTuple):
    """A file in a tar file."""

    tar: Path
    name: PurePosixPath
    offset: int
    size: int

    def open(self) -> io.BytesIO:
        """Reads it."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def members(path: Path) -> Iterator[Member]:
    """Yields the files in a tar file, and those of the tar files in it under their names; hidden ones are passed over.

    Raises a `ValueError` if it is not whole. `tarfile` ends at a damaged header as if there were no more.
    """
    size = path.stat().st_size
    with path.open("rb") as raw:
        yield from _members(path, raw, PurePosixPath(), size)
        while rest := raw.read(2**20):
            if any(rest):
                raise ValueError(f"{str(path)!r} goes on behind its end: it is damaged, or joined of several.")


def _members(path: Path, raw: BinaryIO, folder: PurePosixPath, end: int) -> Iterator[Member]:
    cure = "Pack or download it again."
    try:
        with tarfile.open(fileobj=raw, mode="r:") as file:
            for member in file:
                name = folder / member.name
                if member.isdir() or any(part.startswith(".") and part != ".." for part in name.parts):
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{str(name)!r} in {str(path)!r} is a link or sparse. Pack the file itself.")
                if member.offset_data + member.size > end:
                    raise ValueError(f"{str(path)!r} is cut in the middle of {str(name)!r}. {cure}")
                if name.suffix == ".tar":
                    raw.seek(member.offset_data)
                    yield from _members(path, raw, name.with_suffix(""), member.offset_data + member.size)
                else:
                    yield Member(path, name, member.offset_data, member.size)
            raw.seek(file.offset)
    except (tarfile.TarError, OverflowError, MemoryError) as error:
        raise ValueError(f"{str(path)!r} is not a tar file that can be read: {error}. {cure}") from error
    block = raw.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        raise ValueError(f"{str(path)!r} does not end as a tar file ends: it is cut or damaged. {cure}")
