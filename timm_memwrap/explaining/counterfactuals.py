"""Measures how typical the images are that serve as counterfactuals: IM1 and IM2, and their mean over a data set.

Shapes: N counterfactuals, K samples read per input, C channels.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from timm_memwrap._utils import evaluating
from timm_memwrap.data import BATCH_SIZE, SampleImages, class_names
from timm_memwrap.explaining.reading import encodings_of, own_predictions, snapshot
from timm_memwrap.explaining.results import Result
from timm_memwrap.memory_checks import check_single_label
from timm_memwrap.model import MemoryWrapModel

__all__ = ["CounterfactualMetrics", "evaluate_counterfactuals", "im1", "im2"]

Autoencoder = Callable[[Tensor], Tensor]

_EPSILON = 1e-8


@dataclass(frozen=True)
class CounterfactualMetrics(Result):
    """What `evaluate_counterfactuals` found over a data set. `None` means no counterfactual to measure.

    Args:
        count: Number of inputs.
        with_counterfactual: Number of inputs of which a sample with positive weight is a counterfactual.
        im1: Mean IM1 of the strongest counterfactuals of these inputs. Lower is better.
        im2: Their mean IM2. Lower is better.
    """

    count: int
    with_counterfactual: int
    im1: float | None
    im2: float | None


def evaluate_counterfactuals(
    model: MemoryWrapModel,
    data: Any,
    memory: Any,
    autoencoders: Mapping[int, Autoencoder],
    autoencoder_of_all: Autoencoder,
    progress: bool = True,
) -> CounterfactualMetrics:
    """Measures by IM1 and IM2 how typical the strongest counterfactuals of predictions are (see `im1` and `im2`).

    Each is measured for the class that the model predicts for it (`MemorySample.prediction`) against the class that it
    predicts for the input, as in La Rosa et al. 2022. Modes of the model and the autoencoders are restored.

    Args:
        model: A model with a memory bank.
        data: As in `evaluate_explanations`; its labels are not used.
        memory: As in `attribute`.
        autoencoders: By class, an autoencoder trained on images of that class. It maps model inputs `[N, C, H, W]` to
            their reconstructions.
        autoencoder_of_all: An autoencoder trained on images of all classes.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the bank or the data is empty, a class that occurs has no autoencoder, a counterfactual is not in
            `memory`, or samples may have several classes.
    """
    model, count, found = snapshot(model), 0, Counter[tuple[int, int, int]]()
    check_single_label(model, "evaluate_counterfactuals")
    with ExitStack() as stack:
        batches = stack.enter_context(encodings_of(model, data, "Counterfactuals", progress))
        for module in (autoencoder_of_all, *autoencoders.values()):
            if isinstance(module, nn.Module):
                stack.enter_context(evaluating(module))
        for encoding, _ in batches:
            readout = model.read(encoding)
            prediction = readout.logits.argmax(dim=-1, keepdim=True)
            own = own_predictions(model, readout)
            other = (own != prediction) & (readout.weights > 0)
            # The first is the strongest.
            first = other.long().argmax(dim=1, keepdim=True)
            columns = torch.cat([own.gather(1, first), prediction, readout.positions.gather(1, first)], dim=1)
            found.update((a, b, position) for a, b, position in columns[other.any(dim=1)].tolist())
            count += len(encoding)
        total = found.total()
        sums = _sums(model, memory, found, autoencoders, autoencoder_of_all)
    return CounterfactualMetrics(count, total, *((value / total for value in sums) if total else (None, None)))


def _sums(
    model: MemoryWrapModel,
    memory: Any,
    found: Counter[tuple[int, int, int]],
    autoencoders: Mapping[int, Autoencoder],
    autoencoder_of_all: Autoencoder,
) -> list[float]:
    """Sums IM1 and IM2 over counterfactuals, given by their class, the input's class and their position."""
    samples, ids, names = SampleImages(model, memory), model.memory_bank.ids, class_names(model)
    for label in sorted({label for *classes, _ in found for label in classes}):
        if label not in autoencoders:
            raise ValueError(
                f"There is no autoencoder for class {label} ({names[label]!r}). Pass one for each class: "
                f"autoencoders={{class: autoencoder}}."
            )
    sums = torch.zeros(2, dtype=torch.float64)
    for (own, prediction), group in groupby(sorted(found), key=lambda key: key[:2]):
        positions = [position for *_, position in group]
        for part in (positions[at : at + BATCH_SIZE] for at in range(0, len(positions), BATCH_SIZE)):
            images = torch.stack([samples.input(ids[position]) for position in part])
            times = torch.tensor([found[own, prediction, position] for position in part], dtype=torch.float64)
            ratios = im1(images, autoencoders[own], autoencoders[prediction])
            distances = im2(images, autoencoders[own], autoencoder_of_all)
            sums += torch.stack([ratios, distances]).double().cpu() @ times
    return sums.tolist()


def im1(counterfactuals: Tensor, autoencoder: Autoencoder, autoencoder_of_prediction: Autoencoder) -> Tensor:
    """Computes IM1 `[N]`: whether a counterfactual looks more like its own class than like the predicted one.

    The squared error of the first autoencoder over that of the second (Van Looveren and Klaise 2021,
    https://arxiv.org/abs/1907.02584). Lower is better. The published Memory Wrap script does not square.

    Args:
        counterfactuals: Images `[N, C, H, W]`.
        autoencoder: Trained on images of the class that the model predicts for the counterfactuals.
        autoencoder_of_prediction: Trained on images of the class that it predicts for the inputs.
    """
    own, other = (
        (counterfactuals - rebuild(counterfactuals)).square().flatten(1).sum(dim=1)
        for rebuild in (autoencoder, autoencoder_of_prediction)
    )
    return own / (other + _EPSILON)


def im2(counterfactuals: Tensor, autoencoder: Autoencoder, autoencoder_of_all: Autoencoder) -> Tensor:
    """Computes IM2 `[N]`: whether a counterfactual is as typical of its own class as of all images.

    The squared difference of both reconstructions over the L1 norm of the image (Van Looveren and Klaise 2021, as for
    `im1`). Lower is better. The published Memory Wrap script takes the input's class for the counterfactual's, and
    other norms.

    Args:
        counterfactuals: Images `[N, C, H, W]`.
        autoencoder: Trained on images of the class that the model predicts for the counterfactuals.
        autoencoder_of_all: Trained on images of all classes.
    """
    difference = (autoencoder(counterfactuals) - autoencoder_of_all(counterfactuals)).square().flatten(1).sum(dim=1)
    return difference / (counterfactuals.abs().flatten(1).sum(dim=1) + _EPSILON)
