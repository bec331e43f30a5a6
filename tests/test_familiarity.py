"""Familiarity against numpy, by what it means, and through all that happens to a model with a memory."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from memory_models import fill, fill_with_encodings, new_images, new_model

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.familiarity import familiarity, fit_reference, quantiles_of, reference_quantiles
from timm_memwrap.memory_bank import Reference

LEVELS = np.linspace(0, 1, 101)


def _read(model: MemoryWrapModel, seed: int = 1) -> timm_memwrap.MemoryReadout:
    with torch.no_grad():
        return model.read(model.encode(new_images(8, seed)))


def _calibrated(variant: str = "joint") -> MemoryWrapModel:
    model = fill(new_model(variant))
    model.memory_bank.set_reference(fit_reference(model, _read(model, seed=9).remainder))
    return model


@pytest.mark.parametrize("variant", ["joint", "probabilities", "mlp", "linear identity l2", "vote"])
def test_it_is_the_share_of_the_reference_that_is_further_from_the_memory(variant: str) -> None:
    readout = _read(fill(new_model(variant)))
    remainders = np.random.default_rng(0).normal(float(readout.remainder.mean()), float(readout.remainder.std()), 500)
    found = familiarity(
        readout.remainder, torch.tensor(quantiles_of(torch.from_numpy(remainders)), dtype=torch.float32)
    )
    expected = 1 - np.interp(readout.remainder.numpy(), np.quantile(remainders, LEVELS), LEVELS)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
    further = [np.mean(remainders > value) for value in readout.remainder.numpy()]
    np.testing.assert_allclose(found.numpy(), further, atol=0.02)


def test_nearer_is_more_familiar_from_0_to_1() -> None:
    steps = torch.linspace(0, 2, 1000)
    # Equal quantiles, as of a reference with copies, too.
    for quantiles in (torch.linspace(0.2, 1.5, 101), torch.full((101,), 0.7)):
        found = familiarity(steps, quantiles)
        assert bool((found.diff() <= 0).all())
        assert (float(found[0]), float(found[-1])) == (1.0, 0.0)


@pytest.mark.parametrize("variant", ["joint", "probabilities", "mlp", "vote"])
def test_without_held_out_images_each_sample_is_read_without_itself(variant: str) -> None:
    model = fill(new_model(variant))
    encodings, _ = model.memory_bank.filled()
    with torch.no_grad():
        left_out = [float(model.read(encodings[[i]], hidden=torch.tensor([[i]])).remainder) for i in range(20)]
    expected = np.quantile(left_out, LEVELS)
    np.testing.assert_allclose(reference_quantiles(model).numpy(), expected, atol=1e-4)


def test_a_copy_of_a_sample_does_not_make_it_familiar() -> None:
    model = fill(new_model("joint"))
    alone = reference_quantiles(model)
    (encodings, labels), size = model.memory_bank.filled(), len(model.memory_bank)
    model.memory_bank.replace(encodings.repeat(2, 1), labels.repeat(2), range(2 * size))
    found = reference_quantiles(model)
    # Between the ends, quantiles of each value twice are others.
    torch.testing.assert_close(found[[0, -1]], alone[[0, -1]], atol=1e-3, rtol=0)
    torch.testing.assert_close(found, alone, atol=0.05, rtol=0)


@pytest.mark.parametrize("dense", [4096, 0])
def test_of_a_large_memory_some_samples_stand_for_all(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_memwrap.bank_memory.LARGE", dense)
    model = fill_with_encodings(new_model("joint"), 1500)
    found = reference_quantiles(model)
    assert found.shape == (101,)
    assert bool((found.diff() >= 0).all())
    assert reference_quantiles(model) is found, "made once"
    model.memory_bank.remove([0])
    assert reference_quantiles(model) is not found, "of these samples"


def test_samples_that_come_or_go_make_the_reference_void() -> None:
    model = _calibrated()
    reference, bank = model.memory_bank.reference, model.memory_bank
    assert reference.count == 8
    for keep in (
        lambda: bank.set_class_names(["a", "b", "c", "d"]),
        lambda: bank.set_provenance(encoder="x"),
        lambda: bank.store_as(torch.float16),
    ):
        keep()
        assert bank.reference == reference
    encodings, labels = (part.clone() for part in bank.filled())
    for change in (
        lambda: bank.append(encodings[:1] + 1, labels[:1], ["new"]),
        lambda: bank.remove([0]),
        lambda: bank.replace(encodings.float(), labels, range(20)),
    ):
        bank.set_reference(reference)
        change()
        assert bank.reference == Reference()
    bank.clear()
    with pytest.raises(ValueError, match="empty"):
        bank.set_reference(reference)


def test_a_reference_of_another_way_to_read_is_not_used() -> None:
    """A bank can be given to another model of the same backbone."""
    model, other = _calibrated("joint"), new_model("probabilities")
    other.memory_bank.load_state_dict(model.memory_bank.state_dict())
    assert other.memory_bank.reference == model.memory_bank.reference
    found = reference_quantiles(other)
    other.memory_bank.set_reference(Reference())
    torch.testing.assert_close(reference_quantiles(other), found)


def test_it_comes_back_with_the_model(tmp_path: Path) -> None:
    model = _calibrated()
    timm_memwrap.save_pretrained(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert again.memory_bank.reference == model.memory_bank.reference
    readouts = [(each, _read(each)) for each in (model, again)]
    one, two = (familiarity(readout.remainder, reference_quantiles(each)) for each, readout in readouts)
    assert torch.equal(one, two)
    assert 0 < one.min() <= one.max() < 1
