"""Every measure is taken of one bank, whatever happens to the model's meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from timm_memwrap import explain
from timm_memwrap.explaining import evaluate_counterfactuals, evaluate_explanations, memory_report
from timm_memwrap.explaining.reading import snapshot
from timm_memwrap.model import MemoryWrapModel


@contextmanager
def _reversing(model: MemoryWrapModel) -> Iterator[None]:
    """Reverses the bank after each read, as another thread might."""
    bank = model.memory_bank
    hook = model.calibration.register_forward_hook(lambda *_: bank.select(reversed(range(len(bank)))) and None)
    try:
        yield
    finally:
        hook.remove()


def _counterfactuals(model: MemoryWrapModel, images: torch.Tensor) -> Any:
    data = TensorDataset(images, torch.arange(len(images)) % 4)
    memory = {i: torch.full((3, 32, 32), float(i + 1)) for i in model.memory_bank.ids}
    decoders = {label: nn.Threshold(label, 0.5) for label in range(4)}
    return evaluate_counterfactuals(model, data, memory, decoders, nn.Identity(), progress=False)


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, images: explain(model, images),
        lambda model, images: evaluate_explanations(
            model, TensorDataset(images, torch.arange(len(images)) % 4), progress=False
        ),
        lambda model, images: memory_report(
            model, TensorDataset(images, torch.arange(len(images)) % 4), progress=False
        ),
        _counterfactuals,
    ],
    ids=["explain", "evaluate_explanations", "memory_report", "evaluate_counterfactuals"],
)
def test_a_bank_that_changes_meanwhile_changes_nothing(
    measure: Callable[..., Any], model: MemoryWrapModel, make_images: Callable[..., torch.Tensor]
) -> None:
    images, ids = make_images(5), model.memory_bank.ids
    expected = measure(model, images)
    with _reversing(model):
        assert measure(model, images) == expected
    # The bank did change.
    assert sorted(model.memory_bank.ids) == sorted(ids)
    assert model.memory_bank.derived is None


def test_snapshots_share_what_was_prepared(make_model: Callable[..., MemoryWrapModel]) -> None:
    model = make_model("wrapped")
    one = snapshot(model)
    with torch.no_grad():
        one(torch.zeros(1, 3, 32, 32))
    prepared = model.memory_bank.derived
    assert prepared is not None
    assert snapshot(model).memory_bank.derived is prepared
    model.memory_bank.select([0, 1])
    assert model.memory_bank.derived is None
    assert one.memory_bank.derived is prepared
    assert len(one.memory_bank) == 12
