"""Labelled images from wherever timm reads them, in one form: strict about what cannot be read, and easy to cut."""

import logging
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.dataset_factory import _search_split
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_memwrap.selection import select
from timm_memwrap.training.digits import Digits
from timm_memwrap.training.shards import Shards

__all__ = ["DIGITS", "Images", "open_dataset", "open_remembered", "open_source", "split_off"]

_logger = logging.getLogger(__name__)

DIGITS = "digits"
_NAMED = ("torch", "hfds", "wds")
_STREAMS = ("hfids", "tfds")


class Images(Dataset):
    """A data set of `(image, label)` whose labels and class names are known without reading an image.

    An image that cannot be read is an error that names it: timm's own data sets give another sample in its place, which
    would make a memory show the wrong evidence.

    Args:
        source: The data set underneath: `Digits`, a timm `ImageDataset` or a torchvision one.
        name: Name for people.
        mode: PIL mode of the images, `"RGB"` or `"L"`; `None` for as they are.
        positions: Which samples of `source`, in which order; `None` for all.
        transform: Applied to each PIL image.
    """

    def __init__(
        self,
        source: Any,
        name: str,
        mode: str | None = "RGB",
        positions: Sequence[int] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.source, self.name, self.mode, self.transform = source, name, mode, transform
        self.positions = list(range(len(source)) if positions is None else positions)
        self.classes = _class_names(source)
        targets = _targets(source)
        self.targets = [targets[i] for i in self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return image if self.transform is None else self.transform(image), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """Reads an image, without the transform.

        Raises:
            ValueError: If it cannot be read.
        """
        position = self.positions[index]
        try:
            if isinstance(self.source, ImageDataset):
                image = Image.open(self.source.reader[position][0])
            else:
                image = self.source[position][0]
            return image.convert(self.mode) if self.mode else image
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"The image {self.filename(index)!r} of {self.name} cannot be read: {error}. Repair or remove it, or "
                f"pass unreadable='skip' to leave such images out."
            ) from error

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Names a sample as timm's data sets do: by its file where there is one, else by its position."""
        if hasattr(self.source, "filename"):
            return self.source.filename(self.positions[index], basename=basename, absolute=absolute)
        return f"{self.positions[index]:06d}"

    def at(self, indices: Sequence[int]) -> "Images":
        """Returns only these samples, in this order."""
        return Images(self.source, self.name, self.mode, [self.positions[i] for i in indices], self.transform)

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> "Images":
        """Returns the same samples with another transform."""
        return Images(self.source, self.name, self.mode, self.positions, transform)

    def subset(self, size: int | None, seed: int = 0) -> "Images":
        """Returns `size` samples, as many of each class as there are, or all for `None`.

        Raises:
            ValueError: If there are fewer.
        """
        if size is None:
            return self
        if not 1 <= size <= len(self):
            raise ValueError(f"{size} samples asked of {self.name}, which has {len(self)}. Pass a number up to that.")
        return self.at(select("balanced", torch.tensor(self.targets), None, size, seed))

    def readable(self, progress: bool = True) -> "Images":
        """Returns only the samples whose images can be read, after reading all, and says how many are left out."""
        bad = []
        for i in tqdm(range(len(self)), desc="Checking images", unit="img", disable=not progress):
            try:
                self.image(i)
            except ValueError as error:
                bad.append(i)
                _logger.warning("Left out: %s", error.__cause__ or error)
        if bad:
            _logger.warning("Left out %d of %d images of %s, which cannot be read.", len(bad), len(self), self.name)
        gone = set(bad)
        return self.at([i for i in range(len(self)) if i not in gone])


def open_dataset(
    dataset: str = "",
    data_dir: str | os.PathLike | None = None,
    split: str = "train",
    classes: Sequence[str] | None = None,
    mode: str | None = "RGB",
    download: bool = False,
) -> Images:
    """Opens labelled images.

    Args:
        dataset: `"digits"`, the embedded data set; a name that `timm.data.create_dataset` knows (`"torch/cifar10"`,
            `"hfds/owner/name"`); `"wds/name"` for WebDataset shards in `data_dir`; or `""` for an image folder or tar
            file.
        data_dir: The image folder or tar file, or where timm keeps a data set.
        split: Name of the split; of an image folder, the folder in it (`"train"`, `"validation"` and their synonyms in
            timm), or `""` if the classes stand in `data_dir` itself.
        classes: Class names by label that labels are to follow; `None` for the data set's own, sorted.
        mode: PIL mode of the images, `"RGB"` or `"L"`; `None` for as they are.
        download: Whether a `torch/` data set may be downloaded.

    Raises:
        ValueError: If there is no such data set, split or class, or it is empty.
        ImportError: If reading it needs a package that is not installed.
    """
    prefix = dataset.partition("/")[0].lower() if "/" in dataset else ""
    if prefix in _STREAMS:
        raise ValueError(
            f"dataset={dataset!r} is a stream: samples have no names that a memory could show, and cannot be drawn. "
            f"Pass a data set with random access: an image folder or tar file, hfds/..., torch/... or wds/..."
        )
    if dataset == DIGITS:
        images = Images(Digits(_digits_split(split)), "scikit-learn digits", mode)
    elif prefix == "torch":
        # timm asserts on what it does not know.
        root = str(data_dir or ".")
        try:
            if dataset.lower() == "torch/svhn":
                source = _svhn(root, split, download)
            else:
                source = create_dataset(dataset, root=root, split=split, download=download)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"dataset={dataset!r} in {str(data_dir)!r}: {error}") from error
        images = Images(source, f"{dataset} {split}", mode)
    elif prefix == "hfds":
        images = Images(
            create_dataset(dataset, root=str(data_dir) if data_dir else None, split=split), f"{dataset} {split}", mode
        )
    elif prefix == "wds":
        # As timm: what follows the prefix is for people only, the shards are found by folder and split.
        images = Images(Shards(str(data_dir or "."), split), f"{dataset} {split}", mode)
    elif dataset:
        raise ValueError(
            f"Unknown dataset={dataset!r}. Pass 'digits', 'torch/<name>', 'hfds/<owner>/<name>' or 'wds/<name>', or "
            f"leave it empty and pass the path of an image folder or tar file as data_dir."
        )
    else:
        images = _open_folder(data_dir, split, classes, mode)
    if classes is not None and list(classes) != images.classes:
        if sorted(classes) != sorted(images.classes):
            raise ValueError(_other_classes(images.name, images.classes, classes))
        raise ValueError(f"{images.name} has its classes in another order: {images.classes}, expected {list(classes)}.")
    if not len(images):
        raise ValueError(f"{images.name} holds no images. Check the path and the split.")
    return images


