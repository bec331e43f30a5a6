"""The metrics against what they say in words, one input at a time."""

import copy
import json
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

from timm_memwrap.explaining import calibrate, evaluate_explanations, explain, im1, im2, randomisation_check
from timm_memwrap.explaining.metrics import expected_calibration_error
from timm_memwrap.explaining.ranking import area_under_risk_coverage
from timm_memwrap.model import MemoryWrapModel

COUNT = 9
# Drawn at random, or with an oracle of their own in test_answers.py.
ELSEWHERE = ("random_flip_rate", "random_drop", "follows_exchanged_answer", "stays_with_answer")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _logits(model: MemoryWrapModel, encoding: torch.Tensor, hidden: list[int]) -> torch.Tensor:
    """Reads for one encoding `[D]` from a bank that really lacks the hidden samples."""
    kept = [i for i in range(len(model.memory_bank)) if i not in hidden]
    if not kept:
        if model.memory_args["classifier"] == "own":
            return torch.zeros(4)
        width = 4 if model.memory_args["classifier"] == "vote" else model.encoding_size
        return model.head.classify(encoding.unsqueeze(0), torch.zeros(1, width))[0]
    model = copy.deepcopy(model)
    model.memory_bank.select(kept)
    return model.read(encoding.unsqueeze(0)).logits[0]


def _predicted(logits: torch.Tensor) -> int | None:
    return None if bool(logits.max() == logits.min()) else int(logits.argmax())


@torch.no_grad()
def naive(model: MemoryWrapModel, images: torch.Tensor, labels: torch.Tensor, deleted: int, seed: int) -> dict:
    bank, columns = model.memory_bank, {}
    own_predictions, own_labels = model.own_predictions().tolist(), bank.labels.tolist()

    def note(name: str, value: float) -> None:
        columns.setdefault(name, []).append(float(value))

    # Without held-out images, the samples themselves, each read with itself hidden.
    left_out = [float(model.read(bank.encodings[[i]], hidden=torch.tensor([[i]])).remainder) for i in range(len(bank))]
    levels = np.linspace(0, 1, 101)

    for image, label in zip(images, labels.tolist(), strict=True):
        encoding = model.encode(image.unsqueeze(0))[0]
        readout = model.read(encoding.unsqueeze(0))
        note("unfamiliar_rate", np.interp(float(readout.remainder), np.quantile(left_out, levels), levels) > 0.95)
        logits = readout.logits[0]
        probabilities = logits.softmax(dim=0)
        prediction = int(logits.argmax())
        weights = [
            (float(w), int(i)) for w, i in zip(readout.weights[0], readout.positions[0], strict=True) if float(w) > 0
        ]
        weights.sort(key=lambda pair: -pair[0])
        examples = [(w, i) for w, i in weights if own_predictions[i] == prediction]
        right = prediction == label
        note("accuracy", right)
        note("accuracy_without_memory", _predicted(_logits(model, encoding, list(range(len(bank))))) == label)
        is_example = own_predictions[weights[0][1]] == prediction
        note("explanation_accuracy", is_example)
        note("accuracy_example" if is_example else "accuracy_counterfactual", right)
        note("support_size", len(weights))
        note("weight_on_prediction", sum(w for w, _ in examples))
        note("identical_class_rate", own_labels[weights[0][1]] == prediction)
        if not right:
            note("identical_class_rate_wrong", own_labels[weights[0][1]] == prediction)
            note("true_class_shown_wrong", label in [own_labels[i] for _, i in weights[:5]])
            note("true_class_contends_wrong", sum(logits > logits[label]) < 3)
        if examples:
            position = examples[0][1]
            if model.memory_args["classifier"] == "own":
                own = model.backbone.get_classifier()(bank.encodings[position])
            else:
                own = _logits(model, bank.encodings[position], [position])
            note("input_nonrepresentativeness", _mean([abs(float(a - b)) for a, b in zip(own, logits, strict=True)]))
            note("prediction_nonrepresentativeness", -math.log(float(own.softmax(dim=0)[prediction])))
        count = min(deleted, len(weights))
        without = _logits(model, encoding, [i for _, i in weights[:count]])
        note("deletion_flip_rate", _predicted(without) != prediction)
        note("deletion_drop", probabilities[prediction] - without.softmax(dim=0)[prediction])
        note("probability", probabilities[prediction])
        if model.keeps_classifier:
            plain = model.backbone(image.unsqueeze(0))[0].softmax(dim=0)
            note("plain", plain.max())
            note("plain_right", int(plain.argmax()) == label)
    gaps = 0.0
    for low in range(15):
        rows = [i for i, p in enumerate(columns["probability"]) if low / 15 < p <= (low + 1) / 15]
        if rows:
            confidence = _mean([columns["probability"][i] for i in rows])
            gaps += len(rows) * abs(confidence - _mean([columns["accuracy"][i] for i in rows]))
    columns["calibration_error"] = [gaps / len(images)]
    columns["error_ranking"] = [roc_auc_score(columns["accuracy"], columns["probability"])]
    if model.keeps_classifier:
        columns["error_ranking_plain"] = [roc_auc_score(columns.pop("plain_right"), columns.pop("plain"))]
    order = sorted(range(len(images)), key=lambda i: -columns["probability"][i])
    risks = [1 - _mean([columns["accuracy"][i] for i in order[:k]]) for k in range(1, len(images) + 1)]
    columns["risk_coverage_area"] = [_mean(risks)]
    del columns["probability"]
    return {name: _mean(values) for name, values in columns.items()}


