"""Says over a data set how far explanations are to be trusted.

Shapes: N inputs, B inputs of a batch, M memory samples, K samples read per input, C classes.
"""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_memwrap.explaining.explanation import read_nothing, read_without
from timm_memwrap.explaining.inputs import SampleImages, check_model, encoded_batches, evaluating, size_of, to_batch
from timm_memwrap.model import MemoryReadout, MemoryWrapModel

__all__ = [
    "ExplanationMeter",
    "ExplanationMetrics",
    "evaluate_explanations",
    "expected_calibration_error",
    "im1",
    "im2",
    "randomisation_check",
]

Autoencoder = Callable[[Tensor], Tensor]

_EPSILON = 1e-8
_DELETIONS = ("deletion", "random")


@dataclass(frozen=True)
class ExplanationMetrics:
    """What `evaluate_explanations` found over a data set. Rates are between 0 and 1; `None` means no input to count.

    An *example* is a memory sample that the model puts in the class that it predicts for the input, a *counterfactual*
    one that it puts in another (La Rosa et al. 2022, https://doi.org/10.1007/s10489-022-03886-6). The model's own
    prediction for a memory sample is made without the sample itself.

    Args:
        count: Number of inputs N.
        accuracy: Share of inputs whose prediction is their label.
        accuracy_without_memory: The same if nothing were read; an input for which no class is then ahead counts as
            wrong. As high as `accuracy`, the memory is decoration.
        explanation_accuracy: Share of inputs whose strongest sample is an example (La Rosa et al. 2022, Section 5).
        accuracy_example: Accuracy on these inputs (the published `explanation_accuracy.py`).
        accuracy_counterfactual: Accuracy on the others (ibid.).
        input_nonrepresentativeness: Mean absolute difference between the logits of the input and those of its
            strongest example, over inputs that have one (Nguyen and Martinez 2020, https://arxiv.org/abs/2007.07584,
            with the L1 loss of the published `run_exp_by_examples.py`). Lower is better.
        prediction_nonrepresentativeness: Cross-entropy of the strongest example's logits with the input's predicted
            class as the target, over the same inputs (ibid.). Lower is better.
        support_size: Mean number of samples with positive weight.
        weight_on_prediction: Mean weight of all examples of an input together.
        identical_class_rate: Share of inputs whose strongest sample has the predicted class as its *label* (the
            identical class test of Hanawa et al. 2021, https://arxiv.org/abs/2006.04528).
        deletion_flip_rate: Share of inputs whose prediction changes without its `deleted` strongest samples, or all of
            them if they are fewer (deletion as of Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421, with memory
            samples for pixels). Faithful explanations are above `random_flip_rate`.
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

    def __str__(self) -> str:
        """Says it as a table."""
        width = max(len(f.name) for f in fields(self))
        values = asdict(self).items()
        return "\n".join(
            f"{name.replace('_', ' '):{width}}  {value if value is None or isinstance(value, int) else f'{value:.4f}'}"
            for name, value in values
        )

    def to_dict(self) -> dict[str, float | int | None]:
        """Returns the numbers by name."""
        return asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        """Returns `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def evaluate_explanations(
    model: MemoryWrapModel, data: Any, deleted: int = 5, seed: int = 0, progress: bool = True
) -> ExplanationMetrics:
    """Measures a model's predictions and explanations in one pass over a data set.

    Runs in evaluation mode without gradients, and restores the model's mode. Each image is encoded once; the deletion
    test takes further reads.

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
    check_model(model)
    meter = ExplanationMeter(model, deleted, seed)
    with evaluating(model), tqdm(total=size_of(data), desc="Explanations", unit="img", disable=not progress) as bar:
        for encoding, labels in encoded_batches(model, data):
            meter.update(encoding, labels)
            bar.update(len(labels))
    return meter.compute()


class ExplanationMeter:
    """Gathers `ExplanationMetrics` over batches of encodings, as timm's meters and evaluators do.

    Args:
        model: A model with a memory bank, in evaluation mode. Its bank may change between two batches.
        deleted: How many of the strongest samples the deletion test leaves out.
        seed: Seed of the samples that it leaves out at random.

    Raises:
        ValueError: If `deleted` is not a number of samples.
    """

    def __init__(self, model: MemoryWrapModel, deleted: int = 5, seed: int = 0) -> None:
        if isinstance(deleted, bool) or not isinstance(deleted, int) or deleted < 1:
            raise ValueError(f"deleted={deleted!r} is not a number of samples. Pass an integer of at least 1.")
        self.model, self.deleted = model, deleted
        self._rng = random.Random(seed)
        self._batches: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def update(self, encoding: Tensor, labels: Tensor) -> MemoryReadout:
        """Reads the memory for encodings `[B, D]` of images with labels `[B]`, and returns what was read."""
        readout = self.model.read_encoding(encoding)
        self._batches.append(_measure(self.model, readout, labels, self.deleted, self._rng))
        return readout

    def compute(self) -> ExplanationMetrics:
        """Returns the metrics of all batches.

        Raises:
            ValueError: If there was none.
        """
        if not self._batches:
            raise ValueError("The data is empty, so there is nothing to evaluate. Check its path and split.")
        values = {name: torch.cat([batch[name] for batch in self._batches]) for name in self._batches[0]}
        right, example = values["right"], values["example"]
        return ExplanationMetrics(
            count=len(right),
            accuracy=_mean(right),
            accuracy_without_memory=_mean(values["right_alone"]),
            explanation_accuracy=_mean(example),
            accuracy_example=_mean(right[example]) if example.any() else None,
            accuracy_counterfactual=_mean(right[~example]) if not example.all() else None,
            input_nonrepresentativeness=_mean(values["input_distance"]) if len(values["input_distance"]) else None,
            prediction_nonrepresentativeness=_mean(values["cross_entropy"]) if len(values["cross_entropy"]) else None,
            support_size=_mean(values["support"]),
            weight_on_prediction=_mean(values["weight_on_prediction"]),
            identical_class_rate=_mean(values["identical"]),
            deletion_flip_rate=_mean(values["deletion_flips"]),
            random_flip_rate=_mean(values["random_flips"]),
            deletion_drop=_mean(values["deletion_drop"]),
            random_drop=_mean(values["random_drop"]),
            deleted=self.deleted,
            calibration_error=expected_calibration_error(values["probability"], right),
        )


def expected_calibration_error(probabilities: Tensor, right: Tensor, bins: int = 15) -> float:
    """Computes the expected calibration error: the mean gap between confidence and accuracy (Guo et al. 2017).

    Args:
        probabilities: Probabilities of the predicted classes `[N]`.
        right: Whether the predictions are right `[N]`.
        bins: Number of bins of equal width.
    """
    index = (probabilities * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right.double() - probabilities.double())
    return float(gap.abs().sum() / len(right))


def im1(counterfactuals: Tensor, autoencoder: Autoencoder, autoencoder_of_prediction: Autoencoder) -> Tensor:
    """Computes IM1 `[N]`: whether a counterfactual looks more like its own class than like the predicted one.

    The squared error of an autoencoder of the counterfactual's class over that of one of the input's predicted class
    (Van Looveren and Klaise 2021, https://arxiv.org/abs/1907.02584). Lower is better. The published Memory Wrap script
    does not square.

    Args:
        counterfactuals: Images `[N, C, H, W]`.
        autoencoder: Trained on images of the class that the model predicts for the counterfactuals.
        autoencoder_of_prediction: Trained on images of the class that it predicts for the inputs.
    """
    own = (counterfactuals - autoencoder(counterfactuals)).square().flatten(1).sum(dim=1)
    other = (counterfactuals - autoencoder_of_prediction(counterfactuals)).square().flatten(1).sum(dim=1)
    return own / (other + _EPSILON)


def im2(counterfactuals: Tensor, autoencoder: Autoencoder, autoencoder_of_all: Autoencoder) -> Tensor:
    """Computes IM2 `[N]`: whether a counterfactual is as usual among its own class as among all images.

    The squared difference of the reconstructions by an autoencoder of the counterfactual's class and one of all
    classes, over the L1 norm of the image (Van Looveren and Klaise 2021, https://arxiv.org/abs/1907.02584). Lower is
    better. The published Memory Wrap script takes the input's class for the counterfactual's, and other norms.

    Args:
        counterfactuals: Images `[N, C, H, W]`.
        autoencoder: Trained on images of the class that the model predicts for the counterfactuals.
        autoencoder_of_all: Trained on images of all classes.
    """
    difference = (autoencoder(counterfactuals) - autoencoder_of_all(counterfactuals)).square().flatten(1).sum(dim=1)
    return difference / (counterfactuals.abs().flatten(1).sum(dim=1) + _EPSILON)


def randomisation_check(model: MemoryWrapModel, images: Any, memory: Any, top_k: int = 5, seed: int = 0) -> float:
    """Returns the share of an explanation's strongest samples that a randomised encoder would show as well.

    The encoder's parameters are shuffled, each tensor in itself, and the memory is encoded anew. An explanation that
    depends on what the model has learnt must change, so the share should be near `top_k / M` (the model parameter
    randomisation test of Adebayo et al. 2018, https://arxiv.org/abs/1810.03292).

    Args:
        model: A model with a memory bank; it is not changed.
        images: Model inputs `[B, C, H, W]`, PIL images or paths.
        memory: The dataset that the bank was built from, or a mapping from id to image.
        top_k: How many of the strongest samples to compare.
        seed: Seed of the shuffle.

    Raises:
        ValueError: If the bank is empty, or one of its samples is not in `memory`.
    """
    check_model(model)
    batch = to_batch(model, images)
    shuffled = copy.deepcopy(model)
    _shuffle(shuffled.backbone, seed)
    with evaluating(model), evaluating(shuffled):
        bank = shuffled.memory_bank
        assert bank.labels is not None and bank.predictions is not None
        samples = SampleImages(model, memory)
        inputs = [samples.input(sample_id) for sample_id in bank.ids]
        encodings = torch.cat([shuffled.encode(torch.stack(part)) for part in _parts(inputs)])
        bank.replace(encodings, bank.labels, bank.predictions, bank.ids)
        before, after = (_strongest(part.read_memory(batch), top_k) for part in (model, shuffled))
    shares = [len(a & b) / max(1, len(a)) for a, b in zip(before, after, strict=True)]
    return sum(shares) / len(shares)


def _measure(
    model: MemoryWrapModel, readout: MemoryReadout, labels: Tensor, deleted: int, rng: random.Random
) -> dict[str, Tensor]:
    """Computes what is averaged later, one row per input, on the CPU."""
    bank = model.memory_bank
    assert bank.labels is not None and bank.predictions is not None and bank.encodings is not None
    weights, indices, encoding = readout.weights.float(), readout.indices, readout.encoding
    logits = readout.logits.float()
    probability, prediction = logits.softmax(dim=-1).max(dim=-1)
    used = weights > 0
    same = (bank.predictions[indices] == prediction.unsqueeze(1)) & used

    has_example = same.any(dim=1)
    strongest = indices.gather(1, same.long().argmax(dim=1, keepdim=True))[has_example]
    # An example's own logits, made without itself as its recorded prediction was.
    own = read_without(model, bank.encodings[strongest.squeeze(1)].to(encoding.dtype), strongest)

    alone = read_nothing(model, encoding)
    support = used.sum(dim=1)
    result = {
        "right": prediction == labels,
        "right_alone": (alone.argmax(dim=-1) == labels) & ~_level(alone),
        "probability": probability,
        "example": same[:, 0],
        "identical": bank.labels[indices[:, 0]] == prediction,
        "support": support,
        "weight_on_prediction": (weights * same).sum(dim=1),
        "input_distance": (own - logits[has_example]).abs().mean(dim=1),
        "cross_entropy": nn.functional.cross_entropy(own, prediction[has_example], reduction="none"),
    }
    for name, flips, drop in _deletions(model, encoding, indices, support.clamp(max=deleted), prediction, rng):
        result[f"{name}_flips"] = flips
        result[f"{name}_drop"] = probability - drop
    return {name: value.cpu() for name, value in result.items()}


def _deletions(
    model: MemoryWrapModel, encoding: Tensor, indices: Tensor, counts: Tensor, prediction: Tensor, rng: random.Random
) -> list[tuple[str, Tensor, Tensor]]:
    """Leaves out `counts` `[B]` samples, the strongest and random ones: which predictions change, and what is left of
    the predicted class's probability."""
    left = {name: encoding.new_zeros(len(encoding), model.num_classes, dtype=torch.float32) for name in _DELETIONS}
    size = len(model.memory_bank)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().squeeze(1)
        drawn = torch.tensor([rng.sample(range(size), count) for _ in rows], device=encoding.device)
        left["deletion"][rows] = read_without(model, encoding[rows], indices[rows, :count])
        left["random"][rows] = read_without(model, encoding[rows], drawn)
    return [
        (
            name,
            (logits.argmax(dim=-1) != prediction) | _level(logits),
            logits.softmax(dim=-1).gather(1, prediction.unsqueeze(1)).squeeze(1),
        )
        for name, logits in left.items()
    ]


def _level(logits: Tensor) -> Tensor:
    return logits.amax(dim=-1) == logits.amin(dim=-1)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _parts(inputs: list[Tensor], size: int = 64) -> list[list[Tensor]]:
    return [inputs[i : i + size] for i in range(0, len(inputs), size)]


def _strongest(readout: MemoryReadout, top_k: int) -> list[set[int]]:
    pairs = zip(readout.indices[:, :top_k].tolist(), readout.weights[:, :top_k].tolist(), strict=True)
    return [{i for i, weight in zip(*pair, strict=True) if weight > 0} for pair in pairs]


def _shuffle(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
