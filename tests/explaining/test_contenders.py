"""Contenders against the model's probabilities, and a loop over classes and samples."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import explain
from timm_memwrap.explaining import Contender, Explanation
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.search import ClassIndex, by_class


def _naive(model: MemoryWrapModel, image: torch.Tensor, count: int) -> list[tuple[int, float, list[int], list[float]]]:
    """Returns class, probability, positions and similarities of all classes, most probable first."""
    bank, features = model.memory_bank, model.backbone.head_hidden_size
    with torch.no_grad():
        probabilities = model(image.unsqueeze(0))[0].softmax(dim=0)
        # Not by the model's `encode`, behind whose pre-logits there may be logits.
        query = model.backbone.forward_head(model.backbone.forward_features(image.unsqueeze(0)), pre_logits=True)[0]
    found = []
    for label in sorted(range(model.num_classes), key=lambda one: (-float(probabilities[one]), one)):
        near = []
        for position in range(len(bank)):
            if int(bank.labels[position]) == label:
                key = bank.encodings[position, :features].to(query)
                near.append((-float(torch.cosine_similarity(query, key, dim=0)), position))
        near = sorted(near)[:count]
        found.append((label, float(probabilities[label]), [i for _, i in near], [-s for s, _ in near]))
    return found


def _check(model: MemoryWrapModel, batch: torch.Tensor, contenders: int, top_k: int = 5) -> None:
    bank = model.memory_bank
    for image, explanation in zip(batch, explain(model, batch, top_k, contenders), strict=True):
        expected = _naive(model, image, min(3, top_k))[:contenders]
        assert len(explanation.contenders) == len(expected)
        for contender, (label, probability, positions, similarities) in zip(
            explanation.contenders, expected, strict=True
        ):
            assert contender.prediction == label
            assert contender.probability == pytest.approx(probability, abs=1e-5)
            assert [sample.position for sample in contender.samples] == positions
            assert [sample.similarity for sample in contender.samples] == pytest.approx(similarities, abs=1e-4)
            assert all(sample.label == label for sample in contender.samples)
            assert [sample.id for sample in contender.samples] == [bank.ids[i] for i in positions]
        assert explanation.contenders[0].prediction == explanation.prediction
        assert explanation.contenders[0].probability == explanation.probability


@pytest.mark.parametrize("contenders", [1, 3, 4, 99])
def test_they_are_what_a_loop_over_classes_and_samples_finds(
    model: MemoryWrapModel,
    make_images: Callable[..., torch.Tensor],
    contenders: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_class, "_BLOCK", 5)
    _check(model, make_images(5), contenders)


@pytest.mark.parametrize("top_k", [1, 2, 3, 10])
def test_there_are_three_samples_each_or_top_k_if_that_is_less(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], top_k: int
) -> None:
    model = make_model("wrapped", size=40)
    _check(model, make_images(3), 3, top_k)
    contenders = explain(model, make_images(1), top_k)[0].contenders
    assert [len(contender.samples) for contender in contenders] == [min(3, top_k)] * 3


@pytest.mark.parametrize("distance", ["l2", "dot"])
@pytest.mark.parametrize(
    "name", ["memwrap_test_resnet", "memwrap_baseline_test_resnet", "memwrap_evidence_test_resnet"]
)
def test_whatever_the_read_compares_they_are_near_by_the_cosine_of_the_pre_logits(
    make_images: Callable[..., torch.Tensor], name: str, distance: str
) -> None:
    read = {"read": "sparsemax"} if "evidence" in name else {}
    model = timm.create_model(name, num_classes=4, distance=distance, **read).eval()
    data = TensorDataset(make_images(12, seed=1), torch.arange(12) % 4)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
    _check(model, make_images(3), 3)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "test_resnet"])
def test_logits_behind_the_pre_logits_play_no_part(name: str) -> None:
    size = {"img_size": 32, "depth": 1} if "deit" in name else {}
    plain = timm.create_model(name, num_classes=4, **size)
    for classifier in (plain.head, plain.head_dist) if "deit" in name else (plain.get_classifier(),):
        torch.nn.init.normal_(classifier.weight, std=10.0)
    model = timm_memwrap.wrap(plain).eval()
    assert model.encodes_logits == ("deit" in name)
    data = TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) % 4)
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
    _check(model, torch.randn(3, 3, 32, 32), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_banks_in_half_precision(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    model = make_model("wrapped")
    model.memory_bank.store_as(dtype)
    _check(model, make_images(3), 4)


def test_models_in_float64(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped")
    explain(model, make_images(1))
    # What was kept of the bank was in float32.
    _check(model.double(), make_images(3).double(), 4)


def test_classes_that_the_memory_has_no_sample_of_are_contenders_all_the_same(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("memory wrap")
    model.memory_bank.select([2, 6])
    _check(model, make_images(3), 4)
    for explanation in explain(model, make_images(3), contenders=4):
        assert {len(one.samples) for one in explanation.contenders if one.prediction != 2} == {0}
        assert {one.similarity for one in explanation.contenders if one.prediction != 2} == {None}
        assert explanation.most_alike.prediction == 2


def test_none_are_looked_for_if_none_are_asked_for(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("wrapped")
    expected = explain(model, make_images(2))
    monkeypatch.delattr("timm_memwrap.explaining.contenders.ClassIndex")
    model.memory_bank.derived = None
    without = explain(model, make_images(2), contenders=0)
    assert without == [dataclasses.replace(explanation, contenders=()) for explanation in expected]
    assert without[0].most_alike is None


@pytest.mark.parametrize("contenders", [-1, 1.5, True, None])
def test_a_bad_number_of_contenders_is_refused(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], contenders: object
) -> None:
    with pytest.raises(ValueError, match=r"contenders=.*at least 0"):
        explain(make_model("wrapped"), make_images(1), contenders=contenders)  # type: ignore[arg-type]


def test_a_bank_that_changes_between_calls_is_searched_as_it_is(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped")
    _check(model, make_images(2), 4)
    bank = model.memory_bank
    # Other lengths, which would be wrong if they were kept.
    factor = torch.arange(1, 13).unsqueeze(1).float()
    bank.replace(bank.encodings.flip(0) * factor, bank.labels, bank.ids)
    _check(model, make_images(2), 4)
    bank.select(range(7))
    _check(model, make_images(2), 4)


def test_samples_are_sorted_by_class_once_while_the_bank_stays(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = make_model("wrapped"), []
    monkeypatch.setattr(
        "timm_memwrap.explaining.contenders.ClassIndex", lambda *args: calls.append(1) or ClassIndex(*args)
    )
    explain(model, make_images(2))
    explain(model, make_images(2))
    assert len(calls) == 1
    model.memory_bank.select(range(6))
    explain(model, make_images(2))
    assert len(calls) == 2


def test_the_most_alike_is_that_of_the_highest_mean_similarity(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("memory wrap", size=40, class_names=["ant", "bee", "cow\x1b[2J", "doe"])
    said = set()
    for explanation in explain(model, make_images(8), contenders=4):
        means = [sum(s.similarity for s in one.samples) / len(one.samples) for one in explanation.contenders]
        best = explanation.contenders[means.index(max(means))]
        assert explanation.most_alike == best
        assert best.similarity == pytest.approx(max(means))
        differs = best.prediction != explanation.prediction
        assert ("looks more like" in str(explanation)) == differs
        assert f"next {explanation.contenders[1].class_name[:3]}" in str(explanation)
        assert "\x1b" not in str(explanation)
        said.add(differs)
    assert said == {True, False}


def test_json_and_pictures(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped", store_images=True)
    explanation: Explanation = explain(model, make_images(1))[0]
    sample = explanation.contenders[1].samples[0]
    assert torch.equal(sample.image, model.memory_bank.images[sample.position])
    found = json.loads(explanation.to_json())["contenders"][1]
    assert found["probability"] == explanation.contenders[1].probability
    assert found["samples"][0] == {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample) if f.repr}
    assert isinstance(explanation.contenders[1], Contender)
