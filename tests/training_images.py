"""Small folders of images, to train with and to look at."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "Zebra")


def write_images(folder: Path, count: int, classes: tuple[str, ...] = CLASSES, size: int = 24) -> Path:
    """Writes `count` noisy images of each class, whose brightness is the class, to a folder each."""
    rng = np.random.default_rng(len(folder.name))
    for label, name in enumerate(sorted(classes)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.normal(60 + 70 * label, 12, (size, size, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


def write_noise(folder: Path, classes: Mapping[str, int], each: int, seed: int, prefix: str = "") -> None:
    """Writes `each` images of noise of each class, by which it is divided, to a folder each."""
    rng = np.random.default_rng(seed)
    for name, divisor in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) // divisor
            Image.fromarray(pixels).save(folder / name / f"{prefix}{i}.png")
