"""Opens labelled images by name or path."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.dataset_factory import _search_split

from timm_memwrap.data.classes import dataset_classes
from timm_memwrap.data.digits import Digits
from timm_memwrap.data.images import Images
from timm_memwrap.data.shards import Shards

__all__ = ["DIGITS", "open_dataset", "open_remembered", "open_source"]

DIGITS = "digits"
_NAMED = ("torch", "hfds", "wds")
_STREAMS = ("hfids", "tfds")


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
            timm), or `""` if `data_dir` itself has the class folders.
        classes: Class names in the order of the labels; `None` for the data set's own, sorted.
        mode: PIL mode of the images, `"RGB"` or `"L"`; `None` for as they are.
        download: Whether a `torch/` data set may be downloaded.

    Raises:
        ValueError: If there is no such data set, split or class, or it is empty.
        ImportError: If reading it needs a package that is not installed.
    """
    prefix = dataset.partition("/")[0].lower() if "/" in dataset else ""
    root, name = str(data_dir or "."), f"{dataset} {split}"
    if prefix in _STREAMS:
        raise ValueError(
            f"dataset={dataset!r} is a stream, whose samples have no names that a memory could show and cannot be "
            f"drawn. Pass an image folder or tar file, hfds/..., torch/... or wds/..."
        )
    if dataset == DIGITS:
        images = Images(Digits(_train_or_test(split)), "scikit-learn digits", mode)
    elif prefix == "torch":
        # timm asserts on names that it does not know.
        try:
            images = Images(_open_torchvision(dataset, root, split, download), name, mode)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"dataset={dataset!r} in {str(data_dir)!r}: {error}") from error
    elif prefix == "hfds":
        images = Images(create_dataset(dataset, root=str(data_dir) if data_dir else None, split=split), name, mode)
    elif prefix == "wds":
        # As in timm, the rest of the name is for people only, and the shards are found by folder and split.
        images = Images(Shards(root, split), name, mode)
    elif dataset:
        raise ValueError(
            f"Unknown dataset={dataset!r}. Pass 'digits', 'torch/<name>', 'hfds/<owner>/<name>' or 'wds/<name>', or "
            f"leave it empty and pass the path of an image folder or tar file as data_dir."
        )
    else:
        images = _open_folder(data_dir, split, classes, mode)
    if classes is not None and list(classes) != images.classes:
        _check_classes(images.name, images.classes, classes, complete=True)
        raise ValueError(f"{images.name} has its classes in another order: {images.classes}, expected {list(classes)}.")
    if not len(images):
        raise ValueError(f"{images.name} holds no images. Check the path and the split.")
    return images


def open_source(
    source: str | os.PathLike, split: str, classes: Sequence[str] | None = None, mode: str | None = "RGB"
) -> Images:
    """Opens labelled images as `open_dataset` does, by one word: a path, `"digits"`, `"torch/..."` or `"hfds/..."`."""
    name = os.fspath(source)
    if not name:
        raise ValueError("No data: pass an image folder, a tar file, 'digits', 'torch/...' or 'hfds/...' as data.")
    if not os.path.exists(name) and (name == DIGITS or name.partition("/")[0].lower() in (*_NAMED, *_STREAMS)):
        return open_dataset(name, None, split, classes, mode)
    return open_dataset("", name, split, classes, mode)


def open_remembered(source: str | os.PathLike) -> Images:
    """Opens the data that a memory was built from: the training split, or an image folder without one as it is."""
    root = Path(source)
    whole = root.is_file() or (root.is_dir() and _search_split(str(root), "train") == str(root))
    return open_source(source, "" if whole else "train")


def _open_folder(
    data_dir: str | os.PathLike | None, split: str, classes: Sequence[str] | None, mode: str | None
) -> Images:
    if data_dir is None:
        raise ValueError("No data: pass data_dir, an image folder or tar file, or dataset='digits'.")
    root = Path(data_dir)
    if not root.exists():
        raise ValueError(f"There is no {str(data_dir)!r}. Pass an image folder or a tar file as data_dir.")
    name = str(_split_folder(root, split) if root.is_dir() and split else root)
    options: dict[str, Any] = {"root": name, "split": split, "search_split": False}
    if root.is_file():
        # timm would keep the contents of a large tar file as a pickle beside it, and read one that it finds there.
        options["cache_tarinfo"] = False
    try:
        found = create_dataset("", **options)
    except RuntimeError as error:
        raise ValueError(f"{name!r} holds no images in class folders: {error}") from error
    names = dataset_classes(found)
    if classes is not None and names != list(classes):
        # timm leaves out classes that its map does not have, so they are checked first.
        _check_classes(name, names, classes)
        found = create_dataset("", class_map={name: i for i, name in enumerate(classes)}, **options)
    return Images(found, name, mode)


def _split_folder(root: Path, split: str) -> Path:
    """Returns the folder of a split as timm finds it, but never the whole folder in place of a missing split."""
    folder = Path(_search_split(str(root), split))
    if folder == root:
        inside = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise ValueError(
            f"There is no folder {split!r} in {str(root)!r}, which has {inside[:10]}. Name the split after one of "
            f"them, or pass split='' if they are the classes."
        )
    return folder


def _open_torchvision(dataset: str, root: str, split: str, download: bool) -> Any:
    if dataset.lower() != "torch/svhn":
        return create_dataset(dataset, root=root, split=split, download=download)
    # timm does not list it.
    from torchvision.datasets import SVHN

    return SVHN(root, split=_train_or_test(split), download=download)


def _train_or_test(split: str) -> str:
    return "test" if split in ("val", "valid", "validation", "eval", "evaluation") else split


def _check_classes(name: str, found: Sequence[str], expected: Sequence[str], complete: bool = False) -> None:
    unknown = sorted(set(found) - set(expected))
    if unknown or (complete and len(found) != len(expected)):
        raise ValueError(
            f"{name} has {len(unknown)} classes that are not among the {len(expected)} expected: {unknown[:5]}. "
            f"Expected are {sorted(expected)[:10]}. Rename or remove their folders."
        )
