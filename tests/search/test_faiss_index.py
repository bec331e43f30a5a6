"""The faiss index: exact where it says so, near where it does not, and never of other keys."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from timm_memwrap import MemoryBank, MemoryWrapModel
from timm_memwrap.attention import DISTANCES, Keys, content_weights, make_keys, scores, unit
from timm_memwrap.search import ExactIndex, FaissIndex

pytest.importorskip("faiss")


def _data(distance: str = "cosine", size: int = 900, width: int = 12) -> tuple[Tensor, Keys]:
    """Queries and keys."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(10, width, generator=generator)
    memory = classes[torch.arange(size) % 10] + 0.5 * torch.randn(size, width, generator=generator)
    queries = classes + 0.3 * torch.randn(10, width, generator=generator)
    return unit(queries) if distance == "cosine" else queries, make_keys(memory, distance)


def _dense(found: tuple[Tensor, ...], size: int) -> Tensor:
    return torch.zeros(len(found[0]), size).scatter_add(1, found[1], found[0])


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("at_least", [4, 64])
def test_a_flat_index_is_exact(distance: str, scale: float, at_least: int) -> None:
    queries, keys = _data(distance)
    found = FaissIndex(keys, at_least=at_least).search(queries, scale)
    expected = scale * scores(queries, keys)
    torch.testing.assert_close(_dense(found, 900), content_weights(expected), atol=1e-4, rtol=0)
    weights, positions, scaled = found
    used = weights > 0
    torch.testing.assert_close(scaled[used], expected.gather(1, positions)[used], atol=1e-4, rtol=1e-5)


def test_hidden_samples_are_not_found() -> None:
    queries, keys = _data()
    hidden = scores(queries, keys).topk(7, dim=-1).indices
    found = FaissIndex(keys, at_least=3).search(queries, 10.0, hidden)
    expected = ExactIndex(keys).search(queries, 10.0, hidden)
    torch.testing.assert_close(_dense(found, 900), _dense(expected, 900), atol=1e-5, rtol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("hides", [False, True])
def test_a_flat_index_finds_the_nearest_samples(distance: str, hides: bool) -> None:
    queries, keys = _data(distance)
    hidden = scores(queries, keys).topk(7, dim=-1).indices if hides else None
    found, positions = FaissIndex(keys).nearest(queries, 30, hidden)
    expected, where = ExactIndex(keys).nearest(queries, 30, hidden)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(positions, where)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_finds_more_with_more_effort(kind: str) -> None:
    queries, keys = _data(size=3000)
    exact = content_weights(10.0 * scores(queries, keys))

    def recall(effort: int) -> float:
        found = FaissIndex(keys, kind, effort, at_least=16).search(queries, 10.0)
        return float((_dense(found, 3000) * (exact > 0)).sum() / len(queries))

    assert recall(1) <= recall(500) + 1e-6
    assert recall(500) > 0.99


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_an_index_is_kept_in_a_file_and_never_taken_for_another_memory(
    kind: str, distance: str, tmp_path: Path
) -> None:
    queries, keys = _data(distance)
    path = tmp_path / "model" / "memory.faiss"
    first = FaissIndex(keys, kind, path=path).search(queries, 10.0)
    written = path.stat().st_mtime_ns
    again = FaissIndex(keys, kind, path=path).search(queries, 10.0)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(first[0], again[0])

    other = make_keys(keys.vectors.flip(0) * torch.arange(12), distance)
    FaissIndex(other, kind, path=path)
    assert path.stat().st_mtime_ns != written
    assert [file.name for file in path.parent.iterdir()] == ["memory.faiss"]


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"\x00" * 99])
def test_a_damaged_file_is_built_again(damage: Any, tmp_path: Path) -> None:
    queries, keys = _data()
    path = tmp_path / "memory.faiss"
    expected = FaissIndex(keys, path=path).search(queries, 10.0)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert torch.equal(FaissIndex(keys, path=path).search(queries, 10.0)[0], expected[0])
    assert path.read_bytes() == content


def test_an_index_of_another_kind_is_built_again(tmp_path: Path) -> None:
    _, keys = _data()
    FaissIndex(keys, "flat", path=tmp_path / "memory.faiss")
    assert type(FaissIndex(keys, "hnsw", path=tmp_path / "memory.faiss")._index).__name__ == "IndexHNSWFlat"


def test_without_faiss_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"timm-memwrap\[faiss\]"):
        FaissIndex(_data()[1])


@pytest.fixture
def model() -> MemoryWrapModel:
    model = timm.create_model("memwrap_test_resnet", num_classes=10, scale=10.0).eval()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(500) % 10
    bank = MemoryBank()
    bank.replace(torch.randn(500, model.encoding_size, generator=generator), labels, range(500))
    model.memory_bank = bank
    return model


def test_the_same_call_reads_through_the_index(model: MemoryWrapModel) -> None:
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        assert torch.allclose(model.use_index("flat")(images), expected, atol=1e-4)
        assert isinstance(model.memory_bank.derived.memory.key_index, FaissIndex)
        assert torch.equal(model.use_index(None)(images), expected)


def test_an_index_is_never_stale(model: MemoryWrapModel) -> None:
    images = torch.randn(4, 3, 32, 32)
    model.use_index("flat")

    def agrees() -> bool:
        with torch.no_grad():
            return torch.allclose(model(images), model.use_index(None)(images), atol=1e-4)

    assert agrees()
    model.use_index("flat")(images)
    model.memory_bank.select(range(100, 500))
    model.use_index("flat")
    assert agrees()
    model.use_index("flat")
    with torch.no_grad():
        model(images)
        model.head.head.weight.mul_(-1.5)
    with torch.no_grad():
        through = model(images)
        assert torch.allclose(through, model.use_index(None)(images), atol=1e-4)


def test_gradients_flow_through_a_read_of_the_index(model: MemoryWrapModel) -> None:
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    model.use_index("flat")(images).sum().backward()
    through = images.grad.clone()
    images.grad = None
    model.use_index(None)(images).sum().backward()
    assert through.any()
    torch.testing.assert_close(through, images.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "effort", "message"),
    [("tree", None, "'tree'"), ("flat", 3, "effort=3"), ("ivf", 0, "effort=0"), ("hnsw", True, "effort=True")],
)
def test_an_unknown_index_is_refused(model: MemoryWrapModel, kind: str, effort: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.use_index(kind, effort)
