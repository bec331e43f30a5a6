"""Measures where images may have several classes, against scikit-learn and loops over inputs and classes."""

import math
from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from timm.task.evaluator import MultiLabelClassificationEvaluator
from torch.utils.data import TensorDataset

from timm_memwrap import MemoryWrapModel, explain
from timm_memwrap.explaining import (
    MultiLabelMetrics,
    calibrate,
    evaluate_counterfactuals,
    evaluate_explanations,
    evaluate_unknown,
    fit_temperature,
    memory_report,
)
from timm_memwrap.explaining.ranking import average_precision

Make = Callable[..., MemoryWrapModel]
MakeImages = Callable[..., torch.Tensor]


@pytest.fixture
def labels() -> torch.Tensor:
    labels = (torch.rand(30, 4, generator=torch.Generator().manual_seed(5)) < 0.4).long()
    # A class that no input has.
    labels[:, 3] = 0
    return labels


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_that_of_scikit_learn_and_timm(ties: bool) -> None:
    scores, positive = torch.randn(60), torch.rand(60) < 0.3
    if ties:
        scores = scores.round()
    expected = average_precision_score(positive.numpy(), scores.numpy())
    assert average_precision(scores, positive) == pytest.approx(expected)
    evaluator = MultiLabelClassificationEvaluator()
    evaluator.update(scores.unsqueeze(1), positive.unsqueeze(1).float())
    assert evaluator.compute()["map"] == pytest.approx(100 * expected)
    assert average_precision(scores, torch.zeros(60, dtype=torch.bool)) is None


def test_predictions_are_measured_as_elsewhere(
    several: MemoryWrapModel, make_images: MakeImages, labels: torch.Tensor
) -> None:
    images = make_images(30)
    found = evaluate_explanations(several, TensorDataset(images, labels), progress=False)
    assert isinstance(found, MultiLabelMetrics)
    with torch.no_grad():
        logits = several(images)
    said = logits > 0
    expected = [average_precision_score(labels[:, i], logits[:, i]) for i in range(3)]
    assert found.mean_average_precision == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert [each.average_precision for each in found.by_class] == [*map(pytest.approx, expected), None]
    assert found.f1 == pytest.approx(f1_score(labels, said, average="micro"))
    assert found.accuracy == pytest.approx(float((said == labels.bool()).float().mean()))
    assert found.exact_match == pytest.approx(float((said == labels.bool()).all(dim=1).float().mean()))
    assert found.classes_present == pytest.approx(float(labels.sum()) / 30)
    assert found.classes_predicted == pytest.approx(float(said.sum()) / 30)
    assert (found.mean_average_precision_plain is None) == (not several.keeps_classifier)
    for i, each in enumerate(found.by_class):
        assert each.count == labels[:, i].sum()
        assert each.recall == (None if i == 3 else pytest.approx(float(said[labels[:, i] == 1, i].float().mean())))
    assert not any(isinstance(value, float) and math.isnan(value) for value in found.to_dict().values())


def test_figures_about_explanations_are_those_of_the_explanations(
    several: MemoryWrapModel, make_images: MakeImages, labels: torch.Tensor
) -> None:
    images = make_images(30)
    found = evaluate_explanations(several, TensorDataset(images, labels), progress=False)
    pairs, missed = [], []
    for explanation, row in zip(explain(several, images, top_k=16), labels, strict=True):
        said = explanation.classes if explanation.present else ()
        pairs += [(each, bool(row[each.prediction])) for each in said]
        absent = {*row.nonzero().flatten().tolist()} - {each.prediction for each in said}
        # All classes of an input are read from the same samples.
        missed += [any(label in sample.labels for sample in explanation.samples[:5]) for label in absent]

    def mean(values: list[float | bool]) -> float:
        return pytest.approx(sum(values) / len(values), abs=1e-5)

    assert found.explanation_accuracy == mean([each.samples[0].is_example for each, _ in pairs])
    assert found.explained_rate == mean([any(s.is_example for s in each.samples[:5]) for each, _ in pairs])
    identical = [each.prediction in each.samples[0].labels for each, _ in pairs]
    assert found.identical_class_rate == mean(identical)
    wrong = [same for same, (_, right) in zip(identical, pairs, strict=True) if not right]
    assert found.identical_class_rate_wrong == mean(wrong)
    assert found.missed_class_shown == mean(missed)
    assert found.weight_on_prediction == mean([sum(s.weight for s in each.examples) for each, _ in pairs])
    assert found.in_memory == 0


