"""Names of samples, which are those of their files where there are any, and the way back from a name to its image."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import PurePath, PureWindowsPath
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Subset

from timm_memwrap.data.transforms import to_batch, to_picture
from timm_memwrap.memory_bank import SampleId

__all__ = ["SampleImages", "file_name", "picture_of"]


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


class SampleImages:
    """Images of memory samples, fetched by id from the data set that the bank was built from.

    Make one per call and keep it: the names of the files are read once, at the first sample that has one.

    Args:
        model: The model: its transform makes inputs of pictures, and its normalisation is undone for people.
        dataset: A data set of `(image, label)`, or a mapping from id to image. An id is a position in the data set, or
            the end of a file's path, which must be the only one of its kind; a bank from the Hub has bare file names.
    """

    def __init__(self, model: nn.Module, dataset: Any) -> None:
        self._model, self._dataset = model, dataset

    def picture(self, sample_id: SampleId) -> np.ndarray | None:
        """Returns the sample as an array `[H, W, 3]` of uint8, or `None` if it is not there."""
        image = self._find(sample_id)
        return None if image is None else to_picture(self._model, image)

    def input(self, sample_id: SampleId) -> Tensor:
        """Returns the sample as a model input `[C, H, W]`.

        Raises:
            ValueError: If it is not there.
        """
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
