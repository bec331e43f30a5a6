"""Milvus for tests: Milvus Lite in a file, and the same behind a server of its own process."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from socket import socket

import pytest

pytest.importorskip("pymilvus", reason="needs timm-memwrap[milvus]")
pytest.importorskip("milvus_lite", reason="needs timm-memwrap[milvus]")

_SERVE = """
import sys
from milvus_lite.adapter.grpc.server import run_server
run_server(sys.argv[1], "127.0.0.1", int(sys.argv[2]))
"""


class Server:
    """A server of Milvus Lite on loopback, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._folder, self._process = folder, None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-c", _SERVE, str(self._folder), str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while socket().connect_ex(("127.0.0.1", self.port)):
            assert self._process.poll() is None, "the server has ended"
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "server.db")
    made.start()
    yield made
    made.kill()


@pytest.fixture
def uri(tmp_path: Path) -> Iterator[str]:
    from milvus_lite.server_manager import server_manager_instance

    path = str(tmp_path / "memory.db")
    yield path
    server_manager_instance.release_server(path)
