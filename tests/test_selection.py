"""Which samples are chosen."""

import builtins
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_memwrap.selection import SELECTIONS, _by_class, _shares, select

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
    torch.manual_seed(1)
    first = select(selection, LABELS, ENCODINGS, 12, seed=3)
    torch.manual_seed(2)
    assert select(selection, LABELS, ENCODINGS, 12, seed=3) == first
    assert any(select(selection, LABELS, ENCODINGS, 12, seed=seed) != first for seed in range(4, 8))


@pytest.mark.parametrize("selection", ["balanced", "kmeans"])
def test_classes_get_even_shares(selection: str) -> None:
    chosen = select(selection, LABELS, ENCODINGS, 21, seed=0)
    assert Counter(LABELS[chosen].tolist()) == {0: 8, 1: 5, 2: 8}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("size", [None, 50, 51])
def test_a_size_that_the_data_does_not_exceed_is_all(selection: str, size: int | None) -> None:
    assert select(selection, LABELS, ENCODINGS, size, seed=0) == list(range(50))


def test_kmeans_takes_one_sample_of_each_clump() -> None:
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    encodings = centres.repeat_interleave(10, dim=0) + torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    chosen = select("kmeans", torch.zeros(40, dtype=torch.long), encodings, 4, seed=0)
    assert sorted(i // 10 for i in chosen) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_kmeans_of_equal_encodings_still_names_each_sample_once() -> None:
    chosen = select("kmeans", torch.zeros(10, dtype=torch.long), torch.ones(10, 3), 6, seed=0)
    assert len(set(chosen)) == 6


def test_kmeans_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"timm-memwrap\[kmeans\]"):
        select("kmeans", LABELS, ENCODINGS, 5, seed=0)


def test_groups_are_by_label_in_order() -> None:
    assert _by_class(torch.tensor([2, 0, 2, 1])) == {0: [1], 1: [3], 2: [0, 2]}
