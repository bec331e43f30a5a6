"""Reads pictures in one way, for all that trains, remembers, explains and evaluates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = ["SUFFIXES", "ImageError", "read_picture"]

# Of the files that are taken for pictures.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# A model's transform makes the short side a few hundred pixels long, and the long one as many times that.
_LARGEST_RATIO = 100


class ImageError(ValueError):
    """A picture cannot be read."""

    def __init__(self, message: str) -> None:
        # PyTorch puts the traceback of a loader's worker before the message, and makes an error of the same class.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def read_picture(source: str | Path | Image.Image | Callable[[], Any], mode: str | None, name: str) -> Image.Image:
    """Returns a picture as a camera shows it: turned as its EXIF data say, and in a mode of PIL's.

    Args:
        source: A path, a picture, or what opens one.
        mode: `"RGB"` or `"L"`; `None` for the picture's own. Of 16 bits the upper eight are kept.
        name: What to call it in an error.

    Raises:
        ImageError: If it cannot be read, has numbers without a known range, or is far longer than wide.
    """
    try:
        opened: Any = source() if callable(source) else source
        image = opened if isinstance(opened, Image.Image) else Image.open(opened)
        short, long = sorted(image.size)
        if long > _LARGEST_RATIO * short:
            raise ImageError(f"{short} by {long} pixels, and a side may be {_LARGEST_RATIO} times the other")
        return _in_mode(ImageOps.exif_transpose(image), mode)
    except Exception as error:  # PIL's decoders raise errors of any class
        reason = str(error) if isinstance(error, ImageError | OSError) else f"{type(error).__name__}: {error}"
        raise ImageError(f"The image {name} cannot be read: {reason}. Repair or remove it.") from error


def _in_mode(image: Image.Image, mode: str | None) -> Image.Image:
    if mode is None or image.mode == mode:
        return image
    if image.mode in ("I", "F"):
        # PIL would cut what is above 255.
        raise ImageError(f"its mode is {image.mode!r}, 32 bits of an unknown range; 8 or 16 are expected")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert(mode)
