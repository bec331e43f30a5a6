"""Models for the tests of the Hub: small, with a memory."""

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import MemoryWrapModel


def make_model(store_images: bool = True, seed: int = 0) -> MemoryWrapModel:
    torch.manual_seed(seed)
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3))
    # What a pixel is worth differs from sample to sample, so that nothing in the memory is alike.
    data = TensorDataset(torch.randn(12, 3, 64, 64), torch.arange(12) % 3)
    names = ["cat", "dog", "a|b <i>*c*</i>"]
    timm_memwrap.build_memory_bank(
        model, data, size=None, store_images=store_images, progress=False, class_names=names, dataset_name="pets"
    )
    ids = [f"/home/me/pets/{'cat' if i % 2 else 'dog'}/{i // 2:04}.png" for i in range(12)]
    bank = model.memory_bank
    bank.replace(bank.encodings, bank.labels, bank.predictions, ids, bank.images, bank.class_names, bank.provenance)
    return model.eval()


@pytest.fixture(scope="session")
def _model() -> MemoryWrapModel:
    return make_model()


@pytest.fixture
def model(_model: MemoryWrapModel) -> MemoryWrapModel:
    """A model with a memory of 12 samples of 3 classes, images inside and paths for ids."""
    return deepcopy(_model)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def run() -> Callable[..., str]:
    """Runs Python in a new process, and returns what it printed."""

    def run_code(code: str, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run_code
