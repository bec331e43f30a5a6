"""What goes wrong between a model and Milvus is one clear error or a retry that succeeds, never a wrong answer."""

import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import fill, new_images, new_model

from timm_memwrap import MemoryWrapModel, explaining

SIZE = 40
IMAGES = new_images(3)


@pytest.fixture
def model(server: Any) -> MemoryWrapModel:
    """A model whose memory is in a server alone."""
    fill(new_model("joint"), SIZE).use_index("milvus", uri=server.uri)
    return new_model("joint").use_index("milvus", uri=server.uri, timeout=2.0)


def read(model: MemoryWrapModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


def test_a_server_that_is_gone_is_a_connection_error(model: MemoryWrapModel, server: Any) -> None:
    server.kill()
    for call in (read, lambda model: explaining.explain(model, IMAGES), lambda model: model.forget([1])):
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=f"Milvus at {server.uri} could not be reached for 2 seconds"):
            call(model)
        assert time.monotonic() - start < 10
    with pytest.raises(ConnectionError):
        new_model("joint").use_index("milvus", uri=server.uri, timeout=0.5)


def test_a_server_that_starts_again_is_waited_for(server: Any) -> None:
    model = fill(new_model("joint"), SIZE)
    expected = read(model)
    model.use_index("milvus", uri=server.uri, timeout=30)
    server.kill()
    again = threading.Timer(1.0, server.start)
    again.start()
    assert torch.allclose(read(model), expected, atol=1e-5)
    again.join()
    model.forget([1])
    assert torch.allclose(read(model), read(model.use_index(None)), atol=1e-5)


def test_reads_while_the_server_goes_are_right_or_errors(server: Any) -> None:
    expected = read(fill(new_model("joint"), SIZE).use_index("milvus", uri=server.uri))
    model = new_model("joint").use_index("milvus", uri=server.uri, timeout=0.5)
    killer = threading.Timer(0.3, server.kill)
    killer.start()
    right, failed = 0, 0
    while failed < 2:
        try:
            assert torch.allclose(read(model), expected, atol=1e-5)
            right += 1
        except (ConnectionError, TimeoutError):
            failed += 1
    assert right


def test_a_server_that_does_not_answer_is_a_timeout(model: MemoryWrapModel, server: Any) -> None:
    server._process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises((TimeoutError, ConnectionError), match=r"2 seconds"):
            read(model)
    finally:
        server._process.send_signal(signal.SIGCONT)
    assert read(model).shape == (3, 4)


def test_a_collection_that_was_dropped_is_named(model: MemoryWrapModel) -> None:
    model.engine.collections.milvus.drop(model.engine.open(model).collection)
    with pytest.raises(ValueError, match="has no memory 'memwrap' of these weights"):
        read(model)


def test_a_bank_is_written_again_where_the_collection_was_dropped(server: Any) -> None:
    model = fill(new_model("joint"), SIZE).use_index("milvus", uri=server.uri)
    expected = read(model)
    model.engine.collections.milvus.drop(model.engine.open(model).collection)
    assert torch.allclose(read(model), expected, atol=1e-5)


def test_a_memory_that_is_replaced_is_found_again(model: MemoryWrapModel, server: Any) -> None:
    other = fill(new_model("joint"), SIZE).use_index("milvus", uri=server.uri)
    fill(other, SIZE, seed=12)
    expected = read(other)
    assert torch.allclose(read(model), expected, atol=1e-5)


def test_a_change_that_was_interrupted_is_made_good_from_the_bank(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fill(new_model("joint"), SIZE).use_index("milvus", uri=server.uri)
    with monkeypatch.context() as patched:
        patched.setattr(
            model.engine.collections.milvus, "delete", lambda *args: (_ for _ in ()).throw(ConnectionError("gone"))
        )
        with pytest.raises(ConnectionError):
            model.forget([1, 2])
    assert 1 in model.memory_bank
    again = fill(new_model("joint"), SIZE).use_index("milvus", uri=server.uri)
    assert again.engine.fetch(again).ids == list(range(SIZE))


def test_a_file_serves_one_process(server: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another process may have it open.*http"):
        fill(new_model("joint")).use_index("milvus", uri=str(tmp_path / "server.db"))


def test_nothing_secret_is_told(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    uri = server.uri.replace("http://", "http://user:hidden@")
    model = fill(new_model("joint")).use_index("milvus", uri=uri, token="secret")
    read(model)
    server.kill()
    with pytest.raises(ConnectionError) as caught:
        new_model("joint").use_index("milvus", uri=uri, token="secret", timeout=0.5)
    told = caplog.text + repr(model.engine) + str(caught.value) + repr(model.engine.__getstate__())
    assert "secret" not in told
    assert "hidden" not in repr(model.engine) + str(caught.value)


def test_paths_do_not_leave_the_machine(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = new_model("joint")
    ids = ["/home/me/cat/1.png", "/home/me/dog/1.png", "C:\\me\\2.png", "cat/3.png"]
    encodings, names = torch.randn(4, model.encoding_size), ["cat", "dog", "c", "d"]
    model.memory_bank.replace(encodings, torch.tensor([0, 1, 0, 0]), ids, class_names=names)
    model.use_index("milvus", uri=server.uri)
    public = ["cat/1.png", "dog/1.png", "2.png", "cat/3.png"]
    assert model.memory_bank.ids == model.engine.fetch(model).ids == public
    assert "3 samples have paths" in caplog.text
    model.remember(new_images(1), 0, ids=["/home/me/4.png"], progress=False)
    assert model.engine.fetch(model).ids == model.memory_bank.ids == [*public, "4.png"]
    collection = model.engine.open(model).collection
    assert "home" not in str(model.engine.collections.milvus.query(collection, ["name", "id"], where="place >= 0"))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"pip install 'timm-memwrap\[milvus\]'"):
        fill(new_model("joint")).use_index("milvus", uri="memory.db")
