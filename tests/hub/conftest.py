"""Models for the tests of the Hub: small, with a memory."""

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hub_models import make_model
from hub_server import Hub

from timm_memwrap import MemoryWrapModel


@pytest.fixture(scope="session")
def _model() -> MemoryWrapModel:
    return make_model()


@pytest.fixture
def model(_model: MemoryWrapModel) -> MemoryWrapModel:
    """A model with a memory of 12 samples of 3 classes, images inside and paths for ids."""
    return deepcopy(_model)


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token that may write, where the client looks for it."""
    token = hub.user("me")
    monkeypatch.setenv("HF_TOKEN", token)
    return token


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
