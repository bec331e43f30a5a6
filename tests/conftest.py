"""What all tests share. The network is closed but for loopback, and thread counts suit a small machine."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

# The client of the Hub reads these at import, so they are set before anything imports it. The port is taken now, and
# the Hub of the `hub` fixture listens on it later; without the fixture, a connection to it is refused.
_HUB_SOCKET = socket.socket()
_HUB_SOCKET.bind(("127.0.0.1", 0))
_HF_HOME = tempfile.mkdtemp(prefix="hf-home-")
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_HUB_SOCKET.getsockname()[1]}"
os.environ["HF_HOME"] = _HF_HOME
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# The Hub on loopback stores large files over plain LFS.
os.environ["HF_HUB_DISABLE_XET"] = "1"
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
    os.environ.pop(_name, None)
os.environ.setdefault("MPLBACKEND", "Agg")
# A process a core runs tests already; new processes that tests start must not take all cores either.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import timm_memwrap  # noqa: E402, F401

if TYPE_CHECKING:
    from hub_server import Hub

torch.set_num_threads(1)

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
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _hub_server() -> Iterator["Hub"]:
    from hub_server import Hub

    server = Hub(_HUB_SOCKET)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def hub(_hub_server: "Hub", tmp_path_factory: pytest.TempPathFactory) -> Iterator["Hub"]:
    """An empty Hugging Face Hub on loopback, which `HF_ENDPOINT` points at."""
    _hub_server.reset()
    for cache in ("hub", "assets"):
        shutil.rmtree(os.path.join(_HF_HOME, cache), ignore_errors=True)
    yield _hub_server
    assert not _hub_server.errors, f"The Hub itself failed: {_hub_server.errors}"
