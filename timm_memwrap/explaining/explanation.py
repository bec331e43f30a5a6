"""Explains predictions by the memory samples that they used, and by those of what they may be instead.

Shapes: B inputs, M memory samples, C classes, K samples read per input, P pairs of an input and a class to explain.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from timm_memwrap._utils import check_count, evaluating, printable
from timm_memwrap.attention import unit, wide
from timm_memwrap.data import batches_of, class_names
from timm_memwrap.explaining.confidence import CONFIDENCE_CLASSES, read_confidence
from timm_memwrap.explaining.contenders import Contender, find_contenders, nearest_samples
from timm_memwrap.explaining.correspondences import Correspondence, Matcher
from timm_memwrap.explaining.nearby import nearby
from timm_memwrap.explaining.reading import no_class_leads, read_nothing, read_without, snapshot
from timm_memwrap.explaining.results import Result
from timm_memwrap.explaining.verdicts import classes_of_samples, classes_said, says_class
from timm_memwrap.familiarity import UNFAMILIAR, familiarity, reference_quantiles
from timm_memwrap.labels import present, probabilities
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
        label: Its label; `None` where samples may have several.
        class_name: Name of its label, or of all of them.
        prediction: The model's own prediction for it: the kept classifier's, else one that does not read the sample.
            `None` where samples may have several classes.
        predicted_class_name: Name of that class, or of all that the model says it has.
        is_example: Whether the model says the class that is explained for the sample too.
        influence: Probability of the predicted class minus what it would be without this sample.
        prediction_without: The prediction without this sample; `None` if no class then leads, or the predicted class is
            then not present.
        image: Its picture, uint8 `[3 or 1, H, W]`, if the bank holds one.
        correspondences: Which of its places look like which of the input, strongest first, if asked for.
        labels: All of its labels.
        predictions: All classes that the model says it has.
    """

    position: int
    id: SampleId
    weight: float
    similarity: float
    feature_similarity: float
    label: int | None
    class_name: str
    prediction: int | None
    predicted_class_name: str
    is_example: bool
    influence: float
    prediction_without: int | None
    image: Tensor | None = field(default=None, repr=False, compare=False)
    correspondences: tuple[Correspondence, ...] = ()
    labels: tuple[int, ...] = ()
    predictions: tuple[int, ...] = ()

    @property
    def disputed(self) -> bool:
        """Whether its labels are not what the model predicts for it."""
        return self.labels != self.predictions


