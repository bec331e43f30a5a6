"""Opens labelled images by name or path."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM, _search_split

from timm_memwrap._utils import check_choice, optional_import
from timm_memwrap.data.folders import Folder
from timm_memwrap.data.images import Images
from timm_memwrap.data.shards import Shards
from timm_memwrap.data.tables import SUFFIX, Table

__all__ = ["DIGITS", "open_dataset", "open_remembered", "open_source"]

DIGITS = "digits"


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
        dataset: `"digits"`, which needs no download; a name that `timm.data.create_dataset` knows (`"torch/cifar10"`;
            `"hfds/owner/name"`, with its labels in the column `label` or `labels`); `"wds/name"` for WebDataset shards
            in `data_dir`; or `""` for an image folder, tar file or CSV file.
        data_dir: The image folder, the tar or CSV file (see `Table`), a folder with a CSV file for each split, or where
            timm keeps a data set.
        split: Name of the split; of an image folder, the folder or CSV file in it (`"train"`, `"validation"` and their
            synonyms in timm), or `""` if `data_dir` itself has the class folders.
        classes: Class names in the order of the labels, e.g. a model's; `None` for the data set's own, sorted.
        mode: PIL mode of the images, `"RGB"` or `"L"`; `None` for as they are.
        download: Whether a `torch/` data set may be downloaded.

    Raises:
        ValueError: If there is no such data set, split or class, or it is empty.
        ImportError: If reading it needs a package that is not installed.
    """
    root, name = os.fspath(data_dir or ""), f"{dataset} {split}"
    prefix, slash, _ = dataset.lower().partition("/")
    if not dataset:
        images = _open_folder(root, split, mode)
    elif dataset == DIGITS:
        images = open_digits(_train_or_test(split), mode)
    elif prefix == "torch" and slash:
        images = Images(_open_torchvision(dataset, root or ".", split, download), name, mode)
    elif prefix == "hfds" and slash:
        if find_spec("datasets") is None:
            raise ImportError(f"dataset={dataset!r} needs the datasets library of Hugging Face: pip install datasets.")
        images = Images(_open_hub(dataset, root, split), name, mode)
    elif prefix == "wds" and slash:
        # As in timm, the rest of the name is for people only, and the shards are found by folder and split.
        images = Images(Shards(root or ".", split), name, mode)
    else:
        raise ValueError(
            f"Unknown dataset={dataset!r}. Pass 'digits', 'torch/<name>', 'hfds/<owner>/<name>' or 'wds/<name>', or "
            f"leave it empty and pass the path of an image folder or tar file as data_dir. A stream (hfids/, tfds/) "
            f"does not do: its samples cannot be drawn, and have no names that a memory could show."
        )
    if not len(images):
        raise ValueError(f"{images.name} holds no images. Check the path and the split.")
    if classes is not None and images.classes != list(classes):
        images = images.with_classes(classes)
    return images


def open_source(
    source: str | os.PathLike, split: str, classes: Sequence[str] | None = None, mode: str | None = "RGB"
) -> Images:
    """Opens labelled images as `open_dataset` does, by one word: a path, `"digits"`, `"torch/..."` or `"hfds/..."`."""
    name = os.fspath(source)
    named = name == DIGITS or name.lower().startswith(("torch/", "hfds/", "wds/", "hfids/", "tfds/"))
    if named and not os.path.exists(name):
        return open_dataset(name, None, split, classes, mode)
    return open_dataset("", name, split, classes, mode)


def open_remembered(source: str | os.PathLike) -> Images:
    """Opens the data that a memory was built from: the training split, or an image folder without one as it is."""
    root = os.fspath(source)
    whole = os.path.isdir(root) and _search_split(root, "train") == root and _find_table(Path(root), "train") is None
    return open_source(source, "" if whole else "train")


def open_digits(split: str, mode: str | None = None) -> Images:
    """Opens scikit-learn's handwritten digits, 1,797 real 8x8 grey images in ten classes, which come with its wheel.

    Every fifth sample of each class, in the order of the file, is in the split `"test"`, the others in `"train"`.
    """
    check_choice("split", split, ("train", "test"))
    digits = optional_import("sklearn.datasets", extra="quickstart", what="The digits").load_digits()
    pictures = map(Image.fromarray, (digits.images * (255 / 16)).round().astype("uint8"))
    images = Images(list(zip(pictures, digits.target, strict=True)), "scikit-learn digits", mode)
    test = np.concatenate([np.flatnonzero(digits.target == label)[4::5] for label in range(10)])
    return images.at(sorted(test) if split == "test" else sorted({*range(len(images))}.difference(test)))


def _open_folder(root: str, split: str, mode: str | None) -> Images:
    if not root:
        raise ValueError("No data: pass an image folder, a tar or CSV file, 'digits', 'torch/...' or 'hfds/...'.")
    folder = Path(root)
    if not folder.exists():
        raise ValueError(f"There is no {root!r}. Pass an image folder, or a tar or CSV file.")
    # The name goes into memories and cards, which may be published: the path does not.
    name = folder.resolve().name
    if table := _find_table(folder, split):
        return Images(Table(table), name, mode)
    if folder.is_dir() and split:
        folder = Path(_search_split(root, split))
        # timm takes the whole folder in place of a split that is not there.
        if folder == Path(root):
            inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise ValueError(
                f"There is no folder {split!r} in {root!r}, which has {inside[:10]}. Name the split after one of them, "
                f"or pass split='' if they are the classes."
            )
    return Images(Folder(folder), name, mode)


def _find_table(root: Path, split: str) -> Path | None:
    """Returns the CSV file that is the data, or that a folder has for a split, under a name as timm finds folders."""
    if root.is_file():
        return root if root.suffix.lower() == SUFFIX else None
    synonyms = next((names for names in (_TRAIN_SYNONYM, _EVAL_SYNONYM) if split in names), {})
    return next((path for name in (split, *synonyms) if name and (path := root / f"{name}{SUFFIX}").is_file()), None)


def _open_torchvision(dataset: str, root: str, split: str, download: bool) -> Any:
    try:
        if dataset.lower() != "torch/svhn":
            return create_dataset(dataset, root=root, split=split, download=download)
        # timm does not list it.
        from torchvision.datasets import SVHN

        return SVHN(root, split=_train_or_test(split), download=download)
    except (AssertionError, RuntimeError) as error:  # timm asserts on names that it does not know
        raise ValueError(f"dataset={dataset!r} in {root!r}: {error}") from error


def _open_hub(dataset: str, root: str, split: str) -> Any:
    """Opens a Hugging Face data set whose labels are in the column `label`, or of several classes often in `labels`."""
    found = create_dataset(dataset, root=root or None, split=split)
    columns = list(found.reader.dataset.features)
    for column in ("label", "labels"):
        if column in columns:
            return (
                found
                if column == "label"
                else create_dataset(dataset, root=root or None, split=split, target_key=column)
            )
    raise ValueError(
        f"{dataset!r} has the columns {columns}, none of which is 'label' or 'labels'. Rename one of them."
    )


def _train_or_test(split: str) -> str:
    return "test" if split in ("val", "valid", "validation", "eval", "evaluation") else split
