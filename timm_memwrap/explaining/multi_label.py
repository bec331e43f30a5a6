"""Measures over a data set how far explanations are to be trusted where images may have several classes.

Shapes: N inputs, B inputs of a batch, E width of an encoding, C classes, K samples read per input, P predicted classes,
all inputs together.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timm_memwrap._utils import check_count, evaluating, printable
from timm_memwrap.bank_memory import are_same
from timm_memwrap.data import class_names
from timm_memwrap.explaining.ranking import average_precision, expected_calibration_error
from timm_memwrap.explaining.reading import read_nothing, read_with_deletions
from timm_memwrap.explaining.results import Metrics, Result
from timm_memwrap.explaining.verdicts import own_present
from timm_memwrap.familiarity import UNFAMILIAR, familiarity, reference_quantiles
from timm_memwrap.labels import multi_hot, present
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["MultiLabelMeter", "MultiLabelMetrics"]

# Classes in a printed table.
_SHOWN = 20
# As many samples as `explain` shows by default.
_STRONGEST = 5


@dataclass(frozen=True)
class MultiLabelClassMetrics(Result):
    """How a class fares among others that an input may have too. `None` means no input to count.

    Args:
        class_name: Its name.
        count: Number of inputs that have it.
        average_precision: How well its logit ranks them before the others (AP).
        accuracy: Share of all inputs for which it is rightly predicted to be there, or not.
        precision: Share of the inputs it is predicted for that have it.
        recall: Share of the inputs that have it for which it is predicted.
        memory_count: Number of memory samples that have it.
    """

    class_name: str
    count: int
    average_precision: float | None
    accuracy: float
    precision: float | None
    recall: float | None
    memory_count: int


@dataclass(frozen=True)
class MultiLabelMetrics(Metrics):
    """What `evaluate_explanations` found where images may have several classes.

    Rates are between 0 and 1; `None` means nothing to count. A class is predicted where it is more probable than not.
    Figures about explanations are over all predicted classes of all inputs: an *example* is then a memory sample that
    the model says has the class too. What is not listed is as in `ExplanationMetrics`.

    Args:
        count: Number of inputs N.
        mean_average_precision: Mean of the classes' average precision, of those that an input has (macro mAP).
        mean_average_precision_plain: The same of the backbone's own classifier; `None` if the memory is not read with
            it.
        mean_average_precision_without_memory: The same if nothing were read. As high as `mean_average_precision`, the
            memory is decoration.
        accuracy: Share of all inputs and classes for which it is rightly predicted whether the class is there. Where
            most classes are absent, it is high for a model that predicts none.
        exact_match: Share of inputs of which all classes are rightly predicted.
        f1: Harmonic mean of precision and recall over all inputs and classes (micro F1); `None` if no class is there or
            predicted.
        calibration_error: Of all inputs and classes, how far the probability of what is predicted is from how often
            that is right.
        classes_predicted: Mean number of predicted classes of an input.
        classes_present: Mean number of classes of an input.
        unfamiliar_rate: See `ExplanationMetrics`.
        explanation_accuracy: Share of predicted classes whose input has an example as its strongest sample. Of several
            classes an input has one strongest sample, which need not speak for all.
        explained_rate: Share of predicted classes with an example among the five strongest samples.
        identical_class_rate: Share of predicted classes that the strongest sample has as a *label*.
        identical_class_rate_wrong: The same among wrongly predicted classes.
        missed_class_shown: Among classes that an input has and that are not predicted, the share that one of the five
            strongest samples has as a label: how often the evidence shows what was missed.
        weight_on_prediction: Mean weight of all examples of a predicted class together.
        support_size: Mean number of samples with positive weight.
        deletion_flip_rate: Share of predicted classes that are not predicted any more without the `deleted` strongest
            samples of their input.
        random_flip_rate: The same without as many samples drawn at random from the whole memory.
        deletion_drop: Mean fall in their probability without the strongest samples.
        random_drop: The same without as many samples drawn at random.
        deleted: How many samples were left out.
        in_memory: Number of inputs that are in the memory themselves.
        by_class: Each class.
    """

    count: int
    mean_average_precision: float | None
    mean_average_precision_plain: float | None
    mean_average_precision_without_memory: float | None
    accuracy: float
    exact_match: float
    f1: float | None
    calibration_error: float
    classes_predicted: float
    classes_present: float
    unfamiliar_rate: float
    explanation_accuracy: float | None
    explained_rate: float | None
    identical_class_rate: float | None
    identical_class_rate_wrong: float | None
    missed_class_shown: float | None
    weight_on_prediction: float | None
    support_size: float
    deletion_flip_rate: float | None
    random_flip_rate: float | None
    deletion_drop: float | None
    random_drop: float | None
    deleted: int
    in_memory: int
    by_class: tuple[MultiLabelClassMetrics, ...]

    @property
    def scores(self) -> dict[str, float]:
        """How good the predictions are, by the name that a model card gives it."""
        ranked = {} if self.mean_average_precision is None else {"mean average precision": self.mean_average_precision}
        return {**ranked, "accuracy": self.accuracy}

    def __str__(self) -> str:
        """Returns a table of the values, and one of the classes, those that are ranked worst first."""
        values = Result.table({name: value for name, value in self.to_dict().items() if name != "by_class"})
        classes = sorted(
            self.by_class, key=lambda each: 1.0 if each.average_precision is None else each.average_precision
        )
        rows = [
            f"{printable(each.class_name)[:24]:24}  {_shown(each.average_precision)}  {_shown(each.accuracy)}  "
            f"{_shown(each.precision)}  {_shown(each.recall)}  {each.count:6,}  {each.memory_count:6,}"
            for each in classes[:_SHOWN]
        ]
        more = [f"and {len(classes) - _SHOWN} more classes"] if len(classes) > _SHOWN else []
        titles = "  ".join(f"{title:>9}" for title in ("AP", "accuracy", "precision", "recall"))
        return "\n".join([values, "", f"{'class':24}  {titles}  {'inputs':>6}  {'memory':>6}", *rows, *more])


class MultiLabelMeter:
    """Gathers `MultiLabelMetrics` over batches of encodings, between which the bank may change."""

    def __init__(self, model: MemoryWrapModel, deleted: int = 5, seed: int = 0) -> None:
        check_count("deleted", deleted)
        self.model, self.deleted = model, deleted
        self._rng = random.Random(seed)
        self._batches: list[dict[str, Tensor]] = []

    def update(self, encoding: Tensor, labels: Tensor) -> MemoryReadout:
        """Reads the memory for encodings `[B, E]` of images with labels `[B, C]`, and returns what was read."""
        with evaluating(self.model):
            readout = self.model.read(encoding)
            columns = _measure(self.model, readout, labels.bool(), self.deleted, self._rng)
            self._batches.append({name: value.cpu() for name, value in columns.items()})
        return readout

    def compute(self) -> MultiLabelMetrics:
        """Returns the metrics of all batches, at least one."""
        found = {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}
        labels, logits = found.pop("labels"), found.pop("logits")
        said, counts = present(logits), self.model.memory_bank.class_counts
        right, hits = said == labels, said & labels
        by_class = tuple(
            MultiLabelClassMetrics(
                class_name=name,
                count=int(labels[:, i].sum()),
                average_precision=average_precision(logits[:, i], labels[:, i]),
                accuracy=float(right[:, i].double().mean()),
                precision=_mean(labels[:, i][said[:, i]]),
                recall=_mean(said[:, i][labels[:, i]]),
                memory_count=counts.get(i, 0),
            )
            for i, name in enumerate(class_names(self.model))
        )
        named = int(said.sum() + labels.sum())
        probability = logits.abs().sigmoid()
        plain, nothing = found.pop("plain"), found.pop("nothing")
        familiar = familiarity(found.pop("remainder"), reference_quantiles(self.model).cpu())
        wrong = ~found["right"].bool()
        return MultiLabelMetrics(
            count=len(labels),
            mean_average_precision=_over_classes([each.average_precision for each in by_class]),
            mean_average_precision_plain=_mean_average_precision(plain, labels)
            if self.model.keeps_classifier
            else None,
            mean_average_precision_without_memory=_mean_average_precision(nothing, labels),
            accuracy=float(right.double().mean()),
            exact_match=float(right.all(dim=1).double().mean()),
            f1=2 * int(hits.sum()) / named if named else None,
            calibration_error=expected_calibration_error(probability.flatten(), right.flatten()),
            classes_predicted=float(said.sum(dim=1).double().mean()),
            classes_present=float(labels.sum(dim=1).double().mean()),
            unfamiliar_rate=float((familiar < UNFAMILIAR).double().mean()),
            identical_class_rate_wrong=_mean(found["identical_class_rate"][wrong]),
            deleted=self.deleted,
            in_memory=int(found.pop("in_memory").sum()),
            by_class=by_class,
            **{name: _mean(column) for name, column in found.items() if name != "right"},
        )


def _measure(
    model: MemoryWrapModel, readout: MemoryReadout, labels: Tensor, deleted: int, rng: random.Random
) -> dict[str, Tensor]:
    """Computes by name what the metrics are made of: of inputs `[B, ...]`, of predicted and of missed classes `[P]`."""
    encodings, bank_labels = model.memory_bank.filled()
    weights, positions, logits = readout.weights.float(), readout.positions, readout.logits.float()
    used, said = weights > 0, present(logits)
    rows, classes = said.nonzero(as_tuple=True)
    same = own_present(model, readout)[rows, :, classes]
    nearest = positions.gather(1, readout.similarities.argmax(dim=1, keepdim=True)).squeeze(1)
    few = positions[:, :_STRONGEST]
    has = multi_hot(bank_labels[few.flatten()], model.num_classes).view(*few.shape, -1)
    shown = (has & used[:, :_STRONGEST].unsqueeze(-1)).any(dim=1)
    result = {
        "labels": labels,
        "logits": logits,
        "plain": model.own_classifier(readout.encoding).float() if model.keeps_classifier else logits,
        "nothing": read_nothing(model, readout.encoding),
        "remainder": readout.remainder,
        "in_memory": are_same(readout.encoding, encodings[nearest]),
        "support_size": used.sum(dim=1),
        "right": labels[rows, classes],
        "explanation_accuracy": same[:, 0],
        "explained_rate": same[:, :_STRONGEST].any(dim=1),
        "identical_class_rate": has[rows, 0, classes],
        "missed_class_shown": shown[labels & ~said],
        "weight_on_prediction": (weights[rows] * same).sum(dim=1),
    }
    probability = logits.sigmoid()[rows, classes]
    for name, left in read_with_deletions(model, readout, deleted, rng).items():
        result[f"{name}_flip_rate"] = ~present(left)[rows, classes]
        result[f"{name}_drop"] = probability - left.sigmoid()[rows, classes]
    return result


def _mean_average_precision(logits: Tensor, labels: Tensor) -> float | None:
    return _over_classes([average_precision(*columns) for columns in zip(logits.T, labels.T, strict=True)])


def _over_classes(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean(values: Tensor) -> Any:
    return float(values.double().mean()) if len(values) else None


def _shown(value: float | None) -> str:
    return f"{'' if value is None else f'{value:.4g}':>9}"
