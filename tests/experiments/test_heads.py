"""The voting heads against loops over samples, and what a head's name may say."""

import re
from typing import Any

import pytest
import timm
import torch

from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.experiments.heads import HEADS, RUNS, NearestNeighbours, SoftmaxVote, parse_head, recipe_of
from timm_memwrap.layers import LabelVote
from timm_memwrap.read_heads import Joint

WIDTH, CLASSES = 6, 3


def _read(layer: LabelVote, inputs: torch.Tensor, memory: torch.Tensor, hidden: Any = None) -> torch.Tensor:
    """Returns the weights `[B, M]` of all samples."""
    labels = torch.zeros(len(memory), dtype=torch.long)
    found = layer.eval().read(layer.query(inputs), layer.prepare(memory, labels), hidden)
    return torch.zeros(len(inputs), len(memory)).scatter_add(1, found.positions, found.weights)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("size", [2, 5, 9])
def test_each_of_the_nearest_has_the_same_vote(size: int) -> None:
    inputs, memory = torch.randn(4, WIDTH), torch.randn(size, WIDTH)
    weights = _read(NearestNeighbours(WIDTH, CLASSES, neighbours=5), inputs, memory)
    for row, one in zip(weights, inputs, strict=True):
        order = sorted(range(size), key=lambda i: -_cosine(one, memory[i]))
        nearest = order[:5]
        expected = [1 / len(nearest) if i in nearest else 0.0 for i in range(size)]
        torch.testing.assert_close(row, torch.tensor(expected))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_the_softmax_vote_is_the_kernel_estimate(scale: float) -> None:
    inputs, memory, labels = torch.randn(4, WIDTH), torch.randn(9, WIDTH), torch.arange(9) % CLASSES
    layer = SoftmaxVote(WIDTH, CLASSES, scale=scale)
    kernels = torch.tensor([[_cosine(one, sample) * scale for sample in memory] for one in inputs]).exp()
    votes = torch.stack([kernels[:, labels == label].sum(dim=1) for label in range(CLASSES)], dim=1)
    read = layer.read(layer.query(inputs), layer.prepare(memory, labels)).vector
    torch.testing.assert_close(layer.classify(inputs, read).softmax(dim=1), votes / votes.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("layer", [NearestNeighbours, SoftmaxVote])
def test_a_hidden_sample_has_no_vote(layer: Any) -> None:
    inputs, memory = torch.randn(2, WIDTH), torch.randn(4, WIDTH)
    hidden = torch.tensor([[0, 2], [3, 1]])
    weights = _read(layer(WIDTH, CLASSES), inputs, memory, hidden)
    assert weights.gather(1, hidden).abs().max() == 0
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    for row, kept in zip(weights, ([1, 3], [0, 2]), strict=True):
        without = _read(layer(WIDTH, CLASSES), inputs, memory[kept])
        torch.testing.assert_close(row[kept], without[0 if kept == [1, 3] else 1])


def test_options_of_a_wrapped_classifier_follow_its_name() -> None:
    plain = timm.create_model("test_resnet", num_classes=CLASSES)
    read = parse_head("logits:scale=5:temperature=2").read
    assert read is not None
    model = read(plain)
    assert (model.memory_args["read_head"], model.memory_args["scale"], model.temperature) == ("logits", 5.0, 2.0)


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.run == "plain" and head.read])
def test_heads_of_the_plain_training_keep_its_weights(name: str) -> None:
    plain = timm.create_model("test_resnet", num_classes=CLASSES)
    read = HEADS[name].read
    assert read is not None
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = read(plain)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.memory_only
    assert not list(model.head.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("probabilites", "Did you mean 'probabilities'?"),
        ("zzz", "Known are 'linear'"),
        ("knn:scale=5", "'knn' takes no options"),
        ("logits:scale", "'scale' in comparison.heads is not an option"),
        ("logits:speed=5", "'speed=5' in comparison.heads is not an option"),
        ("logits:scale=fast", "'scale=fast' in comparison.heads is not an option"),
        ("probabilities:logit_weight=1", "only the heads 'joint' and 'joint_equal' have a logit_weight"),
    ],
)
def test_what_is_no_head_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_head(text)


@pytest.mark.parametrize("run", RUNS)
def test_trainings_differ_in_their_memory_alone(run: str) -> None:
    config = Comparison()
    config.data.train_samples = 77
    recipe = recipe_of(config, run, 5)
    assert (recipe.training.seed, recipe.data.subset_seed, recipe.data.train_samples) == (5, 5, 77)
    recipe.training.seed = recipe.data.subset_seed = 0
    assert (recipe.training, recipe.data) == (config.training, config.data)
    assert recipe.model.name == config.model.name


def test_the_weight_of_the_logits_is_that_asked_for() -> None:
    plain = timm.create_model("test_resnet", num_classes=3)
    weights = [parse_head(text).read(plain).head.head.logit_weight for text in ("joint", "joint:logit_weight=0.25")]
    assert weights == [Joint.LOGIT_WEIGHT, 0.25]
