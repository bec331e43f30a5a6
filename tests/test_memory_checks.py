"""One check and one wording for all that read a memory."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from memory_models import CLASSES, fill, new_images, new_model

import timm_memwrap
from timm_memwrap import MemoryWrapModel, wrap
from timm_memwrap.memory_checks import check_memory, check_model


def test_a_model_without_memory_or_classes_is_refused_with_the_fix() -> None:
    for check in (check_model, check_memory):
        with pytest.raises(ValueError, match=r"ResNet is not a Memory Wrap model.*timm_memwrap\.wrap"):
            check(timm.create_model("test_resnet"))
        with pytest.raises(ValueError, match=r"num_classes=0.*reset_classifier\(n\)"):
            check(new_model(num_classes=0))
    check_model(new_model())
    with pytest.raises(ValueError, match=r"bank is empty.*build_memory_bank"):
        check_memory(new_model())


def _foreign(model: MemoryWrapModel, path: Path) -> None:
    other = fill(new_model(backbone="test_vit"))
    other.memory_bank.set_provenance(encoder="")
    model.memory_bank.load(other.memory_bank.save(path))


def _other_labels(model: MemoryWrapModel, _path: Path) -> None:
    bank = model.memory_bank
    bank.replace(bank.encodings, bank.labels + 1, bank.ids, provenance=bank.provenance)


READS: dict[str, Callable[[MemoryWrapModel], object]] = {
    "forward": lambda model: model(new_images()),
    "read": lambda model: model.read(model.encode(new_images())),
    "own predictions": lambda model: model.own_predictions(),
    "explain": lambda model: timm_memwrap.explain(model, new_images()),
    "check": check_memory,
}


@pytest.mark.parametrize("variant", ["mlp", "linear identity l2", "probabilities", "joint", "vote"])
@pytest.mark.parametrize("change", [_foreign, _other_labels])
@pytest.mark.parametrize("read", READS)
def test_a_bank_of_another_model_is_not_read(variant: str, change: Callable, read: str, tmp_path: Path) -> None:
    model = fill(new_model(variant))
    READS[read](model)
    change(model, tmp_path / "bank.safetensors")
    why = r"\[20, 64\].*of another backbone" if change is _foreign else f"a label {CLASSES}, outside num_classes"
    with pytest.raises(ValueError, match=rf"{why}.*build_memory_bank"):
        READS[read](model)


def test_a_compiled_model_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"OptimizedModule is not .*unwrap_model\(model\)"):
        check_memory(torch.compile(fill(new_model()), backend="eager"))


def test_a_write_that_is_not_watched_is_refused() -> None:
    model = fill(new_model())
    check_memory(model, stale="refuse", rehash=True)
    weight = next(model.backbone.parameters())
    weight.data.copy_(weight + 1)
    with pytest.raises(ValueError, match="stale"):
        check_memory(model, stale="refuse", rehash=True)
    # A new bank is true to the weights as they are.
    weight.data.copy_(weight + 1)
    fill(model)
    check_memory(model, stale="refuse", rehash=True)


def _trained(model: MemoryWrapModel) -> MemoryWrapModel:
    with torch.no_grad():
        model.get_classifier().weight.mul_(2)
    return model


@pytest.mark.parametrize(
    ("make", "random"),
    [
        (lambda: new_model("probabilities"), True),
        (lambda: copy.deepcopy(new_model("probabilities")), True),
        (lambda: _trained(new_model("probabilities")), False),
        (lambda: wrap(timm.create_model("test_resnet", num_classes=CLASSES)), False),
        (lambda: _reset(wrap(timm.create_model("test_resnet", num_classes=5))), True),
        (lambda: _trained(_reset(new_model("probabilities"))), False),
        (lambda: _reset(new_model("mlp")), False),
    ],
    ids=["created", "copied", "trained", "wrapped", "reset", "reset and trained", "no classifier kept"],
)
def test_an_untrained_classifier_is_told(
    make: Callable[[], MemoryWrapModel], random: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    told = "num_classes=4 and not trained"
    model = make()
    fill(model)
    assert (told in caplog.text) == random
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert (told in caplog.text) == random
    caplog.clear()
    fill(timm_memwrap.from_pretrained(tmp_path))
    assert told not in caplog.text


def _reset(model: MemoryWrapModel) -> MemoryWrapModel:
    model.reset_classifier(CLASSES)
    return model


def test_a_classifier_for_other_classes_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    fill(new_model("probabilities")).save_pretrained(tmp_path)
    caplog.clear()
    fill(timm_memwrap.from_pretrained(tmp_path, num_classes=5))
    assert "num_classes=5 and not trained" in caplog.text


def test_a_stale_bank_is_told_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = fill(new_model())
    with caplog.at_level(logging.WARNING):
        check_memory(model)
        check_memory(model, stale="refuse")
        assert not caplog.records
        with torch.no_grad():
            next(model.backbone.parameters()).add_(1.0)
        check_memory(model)
    assert "stale" in caplog.text
    with pytest.raises(ValueError, match="stale"):
        check_memory(model, stale="refuse")
