"""Pictures and their classes from a CSV file, which can say what folders cannot: several classes of one picture."""

import csv
import logging
import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import Dataset

from timm_memwrap._utils import printable

__all__ = ["SUFFIX", "Table"]

_logger = logging.getLogger(__name__)

SUFFIX = ".csv"
_FILE, _LABEL = ("file", "file_name"), "label"
_EXPECTED = "Expected a header: file,label for one class of each picture, or file,label,label for several or none."


class Table(Dataset):
    """Pictures that a CSV file lists with their classes by name; classes are in timm's order.

    The header says which kind of labels there are. With `file,label` each picture has one class, and `targets` are
    class indices `[N]`. With `file,label,label` a line has any number of them, `cat.jpg,cat` or `both.jpg,cat,dog` or
    `none.jpg`, and `targets` are multi-hot `[N, C]`. Paths are relative to the folder of the CSV file, and empty cells
    are passed over.

    Args:
        path: The CSV file, in UTF-8.

    Raises:
        ValueError: If it is not such a file, a picture is missing or listed twice, or there are no pictures or classes.
    """

    def __init__(self, path: Path) -> None:
        lines = _read(path)
        several = _is_multi_label(next(filter(None, lines), []), path)
        filled = [(number, line) for number, line in enumerate(lines, 1) if line][1:]
        rows = [(number, line[0], [cell for cell in line[1:] if cell]) for number, line in filled]
        self._root, self._files = path.parent, [PurePosixPath(file.replace(os.sep, "/")) for _, file, _ in rows]
        self._check(path, rows, several)
        counts = Counter(name for _, _, names in rows for name in names)
        self.classes = sorted(counts, key=natural_key)
        label = {name: i for i, name in enumerate(self.classes)}
        self.targets: list[int] | Tensor = [label[names[0]] for _, _, names in rows if names]
        if several:
            self.targets = torch.zeros(len(rows), len(label), dtype=torch.uint8)
            for target, (_, _, names) in zip(self.targets, rows, strict=True):
                target[[label[name] for name in names]] = 1
        found = ", ".join(f"{name} {counts[name]:,}" for name in self.classes[:20])
        more = f" and {len(self.classes) - 20} more" if len(self.classes) > 20 else ""
        kind = f"{counts.total() / len(rows):.2g} labels each" if several else "one label each"
        shown = printable(f"{found}{more}")
        _logger.info("%s: %d images of %d classes, %s: %s", path.name, len(self), len(counts), kind, shown)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return Image.open(self._root / self._files[index]), self.targets[index]

    def filename(self, index: int) -> str:
        """Returns a picture's path as the file lists it, with "/"."""
        return str(self._files[index])

    def _check(self, path: Path, rows: list[tuple[int, str, list[str]]], several: bool) -> None:
        name = repr(str(path))
        if not rows:
            raise ValueError(f"{name} lists no pictures. Below the header, write a line for each.")
        for number, file, names in rows:
            if not file:
                raise ValueError(f"{name}, line {number} names no file. Write the path of a picture first.")
            if len(set(names)) < len(names):
                raise ValueError(f"{name}, line {number} gives {file!r} the same label twice: {names}. Write it once.")
            if not several and len(names) != 1:
                raise ValueError(
                    f"{name}, line {number} gives {file!r} {len(names)} labels, but the header file,label says one. If "
                    f"pictures may have several or none, make the header file,label,label."
                )
        if not any(names for _, _, names in rows):
            raise ValueError(f"{name} gives no picture a label, so there are no classes. Write them behind the file.")
        first: dict[PurePosixPath, int] = {}
        for (number, file, _), normal in zip(rows, self._files, strict=True):
            if normal in first:
                raise ValueError(
                    f"{name} lists {file!r} in lines {first[normal]} and {number}. Write all labels of it in one line."
                )
            first[normal] = number
        missing = [str(file) for file in self._files if not (self._root / file).is_file()]
        if missing:
            raise ValueError(
                f"{name} lists {len(missing):,} of {len(rows):,} pictures that are not there, e.g. {missing[:3]}. "
                f"Paths are relative to the folder of the CSV file."
            )


def _read(path: Path) -> list[list[str]]:
    """Reads the lines of a CSV file without the spaces around cells; empty lines are empty lists."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file, strict=True)]
    except (UnicodeError, csv.Error) as error:
        raise ValueError(f"{str(path)!r} is not a CSV file in UTF-8 ({error}). Save it as one.") from error
    return [line if any(line) else [] for line in lines]


def _is_multi_label(header: list[str], path: Path) -> bool:
    """Returns whether the header of a CSV file says that pictures have several labels."""
    names = [name.lower() for name in header]
    if not names or names[0] not in _FILE:
        raise ValueError(f"{str(path)!r} begins with {header[:5]}. {_EXPECTED}")
    if unknown := [name for name, plain in zip(header[1:], names[1:], strict=True) if plain != _LABEL]:
        raise ValueError(f"{str(path)!r} has a column {unknown[0]!r} that is not known. {_EXPECTED}")
    if len(names) < 2:
        raise ValueError(f"{str(path)!r} has no column for labels. {_EXPECTED}")
    return len(names) > 2
