"""Similarity scores and the sparse read, against definitions written out in numpy and float64."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from timm_memwrap import attention
from timm_memwrap.attention import DISTANCES, MASKED, content_weights, prepare_keys, read, scores, search, top_weights


def _simplex_projection(row: np.ndarray) -> np.ndarray:
    """Sparsemax by its definition: the point of the simplex nearest to `row`, its threshold found by bisection."""
    low, high = row.max() - 1.0, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - high, 0)


def _scattered(weights: Tensor, indices: Tensor, size: int) -> Tensor:
    return torch.zeros(len(weights), size, dtype=weights.dtype).scatter_add(1, indices, weights)


SCORES = {
    "random": torch.randn(5, 300, generator=torch.Generator().manual_seed(1)),
    "close together": torch.randn(5, 300, generator=torch.Generator().manual_seed(2)) * 1e-3,
    "far apart": torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * 1e4,
    "all equal": torch.full((3, 200), 0.3),
    "ties at the top": torch.cat([torch.ones(3, 70), torch.zeros(3, 70)], dim=1),
    # The first row needs one sample, the second all of them.
    "different supports": torch.stack([torch.arange(200.0), torch.zeros(200)]),
    "one sample": torch.randn(4, 1),
    "masked": torch.randn(4, 100).index_fill(1, torch.arange(30), MASKED),
}


@pytest.mark.parametrize("case", SCORES)
def test_content_weights_are_the_projection_onto_the_simplex(case: str) -> None:
    expected = torch.from_numpy(np.stack([_simplex_projection(row) for row in SCORES[case].double().numpy()])).float()
    torch.testing.assert_close(content_weights(SCORES[case]), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", SCORES)
def test_top_weights_are_the_content_weights_strongest_first(case: str) -> None:
    similarity = SCORES[case]
    dense = content_weights(similarity)
    weights, indices = top_weights(similarity)
    torch.testing.assert_close(_scattered(weights, indices, similarity.shape[1]), dense, atol=2e-6, rtol=0)
    assert weights.shape[1] == int((weights > 0).sum(dim=1).max()), "K is the largest support"
    assert bool((weights.diff(dim=1) <= 0).all())


@settings(max_examples=150, deadline=None)
@given(
    similarity=arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
        # Few different values make ties likely.
        elements=st.one_of(st.sampled_from([-1.0, 0.0, 0.5]), st.floats(-100, 100, width=32)),
    ),
    at_least=st.integers(1, 8),
)
def test_top_weights_do_not_depend_on_where_the_search_starts(similarity: np.ndarray, at_least: int) -> None:
    tensor = torch.from_numpy(similarity)
    weights, indices = top_weights(tensor, at_least)
    scattered = _scattered(weights, indices, tensor.shape[1])
    torch.testing.assert_close(scattered, content_weights(tensor), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("support", "looks"), [(10, [64]), (63, [64]), (65, [64, 256]), (300, [64, 256, 1000])])
def test_the_search_grows_until_the_worst_sample_looked_at_has_no_weight(
    support: int, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    similarity = torch.zeros(2, 1000)
    similarity[1, torch.randperm(1000)[:support]] = 5.0
    similarity[0, 3] = 5.0
    seen: list[int] = []
    exact = attention.content_weights

    def spy(best: Tensor) -> Tensor:
        seen.append(best.shape[1])
        return exact(best)

    monkeypatch.setattr(attention, "content_weights", spy)
    weights, _ = top_weights(similarity)
    assert weights.shape == (2, support)
    assert seen == looks


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_nothing_is_read_from_an_empty_memory(rows: int) -> None:
    weights, indices = top_weights(torch.zeros(rows, 0))
    assert weights.shape == indices.shape == (rows, 0)
    assert content_weights(torch.zeros(rows, 0)).shape == (rows, 0)
    assert torch.equal(read(weights, indices, torch.zeros(0, 5)), torch.zeros(rows, 5))


def test_read_is_the_weighted_sum() -> None:
    similarity, values = torch.randn(6, 50), torch.randn(50, 7)
    weights, indices = top_weights(similarity)
    torch.testing.assert_close(read(weights, indices, values), content_weights(similarity) @ values)


def _exact_scores(queries: Tensor, encodings: Tensor, distance: str) -> Tensor:
    q, k = queries.double(), encodings.double()
    if distance == "cosine":
        return torch.stack([torch.stack([(a @ b) / (a.norm() * b.norm()) for b in k]) for a in q])
    if distance == "l2":
        return -(q.unsqueeze(1) - k.unsqueeze(0)).square().sum(-1)
    return q @ k.T


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_scores_are_the_distance_by_its_definition(distance: str, scale: float) -> None:
    queries, encodings = torch.randn(4, 16) + 1, torch.randn(9, 16) + 1
    got = scores(queries, prepare_keys(encodings, distance), distance, scale).double()
    expected = scale * _exact_scores(queries, encodings, distance)
    if distance == "l2":  # up to a constant per query
        got, expected = got - got[:, :1], expected - expected[:, :1]
    torch.testing.assert_close(got, expected, atol=1e-4 * scale, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 100.0, 1000.0])
def test_l2_is_as_exact_far_from_the_origin(shift: float) -> None:
    """|q|^2 - 2 q.k + |k|^2 loses all digits there unless both are moved first."""
    # Multiples of 1/8 stay exact under the shift, so that float32 can hold the same encodings.
    queries, encodings = torch.randint(-16, 17, (8, 64)) / 8, torch.randint(-16, 17, (200, 64)) / 8
    near = content_weights(_exact_scores(queries, encodings, "l2"))
    far = content_weights(scores(queries + shift, prepare_keys(encodings + shift, "l2"), "l2"))
    torch.testing.assert_close(far.double(), near, atol=1e-3 if shift > 500 else 1e-4, rtol=0)


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-25, 1e-10, 1.0, 1e15, 1e30])
def test_cosine_does_not_depend_on_length_down_to_zero(magnitude: float) -> None:
    directions, queries = torch.randn(6, 8), torch.randn(3, 8)
    memory = (directions * magnitude).requires_grad_()
    tiny = (queries * magnitude).requires_grad_()
    got = scores(tiny, prepare_keys(memory, "cosine"), "cosine")
    expected = _exact_scores(queries, directions, "cosine").float()
    if magnitude == 0:
        expected = torch.zeros_like(expected)
    # Below 1e-38 numbers are denormal and have few digits.
    torch.testing.assert_close(got, expected, atol=1e-5 if magnitude > 1e-37 or magnitude == 0 else 1e-2, rtol=0)
    for gradient in torch.autograd.grad(got.square().sum(), [memory, tiny]):
        assert not gradient.isnan().any()
        if magnitude > 1e-30 or magnitude == 0:
            assert gradient.isfinite().all()


def test_a_vector_is_nearest_to_itself_with_cosine_one() -> None:
    vectors = torch.randn(20, 8) * torch.logspace(-20, 10, 20).unsqueeze(1)
    similarity = scores(vectors, prepare_keys(vectors, "cosine"), "cosine")
    torch.testing.assert_close(similarity.diagonal(), torch.ones(20))


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_of_a_read_are_right(distance: str) -> None:
    def reading(queries: Tensor, memory: Tensor) -> Tensor:
        weights = content_weights(scores(queries, prepare_keys(memory, distance), distance, 2.0))
        return weights @ memory

    queries, memory = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    # Detached centres and largest entries must not lose a part of the gradient: gradcheck would see it.
    assert torch.autograd.gradcheck(reading, (queries.requires_grad_(), memory.requires_grad_()))


def _cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Queries [B, D] and memories [M, D] whose scores are hard for a search block by block."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    classes = randn(10, 16)
    ascending = torch.linspace(-1, 1, 700, dtype=torch.float64).unsqueeze(1)
    return {
        "random": (randn(7, 16), randn(700, 16)),
        "classes": (classes + 0.3 * randn(10, 16), classes[torch.arange(700) % 10] + 0.3 * randn(700, 16)),
        "all equal": (randn(5, 4), torch.ones(700, 4, dtype=torch.float64)),
        "ties": (randn(5, 4), randn(7, 4).repeat(100, 1)),
        "one hot": (torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64).repeat(117, 1)[:700]),
        "ascending": (torch.ones(3, 1, dtype=torch.float64), ascending),
        "descending": (torch.ones(3, 1, dtype=torch.float64), ascending.flip(0)),
        "one": (randn(4, 8), randn(1, 8)),
        "zeros": (torch.zeros(4, 8, dtype=torch.float64), randn(700, 8)),
        "one query": (randn(1, 8), randn(700, 8)),
        "no query": (randn(0, 8), randn(700, 8)),
    }


@pytest.mark.parametrize("block_size", [1, 300, 10_000])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("case", _cases())
def test_a_search_by_blocks_is_the_full_sort(case: str, distance: str, scale: float, block_size: int) -> None:
    queries, memory = _cases()[case]
    keys = prepare_keys(memory, distance)
    expected = content_weights(scores(queries, keys, distance, scale))
    weights, positions = search(queries, keys, distance, scale, at_least=4, block_size=block_size)
    dense = torch.zeros_like(expected).scatter_add(1, positions, weights)
    torch.testing.assert_close(dense, expected, atol=1e-6, rtol=0)
    assert (weights[:, :-1] >= weights[:, 1:]).all()
    if len(queries):
        assert (weights > 0).any(dim=0).all(), "a column that no row uses"
    for row, used in zip(positions, weights > 0, strict=True):
        assert len(set(row[used].tolist())) == used.sum()


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_in_single_precision_a_search_is_as_near_as_the_scores_are(scale: float) -> None:
    queries, memory = _cases()["classes"]
    exact = content_weights(scores(queries, prepare_keys(memory, "cosine"), "cosine", scale))
    keys = prepare_keys(memory.float(), "cosine")
    weights, positions = search(queries.float(), keys, "cosine", scale, block_size=256)
    dense = torch.zeros_like(exact, dtype=torch.float32).scatter_add(1, positions, weights)
    torch.testing.assert_close(dense.double(), exact, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize("kind", ["mask", "positions"])
@pytest.mark.parametrize("block_size", [64, 10_000])
def test_a_search_never_finds_what_is_hidden(kind: str, block_size: int) -> None:
    queries, memory = _cases()["classes"]
    keys = prepare_keys(memory, "cosine")
    similarity = scores(queries, keys, "cosine", 10.0)
    # The very samples that would be read.
    positions = similarity.topk(5, dim=-1).indices
    mask = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, positions, True)
    expected = content_weights(similarity.masked_fill(mask, MASKED))
    hidden = mask if kind == "mask" else positions
    weights, found = search(queries, keys, "cosine", 10.0, hidden, at_least=8, block_size=block_size)
    torch.testing.assert_close(torch.zeros_like(expected).scatter_add(1, found, weights), expected)


def test_a_query_that_is_no_number_gives_weights_that_are_none() -> None:
    queries, memory = _cases()["random"]
    queries[2, 3] = float("nan")
    weights, _ = search(queries, prepare_keys(memory, "cosine"), "cosine", block_size=100)
    assert weights[2].isnan().any()
    assert not weights[[0, 1, 3]].isnan().any()


def test_a_search_takes_memory_for_a_block_and_not_for_all_scores() -> None:
    """In a process of its own: what another test took would hide it."""
    code = """
import resource, torch
from timm_memwrap.attention import prepare_keys, search
torch.set_num_threads(1)
keys = prepare_keys(torch.randn(400_000, 8), "cosine")
queries = torch.randn(256, 8)
search(queries[:4], keys, "cosine", 10.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
search(queries, keys, "cosine", 10.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # All scores would be 400 MB.
    assert int(done.stdout) < 60_000


@pytest.mark.parametrize("weigh", [content_weights, lambda s: attention._sparsemax(s)], ids=["entmax", "compiled"])
def test_scores_that_are_no_numbers_spoil_only_their_row(weigh) -> None:
    similarity = torch.randn(3, 9)
    similarity[1, 4] = float("nan")
    weights = weigh(similarity)
    assert weights[1].isnan().all()
    torch.testing.assert_close(weights[[0, 2]], content_weights(similarity[[0, 2]]))
