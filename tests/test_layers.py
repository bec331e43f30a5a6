"""The two heads: against the published package, and what it gets wrong or leaves out."""

import subprocess
import sys
from itertools import product
from typing import Any

import memorywrap
import pytest
import torch
from torch import Tensor, nn

from timm_memwrap import BaselineMemory, MemoryWrapLayer
from timm_memwrap.attention import DISTANCES
from timm_memwrap.layers import LabelVote

LAYERS = {"memory_wrap": MemoryWrapLayer, "baseline": BaselineMemory}
PUBLISHED = {"memory_wrap": memorywrap.MemoryWrapLayer, "baseline": memorywrap.BaselineMemory}

SIZES = (1, 7, 100, 1000)
WIDTHS = (16, 64)
CLASSES = 5


def _pair(kind: str, width: int, distance: str) -> tuple[nn.Module, nn.Module]:
    published = PUBLISHED[kind](width, CLASSES, distance=distance)
    ours = LAYERS[kind](width, CLASSES, head=nn.Identity(), distance=distance)
    ours.load_state_dict(published.state_dict(), strict=True)
    return published, ours


def _run(layer: nn.Module, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    inputs, memory = inputs.clone().requires_grad_(), memory.clone().requires_grad_()
    output, weights = layer(inputs, memory, return_weights=True)
    # Another factor for each entry: the gradient of a plain sum is the same for all classes.
    factors = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * factors).sum(), [inputs, memory, *layer.parameters()])
    return output.detach(), weights.detach(), list(gradients)


@pytest.mark.parametrize(("kind", "distance", "width"), list(product(LAYERS, DISTANCES, WIDTHS)))
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_published_layer(kind: str, distance: str, width: int, size: int) -> None:
    published, ours = _pair(kind, width, distance)
    inputs, memory = torch.randn(8, width), torch.randn(size, width)
    expected = _run(published, inputs, memory)
    output, weights, gradients = _run(ours, inputs, memory)
    torch.testing.assert_close(output, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, expected[1], atol=1e-5, rtol=0)
    for gradient, reference in zip(gradients, expected[2], strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-5 * max(1.0, float(reference.abs().max())), rtol=0)


@pytest.mark.parametrize(("kind", "distance"), list(product(LAYERS, DISTANCES)))
def test_agrees_with_the_published_layer_in_float64_where_only_formulas_can_differ(kind: str, distance: str) -> None:
    published, ours = _pair(kind, 32, distance)
    inputs, memory = torch.randn(8, 32).double(), torch.randn(100, 32).double()
    expected = _run(published.double(), inputs, memory)
    got = _run(ours.double(), inputs, memory)
    # The published cosine has an eps of 1e-6 inside its square root.
    atol = 1e-7 if distance == "cosine" else 1e-11
    for a, b in zip([*got[:2], *got[2]], [*expected[:2], *expected[2]], strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)


