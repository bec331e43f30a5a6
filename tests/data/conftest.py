"""What tests of data share: a folder of images, and a small model that has never seen one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from training_images import write_images

from timm_memwrap.model import MemoryWrapModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "data" / "train", 12)
    write_images(tmp_path / "data" / "validation", 4)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MemoryWrapModel]:
    def make(num_classes: int = 3, **kwargs: Any) -> MemoryWrapModel:
        torch.manual_seed(0)
        return timm.create_model("memwrap_test_resnet", num_classes=num_classes, **kwargs).eval()

    return make
