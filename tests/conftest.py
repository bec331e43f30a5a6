"""What all tests share. The network is closed but for loopback, and thread counts suit a small machine."""

import os
import socket
from collections.abc import Iterator
from typing import Any

# Read at import by huggingface_hub, so set before anything imports it: a test that would reach for the real Hub fails.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

import timm_memwrap  # noqa: F401

_connect = socket.socket.connect
_LOOPBACK = ("127.", "::1", "localhost")


def _guarded_connect(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
        raise AssertionError(f"A test reached for the network: {address}. Only loopback is allowed.")
    _connect(self, address)


@pytest.fixture(autouse=True, scope="session")
def _only_loopback() -> Iterator[None]:
    socket.socket.connect = _guarded_connect  # type: ignore[method-assign]
    yield
    socket.socket.connect = _connect  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
