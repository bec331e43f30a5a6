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
    "probabilities": lambda: timm_memwrap.wrap(
        timm.create_model("test_resnet", num_classes=CLASSES), read_head="probabilities"
    ),
    "logits": lambda: timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=CLASSES), read_head="logits"),
    # By logits: features of a grey image are zero in a fresh model, and there the cosine of features jumps.
    "vote": lambda: timm_memwrap.wrap(
        timm.create_model("test_resnet", num_classes=CLASSES), read_head="logits", classifier="vote"
    ),
}


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def make(kind: str, size: int = 12, **kwargs: object) -> MemoryWrapModel:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    data = TensorDataset(images(size, seed=1), torch.arange(size) % CLASSES)
    classifier = model.backbone.get_classifier() if model.keeps_classifier else model.get_classifier()
    with torch.no_grad():
        # Classes of a fresh model are so near each other that rounding would decide, and one of them has nearly all
        # samples: nothing would be a counterfactual.
        classifier.weight *= 30
        timm_memwrap.build_memory_bank(model, data, size=None, progress=False, **kwargs)
        if model.memory_args["classifier"] != "vote":
            classifier.bias -= model.own_logits(torch.arange(size)).mean(dim=0)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False, **kwargs)
    return model


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> MemoryWrapModel:
    return make(request.param)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MemoryWrapModel]:
    return make


@pytest.fixture(scope="session")
def make_images() -> Callable[..., torch.Tensor]:
    return images


def make_several(read_head: str | None = None, size: int = 16, **kwargs: object) -> MemoryWrapModel:
    """Returns a model whose memory holds samples of several classes, and some of none."""
    torch.manual_seed(0)
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=CLASSES), read_head=read_head).eval()
    numbers = torch.arange(size)
    labels = torch.stack([(numbers >> bit) % 2 for bit in range(CLASSES)], dim=1)
    data = TensorDataset(images(size, seed=1), labels)
    with torch.no_grad():
        timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
        classifier = model.backbone.get_classifier()
        if model.memory_args["classifier"] != "own":
            classifier = model.get_classifier()
        # So that samples and inputs have several classes by the model, and some have none.
        logits = model.own_logits(numbers)
        classifier.weight *= 4 / logits.std(dim=0, keepdim=True).T
        classifier.bias.zero_()
        classifier.bias -= model.own_logits(numbers).mean(dim=0)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False, **kwargs)
    return model


@pytest.fixture(params=[None, "probabilities", "linear"], ids=["joint", "probabilities", "trained head"])
def several(request: pytest.FixtureRequest) -> MemoryWrapModel:
    return make_several(request.param)


@pytest.fixture(scope="session")
def make_several_model() -> Callable[..., MemoryWrapModel]:
    return make_several