@pytest.mark.parametrize("size", SIZES[1:])
def test_float32_l2_is_no_less_exact_than_published(size: int) -> None:
    """Nearer to the float64 result than a hundred-thousandth, at the width of a real encoder's encodings."""
    published, ours = _pair("baseline", 256, "l2")
    inputs, memory = torch.randn(8, 256) / 4, torch.randn(size, 256) / 4
    exact = published.double()(inputs.double(), memory.double(), return_weights=True)[1]
    weights = ours(inputs, memory, return_weights=True)[1]
    torch.testing.assert_close(weights.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_default_head_projects_query_and_key_and_learns(kind: str) -> None:
    layer = LAYERS[kind](8, CLASSES)
    inputs, memory = torch.randn(4, 8), torch.randn(20, 8)
    output, before = layer(inputs, memory, return_weights=True)
    output.square().sum().backward()
    for parameter in layer.head.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
    with torch.no_grad():
        layer.head.weight.copy_(torch.randn(8, 8))
    after = layer(inputs, memory, return_weights=True)[1]
    assert not torch.allclose(before, after, atol=1e-3)
    # Query and key: a layer without a head on projected encodings has the same weights.
    plain = LAYERS[kind](8, CLASSES, head=nn.Identity())
    expected = plain(layer.head(inputs), layer.head(memory), return_weights=True)[1]
    torch.testing.assert_close(after, expected)


def test_the_value_is_the_encoding_before_the_head() -> None:
    layer = BaselineMemory(8, 8, classifier=nn.Identity())
    memory = torch.randn(20, 8)
    output, weights = layer(torch.randn(4, 8), memory, return_weights=True)
    torch.testing.assert_close(output, weights @ memory)


@pytest.mark.parametrize(("kind", "distance"), list(product(LAYERS, DISTANCES)))
def test_an_empty_memory_reads_as_zero(kind: str, distance: str) -> None:
    layer = LAYERS[kind](8, CLASSES, distance=distance)
    inputs = torch.randn(4, 8, requires_grad=True)
    output, weights = layer(inputs, torch.zeros(0, 8), return_weights=True)
    assert weights.shape == (4, 0)
    torch.testing.assert_close(output, layer.classify(inputs, torch.zeros(4, 8)))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("distance", DISTANCES)
def test_degenerate_encodings_give_finite_results_and_gradients(distance: str) -> None:
    layer = MemoryWrapLayer(8, CLASSES, head=nn.Identity(), distance=distance)
    memory = torch.randn(6, 8)
    memory[0], memory[1] = 0, 1e-25
    memory[2] = memory[3]
    inputs = torch.stack([torch.zeros(8), torch.full((8,), 1e-25), memory[3]])
    output, weights, gradients = _run(layer, inputs, memory)
    assert all(tensor.isfinite().all() for tensor in [output, weights, *gradients])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    if distance == "cosine":
        # Zero is like nothing, so all are alike; tiny vectors have a direction as others have, and 1e-25 finds itself.
        torch.testing.assert_close(weights[0], torch.full((6,), 1 / 6))
        assert int(weights[1].argmax()) == 1


def test_batches_of_zero_rows_pass() -> None:
    assert MemoryWrapLayer(8, CLASSES)(torch.zeros(0, 8), torch.randn(3, 8)).shape == (0, CLASSES)


@pytest.mark.parametrize(("kind", "distance"), list(product(LAYERS, DISTANCES)))
def test_autocast_leaves_the_read_in_float32(kind: str, distance: str) -> None:
    layer = LAYERS[kind](16, CLASSES, distance=distance)
    inputs, memory = torch.randn(4, 16), torch.randn(50, 16)
    output, weights = layer(inputs, memory, return_weights=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_output, mixed_weights = layer(inputs, memory, return_weights=True)
    assert torch.equal(mixed_weights, weights)
    torch.testing.assert_close(mixed_output.float(), output, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_in_half_precision_reads_in_float32(dtype: torch.dtype) -> None:
    layer = MemoryWrapLayer(16, CLASSES).to(dtype)
    output, weights = layer(torch.randn(4, 16).to(dtype), torch.randn(50, 16).to(dtype), return_weights=True)
    assert output.dtype == dtype
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))


@pytest.mark.parametrize(("kind", "distance"), list(product(LAYERS, DISTANCES)))
def test_gradcheck_of_a_whole_layer(kind: str, distance: str) -> None:
    layer = LAYERS[kind](4, 3, distance=distance).double()
    inputs = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: layer(*args, return_weights=True), (inputs, memory))


@pytest.mark.parametrize(("kind", "distance"), list(product(LAYERS, DISTANCES)))
def test_order_of_the_memory_does_not_matter(kind: str, distance: str) -> None:
    layer = LAYERS[kind](16, CLASSES, distance=distance)
    inputs, memory, order = torch.randn(4, 16), torch.randn(50, 16), torch.randperm(50)
    output, weights = layer(inputs, memory, return_weights=True)
    permuted_output, permuted_weights = layer(inputs, memory[order], return_weights=True)
    torch.testing.assert_close(permuted_weights, weights[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(permuted_output, output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_scale_multiplies_the_similarity(scale: float) -> None:
    one, other = (BaselineMemory(8, CLASSES, head=nn.Identity(), distance="dot", scale=s) for s in (1.0, scale))
    inputs, memory = torch.randn(4, 8), torch.randn(20, 8)
    expected = one(inputs * scale, memory, return_weights=True)[1]
    torch.testing.assert_close(other(inputs, memory, return_weights=True)[1], expected)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        ({"distance": "euclid"}, r"'euclid'.*'cosine', 'l2', 'dot'"),
        ({"distance": None}, r"None.*'cosine'"),
        ({"encoder_output_dim": 0}, "encoder_output_dim=0"),
        ({"encoder_output_dim": 8.0}, r"encoder_output_dim=8\.0"),
        ({"encoder_output_dim": True}, "encoder_output_dim=True"),
        ({"output_dim": -1}, "output_dim=-1"),
        ({"scale": 0}, "scale=0"),
        ({"scale": -1.0}, r"scale=-1\.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"scale": "10"}, "scale='10'"),
        ({"head": nn.Linear(7, 8)}, r"head=Linear.*in_features=7.*\[B, 8\]"),
        ({"head": nn.Flatten(0)}, r"head=Flatten.*\[B, 8\]"),
        ({"head": "linear"}, "head='linear'"),
        ({"head": nn.LSTM(8, 8)}, "head=LSTM.*tuple"),
        ({"classifier": nn.Linear(9, CLASSES)}, r"classifier=Linear.*in_features=9"),
        ({"classifier": nn.Linear(8, 99)}, "classifier=Linear"),
        ({"classifier": nn.Linear(16, 99)}, "classifier=Linear"),
        ({"classifier": torch.relu}, "classifier="),
    ],
)
def test_arguments_that_cannot_fit_are_refused_at_construction(
    kind: str, arguments: dict[str, Any], quoted: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){quoted}"):
        LAYERS[kind](**{"encoder_output_dim": 8, "output_dim": CLASSES, **arguments})


def test_a_classifier_with_another_number_of_outputs_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"9 outputs, but output_dim=5.*\[B, 16\] to \[B, 5\].*output_dim=9"):
        MemoryWrapLayer(8, 5, classifier=nn.Linear(16, 9))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("inputs", "memory", "quoted"),
    [
        ((4, 7), (3, 8), r"input_encoding has shape \[4, 7\]; expected \[N, 8\]"),
        ((8,), (3, 8), r"input_encoding has shape \[8\]"),
        ((4, 8, 2, 2), (3, 8), r"input_encoding has shape \[4, 8, 2, 2\]"),
        ((4, 8), (3, 9), r"memory_encoding has shape \[3, 9\]; expected \[N, 8\]"),
        ((4, 8), (8,), r"memory_encoding has shape \[8\]"),
        ((4, 8), (0,), r"memory_encoding has shape \[0\]"),
        ((4, 8), (1, 3, 8), r"memory_encoding has shape \[1, 3, 8\]"),
    ],
)
def test_wrong_shapes_are_refused(kind: str, inputs: tuple[int, ...], memory: tuple[int, ...], quoted: str) -> None:
    layer = LAYERS[kind](8, CLASSES)
    with pytest.raises(ValueError, match=quoted):
        layer(torch.zeros(inputs), torch.zeros(memory))


