"""Measures over a data set how far explanations are to be trusted.

Shapes: N inputs, B inputs of a batch, E width of an encoding, C classes, K samples read per input.
"""

import copy
import logging
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_memwrap._utils import check_count, evaluating, printable
from timm_memwrap.bank_memory import are_same
from timm_memwrap.data import BATCH_SIZE, SampleImages, class_names
from timm_memwrap.explaining.answers import measure_answers
from timm_memwrap.explaining.confidence import read_confidence
from timm_memwrap.explaining.explanation import explain
from timm_memwrap.explaining.multi_label import MultiLabelMeter, MultiLabelMetrics
from timm_memwrap.explaining.nearby import class_counts_of, nearby, quantiles_of_memory
from timm_memwrap.explaining.ranking import area_under_risk_coverage, auroc, expected_calibration_error
from timm_memwrap.explaining.reading import (
    encodings_of,
    no_class_leads,
    own_predictions,
    read_nothing,
    read_with_deletions,
    snapshot,
)
from timm_memwrap.explaining.results import Metrics, Result
from timm_memwrap.familiarity import UNFAMILIAR, familiarity
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = [
    "ExplanationMeter",
    "ExplanationMetrics",
    "evaluate_explanations",
    "expected_calibration_error",
    "randomisation_check",
]


_logger = logging.getLogger(__name__)

# Classes in a printed table.
_SHOWN = 20
# As many samples and contenders as `explain` shows by default.
_STRONGEST, _CONTENDERS = 5, 3


@dataclass(frozen=True)
class ClassMetrics(Result):
    """How a class fares.

    Args:
        class_name: Its name.
        count: Number of inputs with this label.
        accuracy: Share of them that are predicted right; `None` if there are none.
        memory_count: Number of memory samples with this label.
    """

    class_name: str
    count: int
    accuracy: float | None
    memory_count: int