@pytest.mark.parametrize("deleted", [2, 50])
def test_it_agrees_with_a_naive_implementation(
    model: MemoryWrapModel, make_images: Callable[..., torch.Tensor], deleted: int
) -> None:
    images, labels = make_images(COUNT, seed=5), torch.arange(COUNT) % 4
    with torch.no_grad():
        # So that some predictions are right.
        labels[::2] = model(images).argmax(dim=1)[::2]
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    metrics = evaluate_explanations(model, loader, deleted=deleted, progress=False)
    assert metrics.count == COUNT
    expected = naive(model, images, labels, deleted, seed=0)
    for name in metrics.to_dict():
        if name not in ("count", "deleted", "in_memory", "by_class", *ELSEWHERE):
            assert metrics.to_dict()[name] == pytest.approx(expected.get(name), abs=2e-5), name


def test_a_calibrated_model_ranks_errors_by_its_confidence(
    model: MemoryWrapModel, make_images: Callable[..., torch.Tensor]
) -> None:
    images, labels = make_images(20, seed=5), torch.arange(20) % 4
    with torch.no_grad():
        labels[::2] = model(images).argmax(dim=1)[::2]
    data = TensorDataset(images, labels)
    before = evaluate_explanations(model, data, progress=False)
    calibrate(model, data, progress=False)
    metrics = evaluate_explanations(model, DataLoader(data, 7), progress=False)
    found = explain(model, images)
    right = torch.tensor([one.prediction == label for one, label in zip(found, labels.tolist(), strict=True)])
    confidence = torch.tensor([one.confidence for one in found], dtype=torch.float64)
    assert metrics.error_ranking == pytest.approx(roc_auc_score(right, confidence), abs=0.02)
    assert metrics.risk_coverage_area == pytest.approx(area_under_risk_coverage(confidence, right), abs=0.01)
    assert metrics.error_ranking_plain == before.error_ranking_plain
    assert metrics.accuracy == before.accuracy


