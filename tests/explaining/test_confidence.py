"""The confidence against scikit-learn and what an explanation shows, and where it is fitted, kept and forgotten."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import explain
from timm_memwrap.explaining import Explanation
from timm_memwrap.explaining.confidence import class_gap, fit_confidence, log_odds
from timm_memwrap.model import MemoryWrapModel

COUNT = 40


def _data(model: MemoryWrapModel, make_images: Callable[..., Tensor]) -> TensorDataset:
    """Images of which some predictions are right: more of those with a high probability."""
    images = make_images(COUNT, seed=5)
    with torch.no_grad():
        probability, labels = model(images).softmax(dim=1).max(dim=1)
    wrong = torch.arange(COUNT) % 3 == 0
    wrong |= probability < probability.median()
    wrong &= torch.arange(COUNT) % 5 != 0
    return TensorDataset(images, (labels + wrong) % model.num_classes)


def _fitted(model: MemoryWrapModel, make_images: Callable[..., Tensor]) -> MemoryWrapModel:
    timm_memwrap.calibrate(model, _data(model, make_images), progress=False)
    return model


def _drawn(count: int, coefficients: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, len(coefficients) - 1, generator=generator, dtype=torch.float64)
    features = features * torch.tensor([3.0, 0.5, 0.02])[: features.shape[1]] + 0.1
    odds = coefficients[0] + features @ torch.tensor(coefficients[1:], dtype=torch.float64)
    return features, torch.rand(count, generator=generator, dtype=torch.float64) < odds.sigmoid()


@pytest.mark.parametrize("count", [12, 300])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_logistic_regression_of_scikit_learn(count: int, seed: int) -> None:
    features, right = _drawn(count, [0.5, 0.7, -2.0, 30.0], seed)
    found = (fit_confidence(features, right)[0] + features @ fit_confidence(features, right)[1:]).sigmoid()
    scaled = StandardScaler().fit_transform(features.numpy())
    oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaled, right.numpy())
    assert found.tolist() == pytest.approx(oracle.predict_proba(scaled)[:, 1].tolist(), abs=1e-5)


def test_what_the_data_was_drawn_with_is_found() -> None:
    coefficients = [-1.0, 0.4, -2.0, 30.0]
    found = fit_confidence(*_drawn(200_000, coefficients))
    assert found.tolist() == pytest.approx(coefficients, rel=0.05)


def test_each_feature_speaks_for_or_against_a_prediction_as_it_did_in_the_data() -> None:
    features, right = _drawn(2000, [0.5, 0.7, -2.0, 30.0])
    found = fit_confidence(features, right)
    for column, sign in enumerate([1, -1, 1]):
        more = features.clone()
        more[:, column] += 0.1
        change = ((found[0] + more @ found[1:]).sigmoid() - (found[0] + features @ found[1:]).sigmoid()) * sign
        assert bool((change > 0).all())


def test_it_is_the_same_each_time() -> None:
    features, right = _drawn(100, [0.5, 0.7, -2.0])
    assert torch.equal(fit_confidence(features, right), fit_confidence(features, right))


@pytest.mark.parametrize("factor", [1.0, 1e4])
@pytest.mark.parametrize("count", [2, 1000])
def test_of_data_that_it_can_separate_the_weights_stay_finite(count: int, factor: float) -> None:
    features = torch.stack([torch.arange(count) * factor, -torch.arange(count) * 0.01, torch.ones(count)], dim=1)
    right = torch.arange(count) >= count // 2
    found = fit_confidence(features, right)
    assert found.isfinite().all()
    confidence = found[0] + features.double() @ found[1:]
    assert bool((confidence[1:] > confidence[:-1]).all())
    assert bool((confidence[right] > 0).all()) != bool((confidence[~right] > 0).any())
    assert float(found[3]) == 0.0


def test_one_error_in_many_is_enough() -> None:
    features, right = _drawn(5000, [100.0, 1.0, 1.0])
    right[int(features[:, 0].argmax())] = False
    assert fit_confidence(features, right).isfinite().all()


def test_log_odds_are_those_of_the_probability_also_where_it_rounds() -> None:
    logits = 5 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for label in range(4):
        probability = logits.softmax(dim=1)[:, label]
        torch.testing.assert_close(log_odds(logits, torch.full((50,), label)), probability.logit())
    certain = log_odds(torch.tensor([[500.0, 0.0], [500.0, 0.0]]), torch.tensor([0, 1]))
    assert certain.tolist() == [500.0, -500.0]


def test_the_gap_is_between_the_prediction_and_the_most_alike_of_the_others(
    model: MemoryWrapModel, make_images: Callable[..., Tensor]
) -> None:
    model.memory_bank.select(range(11))  # One class has two samples.
    for explanation in explain(model, make_images(5)):
        first, *others = [one.similarity for one in explanation.contenders]
        rows = [[s.similarity for s in one.samples] for one in explanation.contenders]
        padded = torch.tensor([[row + [-torch.inf] * (3 - len(row)) for row in rows]])
        assert float(class_gap(padded)) == pytest.approx(first - max(others), abs=1e-6)


@pytest.mark.parametrize("classes", [[0], [1, 2], [0, 1, 2]])
def test_without_samples_to_compare_there_is_no_gap(classes: list[int]) -> None:
    similarities = torch.rand(2, 3, 3)
    similarities[:, classes] = -torch.inf
    assert class_gap(similarities).tolist() == [0.0, 0.0]


def _seen(model: MemoryWrapModel, image: Tensor, explanation: Explanation) -> list[float]:
    """Returns the features by what an explanation shows."""
    own, others = explanation.contenders[0], explanation.contenders[1:]
    plain = 0.5
    if model.keeps_classifier:
        with torch.no_grad():
            plain = float(model.backbone(image.unsqueeze(0)).double().softmax(dim=1)[0, explanation.prediction])
    gap = own.similarity - max(one.similarity for one in others)
    odds = torch.tensor([explanation.probability, plain], dtype=torch.float64).logit().tolist()
    return [*odds, gap]


def test_it_is_fitted_to_what_an_explanation_shows(model: MemoryWrapModel, make_images: Callable[..., Tensor]) -> None:
    data = _data(model, make_images)
    timm_memwrap.calibrate(model, data, progress=False)
    images, labels = data.tensors
    explanations = explain(model, images)
    features = torch.tensor([_seen(model, *pair) for pair in zip(images, explanations, strict=True)])
    right = [each.prediction == label for each, label in zip(explanations, labels.tolist(), strict=True)]
    scaled = StandardScaler().fit_transform(features.numpy())
    oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaled, right)
    found = [explanation.confidence for explanation in explanations]
    assert found == pytest.approx(oracle.predict_proba(scaled)[:, 1].tolist(), abs=2e-3)


def test_it_is_none_until_calibrated(model: MemoryWrapModel, make_images: Callable[..., Tensor]) -> None:
    images = make_images(4)
    before = explain(model, images)
    assert {explanation.confidence for explanation in before} == {None}
    after = explain(_fitted(model, make_images), images)
    assert all(0 < explanation.confidence < 1 for explanation in after)
    assert [one.prediction for one in after] == [one.prediction for one in before]
    assert [one.samples[0].id for one in after] == [one.samples[0].id for one in before]
    assert "likely right" in str(after[0])
    assert "likely right" not in str(before[0])


@pytest.mark.parametrize(("contenders", "top_k"), [(0, 5), (1, 5), (4, 5), (3, 1)])
def test_how_much_is_shown_does_not_change_it(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Tensor], contenders: int, top_k: int
) -> None:
    model, images = _fitted(make_model("wrapped"), make_images), make_images(6)
    expected = [explanation.confidence for explanation in explain(model, images)]
    found = explain(model, images, top_k, contenders)
    assert [explanation.confidence for explanation in found] == pytest.approx(expected, abs=1e-6)
    assert {len(explanation.contenders) for explanation in found} == {contenders}


@pytest.mark.parametrize("shift", [0, 1])
def test_it_is_not_fitted_if_all_is_right_or_all_is_wrong(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Tensor], shift: int
) -> None:
    model, images = make_model("wrapped"), make_images(6)
    with torch.no_grad():
        labels = (model(images).argmax(dim=1) + shift) % 4
    timm_memwrap.calibrate(model, TensorDataset(images, labels), progress=False)
    assert explain(model, images)[0].confidence is None


def test_another_temperature_undoes_the_fit(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Tensor]
) -> None:
    model = _fitted(make_model("wrapped"), make_images)
    model.temperature = 2.0
    assert explain(model, make_images(1))[0].confidence is None


def test_calibrating_again_changes_nothing(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Tensor]
) -> None:
    model, data = make_model("wrapped"), _data(make_model("wrapped"), make_images)
    found = []
    for _ in range(2):
        timm_memwrap.calibrate(model, data, progress=False)
        found.append(explain(model, make_images(1))[0].confidence)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["wrapped", "memory wrap", "vote"])
def test_it_is_saved_with_the_model(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Tensor], tmp_path: Path, kind: str
) -> None:
    model, images = _fitted(make_model(kind), make_images), make_images(5)
    expected = explain(model, images)
    timm_memwrap.save_pretrained(model, tmp_path / "saved")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    other = make_model(kind)
    other.load_state_dict(model.state_dict())
    for same in (loaded, other, copy.deepcopy(model)):
        assert explain(same, images) == expected
    other.calibration.bfloat16()
    found = [explanation.confidence for explanation in explain(other, images)]
    assert found == pytest.approx([explanation.confidence for explanation in expected], abs=0.02)
    assert torch.equal(timm_memwrap.from_pretrained(tmp_path / "saved").calibration.confidence,
                       model.calibration.confidence)  # fmt: skip
