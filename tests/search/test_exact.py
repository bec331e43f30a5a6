"""The exact search by blocks, against weights computed from all scores."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scores import SCORES
from torch import Tensor

from timm_memwrap.attention import DISTANCES, MASKED, Keys, content_weights, make_keys, scores, unit
from timm_memwrap.search import ExactIndex


def _scattered(weights: Tensor, positions: Tensor, size: int) -> Tensor:
    return torch.zeros(len(weights), size, dtype=weights.dtype).scatter_add(1, positions, weights)


def _search_scores(similarity: Tensor, at_least: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Searches among keys whose scores are these."""
    return ExactIndex(Keys(torch.eye(similarity.shape[1])), at_least).search(similarity)


@pytest.mark.parametrize("case", SCORES)
def test_a_search_finds_the_content_weights_strongest_first(case: str) -> None:
    similarity = SCORES[case]
    dense = content_weights(similarity)
    weights, positions, found = _search_scores(similarity)
    torch.testing.assert_close(_scattered(weights, positions, similarity.shape[1]), dense, atol=2e-6, rtol=0)
    assert weights.shape[1] == int((weights > 0).sum(dim=1).max()), "K is the largest support"
    assert bool((weights.diff(dim=1) <= 0).all())
    assert torch.equal(found[weights > 0], similarity.gather(1, positions)[weights > 0])


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
def test_weights_do_not_depend_on_where_the_search_starts(similarity: np.ndarray, at_least: int) -> None:
    tensor = torch.from_numpy(similarity)
    weights, positions, _ = _search_scores(tensor, at_least)
    scattered = _scattered(weights, positions, tensor.shape[1])
    torch.testing.assert_close(scattered, content_weights(tensor), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("support", "looks"),
    [(10, [(2, 64)]), (63, [(2, 64)]), (65, [(2, 64), (1, 256)]), (300, [(2, 64), (1, 256), (1, 1000)])],
)
def test_the_search_grows_until_the_worst_sample_looked_at_has_no_weight(
    support: int, looks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    similarity = torch.zeros(2, 1000)
    similarity[1, torch.randperm(1000)[:support]] = 5.0
    similarity[0, 3] = 5.0
    seen: list[tuple[int, int]] = []
    topk = Tensor.topk

    def spy(tensor: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
        seen.append((len(tensor), k))
        return topk(tensor, k, dim=dim)

    monkeypatch.setattr(Tensor, "topk", spy)
    weights, _, _ = _search_scores(similarity)
    assert weights.shape == (2, support)
    assert seen == looks, "and only for the rows that need it"


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("distance", DISTANCES)
def test_nothing_is_found_in_an_empty_memory(rows: int, distance: str) -> None:
    found = ExactIndex(make_keys(torch.zeros(0, 4), distance)).search(torch.zeros(rows, 4))
    assert [tuple(tensor.shape) for tensor in found] == [(rows, 0)] * 3


def _cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Queries [B, D] and memories [M, D] whose scores are hard for a search block by block."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
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
    keys = make_keys(memory, distance)
    queries = unit(queries) if distance == "cosine" else queries
    similarity = scale * scores(queries, keys)
    expected = content_weights(similarity)
    weights, positions, found = ExactIndex(keys, at_least=4, block_size=block_size).search(queries, scale)
    torch.testing.assert_close(_scattered(weights, positions, len(memory)), expected, atol=1e-6, rtol=0)
    used = weights > 0
    torch.testing.assert_close(found[used], similarity.gather(1, positions)[used])
    assert (weights[:, :-1] >= weights[:, 1:]).all()
    if len(queries):
        assert (weights > 0).any(dim=0).all(), "a column that no row uses"
    for row, used in zip(positions, weights > 0, strict=True):
        assert len(set(row[used].tolist())) == used.sum()


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_in_single_precision_a_search_is_as_near_as_the_scores_are(scale: float) -> None:
    queries, memory = _cases()["classes"]
    queries = unit(queries)
    exact = content_weights(scale * scores(queries, make_keys(memory, "cosine")))
    index = ExactIndex(make_keys(memory.float(), "cosine"), block_size=256)
    weights, positions, _ = index.search(queries.float(), scale)
    dense = _scattered(weights, positions, len(memory))
    torch.testing.assert_close(dense.double(), exact, atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize("block_size", [64, 10_000])
def test_a_search_never_finds_what_is_hidden(block_size: int) -> None:
    queries, memory = _cases()["classes"]
    queries, keys = unit(queries), make_keys(memory, "cosine")
    similarity = 10.0 * scores(queries, keys)
    # The very samples that would be read.
    positions = similarity.topk(5, dim=-1).indices
    mask = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, positions, True)
    expected = content_weights(similarity.masked_fill(mask, MASKED))
    weights, found, _ = ExactIndex(keys, at_least=8, block_size=block_size).search(queries, 10.0, positions)
    torch.testing.assert_close(_scattered(weights, found, len(memory)), expected)


def test_nan_in_a_query_gives_weights_that_are_nan() -> None:
    queries, memory = _cases()["random"]
    queries[2, 3] = float("nan")
    weights, _, _ = ExactIndex(make_keys(memory, "cosine"), block_size=100).search(queries)
    assert weights[2].isnan().any()
    assert not weights[[0, 1, 3]].isnan().any()


def test_a_search_takes_memory_for_a_block_and_not_for_all_scores() -> None:
    """In a process of its own: what another test took would hide it."""
    code = """
import resource, torch
from timm_memwrap.attention import make_keys, unit
from timm_memwrap.search import ExactIndex
torch.set_num_threads(1)
index = ExactIndex(make_keys(torch.randn(400_000, 8), "cosine"))
queries = unit(torch.randn(256, 8))
index.search(queries[:4], 10.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index.search(queries, 10.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # All scores would be 400 MB.
    assert int(done.stdout) < 60_000


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("count", [1, 5, 40, 100])
@pytest.mark.parametrize("hides", [False, True])
def test_the_nearest_samples_are_those_of_all_scores(distance: str, count: int, hides: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(rows, 6, generator=generator) for rows in (3, 50))
    queries, prepared = unit(queries) if distance == "cosine" else queries, make_keys(keys, distance)
    expected = scores(queries, prepared)
    hidden = expected.topk(4).indices if hides else None
    if hidden is not None:
        expected = expected.scatter(1, hidden, MASKED)
    found, positions = ExactIndex(prepared, at_least=2, block_size=8).nearest(queries, count, hidden)
    torch.testing.assert_close(found, expected.topk(min(count, 50)).values)
    torch.testing.assert_close(expected.gather(1, positions), found)
    assert all(len(row.unique()) == len(row) for row in positions)