@dataclass(frozen=True)
class ExplanationMetrics(Metrics):
    """What `evaluate_explanations` found over a data set. Rates are between 0 and 1; `None` means no input to count.

    An *example* is a memory sample that the model puts in the class that it predicts for the input, a *counterfactual*
    one that it puts in another (La Rosa et al. 2022, https://doi.org/10.1007/s10489-022-03886-6). The model's own
    logits for a memory sample are the kept classifier's, else what the model reads with the sample itself hidden.

    Args:
        count: Number of inputs N.
        accuracy: Share of inputs whose prediction is their label.
        accuracy_without_memory: The same if nothing were read. As high as `accuracy`, the memory is decoration.
        true_class_shown_wrong: Among wrong predictions, the share with a sample of the true class among the five
            strongest: how often the evidence shows what it is instead. More samples show more classes: five drawn at
            random from ten balanced ones would show it in 41 %.
        true_class_contends_wrong: Among wrong predictions, the share whose true class is one of the three most
            probable, of which `explain` shows samples as contenders.
        follows_exchanged_answer: Share of inputs whose prediction becomes the second class of the backbone's classifier
            when its best and second logit are exchanged in the query, and the pre-logits left as they are; of those
            predicted as its best class before. Near 1, the evidence is chosen by the verdict that it is to support;
            near 0, by what is seen. `None` if the query does not hold what the classifier says.
        stays_with_answer: Share of inputs whose prediction stays when the query shows another picture with the answer
            of the input: the pre-logits of a memory sample, itself not read, that the classifier puts in another class
            than the predicted one. High and low mean what they do for `follows_exchanged_answer`.
        error_ranking: How often a right prediction has a higher confidence than a wrong one (AUROC; 0.5 is chance). For
            a model that is not calibrated, confidence is the probability of the predicted class.
        error_ranking_plain: The same of the backbone's own classifier, by the probability of the class that it predicts
            itself; `None` if the memory is not read with it.
        risk_coverage_area: Mean share of errors among the most confident predictions, over all shares of them (AURC,
            Geifman et al. 2019, https://arxiv.org/abs/1805.08206). Lower is better.
        unfamiliar_rate: Share of inputs whose `familiarity` is below 0.05: about that if they are of the kind that
            `calibrate` was given, more if the model does not know them.
        calibration_error: Expected calibration error over 15 bins of equal width (Guo et al. 2017,
            https://arxiv.org/abs/1706.04599).
        explanation_accuracy: Share of inputs whose strongest sample is an example (La Rosa et al. 2022, Section 5). It
            cannot tell evidence from decoration: the similarity contains what the classifier predicts.
        accuracy_example: Accuracy on these inputs (the published `explanation_accuracy.py`).
        accuracy_counterfactual: Accuracy on the others (ibid.).
        input_nonrepresentativeness: Mean absolute difference between the logits of the input and of its strongest
            example, if it has one (Nguyen and Martinez 2020, https://arxiv.org/abs/2007.07584, with the published
            script's L1 loss). Lower is better.
        prediction_nonrepresentativeness: Cross-entropy of that example's logits with the predicted class (ibid.).
        support_size: Mean number of samples with positive weight.
        weight_on_prediction: Mean weight of all examples of an input together.
        identical_class_rate: Share of inputs whose strongest sample has the predicted class as its *label* (the
            identical class test of Hanawa et al. 2021, https://arxiv.org/abs/2006.04528).
        identical_class_rate_wrong: The same among wrong predictions: evidence that agrees with an error cannot show it.
        deletion_flip_rate: Share of inputs whose prediction changes without its `deleted` strongest samples, or all if
            they are fewer (after Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421). Faithful explanations are
            above `random_flip_rate`.
        random_flip_rate: The same without as many samples drawn at random from the whole memory; where an engine holds
            it, from those found for the batch.
        deletion_drop: Mean fall in the predicted class's probability without the strongest samples (comprehensiveness,
            DeYoung et al. 2020, https://arxiv.org/abs/1911.03429).
        random_drop: The same without as many samples drawn at random.
        deleted: How many samples were left out.
        in_memory: Number of inputs that are in the memory themselves, and find themselves there: they flatter all other
            figures.
        by_class: Each class: its inputs, and its share in the memory.
    """

    count: int
    accuracy: float
    accuracy_without_memory: float
    true_class_shown_wrong: float | None
    true_class_contends_wrong: float | None
    follows_exchanged_answer: float | None
    stays_with_answer: float | None
    error_ranking: float | None
    error_ranking_plain: float | None
    risk_coverage_area: float
    unfamiliar_rate: float
    calibration_error: float
    explanation_accuracy: float
    accuracy_example: float | None
    accuracy_counterfactual: float | None
    input_nonrepresentativeness: float | None
    prediction_nonrepresentativeness: float | None
    support_size: float
    weight_on_prediction: float
    identical_class_rate: float
    identical_class_rate_wrong: float | None
    deletion_flip_rate: float
    random_flip_rate: float
    deletion_drop: float
    random_drop: float
    deleted: int
    in_memory: int
    by_class: tuple[ClassMetrics, ...]

    @property
    def scores(self) -> dict[str, float]:
        """How good the predictions are, by the name that a model card gives it."""
        return {"accuracy": self.accuracy}

    def __str__(self) -> str:
        """Returns a table of the values, and one of the classes, the least accurate first."""
        values = Result.table({name: value for name, value in self.to_dict().items() if name != "by_class"})
        classes = sorted(self.by_class, key=lambda each: 1.0 if each.accuracy is None else each.accuracy)
        rows = [
            f"{printable(each.class_name)[:24]:24}  {'' if each.accuracy is None else f'{each.accuracy:.4g}':>8}  "
            f"{each.count:6,}  {each.memory_count:6,}"
            for each in classes[:_SHOWN]
        ]
        more = [f"and {len(classes) - _SHOWN} more classes"] if len(classes) > _SHOWN else []
        return "\n".join([values, "", f"{'class':24}  {'accuracy':>8}  {'inputs':>6}  {'memory':>6}", *rows, *more])


