"""Correspondences: which places of an input and of a memory sample look alike to the backbone.

Shapes: B inputs, P pairs of an input and a sample, C channels, D channels of features, h, w places.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap._utils import check_count
from timm_memwrap.data import SampleImages, enlarged
from timm_memwrap.explaining.results import Result
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.model import MemoryWrapModel

__all__ = ["Box", "Correspondence", "Matcher", "sample_input"]

Box = tuple[float, float, float, float]

# Features are compared at the deepest stage that has this many places a side: with fewer they cannot say where, with
# many more they do not know what. Of the pairs that EfficientNet-Lite0 finds in a photograph and in a random crop of it
# (150 photographs), 91 % are right at 14 places a side, 89 % at the last stage's 7, and 72 % at 28.
_FEWEST_PLACES = 10
# A box is as wide as the picture over this number: large enough to recognise what is in it.
_BOXES_A_SIDE = 7
_NO_PICTURES = (
    "Correspondences need the pictures of the memory samples, and the bank holds none. Pass the dataset that it was "
    "built from (dataset=, on the command line --memory_data), push its pictures with push_memory_images, or build it "
    "with store_images=True."
)


@dataclass(frozen=True)
class Correspondence(Result):
    """Two places that look alike to the backbone, one in an input and one in a memory sample.

    A box is `(left, top, right, bottom)`, in fractions of the width and the height of the model input, which the
    evaluation transform may have cropped from the picture: draw it on that, as `plot_correspondences` does.

    Args:
        similarity: Cosine of the features at the two places.
        box: The place in the input.
        sample_box: The place in the memory sample.
    """

    similarity: float
    box: Box
    sample_box: Box


class Matcher:
    """Finds correspondences of inputs with memory samples.

    Args:
        model: A model in evaluation mode, with a memory bank.
        count: The largest number of correspondences for an input and a sample.
        dataset: Where to find the samples' pictures by id: the dataset that the bank was built from, or a mapping from
            id to image. `None` for the small pictures in the bank, else those that `push_memory_images` pushed.

    Raises:
        ValueError: If `count` is below 1, there are no pictures, or the backbone cannot tell features by place.
    """

    def __init__(self, model: MemoryWrapModel, count: int, dataset: Any = None) -> None:
        check_count("correspondences", count)
        self._stored = stored_images(model, dataset)
        if self._stored is None and model.memory_bank.images is None and model.engine is None:
            raise ValueError(_NO_PICTURES)
        if not hasattr(model.backbone, "forward_intermediates"):
            raise ValueError(
                f"{type(model.backbone).__name__} has no forward_intermediates, which tells features by place. Pass "
                f"correspondences=0, or use a backbone of timm's that has it."
            )
        self._model, self._count = model, count

    def of(self, model: MemoryWrapModel) -> "Matcher":
        """Returns one for the same pictures, by their positions in the bank of another model of these weights."""
        same = copy.copy(self)
        same._model = model
        return same

    def match(
        self, images: Tensor, inputs: Sequence[int], positions: Sequence[int]
    ) -> list[tuple[Correspondence, ...]]:
        """Finds the correspondences of P pairs, the strongest first.

        Each image is encoded alone, so that what is found does not depend on the others.

        Args:
            images: Model inputs `[B, C, H, W]`.
            inputs: Which of them each pair is of.
            positions: Which sample of the bank each pair is of.
        """
        places = {i: _features(self._model, images[i]) for i in sorted(set(inputs))}
        size = (images.shape[-2], images.shape[-1])
        found = []
        for i, position in zip(inputs, positions, strict=True):
            # One that several inputs read is encoded for each of them: features of all would fill the memory.
            sample = sample_input(self._model, self._stored, position, size)
            pair = None if sample is None else (places[i], _features(self._model, sample))
            found.append(() if pair is None else _correspondences(*pair, self._count))
        return found


def sample_input(
    model: MemoryWrapModel, stored: SampleImages | None, position: int, size: tuple[int, int]
) -> Tensor | None:
    """Returns the memory sample at a position as a model input `[C, *size]`: the stored one, else the bank's own.

    `None` if it has no picture in the data set on the Hub, or that cannot be reached.
    """
    bank = model.memory_bank
    if model.engine is not None:
        model.engine.check_whole(bank)
    if stored is not None:
        sample_id = bank.ids[position]
        if not stored.complete and stored.picture(sample_id) is None:
            return None
        image = stored.input(sample_id)
        return image if image.shape[-2:] == size else F.interpolate(image.unsqueeze(0), size, mode="bilinear")[0]
    if bank.images is None:
        raise ValueError(_NO_PICTURES)
    return enlarged(bank.images[position : position + 1], model, size)[0]


class _Features(NamedTuple):
    """An image's features: by place `[D, h, w]`, each of `window` cells a side of `cells`, and the deepest ones."""

    places: Tensor
    window: int
    cells: tuple[int, int]
    deepest: Tensor

    def box(self, place: int) -> Box:
        row, column = divmod(place, self.places.shape[2])
        height, width = self.cells
        return column / width, row / height, (column + self.window) / width, (row + self.window) / height

    def relevance(self, other: "_Features") -> Tensor:
        """Returns how much each place `[h * w]` has of what the other image is of as a whole: 0 or more.

        Without it the strongest pairs are of background, which looks alike everywhere (Zhang et al. 2020,
        https://arxiv.org/abs/2003.06777, weigh places so too).
        """
        alike = torch.einsum("dhw,d->hw", self.deepest, other.deepest.mean(dim=(1, 2))).clamp(min=0)
        cells = F.interpolate(alike[None, None], self.cells, mode="bilinear")
        return F.avg_pool2d(cells, self.window, stride=1).flatten()


