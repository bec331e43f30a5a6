"""Makes batches for training and evaluation with timm's loader and transforms.

A training batch is `(images, labels, extra)`, where `extra` holds what the memory mode reads beside the batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from timm_memwrap.data import Images
from timm_memwrap.training.configuration import DataConfig

__all__ = ["MemoryCollate", "Numbered", "check_batch_size", "create_mixup", "eval_loader", "train_loader"]


class Numbered(Dataset):
    """A data set of `(image, label, position)`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        image, label = self.dataset[index][:2]
        return image, label, index

    @property
    def transform(self) -> Callable[[Image.Image], Any] | None:
        """The transform of the underlying data set, which timm's loader sets."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable[[Image.Image], Any] | None) -> None:
        self.dataset = self.dataset.with_transform(transform)


class MemoryCollate:
    """Collates a batch and what the memory mode reads beside it, in the process that loads the images.

    Args:
        numbered: The training samples.
        mode: `"sample"` adds `memory`: `size` other training images, drawn for each batch. `"queue"` adds `positions`
            of the samples. Other modes add nothing.
        size: Number of images to draw.
        batch_size: Number of samples in a batch.

    Raises:
        ValueError: If there are fewer samples than a batch and `size` together.
    """

    def __init__(self, numbered: Numbered, mode: str, size: int, batch_size: int) -> None:
        if mode == "sample" and size + batch_size > len(numbered):
            raise ValueError(
                f"memory.train_size={size} and data.batch_size={batch_size} are more than the {len(numbered)} training "
                f"images: the memory must not hold the images of the batch. Lower one of them."
            )
        self.numbered, self.mode, self.size = numbered, mode, size

    def __call__(self, samples: list[tuple[Any, Any, int]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns images `[B, C, H, W]`, labels `[B]`, and by name what the mode adds."""
        images, labels, positions = default_collate(samples)
        extra = {}
        if self.mode == "queue":
            extra["positions"] = positions
        elif self.mode == "sample":
            taken = set(positions.tolist())
            # From PyTorch's generator, which each worker seeds again in each epoch.
            order = torch.randperm(len(self.numbered)).tolist()
            drawn = [i for i in order if i not in taken][: self.size]
            extra["memory"] = default_collate([self.numbered[i][0] for i in drawn])
        return images, labels, extra


def train_loader(
    images: Images,
    config: DataConfig,
    model_config: dict[str, Any],
    mode: str,
    train_size: int,
    distributed: bool = False,
) -> DataLoader:
    """Makes shuffled and augmented training batches.

    Args:
        images: The training images.
        config: How they are augmented.
        model_config: The model's input size, normalisation and interpolation, as `data_config` returns them.
        mode: As in `MemoryConfig`.
        train_size: As in `MemoryConfig`.
        distributed: Whether each process of the default group gets its part.

    Raises:
        ValueError: If there are fewer images than a batch takes, or the batch does not suit the mode.
    """
    check_batch_size(len(images), config, mode)
    numbered = Numbered(images)
    return create_loader(
        numbered,  # type: ignore[arg-type]
        input_size=model_config["input_size"],
        batch_size=config.batch_size,
        is_training=True,
        re_prob=config.re_prob,
        re_mode="pixel",
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        interpolation=model_config["interpolation"],
        mean=model_config["mean"],
        std=model_config["std"],
        num_workers=config.workers,
        distributed=distributed,
        collate_fn=MemoryCollate(numbered, mode, train_size, config.batch_size),
        use_prefetcher=False,
        # A persistent worker would continue its random numbers, so that a resumed run would differ.
        persistent_workers=False,
    )


def eval_loader(
    images: Images, config: DataConfig, model_config: dict[str, Any], rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Makes batches in order with the evaluation transform; each process gets its part, no image twice."""
    return create_loader(
        images.at(range(rank, len(images), world_size)),  # type: ignore[arg-type]
        input_size=model_config["input_size"],
        batch_size=config.batch_size,
        interpolation=model_config["interpolation"],
        mean=model_config["mean"],
        std=model_config["std"],
        crop_pct=model_config["crop_pct"],
        crop_mode=model_config["crop_mode"],
        num_workers=config.workers,
        use_prefetcher=False,
        persistent_workers=False,
    )


def check_batch_size(count: int, config: DataConfig, mode: str) -> None:
    """Raises if batches cannot be filled, or do not suit the memory mode.

    Raises:
        ValueError: If so.
    """
    size = config.batch_size
    if size < 1 or size > count:
        raise ValueError(
            f"data.batch_size={size}, but there are {count} training images. Pass a batch size of 1 to {count}."
        )
    if mode == "batch" and size == 1:
        raise ValueError(
            "data.batch_size=1 with memory.mode=batch leaves nothing to read: the memory is the rest of the batch. Pass "
            "a larger batch, or another mode."
        )
    if (config.mixup or config.cutmix) and size % 2:
        raise ValueError(f"data.batch_size={size} is odd, but Mixup pairs the images of a batch. Pass an even one.")


def create_mixup(config: DataConfig, smoothing: float, num_classes: int) -> Mixup | None:
    """Creates timm's Mixup and CutMix, which also smooth the labels; `None` if neither is enabled."""
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )
