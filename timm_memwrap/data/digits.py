"""The embedded data set: real images that need no download."""

import torch
from PIL import Image
from torch.utils.data import Dataset

__all__ = ["Digits"]


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images in ten classes, which come with its wheel.

    Every fifth sample of each class, in the order of the file, is a test sample, the others are training samples.

    Args:
        split: `"train"` (1,442 samples) or `"test"` (355).

    Raises:
        ValueError: If the split is unknown.
        ImportError: If scikit-learn is not installed.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str) -> None:
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
        self.split = split
        self.targets = labels[chosen].tolist()
        self._positions = chosen.nonzero().flatten().tolist()
        self._pixels = (bunch.images[chosen.numpy()] * (255 / 16)).round().astype("uint8")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]), self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Returns a sample's name, as timm's data sets do: its position in scikit-learn's file."""
        return f"{self._positions[index]:04d}" if basename else f"{self.split}/{self._positions[index]:04d}"
