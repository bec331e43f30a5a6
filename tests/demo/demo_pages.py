"""A small model for the page, with names that must stay text."""

from dataclasses import dataclass

import numpy as np
import timm
import torch
from PIL import Image

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.demo import Page

NAMES = ["cat", "dog", "<img src=x onerror=alert(1)>"]


def pictures(count: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


class Pictures(torch.utils.data.Dataset):
    """Labelled pictures in memory."""

    classes = NAMES

    def __init__(self, count: int, seed: int) -> None:
        self.pictures = pictures(count, seed)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[index], index % len(NAMES)


def make_model() -> MemoryWrapModel:
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    torch.nn.init.normal_(backbone.get_classifier().weight)
    model = timm_memwrap.wrap(backbone).eval()
    timm_memwrap.build_memory_bank(
        model, Pictures(12, 1), size=None, store_images=True, progress=False, class_names=NAMES
    )
    return model


@dataclass
class Shown:
    """A page that is being shown."""

    url: str
    page: Page
