"""Heatmaps: which pixels of an input, and of the memory images that it read, a prediction comes from.

Shapes: C channels, M memory samples, K memory samples attributed to, P points on a path, E width of an encoding.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from timm_memwrap._utils import check_choice, check_count, evaluating, optional_import
from timm_memwrap.data import SampleImages, batches_of, class_names, normalisation
from timm_memwrap.explaining.explanation import Explanation, explain_batch
from timm_memwrap.explaining.reading import snapshot
from timm_memwrap.model import MemoryWrapModel

__all__ = ["BASELINES", "METHODS", "Attribution", "attribute"]

_logger = logging.getLogger(__name__)

METHODS = ("integrated_gradients", "input_x_gradient", "saliency")
BASELINES = ("black", "mean")

# Attributions that miss more than this share of the sum that they should have get a warning.
_MOST_GAP = 0.2
# How far a memory image's encoding may be from the stored one, relative to its length. Half precision stays below it;
# an image that was augmented, or transformed for another model, does not.
_TOLERANCE = 0.05

_Score = Callable[..., Tensor]


@dataclass(frozen=True)
class Attribution:
    """What each pixel of an input and of the memory images that it read contributes to a logit.

    Args:
        explanation: The prediction and its samples.
        method: The method.
        target: The class whose logit was attributed.
        class_name: Its name.
        score: That logit, as the model computes it; in a vote, the share of the votes.
        baseline_score: The same with the baseline for the input and for all memory images; `None` for a method that
            has none.
        image: The model input `[C, H, W]`.
        heatmap: Attribution to it `[C, H, W]`.
        memory_images: The memory samples as model inputs `[K, C, H, W]`, in the order of `explanation.samples`.
        memory_heatmaps: Attribution to them `[K, C, H, W]`.
    """

    explanation: Explanation
    method: str
    target: int
    class_name: str
    score: float
    baseline_score: float | None
    image: Tensor = field(repr=False, compare=False)
    heatmap: Tensor = field(repr=False, compare=False)
    memory_images: Tensor = field(repr=False, compare=False)
    memory_heatmaps: Tensor = field(repr=False, compare=False)

    @property
    def completeness_gap(self) -> float | None:
        """What the attributions leave unexplained of `score - baseline_score`; `None` without a baseline."""
        if self.baseline_score is None:
            return None
        total = self.heatmap.double().sum() + self.memory_heatmaps.double().sum()
        return self.score - self.baseline_score - float(total)

    @property
    def shares(self) -> list[float]:
        """Shares of the input and of each memory image in the sum of absolute attributions, `1 + K` numbers."""
        sums = [float(heatmap.double().abs().sum()) for heatmap in (self.heatmap, *self.memory_heatmaps)]
        total = sum(sums)
        return [value / total if total else 0.0 for value in sums]


def attribute(
    model: MemoryWrapModel,
    images: Any,
    memory: Any,
    method: str = "integrated_gradients",
    top_k: int = 5,
    explanations: Sequence[Explanation] | None = None,
    target: int | None = None,
    baseline: str = "black",
    n_steps: int = 50,
    batch_size: int = 64,
    progress: bool = True,
) -> list[Attribution]:
    """Attributes the prediction for each image to the pixels of the image and of the memory images that it used.

    What is attributed is the logit `f(x, m_1, ..., m_K)` of the predicted class as a function of the input image and
    of the images of the K strongest samples, which are encoded again, with gradient (La Rosa et al. 2022, Section 5,
    with Integrated Gradients: Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365). All other samples of the
    bank are read as they are stored, so that `f` is the model's own function between the baseline and the image too.
    Each point costs `1 + K` encodings. In a vote, `f` is the class's share of the votes, since its logarithm, the
    logit, has infinite slope where a class gets its first vote. The model is left unchanged.

    Args:
        model: A model with a memory bank.
        images: As in `explain`.
        memory: The dataset that the bank was built from, or a mapping from id to image; the bank's own are too small.
        method: `"integrated_gradients"`; or in one pass, without a baseline, `"input_x_gradient"` (Shrikumar et al.
            2016, https://arxiv.org/abs/1605.01713) or `"saliency"`, the absolute gradient (Simonyan et al. 2013,
            https://arxiv.org/abs/1312.6034).
        top_k: How many of the strongest samples to attribute to.
        explanations: What `explain` returned for the images; `None` to call it.
        target: The class; `None` for the predicted one, the most probable of several.
        baseline: Where Integrated Gradients starts: `"black"` images, or `"mean"`, grey ones that normalise to 0.
        n_steps: Points on its path.
        batch_size: How many images to encode at a time, which bounds the use of memory.
        progress: Whether to show a progress bar.

    Raises:
        ImportError: If captum is not installed.
        ValueError: If the bank is empty, an argument is not valid, images and explanations differ in number, or a
            memory sample is not in `memory` or is not the image that the bank was built from.
    """
    model = snapshot(model)
    check_choice("method", method, METHODS)
    check_choice("baseline", baseline, BASELINES)
    check_count("top_k", top_k)
    check_count("n_steps", n_steps)
    check_count("batch_size", batch_size)
    if target is not None and (type(target) is not int or not 0 <= target < model.num_classes):
        raise ValueError(f"target={target!r} is not a class. Pass 0 to {model.num_classes - 1}, or None.")
    captum = optional_import("captum.attr", extra="explain", what="A heatmap")

    def heatmaps_of(score: _Score, points: tuple[Tensor, ...], starts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if method == "integrated_gradients":
            rows = max(1, batch_size // len(points))
            explainer = captum.IntegratedGradients(score)
            return explainer.attribute(points, starts, n_steps=n_steps, internal_batch_size=rows)
        explainer = captum.Saliency(score) if method == "saliency" else captum.InputXGradient(score)
        return explainer.attribute(tuple([point.requires_grad_() for point in points]))

    batches, stored, result = batches_of(model, images), SampleImages(model, memory), []
    inputs = [image for batch in batches for image in batch]
    if explanations is not None and len(explanations) != len(inputs):
        raise ValueError(f"{len(explanations)} explanations for {len(inputs)} images. Pass one for each, or None.")
    # The path and its two ends, or one pass with gradient and one without.
    passes = len(inputs) * (n_steps + 2 if method == "integrated_gradients" else 2)
    with evaluating(model), tqdm(total=passes, desc="Heatmaps", unit="pass", disable=not progress) as bar:
        if explanations is None:
            explanations = [found for batch in batches for found in explain_batch(model, batch, top_k)]
        for image, explanation in zip(inputs, explanations, strict=True):
            asked = explanation.prediction if target is None else target
            memory_images = _memory_images(model, explanation, stored, image)
            score = _score_of(model, [sample.position for sample in explanation.samples], asked, bar)
            with torch.inference_mode(False), torch.enable_grad():
                # Copies: inference tensors have no gradient, and the caller's must not get one.
                points = tuple([part.clone().unsqueeze(0) for part in (image, *memory_images)])
                starts = tuple([_baseline(model, point, baseline) for point in points])
                with torch.no_grad():
                    high = float(score(*points))
                    low = float(score(*starts)) if method == "integrated_gradients" else None
                first, *others = (heatmap.detach()[0] for heatmap in heatmaps_of(score, points, starts))
            name, heat = class_names(model)[asked], torch.stack(others)
            result.append(Attribution(explanation, method, asked, name, high, low, image, first, memory_images, heat))
    gaps = [(a.completeness_gap, a.score - a.baseline_score) for a in result if a.baseline_score is not None]
    missed = sum(abs(gap or 0.0) > _MOST_GAP * abs(change) for gap, change in gaps)
    if missed:
        _logger.warning(
            f"The attributions of {missed} of {len(result)} images miss the sum that they should have by more than "
            f"{_MOST_GAP:.0%}: the model is far from linear between the baseline and the image. Pass more than "
            f"n_steps={n_steps}, and see completeness_gap."
        )
    return result


def _score_of(model: MemoryWrapModel, positions: list[int], target: int, bar: tqdm) -> _Score:
    """Returns the score `[P]` of a class as a function of P inputs and of P images for each of K memory samples."""

    def score(*images: Tensor) -> Tensor:
        (stored, stored_labels), count = model.memory_bank.filled(), len(images[0])
        inputs, *memory = model.encode(torch.cat(images)).split(count)
        # One prepared memory serves all points: each sees its own K encodings at the end, and neither those of other
        # points nor the stored ones that they replace.
        encodings = [stored.to(torch.promote_types(inputs.dtype, torch.float32)), *memory]
        labels = [stored_labels, *(stored_labels[[position] * count] for position in positions)]
        replaced = torch.zeros(count, len(stored), dtype=torch.bool, device=inputs.device)
        replaced[:, positions] = True
        others = ~torch.eye(count, dtype=torch.bool, device=inputs.device).repeat(1, len(memory))
        prepared = model.head.prepare(torch.cat(encodings), torch.cat(labels))
        readout = model.read(inputs, memory=prepared, hidden=torch.cat([replaced, others], dim=1))
        bar.update(count)
        logit = readout.logits[:, target]
        # In a vote the logit is the logarithm of the share of the votes, divided by the temperature.
        return (logit * model.temperature).exp() if model.memory_args["classifier"] == "vote" else logit

    return score


def _baseline(model: MemoryWrapModel, like: Tensor, baseline: str) -> Tensor:
    if baseline == "mean":
        return torch.zeros_like(like)
    mean, std = normalisation(model)
    return (-mean / std).to(like).expand_as(like).clone()


def _memory_images(model: MemoryWrapModel, explanation: Explanation, stored: SampleImages, image: Tensor) -> Tensor:
    """Returns the samples as model inputs `[K, C, H, W]`, and raises if they are not what the bank was built from."""
    images = [stored.input(sample.id).to(image) for sample in explanation.samples]
    for sample, sample_image in zip(explanation.samples, images, strict=True):
        if sample_image.shape != image.shape:
            raise ValueError(
                f"The memory sample {sample.id!r} has shape {list(sample_image.shape)}, the input {list(image.shape)}. "
                f"Pass both with the model's own transform, as PIL images or paths."
            )
    kept = model.memory_bank.filled()[0][[sample.position for sample in explanation.samples]].float()
    distances = (model.encode(torch.stack(images)).float() - kept).norm(dim=1)
    distances /= kept.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    for sample, distance in zip(explanation.samples, distances.tolist(), strict=True):
        if not distance <= _TOLERANCE:
            raise ValueError(
                f"The memory sample {sample.id!r} is encoded differently in the bank: by {distance:.0%}. Pass the "
                f"images that the bank was built from, not augmented and with the model's own transform; if the "
                f"weights have changed since, call build_memory_bank again."
            )
    return torch.stack(images)