@dataclass(frozen=True)
class Explanation(Result):
    """A prediction and the memory samples that it used.

    Where images may have several classes, `classes` explains each that is present, and the rest is that of the most
    probable class: its `examples` are the samples that the model says have it, its `counterfactuals` those that do not.

    Args:
        prediction: The predicted class; of several, the most probable.
        class_name: Its name.
        probability: Its probability.
        samples: The samples with the largest weights, strongest first.
        examples: Those that the model puts in the predicted class, strongest first (explanation by example).
        counterfactuals: Those that the model puts in another class, strongest first.
        support_size: Number of samples that the prediction used, shown or not.
        prediction_without_memory: The prediction if nothing were read; `None` if no class then leads, or the predicted
            class is then not present.
        probability_without_memory: Probability of the predicted class if nothing were read.
        familiarity: Share of the held-out images given to `calibrate` that are less familiar than the input, by how
            near the samples come to it that it reads: at 0.02 it is more unlike the memory than 98 % of them. Before
            `calibrate` the memory's own samples stand in for these, and new images come out too low.
        unfamiliar: Whether that is below what `explain` was told to abstain at.
        carried: How much of the plain classifier's margin, its logit of the predicted class minus that of the best
            other one, the samples carry: with 0.8, a fifth comes from what they do not account for. `None` if the model
            has no classifier of its own, or that prefers another class. Where there may be several classes, the margin
            is the logit.
        contenders: The most probable classes, the predicted one first, each with the samples labelled as it that look
            most like the input.
        confidence: Probability that the prediction is right, fitted by `calibrate`; `None` until then. It ranks errors
            better than `probability`, since it also weighs what the classifier and the contenders say. `None` where
            there may be several classes.
        present: Whether the class is predicted at all: where there may be several, there may be none.
        classes: Where there may be several classes, an explanation of each that is present, the most probable first; of
            the most probable one if none is. Else empty.
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
    present: bool = True
    classes: tuple["Explanation", ...] = ()

    @property
    def title(self) -> str:
        """Names of the predicted classes, `"none of its classes"` or `"unfamiliar"`."""
        if self.unfamiliar:
            return "unfamiliar"
        return ", ".join(each.class_name for each in self.classes or [self]) if self.present else "none of its classes"

    @property
    def verdict(self) -> str:
        """The predicted classes, how probable they are and how likely right; or that the input is unfamiliar."""
        if self.unfamiliar:
            return f"unfamiliar (else {self.class_name}, {self.probability:.0%})"
        if not self.present:
            return f"none of its classes (most probable {self.class_name}, {self.probability:.0%})"
        sure = "" if self.confidence is None else f", {self.confidence:.0%} likely right"
        return ", ".join(f"{each.class_name} ({each.probability:.0%}{sure})" for each in self.classes or [self])

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

        Where it is not the predicted class, that is a reason to doubt the prediction; not where there may be several
        classes, for which it is `None`.
        """
        if self.classes:
            return None
        known = [contender for contender in self.contenders if contender.samples]
        return max(known, key=lambda contender: contender.similarity or 0.0, default=None)

    def __str__(self) -> str:
        """Returns a one-line summary."""
        parts = [f"{self.verdict} from {self._evidence}"]
        if self.classes and self.present:
            parts = [f"{each.verdict} from {each._evidence}" for each in self.classes]
        text = "; ".join(parts)
        if len(self.contenders) > 1 and not self.classes:
            second = self.contenders[1]
            text += f"; next {second.class_name} ({second.probability:.0%})"
        return printable("; but ".join([text, *self.doubts]))

    @property
    def _evidence(self) -> str:
        shown = ", ".join(
            f"{sample.id!r} ({sample.class_name}, {sample.weight:.0%}{'' if sample.is_example else ', counterfactual'})"
            for sample in self.samples
        )
        more = self.support_size - len(self.samples)
        return f"{shown}{f' and {more} more' if more > 0 else ''}"


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

    Where images may have several classes, each that is present is explained (`Explanation.classes`).

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
            mapping from id to image. `None` for the small ones in the bank, else what `push_memory_images` pushed.
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
    model = snapshot(model, whole=False)
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
    encoding: Tensor | None = None,
) -> list[Explanation]:
    """Explains predictions for model inputs `[B, C, H, W]`, with a model in evaluation mode and no gradients.

    Encodings `[B, E]` of the inputs, if there are any, spare to encode them.
    """
    encoding = model.encode(images) if encoding is None else encoding
    model = nearby(model, encoding, max(contenders, CONFIDENCE_CLASSES))
    readout, names = model.read(encoding), class_names(model)
    logits = readout.logits.float()
    found, order = probabilities(logits, model.multi_label).sort(dim=-1, descending=True, stable=True)
    nothing = read_nothing(model, readout.encoding)
    familiar = familiarity(readout.remainder, reference_quantiles(model))
    rivals: list[tuple[Contender, ...]] = [()] * len(images)
    similarities = None
    if contenders:
        # At least what the confidence needs, so that one search is enough for both.
        near = nearest_samples(model, readout.encoding, order[:, : max(contenders, CONFIDENCE_CLASSES)])
        shown = [each[:, :contenders, :top_k] for each in near]
        rivals = find_contenders(model, found[:, :contenders], order[:, :contenders], *shown)
        similarities = near[0]
    confidence = None if model.multi_label else read_confidence(model, readout, similarities)
    inputs, classes = classes_said(logits, order, model.multi_label)
    probability = _probability_of(model, classes, logits[inputs])
    columns = {
        "prediction": classes.tolist(),
        "probability": probability.tolist(),
        "support_size": (readout.weights > 0).sum(dim=1)[inputs].tolist(),
        "prediction_without_memory": _leaders(model, classes, nothing[inputs]),
        "probability_without_memory": _probability_of(model, classes, nothing[inputs]).tolist(),
        "familiarity": familiar[inputs].tolist(),
        "unfamiliar": (familiar < abstain)[inputs].tolist(),
        "carried": _carried(model, readout, inputs, classes),
        "confidence": [None] * len(inputs) if confidence is None else confidence.tolist(),
        "present": [True] * len(inputs) if not model.multi_label else present(logits)[inputs, classes].tolist(),
    }
    matcher = None if matcher is None else matcher.of(model)
    samples = _samples(model, readout, inputs, classes, probability, top_k, images, matcher)
    explained = [list[Explanation]() for _ in images]
    for i, read, row in zip(inputs.tolist(), samples, _rows(columns), strict=True):
        explained[i].append(
            Explanation(
                class_name=names[row["prediction"]],
                samples=tuple(read[:top_k]),
                examples=tuple([sample for sample in read if sample.is_example][:top_k]),
                counterfactuals=tuple([sample for sample in read if not sample.is_example][:top_k]),
                **row,
            )
        )
    return [
        replace(first, contenders=own_rivals, classes=(first, *others) if model.multi_label else ())
        for (first, *others), own_rivals in zip(explained, rivals, strict=True)
    ]


