"""Images on their way into the model.

Shapes: B or N images, C channels.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from timm_memwrap.data.reading import read_picture

__all__ = ["BATCH_SIZE", "batches_of", "data_config", "image_mode", "one_by_one", "to_batch"]

BATCH_SIZE = 64


def data_config(model: nn.Module) -> dict[str, Any]:
    """Returns timm's data config of a model, with a mean and a std for each of its channels."""
    config = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", None) or config["input_size"][0]
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            # As timm's loaders do for other channel counts.
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def image_mode(channels: int) -> str:
    """Returns the PIL mode of images with this many channels."""
    if channels not in (1, 3):
        raise ValueError(
            f"The model takes {channels} channels, but images are read in grey (1) or colour (3). Pass tensors."
        )
    return "L" if channels == 1 else "RGB"


def one_by_one(images: Any) -> list[Any]:
    """Lists the images that `explain` takes."""
    if isinstance(images, Tensor) and images.ndim == 4:
        return list(images)
    return [images] if isinstance(images, Tensor | Image.Image | str | os.PathLike) else list(images)


def batches_of(model: nn.Module, images: Any) -> list[Tensor]:
    """Makes model inputs `[B, C, H, W]` of the images that `explain` takes; a tensor stays one, as `model` reads it."""
    if isinstance(images, Tensor):
        return [to_batch(model, images)]
    several = one_by_one(images)
    if not several:
        raise ValueError("No images to explain: the list is empty. Pass at least one.")
    return [to_batch(model, several[i : i + BATCH_SIZE]) for i in range(0, len(several), BATCH_SIZE)]


def to_batch(model: nn.Module, images: Any) -> Tensor:
    """Makes one model input `[B, C, H, W]` of tensors, PIL images or paths, on the model's device."""
    if not isinstance(images, Tensor):
        images = one_by_one(images)
    elif images.ndim == 3:
        images = images.unsqueeze(0)
    return as_batch(data_config(model), images).to(next(model.parameters()))


def as_batch(config: Mapping[str, Any], images: Tensor | Sequence[Any]) -> Tensor:
    """Stacks tensors `[C, H, W]`, PIL images and paths, which get timm's transform; checks what is a batch already."""
    if not isinstance(images, Tensor):
        transform, tensors = create_transform(**config), []
        mode = image_mode(config["input_size"][0]) if any(not isinstance(image, Tensor) for image in images) else None
        for image in images:
            image = opened(image, mode)
            tensors.append(transform(image) if isinstance(image, Image.Image) else image)
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) != 1:
            raise ValueError(f"Images of shapes {sorted(shapes)} do not make a batch. Pass images of one shape.")
        images = torch.stack(tensors)
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {list(images.shape)}; expected floats [B, C, H, W] or [C, H, W], "
            f"normalised as in training. Pass PIL images or paths to have the model's own transform applied."
        )
    channels = config["input_size"][0]
    if images.shape[1] != channels:
        raise ValueError(
            f"images have {images.shape[1]} channels, but the model takes {channels}. Pass PIL images or paths to have "
            f"them converted."
        )
    if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(images)):
        raise ValueError("images have NaN or infinite values, of which a model makes no prediction. Look at the data.")
    return images


def opened(image: Any, mode: str | None) -> Any:
    """Reads an image if it is a path or PIL's, and raises a `ValueError` if it is no picture and no tensor of one."""
    if isinstance(image, str | os.PathLike):
        return read_picture(Path(image), mode, repr(str(image)))
    if isinstance(image, Image.Image):
        return read_picture(image, mode, "in memory")
    if not isinstance(image, Tensor) or image.ndim != 3:
        found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"An image is {found}; expected a tensor [C, H, W], a PIL image or a path.")
    return image
