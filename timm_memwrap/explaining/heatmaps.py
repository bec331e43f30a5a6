"""Heatmaps: which pixels of an input, and of the memory images that it read, a prediction comes from.

Shapes: C channels, K memory samples attributed to, P points on a path, D width of an encoding.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from timm_memwrap.explaining.explanation import Explanation, class_names, explain
from timm_memwrap.explaining.inputs import SampleImages, batches_of, check_model, data_config, evaluating, to_picture
from timm_memwrap.model import MemoryWrapModel

__all__ = ["BASELINES", "HEAT", "METHODS", "Attribution", "attribute", "overlays"]

_logger = logging.getLogger(__name__)

METHODS = ("integrated_gradients", "input_x_gradient", "saliency")
BASELINES = ("black", "mean")

# Yellow: apart from grey, in hue and brightness, for any common colour vision, and the colour of no frame.
HEAT = (255, 214, 10)

# Of the change that the attributions should sum to. Where they miss more, it is said.
_MOST_GAP = 0.2

# How far a memory image's encoding may be from the stored one, relative to its length. Half precision stays below; an
# image that was augmented, or transformed for another model, does not.
_TOLERANCE = 0.05


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
        """What the attributions leave unexplained of `score - baseline_score`; more `n_steps` make it smaller.

        `None` for a method without a baseline, whose attributions have no such sum.
        """
        if self.baseline_score is None:
            return None
        total = self.heatmap.double().sum() + self.memory_heatmaps.double().sum()
        return self.score - self.baseline_score - float(total)

    @property
    def shares(self) -> list[float]:
        """Shares of the input and of each memory image in the sum of absolute attributions, `1 + K` numbers."""
        sums = [
            float(self.heatmap.double().abs().sum()),
            *self.memory_heatmaps.double().abs().flatten(1).sum(1).tolist(),
        ]
        total = sum(sums)
        return [value / total if total else 0.0 for value in sums]


def attribute(
    model: MemoryWrapModel,
    images: Any,
    memory: Any,
    method: str = "integrated_gradients",
    top_k: int = 5,
    target: int | None = None,
    baseline: str = "black",
    n_steps: int = 50,
    batch_size: int = 64,
    progress: bool = True,
) -> list[Attribution]:
    """Attributes predictions to the pixels of the input and of the memory images that they used, jointly.

    What is attributed is the logit `f(x, m_1, ..., m_K)` of the predicted class as a function of the input image and
    of the images of the K strongest samples, which are encoded anew with gradient (La Rosa et al. 2022, Section 5,
    with Integrated Gradients: Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365). All other samples of the
    bank stay in the read as they are stored, also those without weight: between the baseline and the image the
    prediction may come to use others, and `f` is the model's own function there too, not that of a model with a
    smaller memory. Each point costs `1 + K` encodings. In a vote, `f` is the class's share of the votes, of which the
    logit is the logarithm: that is endlessly steep where a class gets its first vote.

    Runs in evaluation mode and changes nothing of the model; gradients of parameters are not computed.

    Args:
        model: A model with a memory bank.
        images: As in `explain`.
        memory: Where the memory samples' images are: the dataset that the bank was built from, or a mapping from id to
            image. The bank's own are too small.
        method: `"integrated_gradients"`; or in one pass, without a baseline, `"input_x_gradient"` (Shrikumar et al.
            2016, https://arxiv.org/abs/1605.01713) or `"saliency"`, the gradient's absolute value (Simonyan et al.
            2013, https://arxiv.org/abs/1312.6034).
        top_k: How many of the strongest samples to attribute to.
        target: The class; `None` for the predicted one.
        baseline: What Integrated Gradients starts from: `"black"` images, or `"mean"`, grey ones that normalise to 0.
        n_steps: Points on its path.
        batch_size: How many images to encode at a time, which bounds the memory that it takes.
        progress: Whether to show a progress bar.

    Returns:
        One attribution per image.

    Raises:
        ImportError: If captum is absent.
        ValueError: If the bank is empty, an argument does not fit, or a memory sample is not in `memory` or is not the
            image that the bank was built from.

    Example:
        ```python
        >>> import timm, timm_memwrap, torch
        >>> from timm_memwrap.explaining import attribute
        >>> model = timm.create_model("memwrap_test_resnet", num_classes=2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 2)
        >>> bank = timm_memwrap.build_memory_bank(model, data, size=4, progress=False)
        >>> one = attribute(model, torch.randn(3, 64, 64), data, method="saliency", top_k=2, progress=False)[0]
        >>> one.heatmap.shape, one.memory_heatmaps.shape
        (torch.Size([3, 64, 64]), torch.Size([2, 3, 64, 64]))

        ```
    """
    check_model(model)
    _check_arguments(model, method, target, baseline, n_steps, batch_size)
    run = _runner(method, n_steps, batch_size)
    steps = n_steps if method == "integrated_gradients" else 1
    stored, result = SampleImages(model, memory), []
    batches = batches_of(model, images)
    with tqdm(total=sum(map(len, batches)) * steps, desc="Heatmaps", unit="pass", disable=not progress) as bar:
        for batch in batches:
            explanations = explain(model, batch, top_k)
            for image, explanation in zip(batch, explanations, strict=True):
                result.append(_attribute(model, image, explanation, stored, method, target, baseline, run, bar))
    _say_gaps(result, n_steps)
    return result


def overlays(model: MemoryWrapModel, attribution: Attribution) -> list[np.ndarray]:
    """Lays the heatmaps over their images for people to look at: `1 + K` arrays `[H, W, 3]` of uint8, the input first.

    The images turn grey, and yellow where the prediction comes from. What is shown is the absolute attribution, summed
    over channels and smoothed: the signs of neighbouring pixels alternate, and to the eye that is noise. Where a
    picture has less than its part of the attribution, its yellow is weaker.
    """
    images = (attribution.image, *attribution.memory_images)
    heatmaps = (attribution.heatmap, *attribution.memory_heatmaps)
    return [
        _overlay(to_picture(model, image), heatmap, min(1.0, (share * len(images)) ** 0.5))
        for image, heatmap, share in zip(images, heatmaps, attribution.shares, strict=True)
    ]


def _overlay(picture: np.ndarray, heatmap: Tensor, most: float) -> np.ndarray:
    grey = torch.from_numpy(picture.copy()).double().mean(dim=-1, keepdim=True)
    heat = _smooth(heatmap.detach().cpu().double().abs().sum(dim=0), sigma=max(heatmap.shape[-2:]) / 24)
    # Half of the picture at most is coloured, so that the rest can be seen.
    heat = (heat - heat.median()).clamp(min=0)
    heat = heat / heat.quantile(0.99).clamp_min(torch.finfo(torch.float64).tiny)
    strength = 0.85 * most * heat.clamp(max=1).unsqueeze(-1)
    return ((1 - strength) * 0.75 * grey + strength * torch.tensor(HEAT)).round().to(torch.uint8).numpy()


def _smooth(heat: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    kernel = (-0.5 * (torch.arange(-reach, reach + 1, dtype=heat.dtype) / sigma).square()).exp()
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    heat = F.pad(heat[None, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(heat, kernel), kernel.transpose(2, 3))[0, 0]


class _Joint:
    """The score of one class `[P]` as a function of P inputs and of P images for each of K memory samples."""

    def __init__(self, model: MemoryWrapModel, positions: Tensor, target: int, bar: tqdm) -> None:
        self._model, self._positions, self._target, self._bar = model, positions, target, bar

    def __call__(self, *images: Tensor) -> Tensor:
        count = len(images[0])
        encodings = self._model.encode(torch.cat(images)).unflatten(0, (len(images), count))
        readout = self._model.read_encoded_anew(encodings[0], self._positions, encodings[1:].transpose(0, 1))
        self._bar.update(count)
        score = readout.logits[:, self._target]
        # The share of the votes, whose logarithm at temperature 1 the logit is.
        return (score * self._model.temperature).exp() if self._model.memory_args["classifier"] == "vote" else score


_Runner = Callable[[_Joint, tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


def _attribute(
    model: MemoryWrapModel,
    image: Tensor,
    explanation: Explanation,
    stored: SampleImages,
    method: str,
    target: int | None,
    baseline: str,
    run: _Runner,
    bar: tqdm,
) -> Attribution:
    target = explanation.prediction if target is None else target
    memory = [stored.input(sample.id).to(image) for sample in explanation.samples]
    for sample, sample_image in zip(explanation.samples, memory, strict=True):
        if sample_image.shape != image.shape:
            raise ValueError(
                f"The memory sample {sample.id!r} has shape {list(sample_image.shape)}, the input {list(image.shape)}. "
                f"Pass both with the model's own transform, as PIL images or paths."
            )
    positions = torch.tensor([sample.position for sample in explanation.samples])
    # A forward that counts no progress: it is for the two ends of the path.
    silent = _Joint(model, positions, target, tqdm(disable=True))
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        joint = _Joint(model, positions, target, bar)
        # Copies, of which none is an inference tensor, and of which none is the caller's.
        points = tuple([part.clone().unsqueeze(0) for part in (image, *memory)])
        starts = tuple([_baseline(model, point, baseline) for point in points])
        with torch.no_grad():
            _check_encodings(model, explanation, torch.cat(points[1:]))
            score = float(silent(*points))
            baseline_score = float(silent(*starts)) if method == "integrated_gradients" else None
        heatmaps = [heatmap.detach()[0] for heatmap in run(joint, points, starts)]
    return Attribution(
        explanation=explanation,
        method=method,
        target=target,
        class_name=class_names(model)[target],
        score=score,
        baseline_score=baseline_score,
        image=image,
        heatmap=heatmaps[0],
        memory_images=torch.stack(memory),
        memory_heatmaps=torch.stack(heatmaps[1:]),
    )


def _runner(method: str, n_steps: int, batch_size: int) -> _Runner:
    try:
        from captum.attr import InputXGradient, IntegratedGradients, Saliency
    except ImportError as error:
        raise ImportError("Heatmaps need captum: pip install 'timm-memwrap[explain]'.") from error

    def integrated_gradients(
        joint: _Joint, points: tuple[Tensor, ...], starts: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        rows = max(1, batch_size // len(points))
        return IntegratedGradients(joint).attribute(points, starts, n_steps=n_steps, internal_batch_size=rows)

    def one_pass(joint: _Joint, points: tuple[Tensor, ...], starts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        points = tuple([point.requires_grad_() for point in points])
        return (Saliency(joint) if method == "saliency" else InputXGradient(joint)).attribute(points)

    return integrated_gradients if method == "integrated_gradients" else one_pass


def _baseline(model: MemoryWrapModel, like: Tensor, baseline: str) -> Tensor:
    if baseline == "mean":
        return torch.zeros_like(like)
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (-mean / std).to(like).expand_as(like).clone()


def _check_encodings(model: MemoryWrapModel, explanation: Explanation, images: Tensor) -> None:
    """Refuses images that are not those that the bank was built from: the heat would be on another picture."""
    bank = model.memory_bank
    assert bank.encodings is not None
    for sample, encoding in zip(explanation.samples, model.encode(images).float(), strict=True):
        kept = bank.encodings[sample.position].float()
        distance = float((encoding - kept).norm() / kept.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if not distance <= _TOLERANCE:
            raise ValueError(
                f"The memory sample {sample.id!r} encodes otherwise than the bank has it: they differ by "
                f"{distance:.0%}. Pass the images that the bank was built from, not augmented and with the model's own "
                f"transform; if the weights have changed since, call build_memory_bank again."
            )


def _say_gaps(attributions: list[Attribution], n_steps: int) -> None:
    missed = [
        attribution
        for attribution in attributions
        if attribution.baseline_score is not None
        and abs(attribution.completeness_gap or 0.0) > _MOST_GAP * abs(attribution.score - attribution.baseline_score)
    ]
    if missed:
        _logger.warning(
            "The attributions of %d of %d images miss the sum that they should have by more than %.0f%%: the model "
            "bends between the baseline and the image. Pass more than n_steps=%d, and see completeness_gap.",
            len(missed),
            len(attributions),
            100 * _MOST_GAP,
            n_steps,
        )


def _check_arguments(
    model: MemoryWrapModel, method: str, target: int | None, baseline: str, n_steps: int, batch_size: int
) -> None:
    for name, value, known in (("method", method, METHODS), ("baseline", baseline, BASELINES)):
        if value not in known:
            raise ValueError(f"Unknown {name}={value!r}. Pass one of {', '.join(map(repr, known))}.")
    for name, number in (("n_steps", n_steps), ("batch_size", batch_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} is not a count. Pass an integer of at least 1.")
    if target is not None and (
        isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < model.num_classes
    ):
        raise ValueError(f"target={target!r} is not a class. Pass 0 to {model.num_classes - 1}, or None.")
