"""A bank's state: one snapshot at a time, and filled in place by loaders that know no state dict."""

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from timm_memwrap.memory_bank import MemoryBank


def make_bank(size: int = 4, **kwargs: Any) -> MemoryBank:
    bank = MemoryBank()
    generator = torch.Generator().manual_seed(size)
    encodings = torch.randn(size, 3, generator=generator)
    bank.replace(encodings, torch.arange(size), [f"{size}-{i}" for i in range(size)], **kwargs)
    return bank


def filled_like(bank: MemoryBank) -> MemoryBank:
    """Returns a bank that a loader filled in place from another's state dict, as transformers does."""
    other = MemoryBank()
    other.reserve(bank.layout())
    for name, tensor in bank.state_dict().items():
        assert getattr(other, name).shape == tensor.shape
        setattr(other, name, tensor)
    return other


def same(one: MemoryBank, other: MemoryBank) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"images": torch.ones(4, 3, 2, 2, dtype=torch.uint8)}, {"dtype": torch.float16}],
    ids=["plain", "images", "half"],
)
def test_a_bank_that_is_filled_in_place_is_the_bank(kwargs: dict[str, Any]) -> None:
    bank = make_bank(**kwargs)
    other = filled_like(bank)
    assert other.ids == bank.ids
    assert torch.equal(other.filled()[0], bank.filled()[0])
    assert same(other, bank)
    assert repr(other) == repr(bank)


def test_a_loader_may_write_into_the_tensors_themselves() -> None:
    bank, other = make_bank(), MemoryBank()
    other.reserve(bank.layout())
    for name, tensor in other.state_dict().items():
        tensor.copy_(bank.state_dict()[name])
    assert same(other, bank)
    assert other.ids == bank.ids


READS: dict[str, Callable[[MemoryBank], object]] = {
    "ids": lambda bank: bank.ids,
    "samples": lambda bank: bank.filled(),
    "snapshot": lambda bank: bank.snapshot(),
    "select": lambda bank: bank.select([0]),
    "append": lambda bank: bank.append(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), ["a"]),
    "contains": lambda bank: "4-0" in bank,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_never_arrived_is_an_error_until_it_is_cleared(read: Callable[[MemoryBank], object]) -> None:
    bank = MemoryBank()
    bank.reserve(make_bank().layout())
    with pytest.raises(ValueError, match="The memory of 4 samples that the model was made for is not there"):
        read(bank)
    bank.clear()
    assert not len(bank)
    assert not bank.state_dict()


def test_an_unfilled_bank_takes_a_state_dict_and_a_replacement() -> None:
    bank, other = make_bank(), MemoryBank()
    other.reserve(bank.layout())
    other.load_state_dict(make_bank(7).state_dict())
    assert same(other, make_bank(7))
    other = MemoryBank()
    other.reserve(bank.layout())
    other.replace(*make_bank(5).filled(), [f"5-{i}" for i in range(5)])
    assert same(other, make_bank(5))


@pytest.mark.parametrize("change", ["copy", "move"])
def test_an_unfilled_bank_is_copied_and_moved_unfilled(change: str) -> None:
    bank, other = make_bank(), MemoryBank()
    other.reserve(bank.layout())
    other = copy.deepcopy(other) if change == "copy" else other.to("cpu")
    for name, tensor in bank.state_dict().items():
        setattr(other, name, tensor)
    assert same(other, bank)
    assert other.ids == bank.ids


def test_the_layout_stays_true_to_the_samples() -> None:
    bank, layout = MemoryBank(), {"num_classes": 2}
    bank.reserve(layout)
    assert not len(bank)
    source = make_bank()
    bank.replace(*source.filled(), source.ids)
    assert layout == {"num_classes": 2, **bank.layout()}
    bank.append(torch.ones(1, 3), torch.ones(1, dtype=torch.long), ["more"])
    assert layout["encodings"] == ["float32", [5, 3]]
    assert layout == {"num_classes": 2, **bank.layout()}
    assert same(filled_like(bank), bank)
    bank.set_class_names(["ant", "bee"])
    assert layout["meaning"] == ["uint8", [len(bank.state_dict()["meaning"])]]
    bank.clear()
    assert layout == {"num_classes": 2}


@pytest.mark.parametrize(
    "layout",
    [
        {"encodings": ["float32", [4, 3]]},
        {**make_bank().layout(), "other": ["float32", [1]]},
        {**make_bank().layout(), "labels": ["int64", "4"]},
        {**make_bank().layout(), "labels": ["int64", [-4]]},
        {**make_bank().layout(), "labels": ["nothing", [4]]},
        {**make_bank().layout(), "labels": 4},
    ],
    ids=["a part", "more", "a text", "negative", "no dtype", "a number"],
)
def test_what_is_no_layout_is_refused(layout: dict[str, Any]) -> None:
    bank = MemoryBank()
    with pytest.raises(ValueError, match="memory_layout"):
        bank.reserve(layout)
    assert not len(bank)


def test_a_snapshot_holds_one_state_while_others_change_the_bank() -> None:
    bank, sources = make_bank(3), [make_bank(3), make_bank(9)]
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for source in sources:
                bank.replace(*source.filled(), source.ids)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(3000):
            seen = bank.snapshot()
            encodings, labels = seen.filled()
            assert len(encodings) == len(labels) == len(seen.ids)
            assert seen.largest_label == int(labels.max())
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