def _features(model: MemoryWrapModel, image: Tensor) -> _Features:
    stages = model.backbone.forward_intermediates(image.unsqueeze(0), output_fmt="NCHW", intermediates_only=True)
    if not all(stage.ndim == 4 for stage in stages):
        raise ValueError(
            f"{type(model.backbone).__name__} returns features of shapes {[list(stage.shape) for stage in stages]}; "
            f"expected [1, D, h, w], a vector for each place. Pass correspondences=0."
        )
    fine = [stage for stage in stages if min(stage.shape[2:]) >= _FEWEST_PLACES]
    # If all are too coarse, the finest will do.
    chosen = fine[-1] if fine else max(reversed(stages), key=lambda stage: stage.shape[2] * stage.shape[3])
    cells = (chosen.shape[2], chosen.shape[3])
    window = max(1, round(min(cells) / _BOXES_A_SIDE))
    places = F.avg_pool2d(chosen.float(), window, stride=1)[0]
    return _Features(places, window, cells, stages[-1][0].float())


def _correspondences(image: _Features, sample: _Features, count: int) -> tuple[Correspondence, ...]:
    """Chooses pairs of places that are each other's nearest, far enough apart from pairs already chosen."""
    left, right = (F.normalize(part.places.flatten(1), dim=0) for part in (image, sample))
    similarity = left.T @ right
    nearest, back = similarity.argmax(dim=1), similarity.argmax(dim=0)
    mutual = (back[nearest] == torch.arange(len(nearest), device=nearest.device)).nonzero().squeeze(1)
    cosine = similarity[mutual, nearest[mutual]].clamp(max=1)
    weight = image.relevance(sample)[mutual] * sample.relevance(image)[nearest[mutual]]
    strongest = (cosine * weight.sqrt()).argsort(descending=True, stable=True)
    chosen: list[tuple[float, int, int]] = []
    rows = zip(cosine[strongest].tolist(), mutual[strongest].tolist(), nearest[mutual][strongest].tolist(), strict=True)
    for alike, place, sample_place in rows:
        apart = all(_apart(image, place, a) and _apart(sample, sample_place, b) for _, a, b in chosen)
        if alike > 0 and apart and len(chosen) < count:
            chosen.append((alike, place, sample_place))
    return tuple([Correspondence(alike, image.box(a), sample.box(b)) for alike, a, b in chosen])


def _apart(features: _Features, first: int, second: int) -> bool:
    """Returns whether two boxes have half a box between them, so that pairs do not cluster at one spot."""
    width = features.places.shape[2]
    distance = max(abs(first // width - second // width), abs(first % width - second % width))
    return distance >= features.window + features.window // 2
