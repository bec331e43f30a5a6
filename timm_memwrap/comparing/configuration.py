"""What a comparison may say: a recipe, and which heads to train and measure by it."""

from dataclasses import dataclass, field
from typing import Literal

from timm_memwrap.training.configuration import Recipe

__all__ = ["Comparison", "ComparisonConfig"]


@dataclass
class ComparisonConfig:
    """Which heads, and how they are measured.

    Args:
        heads: Names of heads, see `timm_memwrap.comparing.heads`. Options of a wrapped classifier follow its name:
            probabilities:scale=50.
        seeds: A run each. A seed also chooses the training images, where data.train_samples does not take all.
        samples_per_class: Sizes of the memory bank besides all training images.
        selections: How the samples of these banks are chosen: balanced, random or kmeans.
        draws: How often a head that draws its memory anew for each batch is evaluated.
        timing_rounds: How often each head's prediction of a batch is timed, in turn with the others; 0 for not at all.
    """

    heads: list[str] = field(
        default_factory=lambda: ["linear", "mlp", "knn", "nadaraya_watson", "published", "batch", "probabilities"]
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    samples_per_class: list[int] = field(default_factory=lambda: [1, 10, 100])
    selections: list[Literal["balanced", "random", "kmeans"]] = field(default_factory=lambda: ["balanced"])
    draws: int = 3
    timing_rounds: int = 9


@dataclass
class Comparison(Recipe):
    """A recipe that all heads are trained by, and the comparison of them.

    Args:
        model: The backbone, as in a recipe; each head says itself how its memory is read.
        data: The images, as in a recipe. The validation images are those that the heads are compared on.
        training: The schedule, as in a recipe; its seed is that of the comparison.
        memory: The memory of the heads that are trained with one, as in a recipe, but for its mode.
        hub: Not used: a comparison pushes nothing.
        comparison: Which heads, and how they are measured.
    """

    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
