"""Labelled images from wherever timm reads them, in one form: strict about unreadable files, and easy to divide."""

import copy
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_memwrap._utils import check_count, printable
from timm_memwrap.data.classes import dataset_classes, file_name, known_labels, labels_by_name
from timm_memwrap.data.reading import ImageError, read_picture
from timm_memwrap.selection import find_candidates

__all__ = ["Images", "split_off"]

_logger = logging.getLogger(__name__)

_MOST_CLASSES = 2**20


class Images(Dataset):
    """A data set of `(image, label)` whose labels and class names are known without reading an image.

    Where images may have several classes, a label is a multi-hot vector of floats `[C]`, as timm's losses take it, and
    `targets` are multi-hot `[N, C]` in uint8 instead of a list of class indices.

    An image that cannot be read is an error that names it. timm's own data sets return another sample in its place,
    and a memory would show the wrong evidence. What is read is `read_picture`'s.

    Args:
        source: The data set underneath, of PIL images: timm's, torchvision's or another with random access.
        name: Name for people.
        mode: PIL mode of the images, `"RGB"` or `"L"`; `None` for as they are.
    """

    def __init__(self, source: Any, name: str, mode: str | None = "RGB") -> None:
        self.source, self.name, self.mode = source, name, mode
        self.transform: Callable[[Image.Image], Any] | None = None
        self.positions = list(range(len(source)))
        labels, reader = known_labels(source), getattr(source, "reader", source)
        self.targets: Any = [int(reader[i][1]) for i in self.positions] if labels is None else labels.tolist()
        if labels is not None and labels.ndim == 2:
            self.targets = labels
        largest = self.labels.shape[1] - 1 if self.multi_label else max(self.targets, default=-1)
        if largest >= _MOST_CLASSES:
            raise ValueError(f"{name} has the label {largest}. Labels are numbers of classes, below {_MOST_CLASSES:,}.")
        self.classes = dataset_classes(source) or [str(i) for i in range(largest + 1)]

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return isinstance(self.targets, Tensor)

    @property
    def labels(self) -> Tensor:
        """Labels of all images: class indices `[N]`, or multi-hot `[N, C]`."""
        return torch.as_tensor(self.targets)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            image = self._read(index)
        except ImageError as error:
            raise ImageError(f"{error} Or pass unreadable='skip' to leave such images out.") from error
        label = self.targets[index].float() if self.multi_label else self.targets[index]
        return image if self.transform is None else self.transform(image), label

    def _read(self, index: int) -> Image.Image:
        position = self.positions[index]
        # timm's data set would return another sample in the place of one that it cannot read.
        source = self.source.reader if isinstance(self.source, ImageDataset) else self.source
        return read_picture(lambda: source[position][0], self.mode, f"{self.filename(index)!r} of {self.name}")

    def filename(self, index: int) -> str:
        """Returns the name of a sample's file, or its position where there is none."""
        return file_name(self.source, self.positions[index]) or f"{self.positions[index]:06d}"

    def at(self, indices: Sequence[int]) -> "Images":
        """Returns only these samples, in this order."""
        some = copy.copy(self)
        some.positions = [self.positions[i] for i in indices]
        some.targets = self.targets[list(indices)] if self.multi_label else [self.targets[i] for i in indices]
        return some

    def with_classes(self, classes: Sequence[str]) -> "Images":
        """Returns the same samples with the labels that these classes have; raises a `ValueError` if one is missing."""
        labels = torch.tensor(labels_by_name(self.classes, classes), dtype=torch.long)
        same = copy.copy(self)
        same.classes = list(classes)
        if self.multi_label:
            same.targets = self.targets.new_zeros(len(self), len(classes))
            same.targets[:, labels] = self.targets
        else:
            same.targets = labels[self.labels].tolist()
        return same

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> "Images":
        """Returns the same samples with another transform."""
        same = copy.copy(self)
        same.transform = transform
        return same

    def subset(self, size: int | None, seed: int = 0) -> "Images":
        """Returns `size` samples, as many of each class as there are, or all for `None`."""
        check_count("size", size, none=True)
        return self.at(find_candidates("balanced", self.labels, size, seed))

    def readable(self, progress: bool = True) -> "Images":
        """Reads all images, and returns only the samples whose image can be read. Logs those that are left out."""
        kept = []
        for i in tqdm(range(len(self)), desc="Checking images", unit="img", disable=not progress):
            try:
                self._read(i)
                kept.append(i)
            except ImageError as error:
                _logger.warning("Left out: %s", printable(str(error)))
        if bad := len(self) - len(kept):
            _logger.warning("Left out %d of %d images of %s, which cannot be read.", bad, len(self), self.name)
        return self.at(kept)


def split_off(images: Images, fraction: float, seed: int = 0) -> tuple[Images, Images]:
    """Divides images into a training and a validation set with this share of each class, at least one in either.

    Of images of several classes, one class after the other gets its share, the rarest first.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} is not between 0 and 1. Pass the share of images to hold out, e.g. 0.1.")
    if images.multi_label:
        return _split_multi_label(images, fraction, seed)
    rng, held_out, targets = random.Random(seed), set(), np.array(images.targets)
    for label in np.unique(targets):
        positions = np.flatnonzero(targets == label).tolist()
        if len(positions) < 2:
            raise ValueError(
                f"Class {label} of {images.name} has one image, so none can be held out. Add images, or name a "
                f"validation split."
            )
        count = min(max(1, round(fraction * len(positions))), len(positions) - 1)
        held_out |= set(rng.sample(positions, count))
    return images.at([i for i in range(len(images)) if i not in held_out]), images.at(sorted(held_out))


def _split_multi_label(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    rng, labels = random.Random(seed), images.labels.bool()
    # A column more, for the images of no class.
    labels = torch.cat([labels, ~labels.any(dim=1, keepdim=True)], dim=1)
    held_out, kept = torch.zeros(2, len(images), dtype=torch.bool)
    for label in labels.sum(dim=0).argsort(stable=True).tolist():
        of_class = labels[:, label]
        wanted = round(fraction * int(of_class.sum())) - int((of_class & held_out).sum())
        free = (of_class & ~held_out & ~kept).nonzero().flatten().tolist()
        chosen = rng.sample(free, min(max(wanted, 0), len(free)))
        held_out[chosen] = True
        # The class has its share: what of it is left stays for training.
        kept |= of_class & ~held_out
    if not held_out.any() or held_out.all():
        raise ValueError(
            f"{images.name} has {len(images)} images, too few to hold out {fraction} of each class. Add images, or "
            f"name a validation split."
        )
    return images.at((~held_out).nonzero().flatten().tolist()), images.at(held_out.nonzero().flatten().tolist())
