"""Small models with banks. Weights are random: what is explained need not be clever, only true."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap.model import MemoryWrapModel

CLASSES = 4
KINDS = {
    "memory wrap": lambda: timm.create_model("memwrap_test_resnet", num_classes=CLASSES),
    "memory only": lambda: timm.create_model("memwrap_baseline_test_resnet", num_classes=CLASSES),
    "l2": lambda: timm.create_model("memwrap_test_resnet", num_classes=CLASSES, distance="l2", scale=0.5),
    "wrapped": lambda: timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=CLASSES)),
    "classifier": lambda: timm_memwrap.wrap(
        timm.create_model("test_resnet", num_classes=CLASSES), read_head="classifier"
    ),
    # By logits: features of a grey image are zero in a fresh model, and there the cosine of features jumps.
    "vote": lambda: timm_memwrap.wrap(
        timm.create_model("test_resnet", num_classes=CLASSES), read_head="classifier", classifier="vote"
    ),
}


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def make(kind: str, size: int = 12, **kwargs: object) -> MemoryWrapModel:
    torch.manual_seed(0)
    model = KINDS[kind]()
    # Classes of a fresh model are so near each other that rounding would decide.
    for parameter in model.get_classifier().parameters():
        parameter.data.mul_(30)
    data = TensorDataset(images(size, seed=1), torch.arange(size) % CLASSES)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False, **kwargs)
    # Random weights put nearly all samples in one class, and nothing would be a counterfactual.
    model.memory_bank.set_predictions(torch.arange(size) * 3 // 2 % CLASSES)
    return model.eval()


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> MemoryWrapModel:
    return make(request.param)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MemoryWrapModel]:
    return make


@pytest.fixture(scope="session")
def make_images() -> Callable[..., torch.Tensor]:
    return images