def test_each_class_is_counted(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images, labels = make_model("wrapped", size=9), make_images(6, seed=5), torch.tensor([0, 0, 0, 1, 3, 3])
    model.memory_bank.set_class_names(["ant", "bee", "cow", "\x1b[31mdoe"])
    with torch.no_grad():
        right = model(images).argmax(dim=1) == labels
    metrics = evaluate_explanations(model, TensorDataset(images, labels), progress=False)
    found = [(each.class_name, each.count, each.accuracy, each.memory_count) for each in metrics.by_class]
    rates = [pytest.approx(float(right[labels == label].float().mean())) for label in (0, 1, 3)]
    names = metrics.by_class[3].class_name
    assert found == [("ant", 3, rates[0], 3), ("bee", 1, rates[1], 2), ("cow", 0, None, 2), (names, 2, rates[2], 2)]
    assert json.loads(metrics.to_json())["by_class"][0]["memory_count"] == 3
    assert "ant " in str(metrics)
    assert "\x1b" not in str(metrics)


def test_inputs_that_are_in_the_memory_are_counted_and_said(
    model: MemoryWrapModel, make_images: Callable[..., torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    # The memory has twelve images of seed 1; in other batches they are encoded to other digits.
    others, inside = make_images(4, seed=5), make_images(12, seed=1)[[7, 2, 9]]
    data = DataLoader(TensorDataset(torch.cat([others, inside]), torch.zeros(7, dtype=torch.long)), batch_size=2)
    assert evaluate_explanations(model, data, progress=False).in_memory == 3
    assert "3 of 7 inputs are in the memory" in caplog.text
    caplog.clear()
    data = DataLoader(TensorDataset(others, torch.zeros(4, dtype=torch.long)))
    assert evaluate_explanations(model, data, progress=False).in_memory == 0
    assert not caplog.text


def test_random_deletion_leaves_out_as_many_samples_by_the_seed(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images = make_model("memory wrap"), make_images(3, seed=5)
    metrics = evaluate_explanations(model, TensorDataset(images, torch.zeros(3, dtype=torch.long)), 4, 7, False)
    rng, drops, flips = random.Random(7), [], []
    with torch.no_grad():
        for image in images:
            encoding = model.encode(image.unsqueeze(0))[0]
            logits = _logits(model, encoding, [])
            without = _logits(model, encoding, rng.sample(range(12), 4))
            prediction = int(logits.argmax())
            flips.append(float(int(without.argmax()) != prediction))
            drops.append(float(logits.softmax(0)[prediction] - without.softmax(0)[prediction]))
    assert metrics.random_flip_rate == pytest.approx(_mean(flips))
    assert metrics.random_drop == pytest.approx(_mean(drops), abs=1e-5)


def test_a_prediction_made_of_its_samples_is_lost_without_them(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    data = TensorDataset(make_images(4), torch.zeros(4, dtype=torch.long))
    metrics = evaluate_explanations(make_model("wrapped", size=3), data, deleted=3, progress=False)
    assert metrics.accuracy_without_memory == 0.0
    assert metrics.random_flip_rate <= metrics.deletion_flip_rate <= 1.0


def test_datasets_of_pictures_and_loaders_agree_and_modes_are_restored(
    make_model: Callable[..., MemoryWrapModel],
) -> None:
    model = make_model("wrapped").train()
    pictures = [(Image.new("RGB", (40, 30), (60 * i, 90, 200)), i) for i in range(4)]
    metrics = evaluate_explanations(model, pictures, progress=False)
    assert model.training
    assert metrics.count == 4
    assert metrics == evaluate_explanations(model.eval(), pictures, progress=False)


def test_results_are_json_and_a_table(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    data = TensorDataset(make_images(4), torch.zeros(4, dtype=torch.long))
    metrics = evaluate_explanations(make_model("wrapped"), data, progress=False)
    assert json.loads(metrics.to_json()) == metrics.to_dict()
    # And the classes under a header, instead of in a row.
    assert len(str(metrics).splitlines()) == len(metrics.to_dict()) - 1 + 2 + len(metrics.by_class)
    assert f"{metrics.support_size:.4g}" in str(metrics)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_by_loops(bins: int) -> None:
    probabilities = torch.rand(200).clamp(1e-3)
    probabilities[:3] = torch.tensor([1.0, 1 / bins, 1e-3])
    right = torch.rand(200) < 0.5
    gaps = 0.0
    for i in range(bins):
        rows = [j for j in range(200) if i < float(probabilities[j] * bins) <= i + 1]
        gaps += abs(sum(float(right[j]) - float(probabilities[j]) for j in rows)) / 200
    assert expected_calibration_error(probabilities, right, bins) == pytest.approx(gaps)


def test_calibration_error_is_zero_for_the_calibrated() -> None:
    right = torch.tensor([True, True, True, False])
    assert expected_calibration_error(torch.full((4,), 0.75), right) == pytest.approx(0.0)


def test_im1_and_im2_by_their_formulas(make_images: Callable[..., torch.Tensor]) -> None:
    images = make_images(3)
    ratios = im1(images, lambda x: 0.9 * x, lambda x: 0.5 * x)
    assert ratios.tolist() == pytest.approx([0.04] * 3, rel=1e-4)
    distances = im2(images, lambda x: x + 1, lambda x: x - 1)
    expected = [4 * image.numel() / float(image.abs().sum()) for image in images]
    assert distances.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_randomised_encoder_changes_explanations_and_the_model_stays(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped", size=40)
    memory = TensorDataset(make_images(40, seed=1), torch.zeros(40))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share = randomisation_check(model, make_images(20), memory, top_k=3)
    assert 0 <= share < 0.5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    mapping = {i: memory[i][0] for i in range(40)}
    assert randomisation_check(model, make_images(20), mapping, top_k=3) == share
    with pytest.raises(ValueError, match=r"39 is not in|0 is not in"):
        randomisation_check(model, make_images(1), {})


def test_nothing_is_a_value_error(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped")
    with pytest.raises(ValueError, match="data is empty"):
        evaluate_explanations(model, TensorDataset(make_images(0), torch.zeros(0)), progress=False)
    with pytest.raises(ValueError, match=r"Labels of the data are 4.*0 to 3"):
        evaluate_explanations(model, TensorDataset(make_images(1), torch.tensor([4])), progress=False)
    with pytest.raises(ValueError, match=r"deleted=0"):
        evaluate_explanations(model, TensorDataset(make_images(1), torch.tensor([0])), deleted=0)
    model.memory_bank.clear()
    with pytest.raises(ValueError, match="bank is empty"):
        evaluate_explanations(model, TensorDataset(make_images(1), torch.tensor([0])))


def test_a_calibration_bin_holds_its_upper_edge() -> None:
    """As Guo et al. define it: 0.5 is in the first of two bins, and does not even out with 0.75."""
    probabilities, right = torch.tensor([0.5, 0.75]), torch.tensor([True, False])
    assert expected_calibration_error(probabilities, right, bins=2) == (0.5 + 0.75) / 2