def test_looking_at_a_head_leaves_its_mode_and_state_alone() -> None:
    head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5))
    head[1].eval()
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    layer = MemoryWrapLayer(8, CLASSES, head=head)
    assert layer.head.training
    assert layer.head[0].training
    assert not layer.head[1].training
    assert all(torch.equal(state[name], tensor) for name, tensor in head.state_dict().items())


def test_a_vote_needs_labels_and_sums_their_weights() -> None:
    layer = LabelVote(8, 3, head=nn.Identity())
    inputs, memory, labels = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 1, 2] * 3)
    with pytest.raises(ValueError, match="labels=None"):
        layer(inputs, memory)
    weights = BaselineMemory(8, 8, head=nn.Identity(), classifier=nn.Identity())(inputs, memory, True)[1]
    vector = layer.read(layer.query(inputs), layer.prepare(memory, labels)).vector
    probability = layer.classify(inputs, vector).exp()
    for label in range(3):
        expected = weights[:, labels == label].sum(dim=1)
        torch.testing.assert_close(vector[:, label], expected)
        torch.testing.assert_close(probability[:, label], expected.clamp_min(LabelVote.LEAST_PROBABILITY))


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_logits_of_an_affine_classifier_are_the_weighted_sum_of_the_samples_logits(distance: str) -> None:
    """What a prediction from the memory alone is made of: shares of what is predicted for each sample."""
    layer = BaselineMemory(8, CLASSES, classifier=nn.Linear(8, CLASSES), distance=distance)
    memory = torch.randn(20, 8)
    output, weights = layer(torch.randn(4, 8), memory, return_weights=True)
    torch.testing.assert_close(output, weights @ layer.classifier(memory), atol=1e-5, rtol=1e-5)


_MEASURE = """
import torch, memorywrap, timm_memwrap
inputs, memory = torch.randn(128, 512), torch.randn(10_000, 512)
def peak():
    # Not getrusage: its peak is inherited from the process that started this one, and would hide ours.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
def measure(module, distance, size):
    layer = module.BaselineMemory(512, 10, distance=distance)
    with torch.no_grad():
        layer(inputs[:2], memory[:10])  # what is allocated once, whatever the size
        before = peak()
        layer(inputs, memory[:size])
    print(peak() - before)
# A peak only rises, so the small ones come first.
measure(timm_memwrap, "l2", 10_000)
measure(timm_memwrap, "dot", 10_000)
measure(memorywrap, "l2", 2_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak in /proc")
def test_no_read_makes_an_intermediate_of_batch_x_memory_x_width() -> None:
    run = subprocess.run([sys.executable, "-c", _MEASURE], check=True, capture_output=True, text=True)
    l2, dot, published = map(int, run.stdout.split())
    assert l2 < 150e6, "B x M x D would be 2.6 GB"
    assert dot < 150e6
    assert published > 0.9 * 4 * 128 * 2_000 * 512, "the measure must see such an intermediate where there is one"
