"""Explanations against what the model says itself, one image and one sample at a time."""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_memwrap import explain
from timm_memwrap.familiarity import familiarity, fit_reference, reference_quantiles
from timm_memwrap.model import MemoryWrapModel


def _probabilities(model: MemoryWrapModel, image: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Classifies with a bank that really holds only the samples at `kept`."""
    model = copy.deepcopy(model)
    model.memory_bank.select(kept)
    with torch.no_grad():
        return model(image.unsqueeze(0))[0].softmax(dim=0)


def _carried(model: MemoryWrapModel, image: torch.Tensor, read: torch.Tensor) -> float | None:
    """Returns the share of the plain classifier's margin that is left in the logits of the read."""
    if model.memory_args["classifier"] != "own":
        return None
    with torch.no_grad():
        plain = model.backbone(image.unsqueeze(0))[0].tolist()
    prediction = int(read.argmax())
    other = max((i for i in range(len(plain)) if i != prediction), key=lambda i: plain[i])
    margin = plain[prediction] - plain[other]
    return float(read[prediction] - read[other]) / margin if margin > 0 else None


def test_it_agrees_with_the_model_read_one_image_at_a_time(
    model: MemoryWrapModel, make_images: Callable[..., torch.Tensor]
) -> None:
    batch = make_images(5)
    for image, explanation in zip(batch, explain(model, batch, top_k=3), strict=True):
        with torch.no_grad():
            readout = model(image.unsqueeze(0), return_readout=True)
        probabilities = readout.logits[0].softmax(dim=0)
        assert explanation.prediction == int(probabilities.argmax())
        assert explanation.probability == pytest.approx(float(probabilities.max()), abs=1e-5)
        weights = {int(i): float(w) for i, w in zip(readout.positions[0], readout.weights[0], strict=True) if w > 1e-5}
        similarities = dict(zip(readout.positions[0].tolist(), readout.similarities[0].tolist(), strict=True))
        quantiles = reference_quantiles(model)
        assert explanation.familiarity == pytest.approx(float(familiarity(readout.remainder, quantiles)), abs=1e-3)
        assert explanation.carried == pytest.approx(_carried(model, image, readout.logits[0]), abs=1e-3)
        assert explanation.support_size == len(weights)
        by_weight = sorted(weights, key=lambda i: -weights[i])
        assert [sample.position for sample in explanation.samples] == by_weight[:3]
        own = model.own_predictions().tolist()
        same = [i for i in by_weight if own[i] == explanation.prediction]
        other = [i for i in by_weight if own[i] != explanation.prediction]
        assert [sample.position for sample in explanation.examples] == same[:3]
        assert [sample.position for sample in explanation.counterfactuals] == other[:3]
        for sample in (*explanation.samples, *explanation.examples, *explanation.counterfactuals):
            assert sample.weight == pytest.approx(weights[sample.position], abs=1e-5)
            assert sample.similarity == pytest.approx(similarities[sample.position], abs=1e-5)
            features = model.memory_bank.encodings[sample.position], readout.encoding[0]
            by_features = torch.cosine_similarity(*(each[: model.head_hidden_size] for each in features), dim=0)
            assert sample.feature_similarity == pytest.approx(float(by_features), abs=1e-5)
            assert sample.id == model.memory_bank.ids[sample.position]
            assert sample.label == int(model.memory_bank.labels[sample.position])
            assert sample.prediction == own[sample.position]
            assert sample.is_example == (own[sample.position] == explanation.prediction)


def test_leaving_a_sample_out_is_a_bank_without_it(
    model: MemoryWrapModel, make_images: Callable[..., torch.Tensor]
) -> None:
    for image, explanation in zip(make_images(3), explain(model, make_images(3), top_k=4), strict=True):
        for sample in explanation.samples:
            kept = [i for i in range(len(model.memory_bank)) if i != sample.position]
            without = _probabilities(model, image, kept)
            assert sample.prediction_without == int(without.argmax())
            expected = explanation.probability - float(without[explanation.prediction])
            assert sample.influence == pytest.approx(expected, abs=1e-5)


def test_without_memory_is_a_read_of_zeros(model: MemoryWrapModel, make_images: Callable[..., torch.Tensor]) -> None:
    batch = make_images(3)
    with torch.no_grad():
        encoding = model.encode(batch)
        width = 4 if model.memory_args["classifier"] == "vote" else model.encoding_size
        logits = model.head.classify(encoding, torch.zeros(3, width))
        if model.memory_args["classifier"] == "own":
            # The sum of the classifier's logits over no samples: its bias says nothing of the input.
            logits = torch.zeros(3, 4)
    for row, explanation in zip(logits, explain(model, batch), strict=True):
        probability = float(row.softmax(dim=0)[explanation.prediction])
        assert explanation.probability_without_memory == pytest.approx(probability, abs=1e-5)
        undecided = bool(row.max() == row.min())
        assert explanation.prediction_without_memory == (None if undecided else int(row.argmax()))


def test_a_model_that_predicts_from_its_memory_alone_cannot_tell_without_it(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    explanation = explain(make_model("wrapped"), make_images(1))[0]
    assert explanation.prediction_without_memory is None
    assert explanation.probability_without_memory == pytest.approx(0.25)


def test_a_bank_of_one_sample_leaves_nothing_without_it(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped")
    model.memory_bank.select([3])
    explanation = explain(model, make_images(1))[0]
    assert explanation.support_size == 1
    assert explanation.samples[0].weight == 1.0
    assert explanation.samples[0].prediction_without is None


def test_images_are_encoded_once(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, seen = make_model("wrapped"), []
    first = next(module for module in model.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    explain(model, make_images(6))
    assert seen == [6]


def test_blocks_of_reads_do_not_change_the_result(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("memory wrap")
    whole = explain(model, make_images(3))
    monkeypatch.setattr("timm_memwrap.explaining.reading._MOST_SCORES", 40)
    for a, b in zip(whole, explain(model, make_images(3)), strict=True):
        assert [sample.position for sample in a.samples] == [sample.position for sample in b.samples]
        assert [s.influence for s in a.samples] == pytest.approx([s.influence for s in b.samples], abs=1e-6)


def test_tensors_pictures_and_paths_agree(make_model: Callable[..., MemoryWrapModel], tmp_path: Path) -> None:
    model = make_model("wrapped")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    batch = torch.stack([transform(picture) for picture in pictures])
    expected = explain(model, batch)
    assert len(expected) == 2
    for images in (pictures, paths, [str(path) for path in paths], list(batch), (pictures[0], paths[1])):
        assert explain(model, images) == expected
    for image in (pictures[0], paths[0], batch[0]):
        assert explain(model, image)[0].samples[0].id == expected[0].samples[0].id


def test_grey_images_for_a_model_of_one_channel() -> None:
    model = timm.create_model("memwrap_test_resnet", num_classes=2, in_chans=1)
    model.memory_bank.replace(torch.randn(4, 96), torch.arange(4) % 2, range(4))
    assert len(explain(model, Image.new("RGB", (40, 30)))) == 1


def test_modes_are_restored_and_no_gradient_is_kept(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("memory wrap").train()
    model.backbone.eval()
    expected = {name: module.training for name, module in model.named_modules()}
    before = explain(model, make_images(2))
    assert {name: module.training for name, module in model.named_modules()} == expected
    assert explain(model.eval(), make_images(2)) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="list is empty"):
        explain(model.train(), [])
    assert model.training


def test_json_holds_everything_but_the_images(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped", store_images=True, class_names=["a", 'quote "', "<b>", "ü"])
    explanation = explain(model, make_images(1))[0]
    assert explanation.samples[0].image.shape == (3, 32, 32)
    assert json.loads(explanation.to_json()) == explanation.to_dict()
    assert "image" not in explanation.to_json()
    assert explanation.to_dict()["samples"][0]["weight"] == explanation.samples[0].weight
    assert explanation.to_dict()["samples"][0]["similarity"] == explanation.samples[0].similarity
    assert explanation.class_name in str(explanation)
    with pytest.raises(FrozenInstanceError):
        explanation.prediction = 1  # type: ignore[misc]


def test_class_names_come_from_the_bank_the_cfg_or_the_number(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped")
    explanation = explain(model, make_images(1))[0]
    assert explanation.class_name == f"class {explanation.prediction}"
    model.pretrained_cfg["label_names"] = ["p", "q", "r", "s"]
    assert explain(model, make_images(1))[0].class_name == "pqrs"[explanation.prediction]
    model.memory_bank.set_class_names(["a", "b", "c", "d"])
    assert explain(model, make_images(1))[0].class_name == "abcd"[explanation.prediction]


def test_an_empty_memory_is_refused(make_images: Callable[..., torch.Tensor]) -> None:
    model = timm.create_model("memwrap_test_resnet", num_classes=4)
    with pytest.raises(ValueError, match=r"bank is empty.*build_memory_bank"):
        explain(model, make_images(1))
    with pytest.raises(ValueError, match=r"num_classes=0.*reset_classifier"):
        explain(timm.create_model("memwrap_test_resnet", num_classes=0), make_images(1))
    with pytest.raises(ValueError, match="Wrap it"):
        explain(timm.create_model("test_resnet"), make_images(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [0, -1, 2.5, True])
def test_a_bad_number_of_samples_is_refused(make_model: Callable[..., MemoryWrapModel], top_k: int) -> None:
    with pytest.raises(ValueError, match=r"top_k=.*at least 1"):
        explain(make_model("wrapped"), torch.zeros(1, 3, 32, 32), top_k=top_k)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(32, 32),
        torch.zeros(0, 3, 32, 32),
        [torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)],
        [torch.zeros(32, 32)],
        [7],
    ],
)
def test_what_is_no_image_is_refused(make_model: Callable[..., MemoryWrapModel], images: object) -> None:
    with pytest.raises(ValueError, match=r"expected|one shape"):
        explain(make_model("wrapped"), images)


def test_a_stale_memory_is_said_once_a_call(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model("wrapped")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        explain(model, make_images(2))
        assert not caplog.records
        with torch.no_grad():
            next(model.backbone.parameters()).mul_(2)
        explain(model, make_images(2))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "stale" in caplog.text


def test_it_abstains_only_if_asked_to(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images = make_model("wrapped"), make_images(8)
    usual = explain(model, images)
    least = sorted(each.familiarity for each in usual)[3]
    asked = explain(model, images, abstain=least)
    assert not any(each.unfamiliar for each in usual)
    assert sum(each.unfamiliar for each in asked) == 3
    for one, other in zip(usual, asked, strict=True):
        assert other.prediction == one.prediction
        assert other.unfamiliar == (one.familiarity < least)
        assert other.title == ("unfamiliar" if other.unfamiliar else one.class_name)
        assert str(other).startswith(other.verdict)
        assert other.verdict.startswith("unfamiliar (else " if other.unfamiliar else f"{one.class_name} (")
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"abstain=.*between 0 and 1"):
            explain(model, images, abstain=wrong)


def test_what_is_unlike_the_memory_is_a_doubt(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("wrapped")
    model.memory_bank.set_reference(fit_reference(model, torch.linspace(0, 1e-3, 50)))
    for explanation in explain(model, make_images(3), contenders=0):
        assert explanation.familiarity == 0.0
        assert explanation.doubts == ["it is more unlike the memory than all known images"]
        assert explanation.doubts[0] in str(explanation)
