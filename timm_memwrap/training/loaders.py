"""Makes batches for training and evaluation with timm's transforms.

A training batch is `(inputs, labels, extra)`, where `extra` holds what the memory mode reads beside the batch.
"""

import random
from typing import Any

import torch
from timm.data import Mixup, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, StackDataset, default_collate

from timm_memwrap.data import Images
from timm_memwrap.training.configuration import DataConfig, MemoryConfig

__all__ = ["augmented", "check_batch_size", "create_mixup", "eval_loader", "train_loader"]


# Options that `DataConfig` and `timm.data.create_transform` share.
_AUGMENTATION = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "re_prob")


class _MemoryCollate:
    """Collates a batch and what the memory mode reads beside it, in the process that loads the inputs."""

    def __init__(self, dataset: Any, memory: MemoryConfig) -> None:
        self.dataset, self.mode, self.size = dataset, memory.mode, memory.train_size

    def __call__(self, samples: list[tuple[tuple[Any, Any], int]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        (inputs, labels), positions = default_collate(samples)
        extra = {}
        if self.mode == "queue":
            extra["positions"] = positions
        elif self.mode == "sample":
            taken = set(positions.tolist())
            # Seeded by PyTorch's generator, which each worker seeds again in each epoch. As many as could be taken are
            # drawn too: to order the whole data set at each batch would take half a second for a million images.
            generator = random.Random(int(torch.randint(2**62, ())))
            count = min(self.size + len(taken), len(self.dataset))
            drawn = [i for i in generator.sample(range(len(self.dataset)), count) if i not in taken][: self.size]
            extra["memory"] = default_collate([self.dataset[i][0] for i in drawn])
        return inputs, labels, extra


def train_loader(
    dataset: Any, config: DataConfig, memory: MemoryConfig, workers: int = 0, distributed: bool = False
) -> DataLoader:
    """Makes shuffled training batches of a data set of `(input, label)`, of which each process gets its part."""
    numbered = StackDataset(dataset, range(len(dataset)))  # type: ignore[arg-type]
    sampler: Any = DistributedSampler(numbered, drop_last=True) if distributed else None
    return DataLoader(
        numbered,
        # Fewer samples than a batch make one batch: incomplete ones are dropped.
        _batch_size(config, len(sampler or numbered)),
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
        collate_fn=_MemoryCollate(dataset, memory),
        num_workers=workers,
    )


def augmented(images: Images, config: DataConfig, model_config: dict[str, Any]) -> Images:
    """Returns the images with timm's augmentation, for a model of a data config."""
    options = {name: getattr(config, name) for name in _AUGMENTATION}
    options |= {name: model_config[name] for name in ("input_size", "interpolation", "mean", "std")}
    try:
        return images.with_transform(create_transform(is_training=True, re_mode="pixel", **options))
    except (AssertionError, ValueError, LookupError) as error:
        raise ValueError(f"data.auto_augment={config.auto_augment!r} is not one of timm's policies: {error}") from error


def eval_loader(
    images: Images, config: DataConfig, model_config: dict[str, Any], rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Makes batches in order with the evaluation transform; each process gets its part, no image twice."""
    mine = images.at(range(rank, len(images), world_size)).with_transform(create_transform(**model_config))
    return DataLoader(mine, config.batch_size, num_workers=config.workers)


def create_mixup(config: DataConfig, smoothing: float, num_classes: int, multi_label: bool = False) -> Mixup | None:
    """Creates timm's Mixup and CutMix, which also smooth the labels; `None` if neither is enabled."""
    if not (config.mixup or config.cutmix):
        return None
    options = {"label_smoothing": smoothing, "num_classes": num_classes, "multi_label": multi_label}
    return Mixup(config.mixup, config.cutmix, prob=config.mixup_prob, **options)


def check_batch_size(config: DataConfig, memory: MemoryConfig, count: int, world_size: int = 1) -> None:
    """Raises if `count` images cannot be divided into batches on each process that suit the memory mode."""
    mixes = bool(config.mixup or config.cutmix)
    if mixes and config.batch_size % 2:
        raise ValueError(
            f"data.batch_size={config.batch_size} is odd, but Mixup pairs the images of a batch. Pass an even one."
        )
    size = _batch_size(config, count // world_size)
    if size < 1:
        raise ValueError(
            f"{count} training images are too few for {world_size} processes{' with Mixup' if mixes else ''}. Pass "
            f"more images, or start fewer processes."
        )
    if memory.mode == "batch" and size == 1:
        raise ValueError(
            "Batches of one image with memory.mode=batch leave nothing to read: the memory is the rest of the batch. "
            "Pass a larger data.batch_size, or another mode."
        )
    if memory.mode == "sample" and memory.train_size + size > count:
        raise ValueError(
            f"memory.train_size={memory.train_size} and batches of {size} are more than the {count} training images, "
            f"but the memory must not hold the images of the batch. Lower memory.train_size or data.batch_size."
        )


def _batch_size(config: DataConfig, count: int) -> int:
    """Returns the number of images of a batch where a process has `count` images."""
    size = min(config.batch_size, count)
    return size - size % 2 if config.mixup or config.cutmix else size
