"""Temperatures against a grid, and what calibrating changes and what not."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_memwrap
from timm_memwrap.explaining import fit_temperature
from timm_memwrap.familiarity import fit_reference
from timm_memwrap.model import MemoryWrapModel


def _labelled(make_images: Callable[..., torch.Tensor], count: int = 24) -> TensorDataset:
    return TensorDataset(make_images(count, seed=5), torch.arange(count) % 4)


@pytest.mark.parametrize("factor", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_temperature_of_a_grid_fits_better(factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = factor * torch.randn(200, 5, generator=generator)
    labels = torch.where(
        torch.rand(200, generator=generator) < 0.7,
        logits.argmax(dim=1),
        torch.randint(0, 5, (200,), generator=generator),
    )
    found = F.cross_entropy(logits / fit_temperature(logits, labels), labels)
    grid = torch.logspace(-2, 2, 2001)
    best = min(F.cross_entropy(logits / temperature, labels) for temperature in grid)
    assert found <= best + 1e-6


def test_the_temperature_of_labels_drawn_from_the_logits_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 4, generator=generator)
    labels = (logits / 2.5).softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)


def test_calibrating_changes_the_temperature_alone(
    model: MemoryWrapModel, make_images: Callable[..., torch.Tensor]
) -> None:
    data = _labelled(make_images)
    images, labels = data.tensors
    with torch.no_grad():
        before = model(images, return_readout=True)
        temperature = timm_memwrap.calibrate(model, data, progress=False)
        after = model(images, return_readout=True)
    assert temperature == pytest.approx(fit_temperature(before.logits, labels))
    assert temperature == model.temperature
    torch.testing.assert_close(after.logits * temperature, before.logits)
    assert torch.equal(after.weights, before.weights)
    assert model.memory_bank.reference == fit_reference(model, before.remainder)
    assert not model.memory_is_stale()


def test_the_temperature_before_does_not_matter(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped")
    first = timm_memwrap.calibrate(model, _labelled(make_images), progress=False)
    model.temperature = 17.0
    again = timm_memwrap.calibrate(model, DataLoader(_labelled(make_images), 5), progress=False)
    assert again == pytest.approx(first, rel=1e-4)


def test_without_a_wrong_prediction_the_temperature_stays(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, images = make_model("wrapped"), make_images(6)
    model.temperature = 3.0
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    with caplog.at_level(logging.WARNING):
        assert timm_memwrap.calibrate(model, TensorDataset(images, labels), progress=False) == 3.0
    assert "All 6 images" in caplog.text
    assert model.memory_bank.reference.count == 6, "familiarity asks for no errors"


def test_nothing_to_calibrate_with_is_refused(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match="empty"):
        timm_memwrap.calibrate(make_model("wrapped"), [], progress=False)
    model = make_model("wrapped")
    model.memory_bank.clear()
    with pytest.raises(ValueError, match="build_memory_bank"):
        timm_memwrap.calibrate(model, _labelled(make_images), progress=False)


def test_a_stale_memory_is_warned_of(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The temperature would be fitted to wrong evidence."""
    model = make_model("wrapped")
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(2)
    with caplog.at_level(logging.WARNING):
        timm_memwrap.calibrate(model, _labelled(make_images), progress=False)
    assert "stale" in caplog.text


def test_calibrated_familiarity_is_uniform_over_images_like_those_given(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped")
    timm_memwrap.calibrate(model, _labelled(make_images, 200), progress=False)
    found = sorted(each.familiarity for each in timm_memwrap.explain(model, make_images(200, seed=11), contenders=0))
    assert max(abs(value - (i + 0.5) / 200) for i, value in enumerate(found)) < 0.15


def test_a_memory_that_changes_meanwhile_is_not_calibrated(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    """What was fitted is of the samples that were there when it began."""
    model, data = make_model("wrapped"), _labelled(make_images)

    class Forgets(TensorDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            if index == 20:
                model.memory_bank.remove([model.memory_bank.ids[0]])
            return super().__getitem__(index)

    with pytest.raises(ValueError, match=r"changed while.*again"):
        timm_memwrap.calibrate(model, Forgets(*data.tensors), progress=False)
    assert model.temperature == 1.0
    assert model.memory_bank.reference.count == 0
    assert not model.calibration.confidence.any()
