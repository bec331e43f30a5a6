"""What is derived from a bank: made once, never stale, never in the way of a gradient."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from memory_models import (
    CLASSES,
    EVIDENCE,
    TRAINED,
    VARIANTS,
    fill,
    fill_with_encodings,
    naive_logits,
    new_images,
    new_model,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import timm_memwrap
from timm_memwrap import MemoryWrapModel, bank_memory
from timm_memwrap.search import ExactIndex


def _train_step(model: MemoryWrapModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(new_images(4, 5)).square().sum().backward()
    optimizer.step()
    model.eval()


def _append(model: MemoryWrapModel) -> None:
    model.memory_bank.append(torch.randn(3, model.encoding_size), torch.tensor([0, 1, 2]), ["a", "b", "c"])


def _reset(model: MemoryWrapModel) -> None:
    model.reset_classifier(3)
    fill(model)


def _other_weights(model: MemoryWrapModel) -> None:
    state = {k: v + 0.1 if v.is_floating_point() and "bank" not in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def _other_weights_assigned(model: MemoryWrapModel) -> None:
    state = {k: v + 0.1 if v.is_floating_point() and "bank" not in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _in_place(model: MemoryWrapModel) -> None:
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.3)


def _fused_step(model: MemoryWrapModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(new_images(4, 5)).square().sum().backward()
    optimizer.step()


def _fused_step_in_training(model: MemoryWrapModel) -> None:
    _fused_step(model.train())
    model.eval()


CHANGES: dict[str, Callable[[MemoryWrapModel], Any]] = {
    "train step": _train_step,
    "fused step": _fused_step_in_training,
    "fused step in evaluation": _fused_step,
    "load_state_dict": _other_weights,
    "load_state_dict assign": _other_weights_assigned,
    "in place": _in_place,
    "half and back": lambda m: m.half().float(),
    "double": lambda m: m.double(),
    "append": _append,
    "remove": lambda m: m.memory_bank.remove([0, 5]),
    "encodings in place": lambda m: m.memory_bank.encodings.mul_(-1),
    "labels in place": lambda m: m.memory_bank.labels.copy_((m.memory_bank.labels + 1) % CLASSES),
    "another bank": lambda m: fill(m, 7, seed=9),
    "reset_classifier": _reset,
}


@pytest.mark.parametrize("variant", ["mlp", "linear identity l2", "logits", "vote"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_prepared_keys_are_those_of_the_present_weights_and_bank(variant: str, change: str, inference: bool) -> None:
    if "step" in change and variant == "vote":
        pytest.skip("a vote has nothing to train")
    model = fill(new_model(variant))
    grad = torch.inference_mode if inference else torch.no_grad
    with grad():
        model(new_images())
    assert model.memory_bank.derived is not None, "else this tests nothing"
    CHANGES[change](model)
    images = new_images().to(next(model.parameters()).dtype)
    with grad():
        got = model(images)
        fresh = copy.deepcopy(model)
        assert fresh.memory_bank.derived is None
        assert torch.equal(got, fresh(images))


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("variant", ["mlp", "probabilities", "joint"])
def test_after_a_fused_step_the_bank_is_stale_and_keys_are_made_again(mode: str, variant: str) -> None:
    """Fused optimizers write weights without raising the version counters. In evaluation: with frozen statistics."""
    model = fill(new_model(variant))
    with torch.no_grad():
        before = model(new_images())
    assert not model.memory_is_stale()
    versions = [parameter._version for parameter in model.parameters()]
    CHANGES["fused step" if mode == "training" else "fused step in evaluation"](model)
    assert versions == [parameter._version for parameter in model.parameters()], "else this tests nothing"
    assert model.memory_is_stale()
    with torch.no_grad():
        after = model(new_images())
        assert torch.equal(after, copy.deepcopy(model)(new_images()))
    assert not torch.allclose(after, before)


def _count_keys(model: MemoryWrapModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    key = model.head.key

    def spy(encodings: Tensor) -> Any:
        calls.append(len(encodings))
        return key(encodings)

    monkeypatch.setattr(model.head, "key", spy)
    return calls


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backward", [False, True])
def test_keys_are_prepared_once_in_evaluation(
    variant: str, grad: bool, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fill(new_model(variant)).requires_grad_(not backward)
    calls = _count_keys(model, monkeypatch)
    with torch.set_grad_enabled(grad):
        for seed in range(4):
            images = new_images(3, seed).requires_grad_(backward)
            logits = model(images)
            if backward and grad:
                logits.sum().backward()
                assert images.grad is not None
            model(images, return_readout=True)
            model.read(model.encode(images))
            model.own_predictions()
    assert calls == [20]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("variant", ["mlp", "probabilities", "joint", "vote"])
def test_keys_are_prepared_once_when_compiled(
    variant: str, known: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model = fill(new_model(variant))
    with torch.no_grad():
        expected = copy.deepcopy(model)(new_images())
        if known:
            model(new_images())
    calls = _count_keys(model, monkeypatch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            torch.testing.assert_close(compiled(new_images()).detach(), expected, atol=1e-5, rtol=1e-5)
    assert calls == ([] if known else [20])


@pytest.mark.parametrize("most", [4, 64], ids=["all are read", "few are read"])
@pytest.mark.parametrize("variant", ["mlp", "probabilities", "joint", "vote"])
def test_a_compiled_read_of_a_large_memory_is_the_read(
    variant: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("timm_memwrap.memory_layer.LARGE", 100)
    monkeypatch.setattr("timm_memwrap.memory_layer._MOST_READ", most)
    model = new_model(variant).eval()
    fill_with_encodings(model, 300)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, found = (each(new_images(), return_readout=True) for each in (model, compiled))
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.remainder, expected.remainder, atol=1e-4, rtol=1e-4)
    shown = min(expected.weights.shape[1], found.weights.shape[1])
    torch.testing.assert_close(found.weights[:, :shown], expected.weights[:, :shown], atol=1e-5, rtol=1e-5)
    used = expected.weights[:, :shown] > 1e-4
    assert torch.equal(found.positions[:, :shown][used], expected.positions[:, :shown][used])
    torch.testing.assert_close(found.similarities[:, :shown][used], expected.similarities[:, :shown][used])


@pytest.mark.parametrize("change", ["train step", "fused step", "remove", "another bank", "load_state_dict"])
def test_keys_are_never_stale_when_compiled(change: str) -> None:
    """A compiled model cannot watch its weights, but is told of training and of another bank."""
    torch._dynamo.reset()
    model = fill(new_model())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(new_images())
        with torch.enable_grad():
            CHANGES[change](model)
        after = compiled(new_images())
        expected = copy.deepcopy(model)(new_images())
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_model_that_is_created_or_loaded_in_inference_mode_prepares_keys_once(
    context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(new_model()).save_pretrained(tmp_path)
    with torch.inference_mode():
        made = [new_model(), timm_memwrap.from_pretrained(tmp_path)]
        fill(made[0].eval())
    for model in made:
        calls = _count_keys(model, monkeypatch)
        with context():
            for seed in range(3):
                model(new_images(2, seed))
        assert calls == [20]


def test_keys_prepared_without_gradient_do_not_cut_one_later() -> None:
    model = copy.deepcopy(fill(new_model()))
    with torch.inference_mode():
        model(new_images())
    model(new_images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
    gradient = model.head.head.weight.grad.clone()
    fresh = copy.deepcopy(model)
    fresh.zero_grad()
    fresh(new_images()).sum().backward()
    torch.testing.assert_close(fresh.head.head.weight.grad, gradient)


@pytest.mark.parametrize("variant", ["logits", "linear identity l2", "mlp"])
def test_keys_prepared_in_inference_mode_serve_a_gradient_of_the_input(variant: str) -> None:
    """A read head without parameters keeps its prepared keys, and a heatmap wants a gradient through them."""
    # A copy has no prepared keys; those of the original were made while its bank was built.
    model = copy.deepcopy(fill(new_model(variant)))
    with torch.inference_mode():
        model(new_images())
    images = new_images().requires_grad_()
    model(images).sum().backward()
    fresh, again = copy.deepcopy(model), new_images().requires_grad_()
    fresh(again).sum().backward()
    torch.testing.assert_close(images.grad, again.grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_flows_through_the_query_and_not_into_the_bank(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is the same whether all samples are scored or some are searched for."""
    # In double precision: the logarithm of a small share of a vote makes much of rounding.
    model = fill(new_model(variant)).double()
    gradients = []
    for most in (4096, 0):
        monkeypatch.setattr("timm_memwrap.bank_memory.LARGE", most)
        model.memory_bank.derived = None
        model.zero_grad()
        images = new_images().double().requires_grad_()
        model(images).square().sum().backward()
        searches = isinstance(model.memory_bank.derived.memory.key_index, ExactIndex)
        assert searches == (most == 0)
        gradients.append([images.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert gradients[0][0].any()
    for dense_gradient, sparse_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse_gradient, dense_gradient)


@pytest.mark.parametrize("most", [4096, 0])
@pytest.mark.parametrize("distance", ["cosine", "l2", "dot"])
@pytest.mark.parametrize("kind", ["memwrap_", "memwrap_evidence_"])
def test_gradcheck_of_a_read_of_the_bank(kind: str, distance: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_memwrap.bank_memory.LARGE", most)
    read_head = {"read_head": "probabilities"} if kind == "memwrap_evidence_" else {}
    arguments = {"distance": distance, "scale": 1.0, **read_head}
    model = timm.create_model(kind + "test_resnet", num_classes=3, **arguments).double().eval()
    fill_with_encodings(model, 300)
    encoding = torch.randn(2, model.encoding_size, dtype=torch.float64) * 0.3
    assert torch.autograd.gradcheck(
        lambda x: model.read(x).logits, encoding.requires_grad_(), atol=1e-6, fast_mode=True
    )
    assert isinstance(model.memory_bank.derived.memory.key_index, ExactIndex) == (most == 0)
    readout = model.read(encoding)
    with torch.no_grad():
        torch.testing.assert_close(model.read(encoding).logits, readout.logits)


class _Synchronisations(TorchDispatchMode):
    """Counts operations that have to wait for a device, since their result depends on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in self.WAITING or by_mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_count_of_synchronisations_sees_them() -> None:
    values = torch.arange(3)
    with _Synchronisations() as counted:
        bool(values[1]), int(values[1]), values[1].item(), values[values > 1], values.nonzero()
    assert counted.seen == {"_local_scalar_dense": 3, "index": 1, "nonzero": 1}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("hides", [False, True])
def test_logits_of_a_bank_need_no_synchronisation(variant: str, grad: bool, hides: bool) -> None:
    """Nor does making its keys."""
    model = fill_with_encodings(new_model(variant), 1000)
    images, hidden = new_images(), torch.arange(12).view(6, 2) if hides else None
    with torch.set_grad_enabled(grad), _Synchronisations() as counted:
        for _ in range(2):
            model(images, hidden=hidden)
    assert not counted.seen


@pytest.mark.parametrize("variant", TRAINED)
def test_training_needs_no_synchronisation(variant: str) -> None:
    model = new_model(variant).train()
    with _Synchronisations() as counted:
        model(new_images())
        model(new_images(6, 2), memory=new_images(6, 3))
        # Evaluation before there is a bank, too.
        model.eval()(new_images())
    assert not counted.seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bank_is_read_on_the_meta_device(variant: str) -> None:
    """Where nothing can depend on values."""
    model = fill_with_encodings(new_model(variant), 1000).to("meta")
    assert model(new_images().to("meta")).shape == (6, CLASSES)
    if variant in TRAINED:
        assert model.train()(new_images().to("meta")).shape == (6, CLASSES)


@pytest.mark.parametrize("variant", EVIDENCE)
def test_own_logits_of_the_backbones_classifier_are_the_plain_models(variant: str) -> None:
    model = fill(new_model(variant))
    plain = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    plain.load_state_dict(model.backbone.state_dict())
    positions = torch.tensor([3, 0, 19])
    model.temperature = 2.0
    with torch.no_grad():
        expected = plain(new_images(20, 2))
    torch.testing.assert_close(model.own_logits(positions), expected[positions] / 2.0, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.own_predictions(), expected.argmax(dim=1))


@pytest.mark.parametrize("block", [1024, 3])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in EVIDENCE])
def test_own_logits_of_other_heads_are_a_read_with_the_sample_itself_hidden(
    variant: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fill(new_model(variant))
    monkeypatch.setattr("timm_memwrap.bank_memory._MOST_SCORES", block * len(model.memory_bank))
    encodings, labels = model.memory_bank.filled()
    expected = []
    with torch.no_grad():
        for i in range(20):
            rest = [j for j in range(20) if j != i]
            expected.append(naive_logits(model, encodings[i], encodings[rest], labels[rest]))
    logits = model.own_logits(torch.arange(20))
    torch.testing.assert_close(logits, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert torch.equal(model.own_predictions(), logits.argmax(dim=1))
    assert model.own_logits(torch.zeros(0, dtype=torch.long)).shape == (0, CLASSES)


def _asked(model: MemoryWrapModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    asked: list[list[int]] = []
    own_logits = model.own_logits

    def spy(positions: Tensor) -> Tensor:
        asked.append(positions.tolist())
        return own_logits(positions)

    monkeypatch.setattr(model, "own_logits", spy)
    return asked


@pytest.mark.parametrize("variant", ["mlp", "probabilities", "joint", "vote"])
def test_own_predictions_are_computed_once_and_for_the_samples_asked_for(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fill(new_model(variant))
    expected = copy.deepcopy(model).own_predictions()
    asked = _asked(model, monkeypatch)
    positions = torch.tensor([[5, 1, 5], [2, 1, 1]])
    assert torch.equal(model.own_predictions(positions), expected[positions])
    assert torch.equal(model.own_predictions(positions[1]), expected[positions[1]])
    assert torch.equal(model.own_predictions(torch.tensor([7, 2])), expected[[7, 2]])
    assert asked == [[1, 2, 5], [7]]
    assert torch.equal(model.own_predictions(), expected)
    assert sorted(position for positions in asked for position in positions) == list(range(20))
    model.own_predictions()
    assert len(asked) == 3


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in ("double", "half and back")])
@pytest.mark.parametrize("variant", ["mlp", "probabilities", "joint"])
def test_own_predictions_are_dropped_with_the_weights_and_samples_that_they_were_made_of(
    variant: str, change: str
) -> None:
    model = fill(new_model(variant))
    model.own_predictions()
    CHANGES[change](model)
    # Not left from before, and not those of weights before the last change.
    assert torch.equal(model.own_predictions(), copy.deepcopy(model).own_predictions())
    assert torch.equal(model.own_predictions(), model.own_logits(torch.arange(len(model.memory_bank))).argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_is_not_asked_about_by_its_copies(variant: str, dtype: torch.dtype) -> None:
    model = fill(new_model(variant), 7)
    images = torch.cat([new_images(7, 2), new_images(7, 2)[[4, 1, 4]]])
    # Each in a batch of another size, which gives other digits.
    encodings = torch.cat([model.encode(part) for part in images.split([3, 4, 1, 2])]).detach()
    model.memory_bank.replace(encodings, torch.arange(10) % CLASSES, range(10), dtype=dtype)
    groups = {0: [0], 1: [1, 8], 2: [2], 3: [3], 4: [4, 7, 9], 5: [5], 6: [6], 7: [4, 7, 9], 8: [1, 8], 9: [4, 7, 9]}
    own = model.own_logits(torch.arange(10))
    for position, group in groups.items():
        alone = copy.deepcopy(model)
        if model.memory_args["classifier"] != "own":
            alone.memory_bank.select([i for i in range(10) if i not in group])
            expected = alone.read(model.memory_bank.encodings[[position]].float()).logits[0]
            torch.testing.assert_close(own[position], expected, rtol=1e-4, atol=1e-4)


def test_groups_of_many_samples_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_memory, "_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    encodings = torch.randn(40, 16, generator=generator)
    source = torch.randint(40, (200,), generator=generator)
    groups = bank_memory.groups_of(encodings[source])
    assert torch.equal(groups.unsqueeze(0) == groups.unsqueeze(1), source.unsqueeze(0) == source.unsqueeze(1))


def test_own_predictions_of_an_empty_bank_are_refused_with_what_to_call() -> None:
    for call in (MemoryWrapModel.own_predictions, lambda model: model.own_logits(torch.tensor([0]))):
        with pytest.raises(ValueError, match=r"bank is empty.*build_memory_bank"):
            call(new_model())


def test_what_is_derived_is_neither_saved_nor_copied() -> None:
    model = fill(new_model())
    names = set(model.state_dict())
    model.own_predictions()
    assert model.memory_bank.derived is not None
    assert set(model.state_dict()) == names
    assert copy.deepcopy(model).memory_bank.derived is None
    assert pickle.loads(pickle.dumps(model)).memory_bank.derived is None