def open_source(
    source: str | os.PathLike, split: str, classes: Sequence[str] | None = None, mode: str | None = "RGB"
) -> Images:
    """Opens labelled images named in one word: the path of an image folder or tar file, or the name of a data set.

    Args:
        source: `"digits"`, `"torch/..."`, `"hfds/..."`, or a path.
        split: As in `open_dataset`.
        classes: As in `open_dataset`.
        mode: As in `open_dataset`.

    Raises:
        ValueError: As in `open_dataset`.
    """
    name = os.fspath(source)
    if not name:
        raise ValueError("No data: pass an image folder, a tar file, 'digits', 'torch/...' or 'hfds/...' as data.")
    if not os.path.exists(name) and (name == DIGITS or name.partition("/")[0].lower() in (*_NAMED, *_STREAMS)):
        return open_dataset(name, None, split, classes, mode)
    return open_dataset("", name, split, classes, mode)


def open_remembered(source: str | os.PathLike) -> Images:
    """Opens the data that a memory was built from: the training split, or an image folder that has none as it is.

    Args:
        source: As in `open_source`.

    Raises:
        ValueError: As in `open_source`.
    """
    root = Path(source)
    whole = root.is_file() or (root.is_dir() and _search_split(str(root), "train") == str(root))
    return open_source(source, "" if whole else "train")


