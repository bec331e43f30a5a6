"""IM1 and IM2 over a data set, against a loop over its inputs."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_memwrap.explaining import evaluate_counterfactuals
from timm_memwrap.model import MemoryWrapModel

SIZE = 40


class _Shrink(nn.Module):
    """An autoencoder of a kind; noisy in training mode, so that it shows in which mode it ran."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.noise = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.noise(images * self.factor + 0.1 * images.flip(-1))


AUTOENCODERS = {label: _Shrink(0.2 + 0.2 * label) for label in range(4)}
OF_ALL = _Shrink(0.55)


@torch.no_grad()
def naive(model: MemoryWrapModel, images: Tensor, memory: TensorDataset) -> tuple[int, float, float]:
    """Takes the strongest counterfactual of each input by itself, and the metrics by their formulas."""
    own = model.own_predictions().tolist()
    ratios, distances = [], []
    for image in images:
        readout = model(image.unsqueeze(0), return_readout=True)
        prediction = int(readout.logits[0].argmax())
        weights = {int(i): float(w) for i, w in zip(readout.positions[0], readout.weights[0], strict=True) if w > 0}
        others = [i for i in sorted(weights, key=lambda i: -weights[i]) if own[i] != prediction]
        if not others:
            continue
        picture = memory[model.memory_bank.ids[others[0]]][0]

        def rebuilt(autoencoder: _Shrink, picture: Tensor = picture) -> Tensor:
            return picture * autoencoder.factor + 0.1 * picture.flip(-1)

        of_own, of_input = (rebuilt(AUTOENCODERS[label]) for label in (own[others[0]], prediction))
        ratios.append(float(((picture - of_own) ** 2).sum() / ((picture - of_input) ** 2).sum()))
        distances.append(float(((of_own - rebuilt(OF_ALL)) ** 2).sum() / picture.abs().sum()))
    return len(ratios), sum(ratios) / len(ratios), sum(distances) / len(distances)


@pytest.mark.parametrize("kind", ["memory wrap", "wrapped", "vote"])
@pytest.mark.parametrize("mapping", [False, True])
def test_it_agrees_with_a_loop(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Tensor], kind: str, mapping: bool
) -> None:
    model, images = make_model(kind, size=SIZE), make_images(11, seed=5)
    memory = TensorDataset(make_images(SIZE, seed=1), torch.zeros(SIZE))
    expected = naive(model, images, memory)
    assert expected[0] > 0
    model.train()
    for autoencoder in (*AUTOENCODERS.values(), OF_ALL):
        autoencoder.train()
    data = DataLoader(TensorDataset(images, torch.zeros(11, dtype=torch.long)), batch_size=4)
    source = {i: memory[i][0] for i in range(SIZE)} if mapping else memory
    metrics = evaluate_counterfactuals(model, data, source, AUTOENCODERS, OF_ALL, progress=False)
    assert (metrics.count, metrics.with_counterfactual) == (11, expected[0])
    assert (metrics.im1, metrics.im2) == pytest.approx(expected[1:], rel=1e-4)
    assert model.training
    assert all(autoencoder.noise.training for autoencoder in (*AUTOENCODERS.values(), OF_ALL))
    assert json.loads(metrics.to_json()) == metrics.to_dict()
    assert f"{metrics.im1:.4g}" in str(metrics)


def test_without_counterfactuals_there_is_nothing_to_measure(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Tensor]
) -> None:
    model, images = make_model("wrapped"), make_images(3)
    # One sample is always used, and the prediction is its own.
    model.memory_bank.select([0])
    data = TensorDataset(images[:1], torch.zeros(1, dtype=torch.long))
    metrics = evaluate_counterfactuals(model, data, {}, {}, OF_ALL, progress=False)
    assert metrics.to_dict() == {"count": 1, "with_counterfactual": 0, "im1": None, "im2": None}
    assert "None" in str(metrics)


def test_what_is_missing_is_named(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., Tensor]
) -> None:
    model = make_model("memory wrap", size=SIZE, class_names=["ant", "bee", "cow", "doe"])
    data = TensorDataset(make_images(11, seed=5), torch.zeros(11, dtype=torch.long))
    some = {label: autoencoder for label, autoencoder in AUTOENCODERS.items() if label != 2}
    with pytest.raises(ValueError, match=r"no autoencoder for class 2 \('cow'\)"):
        evaluate_counterfactuals(model, data, {}, some, OF_ALL, progress=False)
    with pytest.raises(ValueError, match="is not in dict"):
        evaluate_counterfactuals(model, data, {}, AUTOENCODERS, OF_ALL, progress=False)
    with pytest.raises(ValueError, match="data is empty"):
        evaluate_counterfactuals(model, TensorDataset(make_images(0), torch.zeros(0)), {}, {}, OF_ALL, progress=False)
