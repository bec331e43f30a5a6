"""The embedded data set: real images that need no download."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

__all__ = ["Digits"]


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1,797 real 8x8 images in ten classes, which come with its wheel.

    Every fifth sample of each class, in the order of the file, is a test sample, the rest are training samples. The
    file's writers follow each other, so the classes' order is kept and the split is the same everywhere.

    Args:
        split: `"train"` (1,442 samples) or `"test"` (355).
        transform: Applied to each PIL image; `None` leaves it a greyscale PIL image.

    Raises:
        ValueError: If the split is unknown.
        ImportError: If scikit-learn is not installed.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str, transform: Callable[[Image.Image], Any] | None = None) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split={split!r}. Pass 'train' or 'test'.")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("The digits come with scikit-learn: pip install 'timm-memwrap[quickstart]'") from error
        bunch = load_digits()
        labels = torch.from_numpy(bunch.target).long()
        # Rank of each sample within its class.
        rank = torch.stack([(labels == label).cumsum(0) - 1 for label in range(10)])[labels, torch.arange(len(labels))]
        chosen = (rank % 5 == 4) == (split == "test")
        self.transform = transform
        self.split = split
        self.targets = labels[chosen].tolist()
        self._positions = chosen.nonzero().flatten().tolist()
        self._pixels = (bunch.images[chosen.numpy()] * (255 / 16)).round().astype("uint8")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self._pixels[index])
        return image if self.transform is None else self.transform(image), self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Names a sample by its position in scikit-learn's file, as timm's datasets name theirs by file."""
        return f"{self._positions[index]:04d}" if basename else f"{self.split}/{self._positions[index]:04d}"
