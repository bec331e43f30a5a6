"""Which samples are chosen."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_memwrap.selection import CANDIDATES_PER_CLASS, SELECTIONS, _by_class, _shares, find_candidates, herd, select

LABELS = torch.tensor([0] * 30 + [1] * 5 + [2] * 15)
ENCODINGS = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


@settings(max_examples=300, deadline=None)
@given(counts=st.dictionaries(st.integers(0, 20), st.integers(1, 30), min_size=1, max_size=12), data=st.data())
def test_shares_are_as_even_as_the_classes_allow(counts: dict[int, int], data: st.DataObject) -> None:
    size = data.draw(st.integers(0, sum(counts.values())))
    shares = _shares({label: list(range(count)) for label, count in counts.items()}, size)
    assert sum(shares.values()) == size
    assert all(0 <= shares[label] <= count for label, count in counts.items())
    most = max(shares.values())
    # No class that has more to give has two less than another: one could then be moved.
    assert all(shares[label] >= most - 1 for label, count in counts.items() if shares[label] < count)


@pytest.mark.parametrize("selection", [s for s in SELECTIONS if s != "all"])
@pytest.mark.parametrize("size", [1, 2, 17, 50])
def test_a_choice_has_the_size_and_names_each_sample_once(selection: str, size: int) -> None:
    chosen = select(selection, LABELS, ENCODINGS, size, seed=0)
    assert len(set(chosen)) == size
    assert chosen == sorted(chosen)
    assert all(0 <= i < 50 for i in chosen)


@pytest.mark.parametrize("selection", [s for s in SELECTIONS if s != "all"])
def test_a_choice_is_the_seeds_and_nothing_elses(selection: str) -> None:
    # More of a class than herding looks at.
    labels, points = LABELS.repeat(5), torch.randn(250, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = select(selection, labels, points, 12, seed=3)
    torch.manual_seed(2)
    assert select(selection, labels, points, 12, seed=3) == first
    assert any(select(selection, labels, points, 12, seed=seed) != first for seed in range(4, 8))


@pytest.mark.parametrize("selection", ["herding", "balanced"])
def test_classes_get_even_shares(selection: str) -> None:
    chosen = select(selection, LABELS, ENCODINGS, 21, seed=0)
    assert Counter(LABELS[chosen].tolist()) == {0: 8, 1: 5, 2: 8}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("size", [None, 50, 51])
def test_a_size_that_the_data_does_not_exceed_is_all(selection: str, size: int | None) -> None:
    assert select(selection, LABELS, ENCODINGS, size, seed=0) == list(range(50))


def _unit_points(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + 1, dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_each_herded_sample_brings_the_mean_closest(seed: int) -> None:
    points = _unit_points(40, seed)
    chosen: list[int] = []
    for _ in range(9):
        rest = [i for i in range(40) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float((points[[*chosen, i]].mean(dim=0) - points.mean(dim=0)).norm())))
        assert herd(torch.zeros(40), points, len(chosen)) == sorted(chosen)


def test_the_length_of_a_point_does_not_count() -> None:
    points = _unit_points(40, 0)
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    assert herd(torch.zeros(40), points * lengths, 7) == herd(torch.zeros(40), points, 7)


def test_classes_are_herded_one_by_one() -> None:
    chosen = herd(LABELS, ENCODINGS, 12)
    for label in range(3):
        members = (label == LABELS).nonzero()[:, 0]
        alone = herd(LABELS[members], ENCODINGS[members], 4)
        assert [i for i in chosen if LABELS[i] == label] == members[alone].tolist()


def test_herding_equal_points_still_names_each_sample_once() -> None:
    assert len(set(select("herding", torch.zeros(10, dtype=torch.long), torch.ones(10, 3), 6, seed=0))) == 6


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 250), min_size=1, max_size=6), data=st.data())
def test_herding_takes_even_shares_of_limited_candidates(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, sum(counts)))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    shares = _shares(_by_class(labels), size)
    candidates = Counter(labels[find_candidates("herding", labels, size, seed=0)].tolist())
    if size < len(labels):
        assert all(candidates[i] <= max(CANDIDATES_PER_CLASS, share) for i, share in shares.items())
    chosen = select("herding", labels, torch.ones(len(labels), 2), size, seed=0)
    assert Counter(labels[chosen].tolist()) == +Counter(shares)


def test_groups_are_by_label_in_order() -> None:
    assert _by_class(torch.tensor([2, 0, 2, 1])) == {0: [1], 1: [3], 2: [0, 2]}
