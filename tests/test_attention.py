"""Similarity scores and sparse weights, against definitions written out in numpy and float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scores import SCORES
from torch import Tensor

from timm_memwrap import attention
from timm_memwrap.attention import (
    DISTANCES,
    content_weights,
    make_keys,
    scores,
    scores_at,
    similarities,
    sum_values,
    threshold,
    trim,
    unit,
)


def _simplex_projection(row: np.ndarray) -> np.ndarray:
    """Sparsemax by its definition: the point of the simplex nearest to `row`, its threshold found by bisection."""
    low, high = row.max() - 1.0, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - high, 0)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"entmax": content_weights, "compiled": attention._sparsemax}


@pytest.mark.parametrize("weigh", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("case", SCORES)
def test_content_weights_are_the_projection_onto_the_simplex(case: str, weigh: Callable[[Tensor], Tensor]) -> None:
    expected = torch.from_numpy(np.stack([_simplex_projection(row) for row in SCORES[case].double().numpy()])).float()
    torch.testing.assert_close(weigh(SCORES[case]), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", SCORES)
def test_the_threshold_divides_samples_with_weight_from_those_without(case: str) -> None:
    ordered = SCORES[case].sort(dim=-1, descending=True).values
    weights = (ordered - threshold(ordered)).clamp(min=0)
    torch.testing.assert_close(weights, content_weights(ordered), atol=2e-6 * float(1 + ordered[:, 0].max()), rtol=0)


def test_trim_cuts_to_the_columns_that_some_row_reads() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0]])
    positions = torch.tensor([[5, 1, 2], [3, 4, 0]])
    trimmed, kept = trim(weights, positions)
    assert trimmed.tolist() == weights[:, :2].tolist()
    assert kept.tolist() == [[5, 1], [3, 4]]
    assert trim(torch.zeros(2, 3))[0].shape == (2, 0)
    assert trim(torch.zeros(0, 3))[0].shape == (0, 0)


def test_trim_does_not_drop_nan() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [torch.nan, torch.nan, torch.nan]])
    assert trim(weights)[0].shape == (2, 3)
    assert trim(weights[1:])[0].isnan().all()


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_nothing_is_read_from_an_empty_memory(rows: int) -> None:
    assert content_weights(torch.zeros(rows, 0)).shape == (rows, 0)
    nothing = torch.zeros(rows, 0)
    assert torch.equal(sum_values(nothing, nothing.long(), torch.zeros(0, 5)), torch.zeros(rows, 5))


def test_sum_values_is_the_weighted_sum() -> None:
    weights, values = content_weights(torch.randn(6, 50)), torch.randn(50, 7)
    ordered, positions = weights.sort(dim=-1, descending=True)
    torch.testing.assert_close(sum_values(*trim(ordered, positions), values), weights @ values)


def _exact_scores(queries: Tensor, encodings: Tensor, distance: str) -> Tensor:
    q, k = queries.double(), encodings.double()
    if distance == "cosine":
        return torch.stack([torch.stack([(a @ b) / (a.norm() * b.norm()) for b in k]) for a in q])
    if distance == "l2":
        return -(q.unsqueeze(1) - k.unsqueeze(0)).square().sum(-1)
    return q @ k.T


@pytest.mark.parametrize("distance", DISTANCES)
def test_scores_and_similarities_are_the_distance_by_its_definition(distance: str) -> None:
    queries, encodings = torch.randn(4, 16) + 1, torch.randn(9, 16) + 1
    keys = make_keys(encodings, distance)
    queries = unit(queries) if distance == "cosine" else queries
    got = scores(queries, keys)
    exact = _exact_scores(queries, encodings, distance)
    # Up to a constant per query with the distance l2, which `similarities` puts back.
    offset = got.double() - exact
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset), atol=1e-4, rtol=0)
    torch.testing.assert_close(similarities(got, queries, keys).double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_scores_at_positions_are_those_of_all_samples(distance: str) -> None:
    queries, keys = torch.randn(4, 16) + 1, make_keys(torch.randn(9, 16) + 1, distance)
    positions = torch.randint(9, (4, 3))
    torch.testing.assert_close(scores_at(queries, keys, positions), scores(queries, keys).gather(1, positions))


@pytest.mark.parametrize("shift", [0.0, 100.0, 1000.0])
def test_l2_is_as_exact_far_from_the_origin(shift: float) -> None:
    """|q|^2 - 2 q.k + |k|^2 loses all digits there unless both are moved first."""
    # Multiples of 1/8 stay exact under the shift, so that float32 can hold the same encodings.
    queries, encodings = torch.randint(-16, 17, (8, 64)) / 8, torch.randint(-16, 17, (200, 64)) / 8
    near = content_weights(_exact_scores(queries, encodings, "l2"))
    far = content_weights(scores(queries + shift, make_keys(encodings + shift, "l2")))
    torch.testing.assert_close(far.double(), near, atol=1e-3 if shift > 500 else 1e-4, rtol=0)


def test_l2_is_exact_among_memories_of_nearly_the_same_large_length() -> None:
    """Their squared lengths differ by less than a float32 of that size can say."""
    encodings = 12 * torch.randn(40, 256).sign() + 1e-5 * torch.randn(40, 256)
    queries = 1e-3 * torch.randn(8, 256)
    exact = content_weights(_exact_scores(queries, encodings, "l2"))
    got = content_weights(scores(queries, make_keys(encodings, "l2")))
    torch.testing.assert_close(got.double(), exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-25, 1e-10, 1.0, 1e15, 1e30])
def test_cosine_does_not_depend_on_length_down_to_zero(magnitude: float) -> None:
    directions, queries = torch.randn(6, 8), torch.randn(3, 8)
    memory = (directions * magnitude).requires_grad_()
    tiny = (queries * magnitude).requires_grad_()
    got = scores(unit(tiny), make_keys(memory, "cosine"))
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
    similarity = scores(unit(vectors), make_keys(vectors, "cosine"))
    torch.testing.assert_close(similarity.diagonal(), torch.ones(20))


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_of_a_read_are_right(distance: str) -> None:
    def reading(queries: Tensor, memory: Tensor) -> Tensor:
        queries = unit(queries) if distance == "cosine" else queries
        return content_weights(2.0 * scores(queries, make_keys(memory, distance))) @ memory

    queries, memory = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    # Detached centres and largest entries must not lose a part of the gradient: gradcheck would see it.
    assert torch.autograd.gradcheck(reading, (queries.requires_grad_(), memory.requires_grad_()))


@pytest.mark.parametrize("weigh", WEIGHTS.values(), ids=WEIGHTS)
def test_nan_among_the_scores_spoils_only_its_row(weigh: Callable[[Tensor], Tensor]) -> None:
    similarity = torch.randn(3, 9)
    similarity[1, 4] = float("nan")
    weights = weigh(similarity)
    assert weights[1].isnan().all()
    torch.testing.assert_close(weights[[0, 2]], content_weights(similarity[[0, 2]]))


@pytest.mark.parametrize("entry", [1.0, 1e-30, 1e30, 0.0], ids=["usual", "tiny", "huge", "zero"])
@pytest.mark.parametrize("distance", attention.DISTANCES)
def test_scores_without_keys_are_the_same_and_so_are_their_gradients(distance: str, entry: float) -> None:
    generator = torch.Generator().manual_seed(0)
    encodings, queries = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (9, 3))
    encodings[4] *= entry
    found = []
    for once in (False, True):
        memory = encodings.clone().requires_grad_()
        keys = None if once else attention.make_keys(memory, distance)
        result = attention.scores_once(queries, memory, distance) if keys is None else attention.scores(queries, keys)
        result.square().sum().backward()
        found.append((result, memory.grad))
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other, expected)
