"""Pictures in class folders, on the disk or in a tar file, and what was left out of them."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from timm_memwrap._utils import printable
from timm_memwrap.data.reading import SUFFIXES
from timm_memwrap.data.tars import members

__all__ = ["Folder"]

_logger = logging.getLogger(__name__)


class Folder(Dataset):
    """Pictures whose class is the folder that they are in; classes and files are in timm's order.

    On the disk the classes are the folders in `root`, as torchvision has it, and what lies deeper belongs to them. In a
    tar file, whose folders may begin anywhere, they are those that the pictures are in. Hidden files and folders are
    passed over.

    Args:
        root: The folder or tar file.

    Raises:
        ValueError: If it holds no pictures in class folders, or is not a whole tar file.
    """

    def __init__(self, root: Path) -> None:
        files = _in_folder(root) if root.is_dir() else _in_tar(root)
        pictures, left_out = [], Counter[str]()
        for name, class_name, opened in files:
            suffix = name.suffix.lower()
            if class_name and suffix in SUFFIXES:
                pictures.append((name, class_name, opened))
            elif not name.name.startswith("."):
                left_out[f"{suffix or 'no suffix'}{'' if class_name else ' in no class folder'}"] += 1
        pictures.sort(key=lambda picture: natural_key(str(picture[0])))
        counts = Counter(class_name for _, class_name, _ in pictures)
        self.classes = sorted(counts, key=natural_key)
        label = {name: i for i, name in enumerate(self.classes)}
        self.targets = [label[class_name] for _, class_name, _ in pictures]
        self._files = [(str(name), opened) for name, _, opened in pictures]
        self._tell(root, counts, left_out)
        if not pictures:
            raise ValueError(
                f"{str(root)!r} holds no images in class folders. Expected a folder for each class, with files ending "
                f"in {', '.join(SUFFIXES)}."
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self._files[index][1]()), self.targets[index]

    def filename(self, index: int) -> str:
        """Returns a picture's path from the root, with "/"."""
        return self._files[index][0]

    def _tell(self, root: Path, counts: Counter[str], left_out: Counter[str]) -> None:
        found = ", ".join(f"{name} {counts[name]:,}" for name in self.classes[:20])
        more = f" and {len(self.classes) - 20} more" if len(self.classes) > 20 else ""
        _logger.info("%s: %d images of %d classes: %s%s", root.name, len(self), len(counts), printable(found), more)
        if root.is_dir() and (empty := sorted(path.name for path in _folders(root) if path.name not in counts)):
            _logger.warning("%s: no images for %s, which are no classes.", root.name, printable(", ".join(empty[:20])))
        if left_out:
            what = ", ".join(f"{count:,} of {kind}" for kind, count in left_out.most_common(10))
            _logger.warning("%s: left out %s.", root.name, printable(what))
        if root.is_dir() and (deeper := [name for name, _ in self._files if name.count("/") > 1]):
            _logger.warning(
                "%s: %d images lie in folders inside their class folder, e.g. %s; their class is the outer one.",
                root.name,
                len(deeper),
                printable(deeper[0]),
            )


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _in_folder(root: Path) -> Iterator[tuple[PurePosixPath, str, Callable[[], Any]]]:
    for path in root.iterdir():
        if path.is_file():
            yield PurePosixPath(path.name), "", lambda: None
    for folder in _folders(root):
        for path in _walk(folder):
            yield PurePosixPath(path.relative_to(root)), folder.name, path.absolute


def _walk(folder: Path) -> Iterable[Path]:
    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(place))
        # A link may lead back.
        folders[:] = [
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        yield from (Path(place, name) for name in files)


def _in_tar(path: Path) -> Iterator[tuple[PurePosixPath, str, Callable[[], Any]]]:
    for member in members(path):
        yield member.name, member.name.parent.name, member.open
