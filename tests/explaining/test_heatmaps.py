"""Heatmaps against the axioms of their methods, finite differences and a function whose answer is known."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import explain
from timm_memwrap.explaining import attribute
from timm_memwrap.explaining.heatmaps import BASELINES, METHODS
from timm_memwrap.model import MemoryWrapModel

SIZE = 12
KINDS = ("memory wrap", "memory only", "l2", "wrapped", "probabilities", "logits", "vote")


def _memory(make_images: Callable[..., torch.Tensor]) -> TensorDataset:
    return TensorDataset(make_images(SIZE, seed=1), torch.arange(SIZE) % 4)


def _vit() -> MemoryWrapModel:
    torch.manual_seed(0)
    model = timm_memwrap.wrap(timm.create_model("test_vit", num_classes=4, img_size=32))
    for parameter in model.get_classifier().parameters():
        parameter.data.mul_(30)
    images = torch.randn(SIZE, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    timm_memwrap.build_memory_bank(model, TensorDataset(images, torch.arange(SIZE) % 4), size=None, progress=False)
    return model.eval()


def _score(model: MemoryWrapModel, logits: torch.Tensor) -> list[float]:
    """Logits; in a vote, shares of the votes."""
    return (logits[0].exp() if model.memory_args["classifier"] == "vote" else logits[0]).tolist()


@torch.no_grad()
def _logit(model: MemoryWrapModel, image: torch.Tensor, memory: dict[int, torch.Tensor], target: int) -> float:
    """Classifies with a bank that really holds the encodings of other images at some positions."""
    model = copy.deepcopy(model).eval()
    bank = model.memory_bank
    encodings = bank.encodings.to(image.dtype)
    for position, memory_image in memory.items():
        encodings[position] = model.encode(memory_image.unsqueeze(0))[0]
    # As a memory set that is not stored, so that double precision survives.
    prepared = model.head.prepare(encodings, bank.labels)
    return _score(model, model.read(model.encode(image.unsqueeze(0)), memory=prepared).logits)[target]


def _baseline(model: MemoryWrapModel, name: str) -> torch.Tensor:
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixel = {"black": torch.zeros(3, 1, 1), "mean": mean}[name]
    return ((pixel - mean) / std).expand(3, 32, 32)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_attributed_is_the_models_own_logit(
    model: MemoryWrapModel, make_images: Callable[..., torch.Tensor], method: str
) -> None:
    images = make_images(3)
    explanations = explain(model, images, top_k=4)
    found = attribute(model, images, _memory(make_images), method, top_k=4, n_steps=2, progress=False)
    with torch.no_grad():
        logits = model(images)
    for image, row, explanation, attribution in zip(images, logits, explanations, found, strict=True):
        assert attribution.target == explanation.prediction == int(row.argmax())
        assert attribution.score == pytest.approx(max(_score(model, row.unsqueeze(0))), abs=1e-5)
        assert [s.id for s in attribution.explanation.samples] == [s.id for s in explanation.samples]
        assert torch.equal(attribution.image, image)
        kept = _memory(make_images).tensors[0]
        assert torch.equal(attribution.memory_images, kept[[s.position for s in explanation.samples]])
        assert attribution.memory_heatmaps.shape == attribution.memory_images.shape
        assert sum(attribution.shares) == pytest.approx(1)


# Each kind with one baseline and one kind with both: a case takes 1500 steps.
@pytest.mark.parametrize(
    ("kind", "baseline"),
    [
        pytest.param(kind, baseline, marks=[] if baseline == "black" or kind == "memory wrap" else pytest.mark.slow)
        for kind in KINDS
        for baseline in BASELINES
    ],
)
def test_integrated_gradients_sum_to_what_input_and_memory_change_together(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], kind: str, baseline: str
) -> None:
    model = make_model(kind)
    # Without a bias a fresh model encodes a grey image as zero, where the cosine jumps and no gradient could tell.
    torch.nn.init.normal_(model.get_classifier().bias)
    timm_memwrap.build_memory_bank(model, _memory(make_images), size=None, progress=False)
    image = make_images(1)
    found = attribute(model, image, _memory(make_images), baseline=baseline, n_steps=1500, top_k=3, progress=False)[0]
    start = _baseline(model, baseline)
    positions = [sample.position for sample in found.explanation.samples]
    low = _logit(model, start, dict.fromkeys(positions, start), found.target)
    with torch.no_grad():
        high = _score(model, model(image))[found.target]
    assert found.baseline_score == pytest.approx(low, abs=1e-4)
    total = float(found.heatmap.sum() + found.memory_heatmaps.sum())
    assert total == pytest.approx(high - low, rel=0.02)
    assert found.completeness_gap == pytest.approx(high - low - total, abs=1e-3)
    # The memory images have a part in it, or the sum would say nothing of them.
    assert found.memory_heatmaps.flatten(1).abs().sum(1).min() > 0.001 * abs(high - low)


# A reconstruction jumps at the very end of the path, where all images are the baseline and each weight will do.
@pytest.mark.parametrize(("kind", "left"), [("probabilities", 0.1), ("logits", 0.1), ("wrapped", 0.3)])
def test_more_steps_come_nearer(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Any], kind: str, left: float
) -> None:
    model, image, memory = make_model(kind), make_images(1), _memory(make_images)
    few, many = (attribute(model, image, memory, n_steps=n, progress=False)[0] for n in (3, 600))
    assert abs(many.completeness_gap) < left * abs(few.completeness_gap)


@pytest.mark.parametrize("kind", ["memory wrap", "memory only", "l2", "wrapped", "vote", "vit"])
def test_gradients_are_those_of_finite_differences(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], kind: str
) -> None:
    model = (_vit() if kind == "vit" else make_model(kind)).double()
    images, memory = make_images(1).double(), TensorDataset(make_images(SIZE, seed=1).double(), torch.zeros(SIZE))
    by_input = attribute(model, images, memory, "input_x_gradient", top_k=2, progress=False)[0]
    saliency = attribute(model, images, memory, "saliency", top_k=2, progress=False)[0]
    positions = [sample.position for sample in by_input.explanation.samples]
    memory_images = dict(zip(positions, by_input.memory_images, strict=True))
    gradients = [by_input.heatmap / images[0], *by_input.memory_heatmaps / by_input.memory_images]
    assert torch.allclose(saliency.heatmap, gradients[0].abs(), rtol=1e-4)
    assert torch.allclose(saliency.memory_heatmaps, torch.stack(gradients[1:]).abs(), rtol=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert largest > 0
    for part, gradient in enumerate(gradients):
        # The steepest pixels: a difference is exact enough there.
        for flat in gradient.abs().flatten().topk(3).indices.tolist():
            ends = []
            for step in (1e-5, -1e-5):
                image, others = images[0].clone(), {k: v.clone() for k, v in memory_images.items()}
                moved = image if part == 0 else others[positions[part - 1]]
                moved.view(-1)[flat] += step
                ends.append(_logit(model, image, others, by_input.target))
            slope = (ends[0] - ends[1]) / 2e-5
            assert float(gradient.flatten()[flat]) == pytest.approx(slope, rel=1e-3, abs=1e-6 * largest)


@pytest.mark.parametrize("name", ["memwrap_evidence_test_resnet", "memwrap_test_resnet"])
def test_a_linear_model_with_one_sample_has_attributions_by_its_weights(
    make_images: Callable[..., torch.Tensor], name: str
) -> None:
    """With one sample its weight is 1 whatever the images: `f = C(m)`, or `f = C([x, m])` if the input is read."""
    evidence = "evidence" in name
    arguments = {} if evidence else {"classifier": "linear", "read_head": "identity"}
    model = timm.create_model(name, num_classes=4, **arguments).eval()
    encoder = torch.randn(model.encoding_size, 3 * 32 * 32) / 50
    model.encode = lambda x: x.flatten(1) @ encoder.T
    memory, image = make_images(1, seed=1), make_images(1)
    model.memory_bank.replace(model.encode(memory), torch.tensor([2]), [0])
    found = attribute(model, image, [(memory[0], 2)], baseline="mean", n_steps=3, progress=False)[0]
    classifier = model.backbone.get_classifier() if evidence else model.get_classifier()
    weights = classifier.weight[found.target].detach().view(-1, model.encoding_size) @ encoder
    on_input, on_memory = (torch.zeros_like(weights[0]), weights[0]) if evidence else weights
    assert torch.allclose(found.heatmap, on_input.view(3, 32, 32) * image[0], atol=1e-6)
    assert torch.allclose(found.memory_heatmaps[0], on_memory.view(3, 32, 32) * memory[0], atol=1e-6)
    assert found.completeness_gap == pytest.approx(0, abs=1e-5)


def test_a_vision_transformer_is_explained_too(make_images: Callable[..., torch.Tensor]) -> None:
    model = _vit()
    found = attribute(model, make_images(2), _memory(make_images), n_steps=1500, top_k=2, progress=False)
    for attribution in found:
        assert abs(attribution.completeness_gap) < 0.02 * abs(attribution.score - attribution.baseline_score)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_memory_is_bounded_and_batches_do_not_change_the_result(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], batch_size: int
) -> None:
    model, memory, images = make_model("memory wrap"), _memory(make_images), make_images(2)
    expected = [attribute(model, image, memory, n_steps=9, top_k=2, progress=False)[0] for image in images]
    sizes: list[int] = []
    model.backbone.conv1.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = attribute(model, images, memory, n_steps=9, top_k=2, batch_size=batch_size, progress=False)
    # One point takes the input and its two memory images.
    assert max(sizes) <= max(batch_size, 3)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.heatmap, b.heatmap, atol=1e-5)
        assert torch.allclose(a.memory_heatmaps, b.memory_heatmaps, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], method: str
) -> None:
    model = make_model("memory wrap").train()
    model.backbone.conv1.eval()
    first, *_ = model.parameters()
    first.requires_grad_(False)
    images, memory = make_images(2), _memory(make_images)
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = [images.clone(), memory.tensors[0].clone()]
    attribute(model, images, memory, method, n_steps=2, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(images, kept[0])
    assert torch.equal(memory.tensors[0], kept[1])
    assert not images.requires_grad
    assert not memory.tensors[0].requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_frozen_models_and_callers_without_gradients_get_the_same(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], method: str
) -> None:
    model, memory = make_model("wrapped"), _memory(make_images)
    expected = attribute(model, make_images(1), memory, method, n_steps=3, progress=False)[0]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        images = make_images(1) * 1.0
        found = attribute(model, images, memory, method, n_steps=3, progress=False)[0]
    assert float(found.heatmap.abs().max()) > 0
    assert torch.allclose(found.heatmap, expected.heatmap, atol=1e-6)
    assert torch.allclose(found.memory_heatmaps, expected.memory_heatmaps, atol=1e-6)


def test_explanations_that_are_there_are_not_made_again(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, memory = make_model("wrapped"), make_images(2), _memory(make_images)
    explanations = explain(model, images, top_k=2)
    expected = attribute(model, images, memory, "saliency", top_k=2, progress=False)
    monkeypatch.delattr("timm_memwrap.explaining.heatmaps.explain_batch")
    found = attribute(model, images, memory, "saliency", explanations=explanations, progress=False)
    for one, other, given in zip(found, expected, explanations, strict=True):
        assert one.explanation is given
        assert torch.equal(one.heatmap, other.heatmap)
        assert torch.equal(one.memory_heatmaps, other.memory_heatmaps)
    with pytest.raises(ValueError, match="1 explanations for 2 images"):
        attribute(model, images, memory, "saliency", explanations=explanations[:1], progress=False)


def test_another_class_can_be_asked_for(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images = make_model("memory wrap"), make_images(1)
    for target, logit in enumerate(model(images)[0].tolist()):
        found = attribute(model, images, _memory(make_images), "saliency", target=target, progress=False)[0]
        assert (found.target, found.class_name) == (target, f"class {target}")
        assert found.score == pytest.approx(logit, abs=1e-5)


def test_pictures_get_the_models_transform(make_model: Callable[..., MemoryWrapModel]) -> None:
    model = make_model("wrapped")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 160, 160, 3), dtype=np.uint8)
    data = [(Image.fromarray(array), i % 4) for i, array in enumerate(pixels[1:])]
    timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
    found = attribute(model, Image.fromarray(pixels[0]), data, "saliency", progress=False)[0]
    assert found.score == pytest.approx(explain_score(model, Image.fromarray(pixels[0])), abs=1e-4)


@torch.no_grad()
def explain_score(model: MemoryWrapModel, picture: Image.Image) -> float:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return float(model(transform(picture).unsqueeze(0)).max())


def test_images_other_than_the_remembered_are_refused(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, right = make_model("wrapped"), _memory(make_images)
    flipped = {i: torch.roll(right[i][0], 5, dims=-1) for i in range(SIZE)}
    with pytest.raises(ValueError, match=r"encoded differently in the bank: by \d+%.*not augmented"):
        attribute(model, make_images(1), flipped, progress=False)
    with pytest.raises(ValueError, match=r"has shape \[3, 16, 16\], the input \[3, 32, 32\]"):
        attribute(model, make_images(1), {i: torch.zeros(3, 16, 16) for i in range(SIZE)}, progress=False)
    with pytest.raises(ValueError, match=r"is not in dict"):
        attribute(model, make_images(1), {}, progress=False)
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(-1)
    with pytest.raises(ValueError, match=r"build_memory_bank again"):
        attribute(model, make_images(1), right, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "grad_cam"}, r"Unknown method='grad_cam'. Pass one of 'integrated_gradients'"),
        ({"baseline": "white"}, r"Unknown baseline='white'. Pass one of 'black', 'mean'"),
        ({"n_steps": 0}, r"n_steps=0 is not valid"),
        ({"batch_size": True}, r"batch_size=True is not valid"),
        ({"target": 4}, r"target=4 is not a class. Pass 0 to 3"),
        ({"target": -1}, r"target=-1 is not a class"),
        ({"top_k": 0}, r"top_k=0"),
    ],
)
def test_bad_arguments_are_refused(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    arguments: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(make_model("wrapped"), make_images(1), _memory(make_images), progress=False, **arguments)


def test_absent_captum_is_missed_by_the_name_of_the_extra(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"timm-memwrap\[explain\]"):
        attribute(make_model("wrapped"), make_images(1), _memory(make_images))


@pytest.mark.parametrize(("n_steps", "said"), [(2, True), (1500, False)])
def test_attributions_that_miss_their_sum_are_said(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    n_steps: int,
    said: bool,
) -> None:
    model = make_model("logits")
    caplog.clear()
    found = attribute(model, make_images(2), _memory(make_images), n_steps=n_steps, progress=False)
    wide = [abs(a.completeness_gap) > 0.2 * abs(a.score - a.baseline_score) for a in found]
    assert any(wide) == said
    assert [record.levelname for record in caplog.records] == ["WARNING"] * said
    assert f"{sum(wide)} of 2 images" in caplog.text or not said
