"""What figures and pages show: images beside their explanations, and heatmaps over images."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_memwrap.data import one_by_one, to_picture
from timm_memwrap.explaining.explanation import Explanation, explain
from timm_memwrap.explaining.heatmaps import Attribution
from timm_memwrap.memory_checks import check_single_label
from timm_memwrap.model import MemoryWrapModel

__all__ = ["HEAT", "MATCHES", "aligned", "each_class", "overlays"]

# Yellow: differs from grey in hue and brightness with any common colour vision, and from the colours of the frames.
HEAT = (255, 214, 10)
# Of boxes, which have numbers too. They differ from the colours of the frames.
MATCHES = ("#F0E442", "#56B4E9", "#00B386", "#CC79A7", "#E69F00")


def aligned(
    model: MemoryWrapModel,
    images: Any,
    explanations: Sequence[Explanation] | None,
    labels: Sequence[int] | Tensor | None,
    top_k: int = 5,
) -> tuple[list[Any], list[Explanation], list[int | None]]:
    """Lists images, at least one, with their explanations, made if `None`, and their labels, `None` if unknown.

    Raises:
        ValueError: If they differ in number, or there are labels and images may have several classes.
    """
    if explanations is None:
        explanations = explain(model, images, top_k)
    if labels is not None:
        check_single_label(model, "labels=")
    several = one_by_one(images)
    true: list[int | None] = [None] * len(several) if labels is None else [int(label) for label in labels]
    if not len(several) == len(explanations) == len(true) or not several:
        raise ValueError(
            f"{len(several)} images, {len(explanations)} explanations and {len(true)} labels. Pass one explanation, "
            f"and one label if any, for each image, and at least one image."
        )
    return several, list(explanations), true


def each_class(several: list[Any], explanations: list[Explanation], true: list[int | None]) -> list[tuple[Any, ...]]:
    """Lists images, explanations and labels with a row for each class that an image has, if it may have several."""
    rows = zip(several, explanations, true, strict=True)
    return [(image, each, label) for image, explanation, label in rows for each in explanation.classes or [explanation]]


def overlays(model: MemoryWrapModel, attribution: Attribution) -> list[np.ndarray]:
    """Lays heatmaps over their images, which turn grey: `1 + K` arrays `[H, W, 3]` of uint8, the input first."""
    images = (attribution.image, *attribution.memory_images)
    heatmaps = (attribution.heatmap, *attribution.memory_heatmaps)
    # A picture with less than an equal share of the attribution has a weaker yellow.
    return [
        _overlay(to_picture(model, image), heatmap, min(1.0, (share * len(images)) ** 0.5))
        for image, heatmap, share in zip(images, heatmaps, attribution.shares, strict=True)
    ]


def _overlay(picture: np.ndarray, heatmap: Tensor, most: float) -> np.ndarray:
    from torchvision.transforms.functional import gaussian_blur

    # The signs of neighbouring pixels alternate, which would look like noise: absolute and smoothed.
    grey = torch.from_numpy(picture.copy()).double().mean(dim=-1, keepdim=True)
    heat, sigma = heatmap.detach().cpu().double().abs().sum(dim=0), max(heatmap.shape[-2:]) / 24
    # The heat is mirrored at the edges, so the kernel cannot reach further than a side is long.
    reach = min(math.ceil(3 * sigma), min(heat.shape) - 1)
    heat = gaussian_blur(heat[None], 2 * reach + 1, sigma)[0]
    # At most half of the picture is coloured, so that the rest can be seen.
    heat = (heat - heat.median()).clamp(min=0)
    heat = heat / heat.quantile(0.99).clamp_min(torch.finfo(torch.float64).tiny)
    strength = 0.85 * most * heat.clamp(max=1).unsqueeze(-1)
    return ((1 - strength) * 0.75 * grey + strength * torch.tensor(HEAT)).round().to(torch.uint8).numpy()