def test_batches_of_any_size_give_the_same_figures(
    make_several_model: Make, make_images: MakeImages, labels: torch.Tensor
) -> None:
    model, data = make_several_model(), TensorDataset(make_images(30), labels)
    whole, parts = (
        evaluate_explanations(model, torch.utils.data.DataLoader(data, size), progress=False).to_dict()
        for size in (30, 7)
    )
    for name, value in whole.items():
        if name != "by_class":
            assert value == pytest.approx(parts[name], abs=1e-4), name


def test_a_model_that_predicts_nothing_has_no_figures_of_explanations(
    make_several_model: Make, make_images: MakeImages
) -> None:
    model = make_several_model()
    with torch.no_grad():
        model.backbone.get_classifier().bias -= 100
    found = evaluate_explanations(model, TensorDataset(make_images(6), torch.zeros(6, 4)), progress=False)
    assert found.accuracy == found.exact_match == 1
    assert found.mean_average_precision is found.explanation_accuracy is found.f1 is found.deletion_drop is None
    assert "class 0" in str(found)
    assert found.to_json()


def test_labels_of_the_other_kind_are_refused(
    make_several_model: Make, make_model: Make, make_images: MakeImages, labels: torch.Tensor
) -> None:
    several, single = TensorDataset(make_images(30), labels), TensorDataset(make_images(30), labels[:, 0])
    with pytest.raises(ValueError, match=r"data say several classes per image, those of the memory one class"):
        evaluate_explanations(make_model("wrapped"), several, progress=False)
    with pytest.raises(ValueError, match=r"data say one class per image, those of the memory several classes"):
        evaluate_explanations(make_several_model(), single, progress=False)


def test_what_compares_classes_that_exclude_each_other_is_refused(
    make_several_model: Make, make_images: MakeImages, labels: torch.Tensor
) -> None:
    model, data = make_several_model(), TensorDataset(make_images(30), labels)
    for name, call in {
        "memory_report": lambda: memory_report(model, data),
        "evaluate_unknown": lambda: evaluate_unknown(model, data, [make_images(2)]),
        "evaluate_counterfactuals": lambda: evaluate_counterfactuals(model, data, data, {}, lambda images: images),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} is for classes that exclude each other.*class indices"):
            call()


def test_the_temperature_fits_all_classes_together(make_several_model: Make, make_images: MakeImages) -> None:
    model, images = make_several_model(), make_images(30)
    with torch.no_grad():
        logits = model(images)
    labels = (torch.rand(30, 4) < (logits / 3).sigmoid()).long()
    before = [each.classes for each in explain(model, images, contenders=0)]
    temperature = calibrate(model, TensorDataset(images, labels), progress=False)
    assert temperature == model.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-4)

    def loss(temperature: float) -> float:
        divided = logits.double() / temperature
        return float(torch.nn.functional.binary_cross_entropy_with_logits(divided, labels.double()))

    assert loss(temperature) <= min(loss(temperature * factor) for factor in (0.9, 0.99, 1.01, 1.1)) + 1e-9
    explanations = explain(model, images, contenders=0)
    for old, new in zip(before, explanations, strict=True):
        assert [each.prediction for each in old] == [each.prediction for each in new.classes]
        assert new.confidence is None
    assert model.memory_bank.reference.count == 30


def test_nothing_wrong_leaves_the_temperature(
    make_several_model: Make, make_images: MakeImages, caplog: pytest.LogCaptureFixture
) -> None:
    model, images = make_several_model(), make_images(5)
    with torch.no_grad():
        labels = (model(images) > 0).long()
    assert calibrate(model, TensorDataset(images, labels), progress=False) == 1.0
    assert "All 5 images are classified correctly" in caplog.text
