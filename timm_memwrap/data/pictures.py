"""Pictures for people: of model inputs, and of memory samples, which are found by their ids.

Shapes: N images, C channels.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import PureWindowsPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from timm_memwrap.data.classes import file_name
from timm_memwrap.data.transforms import data_config, opened, to_batch
from timm_memwrap.memory_bank import SampleId

__all__ = ["SampleImages", "enlarged", "normalisation", "picture_of", "small_images", "to_picture"]

_SMALL = 64  # pixels


def to_picture(model: nn.Module, image: Any) -> np.ndarray:
    """Makes a uint8 array `[H, W, 3]` of a PIL image, a path or a tensor `[C, H, W]`, of floats if a model input."""
    image = opened(image, "RGB")
    if isinstance(image, Image.Image):
        return np.asarray(image)
    if image.is_floating_point():
        image = _pixels(image, model)
    if image.shape[0] != 3:
        # There are no colours to show, so one channel stands for all.
        image = image[:1].expand(3, -1, -1)
    return image.permute(1, 2, 0).cpu().numpy()


def small_images(images: Tensor, model: nn.Module, size: Sequence[int] | None = None) -> Tensor:
    """Makes uint8 pictures `[N, C, H, W]` of model inputs `[N, C, H, W]`, of this size or at most 64 pixels a side."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"Images have {images.shape[1]} channels; only 1 or 3 can be shown. Pass store_images=False.")
    if size is None:
        factor = min(1, _SMALL / max(images.shape[-2:]))
        size = [max(1, round(side * factor)) for side in images.shape[-2:]]
    if tuple(size) != tuple(images.shape[-2:]):
        images = F.interpolate(images.float(), list(size), mode="bilinear", antialias=True)
    return _pixels(images, model)


def enlarged(images: Tensor, model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Makes model inputs `[N, C, *size]` of what `small_images` made of some: as they were, but out of focus."""
    mean, std = normalisation(model)
    inputs = (images.cpu().float() / 255 - mean) / std
    return F.interpolate(inputs, size, mode="bilinear").to(next(model.parameters()))


def _pixels(images: Tensor, model: nn.Module) -> Tensor:
    """Undoes the normalisation of model inputs `[..., C, H, W]`; returns uint8 on the CPU."""
    mean, std = normalisation(model)
    images = images.detach().cpu().float() * std + mean
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def normalisation(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation `[C, 1, 1]` of the pixels."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return mean, std


class SampleImages:
    """Images of memory samples, fetched by id from the data set that the bank was built from.

    Make one per call and keep it: the names of the files are read once, at the first sample that has one.

    Args:
        model: The model: its transform makes inputs of pictures, and its normalisation is undone for people.
        dataset: A data set of `(image, label)`, or a mapping from id to image. An id is a position in the data set, or
            the end of a file's path, which must be the only one of its kind; a bank from the Hub has bare file names.
        complete: Whether all samples are expected to be in it.
    """

    def __init__(self, model: nn.Module, dataset: Any, complete: bool = True) -> None:
        self._model, self._dataset, self.complete = model, dataset, complete

    def picture(self, sample_id: SampleId) -> np.ndarray | None:
        """Returns the sample as an array `[H, W, 3]` of uint8, or `None` if it is not there."""
        image = self._find(sample_id)
        return None if image is None else to_picture(self._model, image)

    def input(self, sample_id: SampleId) -> Tensor:
        """Returns the sample as a model input `[C, H, W]`; raises a `ValueError` if it is not there."""
        image = self._find(sample_id)
        if image is None:
            raise ValueError(
                f"The memory sample {sample_id!r} is not in {type(self._dataset).__name__}, or there twice. Pass the "
                f"dataset that the bank was built from, or a mapping from id to image."
            )
        return to_batch(self._model, image)[0]

    def _find(self, sample_id: SampleId) -> Any:
        if isinstance(self._dataset, Mapping):
            return self._dataset.get(sample_id)
        index = sample_id if isinstance(sample_id, int) else self._position(sample_id)
        if index is None or not 0 <= index < len(self._dataset):
            return None
        sample = self._dataset[index]
        return sample[0] if isinstance(sample, Sequence) else sample

    def _position(self, name: str) -> int | None:
        # Splits at both separators: a bank may come from a machine with the other one.
        parts = PureWindowsPath(name).parts
        return self._positions.get(parts, self._positions.get(parts[-2:]))

    @cached_property
    def _positions(self) -> dict[tuple[str, ...], int | None]:
        """Positions by path, with and without its folders; `None` where several files have it."""
        found: dict[tuple[str, ...], int | None] = {}
        for i in range(len(self._dataset)):
            parts = PureWindowsPath(file_name(self._dataset, i) or "").parts
            for end in {parts, parts[-2:], parts[-1:]}:
                found[end] = None if end in found else i
        return found


def picture_of(
    model: nn.Module, thumbnail: Tensor | None, sample_id: SampleId, stored: SampleImages | None
) -> np.ndarray | None:
    """Returns a memory sample's picture: the bank's own, else the one in its data set, else `None`."""
    if thumbnail is not None:
        return to_picture(model, thumbnail)
    return None if stored is None else stored.picture(sample_id)
