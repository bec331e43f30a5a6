"""Explains predictions by the memory samples that they used, and by those of what they may be instead.

Shapes: B inputs, M memory samples, C classes, K samples read per input.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from timm_memwrap._utils import check_count, evaluating, printable
from timm_memwrap.attention import unit, wide
from timm_memwrap.data import batches_of, class_names
from timm_memwrap.explaining.confidence import CONFIDENCE_CLASSES, read_confidence
from timm_memwrap.explaining.contenders import Contender, find_contenders, nearest_samples
from timm_memwrap.explaining.correspondences import Correspondence, Matcher
from timm_memwrap.explaining.reading import no_class_leads, own_predictions, read_nothing, read_without, snapshot
from timm_memwrap.explaining.results import Result
from timm_memwrap.familiarity import UNFAMILIAR, familiarity, reference_quantiles
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = ["Explanation", "MemorySample", "explain", "explain_batch"]


@dataclass(frozen=True)
class MemorySample(Result):
    """A memory sample that a prediction used.

    Args:
        position: Position in the memory bank.
        id: What names the sample in its data set.
        weight: Its share of what was read; the weights of all samples that a prediction used sum to 1.
        similarity: Its similarity to the input, in the metric of the read and without its scale.
        feature_similarity: Cosine similarity of its pre-logits to those of the input. What the model predicts plays no
            part in it, as it does not for contenders.
        label: Its label.
        class_name: Name of its label.
        prediction: The model's own prediction for it: the kept classifier's, else one that does not read the sample.
        predicted_class_name: Name of that class.
        is_example: Whether `prediction` is the class that the model predicts for the input.
        influence: Probability of the predicted class minus what it would be without this sample.
        prediction_without: The prediction without this sample; `None` if no class then leads.
        image: Its picture, uint8 `[3 or 1, H, W]`, if the bank holds one.
        correspondences: Which of its places look like which of the input, strongest first, if asked for.
    """

    position: int
    id: SampleId
    weight: float
    similarity: float
    feature_similarity: float
    label: int
    class_name: str
    prediction: int
    predicted_class_name: str
    is_example: bool
    influence: float
    prediction_without: int | None
    image: Tensor | None = field(default=None, repr=False, compare=False)
    correspondences: tuple[Correspondence, ...] = ()


@dataclass(frozen=True)
class Explanation(Result):
    """A prediction and the memory samples that it used.

    Args:
        prediction: The predicted class.
        class_name: Its name.
        probability: Its probability.
        samples: The samples with the largest weights, strongest first.
        examples: Those that the model puts in the predicted class, strongest first (explanation by example).
        counterfactuals: Those that the model puts in another class, strongest first.
        support_size: Number of samples that the prediction used, shown or not.
        prediction_without_memory: The prediction if nothing were read; `None` if no class then leads.
        probability_without_memory: Probability of the predicted class if nothing were read.
        familiarity: Share of the held-out images given to `calibrate` that are less familiar than the input, by how
            near the samples come to it that it reads: at 0.02 it is more unlike the memory than 98 % of them. Before
            `calibrate` the memory's own samples stand in for these, and new images come out too low.
        unfamiliar: Whether that is below what `explain` was told to abstain at.
        carried: How much of the plain classifier's margin, its logit of the predicted class minus that of the best
            other one, the samples carry: with 0.8, a fifth comes from what they do not account for. `None` if the model
            has no classifier of its own, or that prefers another class.
        contenders: The most probable classes, the predicted one first, each with the samples labelled as it that look
            most like the input.
        confidence: Probability that the prediction is right, fitted by `calibrate`; `None` until then. It ranks errors
            better than `probability`, since it also weighs what the classifier and the contenders say.
    """

    prediction: int
    class_name: str
    probability: float
    samples: tuple[MemorySample, ...]
    examples: tuple[MemorySample, ...]
    counterfactuals: tuple[MemorySample, ...]
    support_size: int
    prediction_without_memory: int | None
    probability_without_memory: float
    familiarity: float
    unfamiliar: bool
    carried: float | None
    contenders: tuple[Contender, ...] = ()
    confidence: float | None = None

    @property
    def title(self) -> str:
        """Name of the predicted class, or `"unfamiliar"`."""
        return "unfamiliar" if self.unfamiliar else self.class_name

    @property
    def verdict(self) -> str:
        """The predicted class, how probable it is and how likely right; or that the input is unfamiliar."""
        if self.unfamiliar:
            return f"unfamiliar (else {self.class_name}, {self.probability:.0%})"
        sure = "" if self.confidence is None else f", {self.confidence:.0%} likely right"
        return f"{self.class_name} ({self.probability:.0%}{sure})"

    @property
    def doubts(self) -> list[str]:
        """What speaks against the prediction: that the input looks like another class, or like nothing remembered."""
        found = []
        if self.most_alike is not None and self.most_alike.prediction != self.prediction:
            found.append(f"it looks more like {self.most_alike.class_name}")
        if self.familiarity < UNFAMILIAR:
            share = f"{math.floor(100 * (1 - self.familiarity))}% of" if self.familiarity else "all"
            found.append(f"it is more unlike the memory than {share} known images")
        return found

    @property
    def most_alike(self) -> Contender | None:
        """The contender whose samples look most like the input, by mean similarity; `None` if there are no samples.

        Where it is not the predicted class, that is a reason to doubt the prediction.
        """
        known = [contender for contender in self.contenders if contender.samples]
        return max(known, key=lambda contender: contender.similarity or 0.0, default=None)

    def __str__(self) -> str:
        """Returns a one-line summary."""
        shown = ", ".join(
            f"{sample.id!r} ({sample.class_name}, {sample.weight:.0%}{'' if sample.is_example else ', counterfactual'})"
            for sample in self.samples
        )
        more = self.support_size - len(self.samples)
        text = f"{self.verdict} from {shown}{f' and {more} more' if more > 0 else ''}"
        if len(self.contenders) > 1:
            second = self.contenders[1]
            text += f"; next {second.class_name} ({second.probability:.0%})"
        return printable("; but ".join([text, *self.doubts]))


def explain(
    model: MemoryWrapModel,
    images: Any,
    top_k: int = 5,
    contenders: int = 3,
    correspondences: int = 0,
    dataset: Any = None,
    abstain: float = 0.0,
) -> list[Explanation]:
    """Explains the prediction for each image by the memory samples that it used.

    Each image is encoded once, and what the prediction would be without a sample is read. The model's mode is restored.

    Args:
        model: A model with a memory bank.
        images: A batch `[B, C, H, W]` or an image `[C, H, W]`, normalised as in training; PIL images or paths, which
            get the model's own evaluation transform; or a list of images, PIL images or paths.
        top_k: How many samples to return, and how many examples and counterfactuals.
        contenders: How many of the most probable classes to return with the samples labelled as them that look most
            like the input: up to three of each, or `top_k` if that is less. Beyond the number of classes, all of them.
        correspondences: How many places to look for at most that an input and a sample have in common. Both are encoded
            for it once more.
        dataset: Where to find the samples' pictures for that, by id: the dataset that the bank was built from, or a
            mapping from id to image. `None` for the small ones in the bank.
        abstain: Familiarity, between 0 and 1, below which a prediction is called unfamiliar: 0.05 does so for one in
            twenty images like those given to `calibrate`.

    Raises:
        ValueError: If the bank is empty, there are no images, `top_k` is below 1, a count below 0, `abstain` outside 0
            to 1, or correspondences are asked for and there is no picture of a sample.

    Example:
        ```python
        >>> import timm, timm_memwrap, torch
        >>> model = timm.create_model("memwrap_test_resnet", num_classes=2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 2)
        >>> bank = timm_memwrap.build_memory_bank(model, data, size=4, progress=False)
        >>> explanation = timm_memwrap.explain(model, torch.randn(3, 64, 64), top_k=2)[0]
        >>> len(explanation.samples), explanation.support_size
        (2, 4)

        ```
    """
    model = snapshot(model)
    check_count("top_k", top_k)
    check_count("contenders", contenders, at_least=0)
    check_count("correspondences", correspondences, at_least=0)
    if not 0 <= abstain <= 1:
        raise ValueError(f"abstain={abstain!r} is not a share of images. Pass a number between 0 and 1, e.g. 0.05.")
    matcher = Matcher(model, correspondences, dataset) if correspondences else None
    with evaluating(model):
        batches = batches_of(model, images)
        return [
            found for batch in batches for found in explain_batch(model, batch, top_k, contenders, matcher, abstain)
        ]


def explain_batch(
    model: MemoryWrapModel,
    images: Tensor,
    top_k: int,
    contenders: int = 3,
    matcher: Matcher | None = None,
    abstain: float = 0.0,
) -> list[Explanation]:
    """Explains predictions for model inputs `[B, C, H, W]`, with a model in evaluation mode and no gradients."""
    readout, names = model.read(model.encode(images)), class_names(model)
    probabilities, classes = readout.logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    probability, prediction = probabilities[:, 0], classes[:, 0]
    nothing = read_nothing(model, readout.encoding)
    familiar = familiarity(readout.remainder, reference_quantiles(model))
    rivals: list[tuple[Contender, ...]] = [()] * len(images)
    similarities = None
    if contenders:
        # At least what the confidence needs, so that one search is enough for both.
        near = nearest_samples(model, readout.encoding, classes[:, : max(contenders, CONFIDENCE_CLASSES)])
        shown = [each[:, :contenders, :top_k] for each in near]
        rivals = find_contenders(model, probabilities[:, :contenders], classes[:, :contenders], *shown)
        similarities = near[0]
    confidence = read_confidence(model, readout, similarities)
    columns = {
        "prediction": prediction.tolist(),
        "probability": probability.tolist(),
        "support_size": (readout.weights > 0).sum(dim=1).tolist(),
        "prediction_without_memory": _leaders(nothing),
        "probability_without_memory": _probability_of(prediction, nothing).tolist(),
        "familiarity": familiar.tolist(),
        "unfamiliar": (familiar < abstain).tolist(),
        "carried": _carried(model, readout, prediction),
        "contenders": rivals,
        "confidence": [None] * len(images) if confidence is None else confidence.tolist(),
    }
    samples = _samples(model, readout, probability, prediction, top_k, images, matcher)
    return [
        Explanation(
            class_name=names[row["prediction"]],
            samples=tuple(read[:top_k]),
            examples=tuple([sample for sample in read if sample.is_example][:top_k]),
            counterfactuals=tuple([sample for sample in read if not sample.is_example][:top_k]),
            **row,
        )
        for read, row in zip(samples, _rows(columns), strict=True)
    ]


def _carried(model: MemoryWrapModel, readout: MemoryReadout, prediction: Tensor) -> list[float | None]:
    """Returns how much of the plain classifier's margin the samples carry, for predictions `[B]`."""
    if model.memory_args["classifier"] != "own":
        return [None] * len(prediction)
    plain = model.calibration(model.own_classifier(readout.encoding)).float()
    other = plain.scatter(1, prediction.unsqueeze(1), -torch.inf).argmax(dim=1)
    margins = [
        logits.gather(1, prediction.unsqueeze(1)) - logits.gather(1, other.unsqueeze(1))
        for logits in (readout.logits.float(), plain)
    ]
    read, whole = torch.cat(margins, dim=1).T.tolist()
    return [part / all_ if all_ > 0 else None for part, all_ in zip(read, whole, strict=True)]


