"""The classes that a prediction may be instead, each with the memory samples of it that look most like the input.

Shapes: B inputs, C classes, R contenders per input, K samples per contender.
"""

from dataclasses import dataclass, field

from torch import Tensor

from timm_memwrap.attention import wide
from timm_memwrap.data import class_names
from timm_memwrap.explaining.results import Result
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.search import ClassIndex

__all__ = ["Contender", "NearSample", "find_contenders", "nearest_samples"]

# As many of each class are enough to see what it looks like.
_NEAR = 3


@dataclass(frozen=True)
class NearSample(Result):
    """A memory sample of a class that looks like an input, whether the prediction used it or not.

    Args:
        position: Position in the memory bank.
        id: What names the sample in its data set.
        similarity: Cosine similarity of its pre-logits to those of the input. What the model predicts plays no part in
            it, so it may speak against the prediction.
        label: Its label, that is the class; it may have others where samples may have several.
        class_name: Name of the class.
        image: Its picture, uint8 `[3 or 1, H, W]`, if the bank holds one.
    """

    position: int
    id: SampleId
    similarity: float
    label: int
    class_name: str
    image: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Contender(Result):
    """A class that an input may be of, and what the memory holds of it.

    Args:
        prediction: The class.
        class_name: Its name.
        probability: Its probability.
        samples: The samples that bear its label and look most like the input, nearest first; none if the memory has
            none.
    """

    prediction: int
    class_name: str
    probability: float
    samples: tuple[NearSample, ...]

    @property
    def similarity(self) -> float | None:
        """Mean similarity of its samples to the input; `None` if it has none."""
        return sum(sample.similarity for sample in self.samples) / len(self.samples) if self.samples else None


def nearest_samples(model: MemoryWrapModel, encoding: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the three samples of each of some classes that look most like an input.

    Args:
        model: A model with a memory bank.
        encoding: What `model.encode` returned, `[B, E]`.
        classes: Different classes `[B, R]`.

    Returns:
        Similarities `[B, R, 3]` and positions, as `ClassIndex.nearest` does.
    """
    bank, width = model.memory_bank, model.head_hidden_size
    encodings, labels = bank.filled()
    queries = wide(encoding)[:, :width]
    # Kept while the bank stays, since it takes a pass over it.
    known = model.prepared_bank(queries)
    if known.classes is None:
        known.classes = ClassIndex(encodings, labels, width, queries.dtype)
    return known.classes.nearest(queries, classes, _NEAR)


def find_contenders(
    model: MemoryWrapModel, probabilities: Tensor, classes: Tensor, similarities: Tensor, positions: Tensor
) -> list[tuple[Contender, ...]]:
    """Returns contenders for each of B inputs.

    Args:
        model: A model with a memory bank.
        probabilities: Probabilities `[B, R]` of the contenders.
        classes: Their classes `[B, R]`, in the order in which they are returned.
        similarities: Similarities `[B, R, K]` of the samples to show of them.
        positions: Positions `[B, R, K]` of these samples, -1 for none.
    """
    bank = model.memory_bank
    names, ids, found = class_names(model), bank.ids, positions >= 0
    at = positions[found]
    images = [None] * len(at) if bank.images is None else bank.images[at].cpu()
    labels = classes.unsqueeze(-1).expand_as(found)[found]
    rows = zip(at.tolist(), similarities[found].tolist(), labels.tolist(), images, strict=True)
    samples = (NearSample(i, ids[i], similarity, label, names[label], image) for i, similarity, label, image in rows)
    # `samples` are in the order of inputs, contenders and similarity; each contender takes as many as it has.
    return [
        tuple(
            Contender(label, names[label], probability, tuple([next(samples) for _ in range(size)]))
            for label, probability, size in zip(*row, strict=True)
        )
        for row in zip(classes.tolist(), probabilities.tolist(), found.sum(dim=-1).tolist(), strict=True)
    ]
