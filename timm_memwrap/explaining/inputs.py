"""Images on their way into the model, and back into pictures for people to look at.

Shapes: B images, C channels.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel

__all__ = [
    "SampleImages",
    "batches_of",
    "check_model",
    "encoded_batches",
    "evaluating",
    "one_by_one",
    "picture_of",
    "size_of",
    "to_batch",
    "to_picture",
]

BATCH_SIZE = 64


def check_model(model: Any) -> None:
    """Refuses a model that has nothing to explain its predictions with.

    Raises:
        ValueError: If `model` is no Memory Wrap model, has no classes, or its bank is empty.
    """
    if not isinstance(model, MemoryWrapModel):
        raise ValueError(f"{type(model).__name__} is not a Memory Wrap model. Wrap it: timm_memwrap.wrap(model).")
    if model.num_classes == 0:
        raise ValueError(
            "num_classes=0: the model has no head, so it predicts nothing. Call reset_classifier(n) first."
        )
    if not len(model.memory_bank):
        raise ValueError(
            "The memory bank is empty, so there are no samples to explain a prediction with. Call "
            "timm_memwrap.build_memory_bank(model, data) first."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients, and restores the mode of each of its modules."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def data_config(model: MemoryWrapModel) -> dict[str, Any]:
    """Returns timm's data configuration, with a mean and a std for each of the model's channels."""
    channels = model.in_chans
    config = resolve_model_data_config(model)
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            # As timm's loaders do for other channel counts.
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def batches_of(model: MemoryWrapModel, images: Any) -> list[Tensor]:
    """Makes model inputs `[B, C, H, W]` of whatever images: see `explain`.

    A tensor stays one batch, so that its logits are those of `model(images)`; other images come in batches.

    Raises:
        ValueError: If they are no images, none at all, or do not fit the model.
    """
    if isinstance(images, Tensor):
        return [to_batch(model, images)]
    several = [images] if _is_one(images) else list(images)
    if not several:
        raise ValueError("No images to explain: the list is empty. Pass at least one.")
    if any(isinstance(image, Tensor) for image in several):
        return [to_batch(model, several)]
    return [to_batch(model, several[i : i + BATCH_SIZE]) for i in range(0, len(several), BATCH_SIZE)]


def to_batch(model: MemoryWrapModel, images: Any) -> Tensor:
    """Makes one model input `[B, C, H, W]` of tensors, PIL images or paths."""
    parameter = next(model.parameters())
    if not isinstance(images, Tensor):
        images = _stack(model, [images] if _is_one(images) else list(images))
    if images.ndim == 3:
        images = images.unsqueeze(0)
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {list(images.shape)}; expected floats [B, C, H, W] or [C, H, W], "
            f"normalised as in training. Pass PIL images or paths to have the model's own transform applied."
        )
    return images.to(parameter)


def one_by_one(images: Any) -> list[Any]:
    """Lists images that `explain` takes."""
    if isinstance(images, Tensor) and images.ndim == 4:
        return list(images)
    return [images] if _is_one(images) else list(images)


def _is_one(images: Any) -> bool:
    return isinstance(images, Tensor | Image.Image | str | os.PathLike)


def _stack(model: MemoryWrapModel, images: list[Any]) -> Tensor:
    config = data_config(model)
    transform = create_transform(**config)
    tensors = []
    for image in images:
        if isinstance(image, str | os.PathLike):
            image = _read(image, _mode(config))
        if isinstance(image, Image.Image):
            image = transform(image.convert(_mode(config)))
        if not isinstance(image, Tensor) or image.ndim != 3:
            shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"An image is {shape}; expected a tensor [C, H, W], a PIL image or a path.")
        tensors.append(image)
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1:
        raise ValueError(f"Images have shapes {sorted(shapes)}, so they make no batch. Pass images of one shape.")
    return torch.stack(tensors)


def _mode(config: Mapping[str, Any]) -> str:
    return "L" if config["input_size"][0] == 1 else "RGB"


def _read(path: str | os.PathLike, mode: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert(mode)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"The image {os.fspath(path)!r} cannot be read: {error}. Repair it, or leave it out."
        ) from error


def to_picture(model: MemoryWrapModel, image: Any) -> np.ndarray:
    """Makes an array `[H, W, 3]` of uint8 that shows an image.

    Float tensors `[C, H, W]` are taken for model inputs, and their normalisation is undone; uint8 tensors, PIL images
    and paths are shown as they are.
    """
    if isinstance(image, str | os.PathLike):
        return np.asarray(_read(image, "RGB"))
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, Tensor) or image.ndim != 3:
        shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"An image is {shape}; expected a tensor [C, H, W], a PIL image or a path.")
    image = image.detach().cpu()
    if image.is_floating_point():
        config = data_config(model)
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        image = ((image.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    if image.shape[0] != 3:
        # No colours to be had: one channel stands for all.
        image = image[:1].expand(3, -1, -1)
    return image.permute(1, 2, 0).numpy()


class SampleImages:
    """Memory samples' images, fetched by id from where the bank was built from.

    Make one per call and keep it: the names of the dataset's files are read once, at the first sample that has one.

    Args:
        model: The model: its transform makes inputs of pictures, and its normalisation is undone for people.
        dataset: A dataset of `(image, label)`, or a mapping from id to image. An id is a position in the dataset, or
            the end of a file's path, which must be the only one of its kind; a bank from the Hub has bare file names.
    """

    def __init__(self, model: MemoryWrapModel, dataset: Any) -> None:
        self._model, self._dataset = model, dataset
        self._positions: dict[tuple[str, ...], int] | None = None

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
        dataset = self._dataset
        if isinstance(dataset, Mapping):
            return dataset.get(sample_id)
        index: int | None
        if isinstance(sample_id, int):
            index = sample_id
        else:
            if self._positions is None:
                self._positions = _positions_by_name(dataset)
            index = self._positions.get(_tail(sample_id))
        if index is None or not 0 <= index < len(dataset):
            return None
        sample = dataset[index]
        return sample[0] if isinstance(sample, Sequence) else sample


def picture_of(
    model: MemoryWrapModel, thumbnail: Tensor | None, sample_id: SampleId, stored: SampleImages | None
) -> np.ndarray | None:
    """Returns a memory sample's picture: the bank's own, else that of where it was built from, else `None`."""
    if thumbnail is not None:
        return to_picture(model, thumbnail)
    return None if stored is None else stored.picture(sample_id)


def _positions_by_name(dataset: Any) -> dict[tuple[str, ...], int]:
    """Finds samples by the ends of their files' paths, where these tell one sample.

    With and without the folder: a bank that came from the Hub has bare names.
    """
    names = _file_names(dataset)
    count = Counter(end for name in names.values() for end in {name, name[-1:]})
    return {end: i for i, name in names.items() for end in (name, name[-1:]) if count[end] == 1}


def _file_names(dataset: Any) -> dict[int, tuple[str, ...]]:
    if isinstance(dataset, Subset):
        inner = _file_names(dataset.dataset)
        return {i: inner[int(index)] for i, index in enumerate(dataset.indices) if int(index) in inner}
    if hasattr(dataset, "filename"):  # timm's datasets
        return {i: _tail(dataset.filename(i, basename=False, absolute=False)) for i in range(len(dataset))}
    samples = getattr(dataset, "samples", None)  # torchvision's image folders
    return {i: _tail(str(path)) for i, (path, *_) in enumerate(samples or [])}


def _tail(name: str) -> tuple[str, ...]:
    # The folder is the class; two classes may well both have a 0001.png.
    return PurePath(Path(name)).parts[-2:]


def encoded_batches(model: MemoryWrapModel, data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the encodings `[B, D]` and labels `[B]` of a dataset or loader of `(image, label)`."""
    device = next(model.parameters()).device
    for images, labels in _loader(model, data):
        labels = torch.as_tensor(labels).to(device).long()
        outside = labels[(labels < 0) | (labels >= model.num_classes)]
        if labels.ndim != 1 or len(outside):
            value = int(outside[0]) if labels.ndim == 1 else list(labels.shape)
            raise ValueError(
                f"Labels of the data are {value}; expected one class index per image, 0 to {model.num_classes - 1}."
            )
        yield model.encode(to_batch(model, images)), labels


def size_of(data: Any) -> int | None:
    """Number of samples of a dataset or loader, if it is known."""
    dataset = getattr(data, "dataset", data)
    return len(dataset) if isinstance(dataset, Sized) else None


def _loader(model: MemoryWrapModel, data: Any) -> Any:
    if isinstance(data, DataLoader) or not (hasattr(data, "__getitem__") and isinstance(data, Sized)):
        return data
    dataset: Any = data
    return DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=lambda batch: _collate(model, batch))


def _collate(model: MemoryWrapModel, batch: list[Any]) -> tuple[Tensor, Tensor]:
    return _stack(model, [sample[0] for sample in batch]), torch.tensor([int(sample[1]) for sample in batch])