def _carried(model: MemoryWrapModel, readout: MemoryReadout, inputs: Tensor, classes: Tensor) -> list[float | None]:
    """Returns how much of the plain classifier's margin the samples carry, for inputs and classes `[P]`."""
    if model.memory_args["classifier"] != "own":
        return [None] * len(inputs)
    logits, plain = readout.logits.float(), model.calibration(model.own_classifier(readout.encoding)).float()
    margins = [each[inputs].gather(1, classes.unsqueeze(1)) for each in (logits, plain)]
    if not model.multi_label:
        other = plain[inputs].scatter(1, classes.unsqueeze(1), -torch.inf).argmax(dim=1, keepdim=True)
        margins = [
            margin - each[inputs].gather(1, other) for margin, each in zip(margins, (logits, plain), strict=True)
        ]
    read, whole = torch.cat(margins, dim=1).T.tolist()
    return [part / all_ if all_ > 0 else None for part, all_ in zip(read, whole, strict=True)]


def _samples(
    model: MemoryWrapModel,
    readout: MemoryReadout,
    inputs: Tensor,
    classes: Tensor,
    probability: Tensor,
    top_k: int,
    images: Tensor,
    matcher: Matcher | None,
) -> list[list[MemorySample]]:
    """Returns for each pair the samples that are among the `top_k` of all, of examples or of counterfactuals."""
    bank, names, ids = model.memory_bank, class_names(model), model.memory_bank.ids
    weights, same = readout.weights.float()[inputs], says_class(model, readout, inputs, classes)
    used = weights > 0
    rank = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    rank_of_kind = torch.where(same, (used & same).cumsum(1), (used & ~same).cumsum(1)) - 1
    shown = (used & ((rank < top_k) | (rank_of_kind < top_k))).nonzero(as_tuple=True)

    pairs, places = shown
    rows = inputs[pairs]
    positions = readout.positions[rows, places]
    # A sample of several pairs is left out of an input once.
    (asked, left_out), back = torch.stack([rows, positions]).unique(dim=1, return_inverse=True)
    without = read_without(model, readout.encoding, left_out.unsqueeze(1), asked)[back]
    matches: list[tuple[Correspondence, ...]] = [()] * len(asked)
    if matcher is not None:
        matches = matcher.match(images, asked.tolist(), left_out.tolist())
    width = model.head_hidden_size
    features = [unit(wide(each)[:, :width]) for each in (readout.encoding[rows], bank.filled()[0][positions])]
    labels, own = classes_of_samples(model, positions)
    one, own_one = ([None if model.multi_label else each[0] for each in several] for several in (labels, own))
    columns: dict[str, Any] = {
        "position": positions.tolist(),
        "weight": weights[shown].tolist(),
        "similarity": readout.similarities[rows, places].tolist(),
        "feature_similarity": (features[0] * features[1]).sum(dim=1).tolist(),
        "label": one,
        "prediction": own_one,
        "is_example": same[shown].tolist(),
        "influence": (probability[pairs] - _probability_of(model, classes[pairs], without)).tolist(),
        "prediction_without": _leaders(model, classes[pairs], without),
        "image": [None] * len(pairs) if bank.images is None else bank.images[positions].cpu(),
        "correspondences": [matches[i] for i in back.tolist()],
        "labels": labels,
        "predictions": own,
    }
    samples = [list[MemorySample]() for _ in range(len(weights))]
    for i, row in zip(pairs.tolist(), _rows(columns), strict=True):
        row["class_name"], row["predicted_class_name"] = (
            ", ".join(names[label] for label in row[key]) or "none" for key in ("labels", "predictions")
        )
        samples[i].append(MemorySample(id=ids[row["position"]], **row))
    return samples


def _rows(columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _probability_of(model: MemoryWrapModel, classes: Tensor, logits: Tensor) -> Tensor:
    return probabilities(logits, model.multi_label).gather(1, classes.unsqueeze(1)).squeeze(1)


def _leaders(model: MemoryWrapModel, classes: Tensor, logits: Tensor) -> list[int | None]:
    """Returns the predicted class of each row, or `None` where no class leads; of several, whether `classes` stay."""
    leaders, none = logits.argmax(dim=-1), no_class_leads(logits)
    if model.multi_label:
        leaders, none = classes, ~present(logits).gather(1, classes.unsqueeze(1)).squeeze(1)
    return [None if nothing else leader for leader, nothing in zip(leaders.tolist(), none.tolist(), strict=True)]
