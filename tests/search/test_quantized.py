"""The search by int8 copies of the keys, against the search of all scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_memwrap.attention import MASKED, Keys, content_weights, make_keys, scores, unit
from timm_memwrap.search import ExactIndex, QuantizedIndex, exact_index
from timm_memwrap.search import quantized as module


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and no search in float32 in place of this one because there is little to search."""
    monkeypatch.setattr(module, "_LEAST_SCORES", 0)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 2**11)
    monkeypatch.setattr(module, "_ROWS", 100)


def _encodings(kind: str, size: int = 1500, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(size, width, generator=generator)
    classes = 3 * torch.randn(5, width, generator=generator)
    return {
        "random": lambda: noise,
        "classes": lambda: classes[torch.arange(size) % 5] + noise,
        "by class": lambda: classes[torch.arange(size) * 5 // size] + noise,
        "rectified": lambda: (classes[torch.arange(size) % 5] + noise).relu(),
        "one large entry": lambda: noise * torch.tensor([100.0] + [1.0] * (width - 1)),
        "copies": lambda: noise[: size // 3].repeat(3, 1),
        "one vector": lambda: noise[:1].expand(size, width).clone(),
        "some zero": lambda: noise * (torch.arange(size) % 7 > 0).unsqueeze(1),
        "lengths": lambda: noise * torch.logspace(-3, 3, size).unsqueeze(1),
    }[kind]()


KINDS = (
    "random", "classes", "by class", "rectified", "one large entry", "copies", "one vector", "some zero", "lengths",
)  # fmt: skip


def _dense(weights: Tensor, positions: Tensor, size: int) -> Tensor:
    return torch.zeros(len(weights), size).scatter_add(1, positions, weights)


def _queries(keys: Keys, rows: int, distance: str) -> Tensor:
    noise = torch.randn(rows, keys.vectors.shape[1], generator=torch.Generator().manual_seed(2))
    near = keys.vectors[torch.arange(rows) * 97 % len(keys.vectors)] + 0.3 * noise
    return unit(near) if distance == "cosine" else near


@pytest.mark.parametrize("distance", ["cosine", "dot"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_samples_are_those_of_all_scores(kind: str, rows: int, distance: str) -> None:
    keys = make_keys(_encodings(kind), distance)
    queries = _queries(keys, rows, distance)
    expected = scores(queries, keys)
    found, positions = QuantizedIndex(keys).nearest(queries, 20)
    tolerance = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(found, expected.topk(20).values, atol=tolerance, rtol=0)
    torch.testing.assert_close(expected.gather(1, positions), found, atol=tolerance, rtol=0)
    assert all(len(row.unique()) == 20 for row in positions)


@pytest.mark.parametrize("scale", [1.0, 10.0, torch.tensor(30.0)])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_all_scores(kind: str, rows: int, scale: float | Tensor) -> None:
    keys = make_keys(_encodings(kind), "cosine")
    queries = _queries(keys, rows, "cosine")
    similarity = scores(queries, keys) * scale
    weights, positions, found = QuantizedIndex(keys).search(queries, scale)
    dense, tolerance = _dense(weights, positions, len(keys.vectors)), 1e-6 * float(scale)
    torch.testing.assert_close(dense, content_weights(similarity), atol=tolerance, rtol=0)
    used = weights > 0
    torch.testing.assert_close(found[used], similarity.gather(1, positions)[used], atol=1e-5, rtol=1e-5)
    assert bool((weights.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("kind", ["classes", "by class", "copies"])
def test_what_is_hidden_is_never_found(kind: str) -> None:
    keys = make_keys(_encodings(kind), "cosine")
    queries = _queries(keys, 8, "cosine")
    similarity = scores(queries, keys)
    # The very samples that would be read.
    hidden = similarity.topk(30).indices
    seen = similarity.scatter(1, hidden, MASKED)
    found, positions = QuantizedIndex(keys).nearest(queries, 20, hidden)
    torch.testing.assert_close(found, seen.topk(20).values)
    assert not bool((positions.unsqueeze(-1) == hidden.unsqueeze(1)).any())
    weights, positions, _ = QuantizedIndex(keys).search(queries, 10.0, hidden)
    expected = content_weights(10.0 * seen)
    torch.testing.assert_close(_dense(weights, positions, len(keys.vectors)), expected, atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), width=st.integers(1, 70), size=st.integers(1, 900), rows=st.integers(1, 9),
    spread=st.floats(0, 3),
)  # fmt: skip
def test_rounding_never_rules_out_what_an_exact_score_would_not(
    seed: int, width: int, size: int, rows: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(size, width, generator=generator) * torch.randn(width, generator=generator).mul(spread).exp()
    queries = unit(torch.randn(rows, width, generator=generator))
    keys = make_keys(entries, "cosine")
    copies = module._Copies(keys.vectors)
    rounded, steps, slack = copies.rounded(queries)
    near = torch.cat([block.flatten(1).clone() for _, block in copies.blocks(rounded, None)], dim=1)[:, :size] * steps
    exact = (queries.double() @ keys.vectors.double().T).float()
    assert bool(((near - exact).abs() <= slack).all())


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_few_samples_are_scored_in_float32(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the search would be right and slow."""
    keys = make_keys(_encodings("rectified", 20_000, 64), "cosine")
    scored = []
    plain = module.pad_sequence
    monkeypatch.setattr(module, "_BLOCK_SCORES", 2**22)
    monkeypatch.setattr(
        module, "pad_sequence", lambda parts, *rest: scored.append(sum(map(len, parts))) or plain(parts, *rest)
    )
    found, _ = QuantizedIndex(keys).nearest(_queries(keys, 4, "cosine"), count)
    assert found.shape == (4, count)
    assert 4 * count <= max(scored) < 4 * 1000


def test_where_nothing_is_ruled_out_all_is_scored_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_LEFT", 1000)
    keys = make_keys(_encodings("one vector"), "cosine")
    index, plain = QuantizedIndex(keys), ExactIndex(keys)
    queries = _queries(keys, 3, "cosine")
    for found, expected in zip(index.search(queries, 10.0), plain.search(queries, 10.0), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(index.nearest(queries, 9), plain.nearest(queries, 9), strict=True):
        assert torch.equal(found, expected)


def test_nan_in_a_query_gives_weights_that_are_nan() -> None:
    keys = make_keys(_encodings("classes"), "cosine")
    queries = _queries(keys, 3, "cosine")
    queries[1, 2] = float("nan")
    weights, _, _ = QuantizedIndex(keys).search(queries, 10.0)
    assert weights[1].isnan().any()
    assert not weights[[0, 2]].isnan().any()


def test_a_query_of_zeros_finds_samples_without_a_warning_or_a_nan() -> None:
    keys = make_keys(_encodings("random"), "cosine")
    found, positions = QuantizedIndex(keys).nearest(torch.zeros(2, 24), 5)
    assert torch.equal(found, torch.zeros(2, 5))
    assert all(len(row.unique()) == 5 for row in positions)


@pytest.mark.parametrize("missing", ["_int_mm", "_is_vnni_supported", "no instruction"])
def test_without_an_int8_product_the_search_is_in_float32(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = make_keys(_encodings("random"), "cosine")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: missing != "no instruction", raising=False)
    assert isinstance(exact_index(keys), ExactIndex if missing == "no instruction" else QuantizedIndex)
    if missing != "no instruction":
        monkeypatch.delattr(torch if missing == "_int_mm" else torch.cpu, missing)
    assert isinstance(exact_index(keys), ExactIndex)


@pytest.mark.parametrize("distance", ["l2", "double"])
def test_keys_that_int8_does_not_suit_are_searched_as_they_are(distance: str) -> None:
    encodings = _encodings("random")
    keys = make_keys(encodings, "l2") if distance == "l2" else make_keys(encodings.double(), "cosine")
    assert isinstance(exact_index(keys), ExactIndex)
