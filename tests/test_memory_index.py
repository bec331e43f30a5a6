"""The faiss index: exact where it says so, near where it does not, and never of other keys."""

from pathlib import Path

import pytest
import timm
import torch

from timm_memwrap import MemoryBank, MemoryWrapModel
from timm_memwrap.attention import DISTANCES, content_weights, prepare_keys, scores, search
from timm_memwrap.memory_index import MemoryIndex

pytest.importorskip("faiss")


def _data(size: int = 900, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(10, width, generator=generator)
    memory = classes[torch.arange(size) % 10] + 0.5 * torch.randn(size, width, generator=generator)
    return classes + 0.3 * torch.randn(10, width, generator=generator), memory


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("at_least", [4, 64])
def test_a_flat_index_is_exact(distance: str, scale: float, at_least: int) -> None:
    queries, memory = _data()
    keys = prepare_keys(memory, distance)
    weights, positions = MemoryIndex(keys, distance).search(queries, scale, at_least=at_least)
    expected = content_weights(scores(queries, keys, distance, scale))
    dense = torch.zeros_like(expected).scatter_add(1, positions, weights)
    torch.testing.assert_close(dense, expected, atol=1e-4, rtol=0)


def test_what_is_hidden_is_not_found() -> None:
    queries, memory = _data()
    keys = prepare_keys(memory, "cosine")
    hidden = scores(queries, keys, "cosine").topk(7, dim=-1).indices
    index = MemoryIndex(keys, "cosine")
    found = index.search(queries, 10.0, hidden, at_least=3)
    expected = search(queries, keys, "cosine", 10.0, hidden)
    dense = [torch.zeros(len(queries), len(memory)).scatter_add(1, p, w) for w, p in (found, expected)]
    torch.testing.assert_close(*dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_finds_more_with_more_effort(kind: str) -> None:
    queries, memory = _data(3000)
    keys = prepare_keys(memory, "cosine")
    exact = content_weights(scores(queries, keys, "cosine", 10.0))

    def recall(effort: int) -> float:
        weights, positions = MemoryIndex(keys, "cosine", kind, effort).search(queries, 10.0, at_least=16)
        return float((torch.zeros_like(exact).scatter_add(1, positions, weights) * (exact > 0)).sum() / len(queries))

    assert recall(1) <= recall(500) + 1e-6
    assert recall(500) > 0.99


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_is_kept_in_a_file_and_never_taken_for_another_memory(kind: str, tmp_path: Path) -> None:
    queries, memory = _data()
    keys = prepare_keys(memory, "cosine")
    path = tmp_path / "model" / "memory.faiss"
    first = MemoryIndex(keys, "cosine", kind, path=path).search(queries, 10.0)
    written = path.stat().st_mtime_ns
    again = MemoryIndex(keys, "cosine", kind, path=path).search(queries, 10.0)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(first[0], again[0])

    other = prepare_keys(memory.flip(0) * torch.arange(12), "cosine")
    MemoryIndex(other, "cosine", kind, path=path)
    assert path.stat().st_mtime_ns != written
    assert {file.name for file in path.parent.iterdir()} == {"memory.faiss", "memory.faiss.json"}


@pytest.fixture
def model() -> MemoryWrapModel:
    model = timm.create_model("memwrap_test_resnet", num_classes=10, scale=10.0).eval()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(500) % 10
    bank = MemoryBank()
    bank.replace(torch.randn(500, model.encoding_size, generator=generator), labels, labels, range(500))
    model.memory_bank = bank
    return model


def test_the_same_call_reads_through_the_index(model: MemoryWrapModel) -> None:
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        assert torch.allclose(model.use_index("flat")(images), expected, atol=1e-4)
        assert model._prepared[1].key_index is not None
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


def test_gradients_go_past_the_index(model: MemoryWrapModel) -> None:
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    model.use_index("flat")(images).sum().backward()
    through = images.grad.clone()
    images.grad = None
    model.use_index(None)(images).sum().backward()
    assert torch.equal(through, images.grad)


@pytest.mark.parametrize(
    ("kind", "effort", "message"),
    [("tree", None, "'tree'"), ("flat", 3, "effort=3"), ("ivf", 0, "effort=0"), ("hnsw", True, "effort=True")],
)
def test_an_index_that_is_none_is_refused(model: MemoryWrapModel, kind: str, effort, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.use_index(kind, effort)
