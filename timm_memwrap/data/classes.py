"""What a data set lists of its samples: labels, file names and class names, which are matched to the model's."""

import logging
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from timm_memwrap.labels import plain_labels
from timm_memwrap.model import MemoryWrapModel

__all__ = ["class_names", "known_class_names"]

_logger = logging.getLogger(__name__)


def class_names(model: MemoryWrapModel) -> list[str]:
    """Returns one name per class of the model: a known one, or "class 3"."""
    names = known_class_names(model)
    return [*names, *(f"class {i}" for i in range(len(names), model.num_classes))]


def known_class_names(model: Any) -> list[str]:
    """Returns the class names of the memory, else of a timm model's pretrained cfg; empty if neither has any."""
    if isinstance(model, MemoryWrapModel):
        elsewhere = model.engine is not None and not len(model.memory_bank)
        names = model.engine.class_names(model) if elsewhere and model.engine else model.memory_bank.class_names
        if names:
            return names
    known = model.pretrained_cfg.get("label_names") or []
    names = [str(name) for name in (known.values() if isinstance(known, dict) else known)]
    # A model with a new classifier still has the cfg of its pretrained weights.
    return names if len(names) == model.num_classes else []


def file_name(dataset: Any, index: int) -> str | None:
    """Returns the file name of a sample, with "/" on every platform; `None` if the data set does not know it."""
    if isinstance(dataset, Subset):
        return file_name(dataset.dataset, int(dataset.indices[index]))
    if hasattr(dataset, "filename"):  # timm's data sets and ours
        name = dataset.filename(index)
        return PurePath(name).as_posix() if name else None
    if isinstance(samples := getattr(dataset, "samples", None), list):  # torchvision's image folders
        # The folder is the class; two classes may well both have a 0001.png.
        return PurePath(*PurePath(str(samples[index][0])).parts[-2:]).as_posix()
    return None


def innermost(dataset: Any) -> Any:
    """Returns the data set that a `Subset` was taken of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def dataset_classes(dataset: Any) -> list[str]:
    """Returns the class names of a data set by label: its `classes`, else its reader's; empty if there are none."""
    dataset = innermost(dataset)
    reader = getattr(dataset, "reader", None)
    by_name = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    by_label = {label: name for name, label in by_name.items()}
    names = getattr(dataset, "classes", None) or [by_label.get(i, "") for i in range(max(by_label, default=-1) + 1)]
    return [str(name) for name in names]


def known_labels(dataset: Any) -> Tensor | None:
    """Returns the labels that a data set lists: class indices `[N]`, or multi-hot `[N, C]` of several classes.

    Lists of class indices, as of a `Sequence(ClassLabel)` of Hugging Face, are made multi-hot. `None` if the labels are
    only known by reading each image.

    Raises:
        ValueError: If a list has a class index without a class.
    """
    if isinstance(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    reader: Any = getattr(dataset, "reader", None)
    candidates = [getattr(part, name, None) for part in (dataset, reader) for name in ("targets", "labels")]
    if isinstance(samples := getattr(reader, "samples", None), list):  # timm's folders
        candidates.append([sample[1] for sample in samples])
    elif hasattr(reader, "iter_targets"):  # Hugging Face data sets in timm
        targets = list(reader.iter_targets())
        if targets and isinstance(targets[0], list) and not getattr(reader, "dense_target", False):
            return _from_lists(targets, len(dataset_classes(dataset)))
        candidates.append(targets)
    for candidate in candidates:
        try:
            labels = torch.as_tensor(candidate)
        except (TypeError, ValueError, RuntimeError):  # e.g. names
            continue
        if labels.shape == (len(dataset),) and not labels.is_floating_point():
            return labels.long()
        if labels.ndim == 2 and len(labels) == len(dataset) and bool(((labels == 0) | (labels == 1)).all()):
            return plain_labels(labels)
    return None


def _from_lists(rows: Sequence[Sequence[int]], num_classes: int) -> Tensor:
    """Makes multi-hot labels `[N, C]` of lists of class indices."""
    indices = [(i, int(index)) for i, row in enumerate(rows) for index in row]
    outside = [index for _, index in indices if not 0 <= index < num_classes]
    if outside:
        raise ValueError(
            f"The data has the label {outside[0]}, but {num_classes} classes: expected lists of class indices, 0 to "
            f"{num_classes - 1}, and the names of the classes."
        )
    labels = torch.zeros(len(rows), num_classes, dtype=torch.uint8)
    if indices:
        labels[tuple(torch.tensor(indices).T)] = 1
    return labels


def model_labels(theirs: Sequence[str], ours: Sequence[str], num_classes: int) -> list[int] | None:
    """Returns a model's label of each class of a data set, by name; `None` where labels are taken by number.

    The numbers that an image folder gives to the classes in it may be others than the model's.

    Args:
        theirs: Names of the classes by the data's label, if it has any.
        ours: Names by the model's label, if it knows any.
        num_classes: Number of the model's classes.

    Raises:
        ValueError: If the classes cannot be matched.
    """
    if not theirs or theirs == ours:
        return None
    numbers = theirs == [str(i) for i in range(len(theirs))]
    # Numbers are not names, unless they are the model's.
    if ours and (not numbers or set(theirs) <= set(ours)):
        return labels_by_name(theirs, ours)
    if len(theirs) != num_classes and (ours or not numbers):
        raise ValueError(
            f"The data has {len(theirs)} classes and the model {num_classes}, and only one of them has class names, so "
            f"they cannot be matched. Name the model's: model.pretrained_cfg['label_names'] = names."
        )
    if ours:
        _logger.warning("The data has numbers for class names, so labels are taken by number: 0 is %r.", ours[0])
    return None


def labels_by_name(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """Returns the model's label of each class of a data set; raises a `ValueError` where there is not one."""
    if unknown := sorted(set(theirs) - set(ours)):
        raise ValueError(
            f"The data has classes that the model does not know: {_some(unknown, 5)}. It knows {_some(ours, 10)}. "
            f"Rename or remove them in the data; or if the model's names are to be others, pass class_names to "
            f"build_memory_bank."
        )
    if twice := [name for name in theirs if ours.count(name) > 1]:
        raise ValueError(
            f"The model has {twice[0]!r} as the name of several classes, so labels cannot be matched by name. Give "
            f"each its own: model.memory_bank.set_class_names(names)."
        )
    return [ours.index(name) for name in theirs]


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(map(repr, names[:count]))}{more}"
