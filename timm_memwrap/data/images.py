"""Labelled images from wherever timm reads them, in one form: strict about unreadable files, and easy to divide."""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_memwrap.data.classes import dataset_classes, known_labels
from timm_memwrap.selection import select

__all__ = ["Images", "split_off"]

_logger = logging.getLogger(__name__)


class Images(Dataset):
    """A data set of `(image, label)` whose labels and class names are known without reading an image.

    An image that cannot be read is an error that names it. timm's own data sets return another sample in its place,
    and a memory would show the wrong evidence.

    Args:
        source: The data set underneath: `Digits`, `Shards`, a timm `ImageDataset` or a torchvision one.
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
        labels = known_labels(source)
        targets = _read_labels(source) if labels is None else labels.tolist()
        self.classes = dataset_classes(source) or [str(label) for label in sorted(set(targets))]
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
        """Returns a sample's name as timm's data sets do: its file's where there is one, else its position."""
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
            raise ValueError(f"{size} samples of {self.name} do not exist. Pass a number from 1 to {len(self)}.")
        return self.at(select("balanced", torch.tensor(self.targets), None, size, seed))

    def readable(self, progress: bool = True) -> "Images":
        """Reads all images, and returns only the samples whose image can be read. Logs those that are left out."""
        kept = []
        for i in tqdm(range(len(self)), desc="Checking images", unit="img", disable=not progress):
            try:
                self.image(i)
                kept.append(i)
            except ValueError as error:
                _logger.warning("Left out: %s", error.__cause__ or error)
        if bad := len(self) - len(kept):
            _logger.warning("Left out %d of %d images of %s, which cannot be read.", bad, len(self), self.name)
        return self.at(kept)


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
        raise ValueError(f"fraction={fraction} is not between 0 and 1. Pass the share of images to hold out, e.g. 0.1.")
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
    return images.at([i for i in range(len(images)) if i not in held_out]), images.at(sorted(held_out))


def _read_labels(source: Any) -> list[int]:
    samples = getattr(source, "reader", source)
    return [int(samples[i][1]) for i in range(len(samples))]