def _samples(
    model: MemoryWrapModel,
    readout: MemoryReadout,
    probability: Tensor,
    prediction: Tensor,
    top_k: int,
    images: Tensor,
    matcher: Matcher | None,
) -> list[list[MemorySample]]:
    """Returns for each input the samples that are among the `top_k` of all, of examples or of counterfactuals."""
    bank, names, ids = model.memory_bank, class_names(model), model.memory_bank.ids
    weights, own = readout.weights.float(), own_predictions(model, readout)
    used, same = weights > 0, own == prediction.unsqueeze(1)
    rank = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    rank_of_kind = torch.where(same, (used & same).cumsum(1), (used & ~same).cumsum(1)) - 1
    shown = (used & ((rank < top_k) | (rank_of_kind < top_k))).nonzero(as_tuple=True)

    inputs, positions = shown[0], readout.positions[shown]
    without = read_without(model, readout.encoding[inputs], positions.unsqueeze(1))
    width = model.head_hidden_size
    features = [unit(wide(each)[:, :width]) for each in (readout.encoding[inputs], bank.filled()[0][positions])]
    columns = {
        "position": positions.tolist(),
        "weight": weights[shown].tolist(),
        "similarity": readout.similarities[shown].tolist(),
        "feature_similarity": (features[0] * features[1]).sum(dim=1).tolist(),
        "label": bank.filled()[1][positions].tolist(),
        "prediction": own[shown].tolist(),
        "is_example": same[shown].tolist(),
        "influence": (probability[inputs] - _probability_of(prediction[inputs], without)).tolist(),
        "prediction_without": _leaders(without),
        "image": [None] * len(inputs) if bank.images is None else bank.images[positions].cpu(),
        "correspondences": [()] * len(inputs)
        if matcher is None
        else matcher.match(images, inputs.tolist(), positions.tolist()),
    }
    samples = [list[MemorySample]() for _ in range(len(weights))]
    for i, row in zip(inputs.tolist(), _rows(columns), strict=True):
        named = {"class_name": names[row["label"]], "predicted_class_name": names[row["prediction"]]}
        samples[i].append(MemorySample(id=ids[row["position"]], **named, **row))
    return samples


def _rows(columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _probability_of(classes: Tensor, logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1).gather(1, classes.unsqueeze(1)).squeeze(1)


def _leaders(logits: Tensor) -> list[int | None]:
    """Returns the predicted class of each row, or `None` where no class leads."""
    pairs = zip(logits.argmax(dim=-1).tolist(), no_class_leads(logits).tolist(), strict=True)
    return [None if tied else leader for leader, tied in pairs]
