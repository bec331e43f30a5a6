"""The weights of the sparse mean that comes closest to a query, against an independent solver of the same problem."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from memory_models import closest
from torch import Tensor

from timm_memwrap import reconstruction
from timm_memwrap.reconstruction import reconstruction_weights

ROWS, COUNT, WIDTH = 4, 24, 12


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _collapsed(spread: float) -> tuple[Tensor, Tensor]:
    queries, keys = 1 + spread * _random(ROWS, WIDTH), 1 + spread * _random(ROWS, COUNT, WIDTH, seed=1)
    return F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)


def _decaying() -> tuple[Tensor, Tensor]:
    factors = torch.exp(-torch.arange(WIDTH) / 4)
    return factors * _random(ROWS, WIDTH), factors * _random(ROWS, COUNT, WIDTH, seed=1)


def _copies() -> tuple[Tensor, Tensor]:
    keys = _random(ROWS, COUNT, WIDTH, seed=1)
    keys[:, 1::2] = keys[:, ::2]
    return _random(ROWS, WIDTH), keys


# Queries and keys. How networks crowd their encodings decides how hard the problem is.
CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "apart": lambda: (_random(ROWS, WIDTH), _random(ROWS, COUNT, WIDTH, seed=1)),
    "wide": lambda: (_random(ROWS, 200), _random(ROWS, COUNT, 200, seed=1)),
    "far": lambda: (5 + _random(ROWS, WIDTH), _random(ROWS, COUNT, WIDTH, seed=1)),
    "collapsed": lambda: _collapsed(1e-2),
    "collapsed to a thousandth": lambda: _collapsed(1e-3),
    "decaying": _decaying,
    "copies": _copies,
    "one candidate": lambda: (_random(ROWS, WIDTH), _random(ROWS, 1, WIDTH, seed=1)),
    "two candidates": lambda: (_random(ROWS, WIDTH), _random(ROWS, 2, WIDTH, seed=1)),
    "all the same": lambda: (_random(ROWS, WIDTH), _random(ROWS, 1, WIDTH, seed=1).expand(-1, COUNT, -1)),
}


def _squared_distances(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    differences = (keys - queries.unsqueeze(1)).double()
    return (weights.double().unsqueeze(1) @ differences).square().sum(dim=(1, 2))


@pytest.mark.parametrize("case", CASES)
def test_no_other_weights_come_closer(case: str) -> None:
    queries, keys = CASES[case]()
    weights = reconstruction_weights(queries, keys)
    expected = torch.stack([closest(*row) for row in zip(queries, keys, strict=True)])
    apart = (keys - queries.unsqueeze(1)).square().sum(dim=2).mean(dim=1)
    excess = _squared_distances(queries, keys, weights) - _squared_distances(queries, keys, expected)
    # Relative to how far the candidates are: a thousandth where hardly anything tells them apart, else rounding.
    assert float((excess / apart).max()) < (1e-3 if case == "decaying" else 2e-6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(ROWS))
    assert bool((weights >= 0).all())


@pytest.mark.parametrize("case", ["apart", "wide", "far", "collapsed", "two candidates"])
def test_the_weights_are_those_of_another_solver(case: str) -> None:
    queries, keys = CASES[case]()
    expected = torch.stack([closest(*row) for row in zip(queries, keys, strict=True)])
    weights = reconstruction_weights(queries, keys)
    torch.testing.assert_close(weights, expected, atol=2e-3, rtol=0)
    assert case == "two candidates" or bool((weights == 0).any()), "most are exactly zero"


def test_a_query_that_is_a_candidate_is_that_candidate() -> None:
    keys = _random(ROWS, COUNT, WIDTH)
    weights = reconstruction_weights(keys[:, 5], keys)
    torch.testing.assert_close(weights, F.one_hot(torch.full((ROWS,), 5), COUNT).float())


def test_what_is_unseen_is_as_if_not_there() -> None:
    queries, keys = CASES["apart"]()
    unseen = torch.rand(ROWS, COUNT, generator=torch.Generator().manual_seed(2)) < 0.5
    unseen[1] = True
    weights = reconstruction_weights(queries, keys, unseen)
    assert not weights[unseen].any()
    assert not weights[1].any(), "nothing is seen, so nothing is read"
    for row in (0, 2, 3):
        alone = reconstruction_weights(queries[row : row + 1], keys[row : row + 1, ~unseen[row]])
        torch.testing.assert_close(weights[row, ~unseen[row]], alone[0], atol=1e-4, rtol=0)


def test_no_candidates_have_no_weights() -> None:
    assert reconstruction_weights(torch.ones(2, 3), torch.ones(2, 0, 3)).shape == (2, 0)


def test_nan_in_a_query_makes_its_weights_nan_and_no_others() -> None:
    queries, keys = CASES["apart"]()
    expected = reconstruction_weights(queries, keys)
    queries[1, 0] = torch.nan
    weights = reconstruction_weights(queries, keys)
    assert bool(weights[1].isnan().all())
    torch.testing.assert_close(weights[[0, 2, 3]], expected[[0, 2, 3]])


def test_a_row_does_not_depend_on_its_batch() -> None:
    queries, keys = CASES["apart"]()
    weights = reconstruction_weights(queries, keys)
    alone = torch.cat([reconstruction_weights(*row) for row in zip(queries.split(1), keys.split(1), strict=True)])
    torch.testing.assert_close(weights, alone, atol=1e-5, rtol=0)
    assert torch.equal(weights, reconstruction_weights(queries, keys))


def test_gradcheck_by_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    # Finite differences need the solution to more digits than anybody else.
    monkeypatch.setattr(reconstruction, "_STEPS", 4000)
    monkeypatch.setattr(reconstruction, "_LEAST_WEIGHT", 1e-12)
    queries = _random(3, 8).double().requires_grad_()
    keys = _random(3, 12, 8, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(reconstruction_weights, (queries, keys), eps=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["apart", "copies", "all the same", "one candidate"])
def test_gradients_are_finite_and_change_no_weight(case: str) -> None:
    queries, keys = CASES[case]()
    expected = reconstruction_weights(queries, keys)
    queries.requires_grad_()
    weights = reconstruction_weights(queries, keys)
    assert torch.equal(weights, expected)
    (weights * torch.arange(weights.shape[1])).sum().backward()
    assert queries.grad is not None
    assert bool(queries.grad.isfinite().all())
