"""Rows of new classes: what they find, and what the trained classes lose by them."""

import pytest
import torch
from torch import Tensor

from timm_memwrap.new_classes import new_rows

TRAINED, NEW, WIDTH = 5, 2, 64


def _world(shots: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns a classifier of the first classes, features and labels in a memory, and others to test with."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(TRAINED + NEW, WIDTH, generator=generator) * 1.2

    def draw(counts: list[int]) -> tuple[Tensor, Tensor]:
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        noise = 2 * torch.randn(len(labels), WIDTH, generator=generator)
        # As behind a ReLU, at any scale.
        return scale * (centres[labels] + noise).clamp(min=0), labels

    many, targets = draw([200] * TRAINED + [1] * NEW)
    kept = targets < TRAINED
    x = torch.cat([many[kept] / scale, torch.ones(int(kept.sum()), 1)], dim=1)
    one_hot = torch.nn.functional.one_hot(targets[kept], TRAINED).float()
    solution = torch.linalg.solve(x.T @ x + 10 * torch.eye(WIDTH + 1), x.T @ (8 * one_hot))
    memory, labels = draw([60] * TRAINED + [shots] * NEW)
    return solution[:-1].T / scale, solution[-1], memory, labels, *draw([200] * (TRAINED + NEW))


def _accuracies(rows: Tensor, biases: Tensor, test: Tensor, targets: Tensor) -> tuple[float, float]:
    right = (test @ rows.T + biases).argmax(dim=1) == targets
    return right[targets < TRAINED].float().mean().item(), right[targets >= TRAINED].float().mean().item()


def _with_new(world: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    weight, bias, memory, labels, *_ = world
    # A read of a sample is made of others, so it is as new to the rows as is an image.
    reads, targets = world[4][::2], world[5][::2]
    right = (targets < TRAINED) & ((reads @ weight.T + bias).argmax(dim=1) == targets)
    reads = reads[right]
    rows, biases = new_rows(weight, bias, memory, labels, reads, NEW)
    return torch.cat([weight, rows]), torch.cat([bias, biases])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_few_samples_tell_a_new_class_and_cost_the_others_little(scale: float) -> None:
    found = []
    for shots in (1, 5, 40):
        pairs = []
        for seed in range(5):
            world = _world(shots, seed, scale)
            old, _ = _accuracies(*world[:2], *world[4:])
            with_new = _accuracies(*_with_new(world), *world[4:])
            pairs.append((old - with_new[0], with_new[1]))
        lost, new = torch.tensor(pairs).mean(dim=0).tolist()
        assert lost < 0.02
        found.append(new)
    assert 0.1 < found[0] < found[1] < found[2]
    assert found[2] > 0.6


def test_rows_are_the_same_each_time_and_in_any_order() -> None:
    world = _world(5)
    rows, biases = _with_new(world)
    again = _with_new(world)
    assert torch.equal(rows, again[0])
    assert torch.equal(biases, again[1])
    order = torch.randperm(len(world[2]), generator=torch.Generator().manual_seed(1))
    shuffled = _with_new((*world[:2], world[2][order], world[3][order], *world[4:]))
    assert torch.allclose(shuffled[0], rows, rtol=1e-2, atol=1e-2 * float(rows.abs().max()))


def test_gradients_and_inference_mode_leave_rows_as_they_are() -> None:
    world = _world(5)
    rows, _ = _with_new(world)
    with torch.inference_mode():
        inside, _ = _with_new(world)
    assert torch.equal(rows, inside)
    assert not rows.requires_grad


@pytest.mark.parametrize("kept", [[], [2]])
def test_a_memory_may_lack_samples_of_trained_classes(kept: list[int]) -> None:
    weight, bias, memory, labels, *test = _world(5)
    some = (labels >= TRAINED) | torch.isin(labels, torch.tensor(kept, dtype=torch.long))
    memory, labels = memory[some], labels[some]
    reads = memory[labels < TRAINED]
    rows, biases = new_rows(weight, bias, memory, labels, reads, NEW)
    assert rows.isfinite().all()
    assert biases.isfinite().all()
    _, new = _accuracies(torch.cat([weight, rows]), torch.cat([bias, biases]), *test)
    assert new > 0.1