def evaluate_explanations(
    model: MemoryWrapModel, data: Any, deleted: int = 5, seed: int = 0, progress: bool = True
) -> ExplanationMetrics | MultiLabelMetrics:
    """Measures a model's predictions and explanations in one pass over a data set.

    Each image is encoded once; the deletion test takes further reads. The model's mode is restored. Where images may
    have several classes, what is measured is in `MultiLabelMetrics`.

    Args:
        model: A model with a memory bank.
        data: A dataset or loader of `(image, label)` with images as tensors, or a dataset with PIL images, which get
            the model's own transform. Not what the bank was built from: each sample's nearest memory would be itself.
        deleted: How many of the strongest samples the deletion test leaves out.
        seed: Seed of the samples that it leaves out at random, and of the other pictures.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the bank or the data is empty, a label is outside `num_classes`, or the labels of the data are of
            another kind than those of the memory.
    """
    model = snapshot(model, whole=False)
    meter = MultiLabelMeter(model, deleted, seed) if model.multi_label else ExplanationMeter(model, deleted, seed)
    with encodings_of(model, data, "Explanations", progress) as batches:
        for encoding, labels in batches:
            meter.update(encoding, labels)
    metrics = meter.compute()
    if metrics.in_memory:
        _logger.warning(
            "%d of %d inputs are in the memory, and find themselves there, which flatters all figures. Evaluate with "
            "images that are not in it.",
            metrics.in_memory,
            metrics.count,
        )
    return metrics


class ExplanationMeter:
    """Gathers `ExplanationMetrics` over batches of encodings, between which the bank may change."""

    def __init__(self, model: MemoryWrapModel, deleted: int = 5, seed: int = 0) -> None:
        check_count("deleted", deleted)
        self.model, self.deleted = model, deleted
        # One for each test: a common one would be drawn from in another order in batches of another size.
        self._rng, self._pictures = random.Random(seed), random.Random(seed)
        self._batches: list[dict[str, Tensor]] = []

    def update(self, encoding: Tensor, labels: Tensor) -> MemoryReadout:
        """Reads the memory for encodings `[B, E]` of images with labels `[B]`, and returns what was read."""
        with evaluating(self.model):
            model = nearby(self.model, encoding, hidden=self.deleted)
            readout = model.read(encoding)
            columns = _measure(model, readout, labels, self.deleted, self._rng)
            columns |= measure_answers(model, readout, self._pictures)
            self._batches.append({name: value.cpu() for name, value in columns.items()})
        return readout

    def compute(self) -> ExplanationMetrics:
        """Returns the metrics of all batches, at least one."""
        values = {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}
        right, example, probability = values["accuracy"], values["explanation_accuracy"], values.pop("probability")
        confidence, plain, plain_right = values.pop("confidence"), values.pop("plain"), values.pop("plain_right")
        # Once, and not for each batch: without `calibrate` it takes reads of the memory itself.
        familiar = familiarity(values.pop("remainder"), quantiles_of_memory(self.model).cpu())
        labels, in_memory, identical = values.pop("labels"), values.pop("in_memory"), values["identical_class_rate"]
        wrong = {name: _mean(values.pop(name)[~right]) for name in ("true_class_shown", "true_class_contends")}
        counts = class_counts_of(self.model)
        return ExplanationMetrics(
            count=len(right),
            accuracy_example=_mean(right[example]),
            accuracy_counterfactual=_mean(right[~example]),
            deleted=self.deleted,
            in_memory=int(in_memory.sum()),
            identical_class_rate_wrong=_mean(identical[~right]),
            by_class=tuple(
                [
                    ClassMetrics(name, int(of_class.sum()), _mean(right[of_class]), counts.get(label, 0))
                    for label, name in enumerate(class_names(self.model))
                    for of_class in [labels == label]
                ]
            ),
            unfamiliar_rate=_mean(familiar < UNFAMILIAR),
            error_ranking=auroc(confidence, right),
            error_ranking_plain=auroc(plain, plain_right) if self.model.keeps_classifier else None,
            risk_coverage_area=area_under_risk_coverage(confidence, right),
            calibration_error=expected_calibration_error(probability, right),
            **{f"{name}_wrong": rate for name, rate in wrong.items()},
            **{name: _mean(column) for name, column in values.items()},
        )


