"""Measures over a data set how far explanations are to be trusted.

Shapes: N inputs, B inputs of a batch, E width of an encoding, C classes, K samples read per input.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap._utils import check_count, evaluating
from timm_memwrap.explaining.reading import encodings_of, no_class_leads, own_predictions, read_nothing, read_without
from timm_memwrap.explaining.results import Result
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["ExplanationMeter", "ExplanationMetrics", "evaluate_explanations", "expected_calibration_error"]


@dataclass(frozen=True)
class ExplanationMetrics(Result):
    """What `evaluate_explanations` found over a data set. Rates are between 0 and 1; `None` means no input to count.

    An *example* is a memory sample that the model puts in the class that it predicts for the input, a *counterfactual*
    one that it puts in another (La Rosa et al. 2022, https://doi.org/10.1007/s10489-022-03886-6). The model's own
    logits for a memory sample are the kept classifier's, else what the model reads with the sample itself hidden.

    Args:
        count: Number of inputs N.
        accuracy: Share of inputs whose prediction is their label.
        accuracy_without_memory: The same if nothing were read, where no class leading is wrong. If it is as high as
            `accuracy`, the memory is decoration.
        explanation_accuracy: Share of inputs whose strongest sample is an example (La Rosa et al. 2022, Section 5).
        accuracy_example: Accuracy on these inputs (the published `explanation_accuracy.py`).
        accuracy_counterfactual: Accuracy on the others (ibid.).
        input_nonrepresentativeness: Mean absolute difference between the logits of the input and of its strongest
            example, over inputs that have one (Nguyen and Martinez 2020, https://arxiv.org/abs/2007.07584, with the L1
            loss of the published `run_exp_by_examples.py`). Lower is better.
        prediction_nonrepresentativeness: Cross-entropy of the strongest example's logits with the input's predicted
            class as the target, over the same inputs (ibid.). Lower is better.
        support_size: Mean number of samples with positive weight.
        weight_on_prediction: Mean weight of all examples of an input together.
        identical_class_rate: Share of inputs whose strongest sample has the predicted class as its *label* (the
            identical class test of Hanawa et al. 2021, https://arxiv.org/abs/2006.04528).
        deletion_flip_rate: Share of inputs whose prediction changes without its `deleted` strongest samples, or all if
            they are fewer (after Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421). Faithful explanations are
            above `random_flip_rate`.
        random_flip_rate: The same without as many samples drawn at random from the whole memory.
        deletion_drop: Mean fall in the predicted class's probability without the strongest samples (comprehensiveness,
            DeYoung et al. 2020, https://arxiv.org/abs/1911.03429).
        random_drop: The same without as many samples drawn at random.
        deleted: How many samples were left out.
        calibration_error: Expected calibration error over 15 bins of equal width (Guo et al. 2017,
            https://arxiv.org/abs/1706.04599).
    """

    count: int
    accuracy: float
    accuracy_without_memory: float
    explanation_accuracy: float
    accuracy_example: float | None
    accuracy_counterfactual: float | None
    input_nonrepresentativeness: float | None
    prediction_nonrepresentativeness: float | None
    support_size: float
    weight_on_prediction: float
    identical_class_rate: float
    deletion_flip_rate: float
    random_flip_rate: float
    deletion_drop: float
    random_drop: float
    deleted: int
    calibration_error: float


def evaluate_explanations(
    model: MemoryWrapModel, data: Any, deleted: int = 5, seed: int = 0, progress: bool = True
) -> ExplanationMetrics:
    """Measures a model's predictions and explanations in one pass over a data set.

    Runs in evaluation mode, and restores the model's mode. Each image is encoded once; the deletion test takes further
    reads.

    Args:
        model: A model with a memory bank.
        data: A dataset or loader of `(image, label)` with images as tensors, or a dataset with PIL images, which get
            the model's own evaluation transform. It should not be what the bank was built from: a sample's nearest
            memory is then the sample itself.
        deleted: How many of the strongest samples the deletion test leaves out.
        seed: Seed of the samples that it leaves out at random.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the bank or the data is empty, or a label is outside `num_classes`.

    Example:
        ```python
        >>> import timm, timm_memwrap, torch
        >>> from timm_memwrap.explaining import evaluate_explanations
        >>> model = timm.create_model("memwrap_test_resnet", num_classes=2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 2)
        >>> bank = timm_memwrap.build_memory_bank(model, data, size=4, progress=False)
        >>> evaluate_explanations(model, data, progress=False).count
        8

        ```
    """
    meter = ExplanationMeter(model, deleted, seed)
    with encodings_of(model, data, "Explanations", progress) as batches:
        for encoding, labels in batches:
            meter.update(encoding, labels)
    return meter.compute()


class ExplanationMeter:
    """Gathers `ExplanationMetrics` over batches of encodings, between which the bank may change."""

    def __init__(self, model: MemoryWrapModel, deleted: int = 5, seed: int = 0) -> None:
        check_count("deleted", deleted)
        self.model, self.deleted = model, deleted
        self._rng = random.Random(seed)
        self._batches: list[dict[str, Tensor]] = []

    def update(self, encoding: Tensor, labels: Tensor) -> MemoryReadout:
        """Reads the memory for encodings `[B, E]` of images with labels `[B]`, and returns what was read."""
        with evaluating(self.model):
            readout = self.model.read(encoding)
            self._batches.append(_measure(self.model, readout, labels, self.deleted, self._rng))
        return readout

    def compute(self) -> ExplanationMetrics:
        """Returns the metrics of all batches, at least one."""
        values = {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}
        right, example, probability = values["accuracy"], values["explanation_accuracy"], values.pop("probability")
        return ExplanationMetrics(
            count=len(right),
            accuracy_example=_mean(right[example]),
            accuracy_counterfactual=_mean(right[~example]),
            deleted=self.deleted,
            calibration_error=expected_calibration_error(probability, right),
            **{name: _mean(column) for name, column in values.items()},
        )


def expected_calibration_error(probabilities: Tensor, right: Tensor, bins: int = 15) -> float:
    """Computes the mean gap between probabilities `[N]` of predictions and how often they are right `[N]`, by bins."""
    index = (probabilities * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right.double() - probabilities.double())
    return float(gap.abs().sum() / len(right))


def _measure(
    model: MemoryWrapModel, readout: MemoryReadout, labels: Tensor, deleted: int, rng: random.Random
) -> dict[str, Tensor]:
    """Computes the probability of the predictions, and by name the columns of which the metrics are the means."""
    bank = model.memory_bank
    assert bank.labels is not None
    weights, positions, logits = readout.weights.float(), readout.positions, readout.logits.float()
    probability, prediction = logits.softmax(dim=-1).max(dim=-1)
    used = weights > 0
    same = (own_predictions(model, readout) == prediction.unsqueeze(1)) & used

    has_example = same.any(dim=1)
    strongest = positions.gather(1, same.long().argmax(dim=1, keepdim=True)).squeeze(1)[has_example]
    own = model.own_logits(strongest).float()
    nothing = read_nothing(model, readout.encoding)
    support = used.sum(dim=1)
    result = {
        "accuracy": prediction == labels,
        "accuracy_without_memory": (nothing.argmax(dim=-1) == labels) & ~no_class_leads(nothing),
        "probability": probability,
        "explanation_accuracy": same[:, 0],
        "identical_class_rate": bank.labels[positions[:, 0]] == prediction,
        "support_size": support,
        "weight_on_prediction": (weights * same).sum(dim=1),
        "input_nonrepresentativeness": (own - logits[has_example]).abs().mean(dim=1),
        "prediction_nonrepresentativeness": F.cross_entropy(own, prediction[has_example], reduction="none"),
    }
    for name, left in _deletions(model, readout, support.clamp(max=deleted), rng):
        result[f"{name}_flip_rate"] = (left.argmax(dim=-1) != prediction) | no_class_leads(left)
        result[f"{name}_drop"] = probability - left.softmax(dim=-1).gather(1, prediction.unsqueeze(1)).squeeze(1)
    return {name: value.cpu() for name, value in result.items()}


def _deletions(
    model: MemoryWrapModel, readout: MemoryReadout, counts: Tensor, rng: random.Random
) -> Iterator[tuple[str, Tensor]]:
    """Yields the logits `[B, C]` without `counts` `[B]` samples: without the strongest, and without random ones."""
    encoding, size = readout.encoding, len(model.memory_bank)
    strongest, drawn = (encoding.new_zeros(len(encoding), model.num_classes, dtype=torch.float32) for _ in range(2))
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().squeeze(1)
        random_positions = torch.tensor([rng.sample(range(size), count) for _ in rows], device=encoding.device)
        strongest[rows] = read_without(model, encoding[rows], readout.positions[rows, :count])
        drawn[rows] = read_without(model, encoding[rows], random_positions)
    yield "deletion", strongest
    yield "random", drawn


def _mean(values: Tensor) -> Any:
    return float(values.double().mean()) if len(values) else None
