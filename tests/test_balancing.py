"""Which samples of several classes are chosen."""

import random

import torch

from timm_memwrap.balancing import balance
from timm_memwrap.selection import find_candidates, select


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
    for selection in ("balanced", "random"):
        assert find_candidates(selection, labels, 12, 3) == find_candidates(selection, labels, 12, 3)
        assert find_candidates(selection, labels, 12, 3) != find_candidates(selection, labels, 12, 4)
        assert len(find_candidates(selection, labels, 12, 3)) == 12


def test_herding_follows_the_mean_of_samples_of_all_classes() -> None:
    labels, points = _labels(2000), torch.randn(2000, 5, generator=torch.Generator().manual_seed(1))
    candidates = find_candidates("herding", labels, 20, 0)
    # As many as of four classes that exclude each other.
    assert len(candidates) == 400
    chosen = select("herding", labels, points, 20, 0)
    assert len(chosen) == 20
    assert {*chosen} <= {*candidates}
    directions = torch.nn.functional.normalize(points, dim=1)
    missed, by_chance = (
        (directions[some].mean(dim=0) - directions[candidates].mean(dim=0)).norm() for some in (chosen, candidates[:20])
    )
    assert missed < 0.5 * by_chance
