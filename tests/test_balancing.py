"""Which samples of several classes are chosen."""

import random

import pytest
import torch

from timm_memwrap.balancing import balance
from timm_memwrap.selection import select


def _labels(count: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # From frequent to rare; one in a few samples has no class.
    return (torch.rand(count, 4, generator=generator) < torch.tensor([0.6, 0.3, 0.1, 0.05])).to(torch.uint8)


def test_classes_are_shown_by_about_as_many_samples() -> None:
    labels = _labels()
    chosen = torch.tensor(balance(labels, 40, random.Random(0)))
    assert len(chosen.unique()) == 40
    before, after = labels.float().mean(dim=0), labels[chosen].float().mean(dim=0)
    assert after.max() / after.min() < 4 < before.max() / before.min()
    # Pictures of nothing are chosen as a class is.
    assert (labels[chosen].sum(dim=1) == 0).sum() >= 5


def test_all_are_chosen_if_all_are_wanted_and_a_seed_repeats_itself() -> None:
    labels = _labels(30)
    assert sorted(balance(labels, 99, random.Random(0))) == list(range(30))
    assert select("balanced", labels, None, 12, 3) == select("balanced", labels, None, 12, 3)
    assert select("balanced", labels, None, 12, 3) != select("balanced", labels, None, 12, 4)
    assert len(select("random", labels, None, 12, 3)) == 12


def test_clusters_of_a_class_are_refused_where_classes_overlap() -> None:
    with pytest.raises(ValueError, match=r"selection='kmeans'.*'balanced', 'random' or 'all'"):
        select("kmeans", _labels(), torch.randn(300, 3), 12, 0)
