"""A second search without some samples, against the search that it spares."""

import pytest
import torch

from timm_memwrap.attention import make_keys, unit
from timm_memwrap.search import ExactIndex, SearchAgain


class _Counting(ExactIndex):
    """Counts searches of the memory."""

    calls = 0

    def search(self, *args):  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().search(*args)

    def nearest(self, *args):  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().nearest(*args)


@pytest.fixture
def index() -> _Counting:
    return _Counting(make_keys(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)), "cosine"))


@pytest.mark.parametrize("hides", [0, 1, 4])
@pytest.mark.parametrize(("count", "scale"), [(20, 20.0), (20, 1.0), (200, 1.0)])
def test_it_finds_what_the_index_finds(index: _Counting, count: int, scale: float, hides: int) -> None:
    queries = unit(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)))
    found, positions = index.nearest(queries, count, None)
    # One query, of which each time other samples are left out.
    rows = torch.tensor([0, 2, 2, 1, 2])
    hidden = positions[rows, :hides].roll(1, dims=0) if hides else None
    again = SearchAgain(index, found[rows], positions[rows])
    for one, other in zip(
        again.nearest(queries[rows], 9, hidden), index.nearest(queries[rows], 9, hidden), strict=True
    ):
        torch.testing.assert_close(one, other)
    weights, where, scores = again.search(queries[rows], scale, hidden)
    expected = index.search(queries[rows], scale, hidden)
    torch.testing.assert_close(weights, expected[0])
    used = weights > 0
    assert torch.equal(where[used], expected[1][used])
    torch.testing.assert_close(scores[used], expected[2][used])


def test_the_memory_is_searched_again_only_where_what_is_known_does_not_do(index: _Counting) -> None:
    queries = unit(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)))
    again = SearchAgain(index, *index.nearest(queries, 20, None))
    hidden = torch.tensor([[1], [2], [3]])
    again.search(queries, 50.0, hidden)
    again.nearest(queries, 19, hidden)
    assert index.calls == 1
    again.search(queries, 0.1, hidden)
    again.nearest(queries, 20, hidden)
    assert index.calls == 3
