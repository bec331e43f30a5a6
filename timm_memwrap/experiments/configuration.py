"""The options of a comparison."""

from dataclasses import dataclass, field
from typing import Literal

from timm_memwrap.training.configuration import Recipe

__all__ = ["Comparison", "ComparisonConfig"]


@dataclass
class ComparisonConfig:
    """The heads, and how they are measured.

    Args:
        heads: Names of heads, see `timm_memwrap.experiments.heads`. Options of a wrapped classifier follow its name, as
            in probabilities:scale=50.
        seeds: Seeds, each of which is a run. It also chooses the training images if data.train_samples is given.
        samples_per_class: Sizes of the memory bank besides all training images.
        selections: How the samples of these banks are chosen: herding, balanced or random.
        draws: Number of evaluations of a head that draws a memory for each batch.
        timing_rounds: How often each head's prediction of a batch is timed, in turn with the others; 0 to disable.
    """

    heads: list[str] = field(
        default_factory=lambda: ["linear", "mlp", "knn", "nadaraya_watson", "published", "batch", "joint"]
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    samples_per_class: list[int] = field(default_factory=lambda: [1, 10, 100])
    selections: list[Literal["herding", "balanced", "random"]] = field(default_factory=lambda: ["herding"])
    draws: int = 3
    timing_rounds: int = 9


@dataclass
class Comparison(Recipe):
    """A recipe that all heads are trained by, and the comparison of them.

    Args:
        model: The backbone, as in a recipe; each head has its own way to read a memory.
        data: The images, as in a recipe; the heads are compared on the validation images.
        training: As in a recipe; the seed is that of the comparison.
        memory: The memory of the heads that are trained with one, as in a recipe; the mode is that of the head.
        hub: Not used.
        comparison: The heads, and how they are measured.
    """

    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