def randomisation_check(model: MemoryWrapModel, images: Any, memory: Any, top_k: int = 5, seed: int = 0) -> float:
    """Returns the share of an explanation's strongest samples that a randomised encoder would show as well.

    The encoder's parameters are shuffled, each tensor in itself, and the memory is encoded again. An explanation that
    depends on what the model has learned must change, so the share should be near `top_k / M` (Adebayo et al. 2018,
    https://arxiv.org/abs/1810.03292).

    Args:
        model: A model with a memory bank; it is not changed.
        images: As in `explain`.
        memory: As in `attribute`.
        top_k: How many of the strongest samples to compare.
        seed: Seed of the shuffle.

    Raises:
        ValueError: If the bank is empty, or one of its samples is not in `memory`.
    """
    before, samples = explain(model, images, top_k, contenders=0), SampleImages(model, memory)
    shuffled, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with evaluating(shuffled):
        for parameter in shuffled.backbone.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
        bank = shuffled.memory_bank
        ids, (_, labels) = bank.ids, bank.filled()
        inputs = ([samples.input(i) for i in ids[at : at + BATCH_SIZE]] for at in range(0, len(ids), BATCH_SIZE))
        bank.replace(torch.cat([shuffled.encode(torch.stack(part)) for part in inputs]), labels, ids)
    after = explain(shuffled, images, top_k, contenders=0)
    shown = [[{sample.position for sample in one.samples} for one in explanations] for explanations in (before, after)]
    shares = [len(a & b) / len(a) for a, b in zip(*shown, strict=True)]
    return sum(shares) / len(shares)


def _measure(
    model: MemoryWrapModel, readout: MemoryReadout, labels: Tensor, deleted: int, rng: random.Random
) -> dict[str, Tensor]:
    """Computes the probability of the predictions, and by name the columns of which the metrics are the means."""
    encodings, bank_labels = model.memory_bank.filled()
    weights, positions, logits = readout.weights.float(), readout.positions, readout.logits.float()
    probability, prediction = logits.softmax(dim=-1).max(dim=-1)
    confidence = read_confidence(model, readout)
    own_logits = model.own_classifier(readout.encoding).float() if model.keeps_classifier else logits
    plain, plain_prediction = own_logits.softmax(dim=-1).max(dim=-1)
    used = weights > 0
    same = (own_predictions(model, readout) == prediction.unsqueeze(1)) & used

    has_example = same.any(dim=1)
    strongest = positions.gather(1, same.long().argmax(dim=1, keepdim=True)).squeeze(1)[has_example]
    own = model.own_logits(strongest).float()
    nothing = read_nothing(model, readout.encoding)
    support, nearest = used.sum(dim=1), positions.gather(1, readout.similarities.argmax(dim=1, keepdim=True)).squeeze(1)
    result = {
        "accuracy": prediction == labels,
        "accuracy_without_memory": (nothing.argmax(dim=-1) == labels) & ~no_class_leads(nothing),
        "probability": probability,
        "remainder": readout.remainder,
        "confidence": probability if confidence is None else confidence,
        "plain": plain,
        "plain_right": plain_prediction == labels,
        "explanation_accuracy": same[:, 0],
        "identical_class_rate": bank_labels[positions[:, 0]] == prediction,
        "true_class_shown": ((bank_labels[positions] == labels.unsqueeze(1)) & used)[:, :_STRONGEST].any(dim=1),
        "true_class_contends": (logits.topk(min(_CONTENDERS, logits.shape[1])).indices == labels.unsqueeze(1)).any(
            dim=1
        ),
        "labels": labels,
        "in_memory": are_same(readout.encoding, encodings[nearest]),
        "support_size": support,
        "weight_on_prediction": (weights * same).sum(dim=1),
        "input_nonrepresentativeness": (own - logits[has_example]).abs().mean(dim=1),
        "prediction_nonrepresentativeness": F.cross_entropy(own, prediction[has_example], reduction="none"),
    }
    for name, left in read_with_deletions(model, readout, deleted, rng).items():
        result[f"{name}_flip_rate"] = (left.argmax(dim=-1) != prediction) | no_class_leads(left)
        result[f"{name}_drop"] = probability - left.softmax(dim=-1).gather(1, prediction.unsqueeze(1)).squeeze(1)
    return result


def _mean(values: Tensor) -> Any:
    return float(values.double().mean()) if len(values) else None
