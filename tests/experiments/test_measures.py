"""Measures whose value is known beforehand."""

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_memwrap
from timm_memwrap.experiments.measures import (
    Encoded,
    classification_measures,
    memory_measures,
    redrawn_measures,
    remember,
)
from timm_memwrap.explaining import fit_temperature
from timm_memwrap.explaining.metrics import expected_calibration_error
from timm_memwrap.model import MemoryWrapModel

CLASSES, EACH, WIDTH = 4, 6, 96


def _model(**options: object) -> MemoryWrapModel:
    plain = timm.create_model("test_resnet", num_classes=CLASSES)
    with torch.no_grad():
        # The first columns of an encoding are its logits.
        plain.fc.weight.copy_(torch.eye(CLASSES, plain.head_hidden_size))
        plain.fc.bias.zero_()
    return timm_memwrap.wrap(plain, read_head="logits", **options).eval()  # type: ignore[arg-type]


def _clusters(per_class: int = EACH, seed: int = 0) -> Encoded:
    """Encodings whose logits are around one corner for each class."""
    labels = torch.arange(CLASSES * per_class) % CLASSES
    noise = torch.randn(len(labels), CLASSES, generator=torch.Generator().manual_seed(seed))
    return Encoded(F.pad(9 * torch.eye(CLASSES)[labels] + 0.3 * noise, (0, WIDTH - CLASSES)), labels)


@pytest.mark.parametrize("options", [{}, {"classifier": "vote"}], ids=["logits", "vote"])
def test_in_well_parted_classes_the_memory_is_everything(options: dict) -> None:
    model, memory = _model(**options), _clusters()
    remember(model, memory, range(memory.size))
    found = memory_measures(model, _clusters(3, seed=1).batches(), seed=0)
    assert found["accuracy"] == found["explanation_accuracy"] == found["identical_class_rate"] == 1
    assert found["accuracy_without_memory"] == 0
    # Each sample found is of the right class, so each that it is taken for is of a wrong one.
    assert found["accuracy_shuffled"] == 0
    assert found["shuffled_flip_rate"] == 1
    assert found["deletion_flip_rate"] == 0
    # The query is the answer.
    assert found["follows_exchanged_answer"] == 1


def test_without_its_strongest_sample_a_prediction_may_flip() -> None:
    model, memory = _model(), _clusters(1)
    remember(model, memory, list(range(CLASSES)))
    assert memory_measures(model, _clusters(2, seed=1).batches(), seed=0)["deletion_flip_rate"] == 1


def test_a_model_that_reads_the_input_too_keeps_what_it_saw() -> None:
    model = timm.create_model(
        "memwrap_test_resnet", num_classes=CLASSES, read_head="identity", classifier="linear"
    ).eval()
    with torch.no_grad():
        model.head.classifier.weight.copy_(torch.eye(CLASSES, WIDTH).repeat(1, 2))
        model.head.classifier.bias.zero_()
    memory = _clusters()
    remember(model, memory, range(memory.size))
    found = memory_measures(model, _clusters(3, seed=1).batches(), seed=0)
    assert found["accuracy_without_memory"] == 1
    assert found["shuffled_flip_rate"] < 1
    # Its query holds no answer, in a memory that is drawn as in a bank.
    assert found["follows_exchanged_answer"] is None
    drawn = redrawn_measures(model, _clusters(3, seed=1), memory, 9, batch_size=6, draws=2, seed=0)
    assert drawn["follows_exchanged_answer"] is None


def test_a_memory_drawn_whole_is_the_bank() -> None:
    inputs, memory = _clusters(5, seed=1), _clusters()
    model = _model()
    remember(model, memory, range(memory.size))
    bank = memory_measures(model, inputs.batches(), seed=3)
    drawn = redrawn_measures(model, inputs, memory, memory.size, batch_size=20, draws=2, seed=3)
    # What is shuffled is drawn by position.
    for name in set(bank) - {"shuffled_flip_rate", "accuracy_shuffled", "random_flip_rate"}:
        assert drawn[name] == pytest.approx(bank[name], abs=1e-6), name


def test_a_memory_is_drawn_anew_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def spy(model: MemoryWrapModel, memory: Encoded, positions: list[int]) -> None:
        seen.append(sorted(positions))
        remember(model, memory, positions)

    monkeypatch.setattr("timm_memwrap.experiments.measures.remember", spy)
    redrawn_measures(_model(), _clusters(5, seed=1), _clusters(), 7, batch_size=10, draws=2, seed=0)
    assert len(seen) == 4
    assert len({tuple(positions) for positions in seen}) == 4
    assert all(len(set(positions)) == 7 for positions in seen)


def test_no_image_is_scaled_by_what_it_chose() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(60, CLASSES, generator=generator)
    labels = torch.randint(0, CLASSES, (60,), generator=generator)
    found = classification_measures(logits, labels, seed=4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    scaled = torch.empty_like(logits)
    for own, other in ((order[:30], order[30:]), (order[30:], order[:30])):
        scaled[own] = logits[own] / fit_temperature(logits[other], labels[other])
    right = logits.argmax(dim=1) == labels
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    for name, values in (("calibration_error", logits), ("calibration_error_scaled", scaled)):
        expected = expected_calibration_error(values.softmax(dim=1).amax(dim=1), right)
        assert found[name] == pytest.approx(expected)
    likelihood = scaled.softmax(dim=1)[torch.arange(60), labels].log().mean()
    assert found["negative_log_likelihood_scaled"] == pytest.approx(-float(likelihood), rel=1e-5)