def split_off(images: Images, fraction: float, seed: int = 0) -> tuple[Images, Images]:
    """Divides images into a training and a validation set, class by class.

    Args:
        images: What to divide.
        fraction: Share of the images for validation; of each class at least one for either.
        seed: Seed of the choice.

    Raises:
        ValueError: If the fraction is not between 0 and 1, or a class has a single image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} is not a share. Pass a number between 0 and 1, e.g. 0.1.")
    members = defaultdict(list)
    for i, label in enumerate(images.targets):
        members[label].append(i)
    rng, held_out = random.Random(seed), set()
    for label, positions in sorted(members.items()):
        if len(positions) < 2:
            raise ValueError(
                f"Class {label} of {images.name} has one image, so none can be held out. Add images, or name a "
                f"validation split."
            )
        count = min(max(1, round(fraction * len(positions))), len(positions) - 1)
        held_out |= set(rng.sample(positions, count))
    everything = range(len(images))
    return images.at([i for i in everything if i not in held_out]), images.at(sorted(held_out))


def _open_folder(
    data_dir: str | os.PathLike | None, split: str, classes: Sequence[str] | None, mode: str | None
) -> Images:
    if data_dir is None:
        raise ValueError("No data: pass data_dir, an image folder or tar file, or dataset='digits'.")
    root = Path(data_dir)
    if not root.exists():
        raise ValueError(f"There is no {str(data_dir)!r}. Pass an image folder or a tar file as data_dir.")
    folder = _split_folder(root, split) if root.is_dir() and split else root
    class_map = {name: i for i, name in enumerate(classes)} if classes is not None else None
    name = str(folder)
    # timm would keep the contents of a large tar file as a pickle beside it, and read one that it finds there.
    options: dict[str, Any] = {"search_split": False, **({"cache_tarinfo": False} if root.is_file() else {})}
    try:
        found = create_dataset("", root=name, split=split, **options)
    except RuntimeError as error:
        raise ValueError(f"{name!r} holds no images in class folders: {error}") from error
    if class_map is None or _class_names(found) == list(class_map):
        return Images(found, name, mode)
    if not set(_class_names(found)) <= set(class_map):
        raise ValueError(_other_classes(name, _class_names(found), list(class_map)))
    # timm leaves out classes that the map does not know, so it may only be used once all are known.
    mapped = create_dataset("", root=name, split=split, class_map=class_map, **options)
    return Images(mapped, name, mode)


def _split_folder(root: Path, split: str) -> Path:
    """Finds the folder of a split as timm does, but never takes the whole folder for a split that is not there."""
    folder = Path(_search_split(str(root), split))
    if folder == root:
        inside = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise ValueError(
            f"There is no folder {split!r} in {str(root)!r}, which has {inside[:10]}. Name the split after one of "
            f"them, or pass split='' if they are the classes."
        )
    return folder


def _svhn(root: str, split: str, download: bool) -> Dataset:
    """Opens torchvision's SVHN, which timm does not list."""
    from torchvision.datasets import SVHN

    return SVHN(root, split=_digits_split(split), download=download)


def _digits_split(split: str) -> str:
    return "test" if split in ("test", "val", "valid", "validation", "eval", "evaluation") else split


def _other_classes(name: str, found: Sequence[str], expected: Sequence[str]) -> str:
    unknown = sorted(set(found) - set(expected))
    return (
        f"{name} has {len(unknown)} classes that are not among the {len(expected)} expected: {unknown[:5]}. Expected "
        f"are {sorted(expected)[:10]}. Rename or remove their folders."
    )


def _class_names(source: Any) -> list[str]:
    reader = getattr(source, "reader", None)
    by_name = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    by_index = {i: str(name) for name, i in by_name.items()}
    names = getattr(source, "classes", None) or [by_index[i] for i in sorted(by_index)]
    return [str(name) for name in names] or [str(label) for label in sorted(Counter(_targets(source)))]


def _targets(source: Any) -> list[int]:
    for holder in (source, getattr(source, "reader", None)):
        for attribute in ("targets", "labels"):
            labels = getattr(holder, attribute, None)
            if labels is not None:
                return [int(label) for label in labels]
    reader = source.reader
    if hasattr(reader, "samples"):
        return [int(label) for _, label in reader.samples]
    if hasattr(reader, "dataset") and not getattr(reader, "remap_class", False):
        # A table of Hugging Face's: one column of it, without the images.
        return [int(label) for label in reader.dataset[reader.label_key]]
    return [int(reader[i][1]) for i in range(len(reader))]
