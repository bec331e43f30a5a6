"""The read that the heads share: dense, sparse and through an index, against loops and against each other."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entmax import sparsemax
from torch import Tensor, nn

from timm_memwrap import BaselineMemory, MemoryWrapLayer
from timm_memwrap.attention import DISTANCES
from timm_memwrap.layers import LabelVote
from timm_memwrap.memory_layer import MemoryLayer
from timm_memwrap.readouts import PreparedMemory, Read
from timm_memwrap.reconstruction import CANDIDATES, reconstruction_weights
from timm_memwrap.search import ExactIndex, FaissIndex

WIDTH, CLASSES, SIZE = 8, 3, 60
LAYERS: dict[str, Callable[..., MemoryLayer]] = {
    "memory_wrap": MemoryWrapLayer,
    "baseline": BaselineMemory,
    "vote": LabelVote,
}


def _faiss(keys: Any) -> FaissIndex:
    pytest.importorskip("faiss")
    return FaissIndex(keys, "flat", at_least=4)


# How a memory is read. The blocks are small enough that there are several of them.
READS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda keys: None,
    "sparse": lambda keys: ExactIndex(keys, at_least=4, block_size=16),
    "faiss": _faiss,
}


def _memory(size: int = SIZE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, WIDTH, generator=generator, dtype=dtype), torch.arange(size) % CLASSES


@torch.no_grad()
def _prepare(layer: MemoryLayer, how: str = "dense", size: int = SIZE, dtype: torch.dtype = torch.float32) -> Any:
    memory = layer.prepare(*_memory(size, dtype))
    return memory._replace(key_index=READS[how](memory.keys))


def _dense(read: Read, size: int = SIZE) -> Tensor:
    return torch.zeros(len(read.weights), size, dtype=read.weights.dtype).scatter_add(1, read.positions, read.weights)


def _naive_similarity(distance: str, query: Tensor, key: Tensor) -> Tensor:
    if distance == "cosine":
        return (query @ key) / (query.norm() * key.norm())
    return query @ key if distance == "dot" else -(query - key).square().sum()


@pytest.mark.parametrize(("how", "distance"), list(product(READS, DISTANCES)))
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_weights_and_similarities_are_those_of_a_loop(how: str, distance: str, scale: float) -> None:
    layer = BaselineMemory(WIDTH, CLASSES, distance=distance, scale=scale).eval()
    inputs, (memory, _) = torch.randn(5, WIDTH), _memory()
    with torch.no_grad():
        read = layer.read(layer.query(inputs), _prepare(layer, how))
        queries, keys = layer.head(inputs), layer.head(memory)
    similarity = torch.stack([torch.stack([_naive_similarity(distance, q, k) for k in keys]) for q in queries])
    weights = sparsemax(scale * similarity, dim=-1)
    torch.testing.assert_close(_dense(read), weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(read.vector, weights @ memory, atol=1e-4, rtol=1e-4)
    compared = (F.normalize(queries), F.normalize(keys)) if distance == "cosine" else (queries, keys)
    torch.testing.assert_close(read.remainder, (compared[0] - weights @ compared[1]).norm(dim=1), atol=1e-4, rtol=1e-4)
    used = read.weights > 0
    expected = similarity.gather(1, read.positions)
    torch.testing.assert_close(read.similarities[used], expected[used], atol=1e-4, rtol=1e-4)
    assert bool((read.weights.diff(dim=1) <= 0).all()), "strongest first"
    assert read.weights.shape == read.positions.shape == read.similarities.shape
    assert used.any(dim=0).all(), "K is the largest support"


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("hides", [False, True])
def test_a_reconstruction_is_of_the_nearest_samples(how: str, kind: str, hides: bool) -> None:
    layer = LAYERS[kind](WIDTH, CLASSES, read="reconstruction").eval()
    size = 2 * CANDIDATES
    inputs, (memory, _) = torch.randn(5, WIDTH), _memory(size)
    hidden = torch.stack([torch.randperm(size)[:7] for _ in range(5)]) if hides else None
    with torch.no_grad():
        prepared = _prepare(layer, how, size)
        read = layer.read(layer.query(inputs), prepared, hidden)
        queries, keys = F.normalize(layer.head(inputs)), F.normalize(layer.head(memory))
    for row, query in enumerate(queries):
        similarity = keys @ query
        if hidden is not None:
            similarity[hidden[row]] = -torch.inf
        nearest = similarity.argsort(descending=True)[:CANDIDATES]
        weights = reconstruction_weights(query[None], keys[nearest][None])[0]
        torch.testing.assert_close(_dense(read, size)[row, nearest], weights, atol=1e-4, rtol=0)
        used = read.weights[row] > 0
        torch.testing.assert_close(read.similarities[row][used], similarity[read.positions[row][used]])
    assert bool((read.weights.diff(dim=1) <= 0).all()), "strongest first"
    torch.testing.assert_close(read.weights.sum(dim=1), torch.ones(5))
    expected = layer.read(layer.query(inputs), _prepare(layer, "dense", size), hidden)
    torch.testing.assert_close(read.vector, expected.vector, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read.remainder, (queries - _dense(read, size) @ keys).norm(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", READS)
def test_what_is_remembered_leaves_no_remainder(how: str) -> None:
    layer = BaselineMemory(WIDTH, CLASSES, read="reconstruction").eval()
    # Fewer samples than dimensions, so that others do not make up one of them.
    inputs, _ = _memory(6)
    with torch.no_grad():
        memory = _prepare(layer, how, 6)
        assert layer.read(layer.query(inputs[:5]), memory).remainder.amax() < 1e-3
        hidden = torch.arange(5).unsqueeze(1)
        assert layer.read(layer.query(inputs[:5]), memory, hidden).remainder.amin() > 0.05


@pytest.mark.parametrize("how", ["dense", "sparse"])
def test_the_gradient_of_a_reconstruction_points_downhill(how: str) -> None:
    layer = BaselineMemory(WIDTH, CLASSES, classifier=nn.Linear(WIDTH, CLASSES), read="reconstruction").double().eval()
    memory = _prepare(layer, how, dtype=torch.float64)
    inputs, direction = torch.randn(3, WIDTH, dtype=torch.float64).requires_grad_(), torch.randn(CLASSES).double()

    def height(encoding: Tensor) -> Tensor:
        return (layer.classify(encoding, layer.read(layer.query(encoding), memory).vector) @ direction).sum()

    (gradient,) = torch.autograd.grad(height(inputs), inputs)
    step = 1e-4 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (height(inputs + step) - height(inputs - step)) / 2e-4
    torch.testing.assert_close(slope, gradient.norm(), rtol=0.02, atol=0)


def test_a_reconstruction_is_trained_through_its_memory() -> None:
    layer = MemoryWrapLayer(WIDTH, CLASSES, read="reconstruction")
    memory = torch.randn(9, WIDTH, requires_grad=True)
    layer(torch.randn(2, WIDTH), memory, hidden=torch.tensor([[0], [1]])).square().sum().backward()
    assert memory.grad is not None
    assert memory.grad.any()
    assert layer.head.weight.grad is not None
    assert layer.head.weight.grad.any()


@pytest.mark.parametrize("how", ["sparse", "faiss"])
@pytest.mark.parametrize(("kind", "distance"), list(product(LAYERS, DISTANCES)))
def test_an_index_reads_what_all_scores_read(how: str, kind: str, distance: str) -> None:
    layer = LAYERS[kind](WIDTH, CLASSES, distance=distance, scale=2.0).eval()
    inputs, hidden = torch.randn(5, WIDTH), torch.stack([torch.randperm(SIZE)[:7] for _ in range(5)])
    with torch.no_grad():
        query = layer.query(inputs)
        for argument in (None, hidden):
            expected = layer.read(query, _prepare(layer), argument)
            got = layer.read(query, _prepare(layer, how), argument)
            torch.testing.assert_close(got.vector, expected.vector, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(_dense(got), _dense(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["dense", "sparse"])
@pytest.mark.parametrize(("kind", "distance"), list(product(LAYERS, DISTANCES)))
@pytest.mark.parametrize("hides", [False, True])
def test_gradcheck_of_a_read_by_the_query(how: str, kind: str, distance: str, hides: bool) -> None:
    layer = LAYERS[kind](WIDTH, CLASSES, distance=distance, scale=2.0).double().eval()
    memory = _prepare(layer, how, dtype=torch.float64)
    hidden = torch.stack([torch.randperm(SIZE)[:5] for _ in range(2)]) if hides else None
    inputs = 0.3 * torch.randn(2, WIDTH, dtype=torch.float64)

    def reads(encoding: Tensor) -> tuple[Tensor, Tensor]:
        read = layer.read(layer.query(encoding), memory, hidden)
        return layer.classify(encoding, read.vector), _dense(read)

    assert torch.autograd.gradcheck(reads, inputs.requires_grad_())


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("scale", [2.0, "learned"])
def test_the_gradient_through_an_index_is_that_of_all_scores(distance: str, scale: float | str) -> None:
    layer = BaselineMemory(WIDTH, CLASSES, distance=distance, scale=scale).double().eval()
    # So small that several samples are read: one alone has weight 1, whatever its score.
    layer.scale = 0.3
    inputs = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [inputs, *layer.head.parameters(), *([] if scale == 2.0 else [layer.log_scale])]
    gradients = []
    for how in ("dense", "sparse"):
        memory = _prepare(layer, how, dtype=torch.float64)
        vector = layer.read(layer.query(inputs), memory).vector
        factors = torch.linspace(-1, 1, vector.numel(), dtype=vector.dtype).view_as(vector)
        gradients.append(torch.autograd.grad((vector * factors).sum(), parameters))
    for dense, sparse in zip(*gradients, strict=True):
        assert dense.any()
        torch.testing.assert_close(sparse, dense)


def test_a_gradient_reaches_a_memory_without_an_index() -> None:
    layer = MemoryWrapLayer(WIDTH, CLASSES)
    memory = torch.randn(9, WIDTH, requires_grad=True)
    layer.read(layer.query(torch.randn(2, WIDTH)), layer.prepare(memory)).vector.square().sum().backward()
    assert memory.grad is not None
    assert memory.grad.any()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", READS)
def test_hidden_samples_are_as_if_not_there(kind: str, how: str) -> None:
    layer = LAYERS[kind](WIDTH, CLASSES, scale=3.0).eval()
    encodings, labels = _memory()
    inputs, hidden = torch.randn(5, WIDTH), torch.stack([torch.randperm(SIZE)[:7] for _ in range(5)])
    with torch.no_grad():
        query = layer.query(inputs)
        read = layer.read(query, _prepare(layer, how), hidden)
        for row in range(5):
            rest = [i for i in range(SIZE) if i not in hidden[row].tolist()]
            expected = layer.read(query[row : row + 1], layer.prepare(encodings[rest], labels[rest]))
            torch.testing.assert_close(read.vector[row : row + 1], expected.vector, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(_dense(read)[row, rest], _dense(expected, len(rest))[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("ranked", [True, False])
def test_a_mask_hides_what_positions_hide(how: str, ranked: bool) -> None:
    layer = BaselineMemory(WIDTH, CLASSES, scale=3.0).eval()
    hidden = torch.stack([torch.randperm(SIZE)[:7] for _ in range(5)])
    mask = torch.zeros(5, SIZE, dtype=torch.bool).scatter(1, hidden, True)
    with torch.no_grad():
        query, memory = layer.query(torch.randn(5, WIDTH)), _prepare(layer, how)
        expected = layer.read(query, memory, hidden, ranked)
        got = layer.read(query, memory, mask, ranked)
    torch.testing.assert_close(got.vector, expected.vector)
    if ranked:
        torch.testing.assert_close(_dense(got), _dense(expected))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("grad", [False, True])
def test_where_all_samples_are_hidden_nothing_is_read(kind: str, how: str, grad: bool) -> None:
    layer = LAYERS[kind](WIDTH, CLASSES).eval()
    hidden = torch.arange(SIZE).expand(2, -1)
    encoding = torch.randn(2, WIDTH, requires_grad=grad)
    read = layer.read(layer.query(encoding), _prepare(layer, how), hidden)
    assert not read.weights.any()
    assert not read.vector.any()


@pytest.mark.parametrize("how", ["dense", "sparse"])
def test_rows_that_see_nothing_do_not_disturb_the_others(how: str) -> None:
    layer = BaselineMemory(WIDTH, CLASSES).eval()
    query = layer.query(torch.randn(2, WIDTH)).detach()
    # Positions may come twice, to fill a row.
    hidden = torch.stack([torch.arange(SIZE), torch.zeros(SIZE, dtype=torch.long)])
    with torch.no_grad():
        read = layer.read(query, _prepare(layer, how), hidden)
        expected = layer.read(query[1:], _prepare(layer), torch.tensor([[0]]))
    assert not read.vector[0].any()
    torch.testing.assert_close(read.vector[1:], expected.vector)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("training", [False, True])
def test_a_vector_alone_is_that_of_the_ranked_read(kind: str, how: str, training: bool) -> None:
    layer = LAYERS[kind](WIDTH, CLASSES).train(training)
    query, memory = layer.query(torch.randn(4, WIDTH)).detach(), _prepare(layer, how)
    alone = layer.read(query, memory, ranked=False)
    assert torch.equal(alone.vector, layer.read(query, memory).vector)


def test_nan_in_a_query_is_not_dropped() -> None:
    layer = BaselineMemory(WIDTH, CLASSES, head=nn.Identity()).eval()
    query = layer.query(torch.randn(3, WIDTH))
    query[1, 2] = torch.nan
    for how in ("dense", "sparse"):
        read = layer.read(query, _prepare(layer, how))
        assert read.weights[1].isnan().any()
        assert read.vector[1].isnan().all()
        assert read.vector[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "hidden",
    [
        torch.zeros(3, 2, dtype=torch.long),
        torch.zeros(4, dtype=torch.long),
        torch.zeros(4, 2, dtype=torch.int32),
        torch.zeros(4, 2),
        torch.zeros(4, SIZE - 1, dtype=torch.bool),
        torch.zeros(3, SIZE, dtype=torch.bool),
    ],
    ids=lambda hidden: f"{hidden.dtype} {list(hidden.shape)}",
)
def test_hidden_of_another_type_or_shape_is_refused(hidden: Tensor) -> None:
    layer = BaselineMemory(WIDTH, CLASSES)
    query, memory = layer.query(torch.randn(4, WIDTH)), _prepare(layer)
    with pytest.raises(ValueError, match=rf"hidden is {hidden.dtype} of shape .*\[4, H\].*\[4, {SIZE}\]"):
        layer.read(query, memory, hidden)


def test_values_are_the_encodings_and_keys_are_made_of_them_by_the_head() -> None:
    layer = BaselineMemory(WIDTH, CLASSES, distance="dot")
    encodings, labels = _memory()
    memory = layer.prepare(encodings, labels)
    assert isinstance(memory, PreparedMemory)
    assert torch.equal(memory.values, encodings)
    torch.testing.assert_close(memory.keys.vectors, layer.head(encodings))
    assert len(memory.keys.vectors) == SIZE


@pytest.mark.parametrize("kind", [MemoryWrapLayer, BaselineMemory])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_learned_scale_is_the_number_it_stands_for_and_learns(kind: Any, distance: str) -> None:
    learned = kind(6, 3, distance=distance, scale="learned")
    fixed = kind(6, 3, distance=distance, scale=10.0)
    fixed.load_state_dict({name: t for name, t in learned.state_dict().items() if name != "log_scale"})
    x, memory = torch.randn(4, 6), torch.randn(9, 6)
    torch.testing.assert_close(learned(x, memory), fixed(x, memory), atol=1e-4, rtol=1e-4)
    # So far apart that one sample has all the weight, no scale would change it.
    learned.scale = 0.1
    _, weights = learned(x, memory, return_weights=True)
    weights.square().sum().backward()
    assert learned.log_scale.grad.abs() > 0
    with torch.no_grad():
        learned.log_scale.fill_(-50.0)
    assert 0 < float(learned.scale.detach()) < 1e-6
    assert "learned" in repr(learned)


@pytest.mark.parametrize("scale", ["auto", "", 0, -1.0, float("nan"), True, None])
def test_a_scale_that_is_not_a_factor_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="learned"):
        MemoryWrapLayer(6, 3, scale=scale)
