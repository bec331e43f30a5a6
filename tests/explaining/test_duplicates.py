"""Copies: found where they are, not found where there are none, whatever the network makes of pictures."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap.attention import make_keys
from timm_memwrap.explaining.duplicates import Sameness, keep_one
from timm_memwrap.explaining.neighbours import Neighbours, find_neighbours
from timm_memwrap.search import ExactIndex

COUNT = 50


def _neighbours(points: Tensor) -> Neighbours:
    keys = make_keys(points, "cosine")
    return find_neighbours(ExactIndex(keys), keys.vectors, min(COUNT, (len(points) - 1) // 2))


def _measured(points: Tensor, labels: Tensor | None = None) -> tuple[Neighbours, Sameness, Tensor]:
    """Returns neighbours, what they measure, and which of them show the same picture."""
    found = _neighbours(points)
    labels = torch.zeros(len(points), dtype=torch.long) if labels is None else labels
    sameness = Sameness.of(found, labels, found.positions.shape[1])
    return found, sameness, sameness.same(found.similarities, sameness.furthest(found, labels))


def _points(size: int, dimensions: int, offset: float, seed: int = 0) -> Tensor:
    """Points of some dimensions in 64, as far from the origin as `offset`: then all cosines are near 1."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(size, dimensions, generator=generator) @ torch.randn(dimensions, 64, generator=generator)
    return points + offset * torch.randn(64, generator=generator)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dimensions", [8, 20, 40])
def test_copies_are_found_and_nothing_else_is(dimensions: int, offset: float) -> None:
    points = _points(800, dimensions, offset)
    _, _, same = _measured(points)
    assert same.any(dim=1).float().mean() < 0.005
    noise = torch.randn(80, 64, generator=torch.Generator().manual_seed(1))
    copies = points[:80] + 0.01 * (points - points.mean(dim=0)).norm(dim=1).mean() * F.normalize(noise, dim=1)
    found, _, same = _measured(torch.cat([points, copies]))
    right = found.positions[800:] == torch.arange(80).unsqueeze(1)
    assert (same[800:] & right).any(dim=1).float().mean() > 0.9


def test_copies_are_found_where_every_picture_is_there_twice() -> None:
    points = _points(300, 20, 1.0)
    found, _, same = _measured(torch.cat([points, points * 1.01]))
    assert same.sum(dim=1).tolist() == [1] * 600
    assert (found.positions[same] % 300 == torch.arange(600) % 300).all()


@pytest.mark.parametrize("size", [2, 3, 6, 20])
def test_tight_classes_are_no_copies(size: int) -> None:
    """Samples of a network that puts each class in one place are near each other, and far from all others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30).repeat_interleave(size)
    points = torch.eye(64)[labels] + 0.02 * torch.randn(len(labels), 64, generator=generator)
    _, _, same = _measured(points, labels)
    assert same.any(dim=1).float().mean() < 0.01


def test_closeness_is_one_for_a_copy_and_zero_for_the_furthest() -> None:
    found, sameness, _ = _measured(_points(100, 20, 0.0))
    furthest = sameness.furthest(found, torch.zeros(100, dtype=torch.long))
    assert torch.equal(furthest, found.similarities[:, -1])
    closeness = sameness.closeness(found.similarities, furthest)
    assert closeness[:, -1].abs().max() == 0
    assert (closeness.diff(dim=1) <= 0).all()
    assert sameness.closeness(torch.ones(1, 1), torch.tensor([0.5])).tolist() == [[1.0]]


def test_of_copies_the_one_with_the_best_supported_label_is_kept() -> None:
    positions = torch.tensor([[1], [2], [1], [4], [3], [0]])
    found = Neighbours(torch.ones(6, 1), positions)
    same = torch.tensor([[True], [True], [False], [True], [True], [False]])
    support = torch.tensor([0.2, 0.3, 0.9, 0.5, 0.5, 0.1])
    # 0, 1 and 2 are a chain; of 3 and 4, which are supported alike, the first is kept.
    assert keep_one(found, same, support).tolist() == [2, 2, 2, 3, 3, 5]


def test_identical_samples_are_copies_in_any_memory() -> None:
    points = torch.cat([torch.eye(8)[:4], torch.eye(8)[:1]])
    _, _, same = _measured(points, torch.arange(5))
    assert same.any(dim=1).tolist() == [True, False, False, False, True]
