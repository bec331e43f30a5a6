"""What a model reads, and from where: against loops written out sample by sample."""

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from entmax import sparsemax
from torch import Tensor, nn

import timm_memwrap
from timm_memwrap import BaselineMemory, MemoryReadout, MemoryWrapModel, build_memory_bank
from timm_memwrap.layers import CentreClasses, Columns, Probabilities

CLASSES = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "linear identity l2": {"classifier": "linear", "read_head": "identity", "distance": "l2"},
    "dot": {"distance": "dot", "scale": 0.1},
    "baseline": {"memory_only": True},
    "classifier": {"read_head": "classifier", "memory_only": True},
    "classifier and input": {"read_head": "classifier"},
    "pre_logits": {"read_head": "pre_logits", "memory_only": True},
    "probabilities": {"read_head": "probabilities", "memory_only": True},
    "probabilities and input": {"read_head": "probabilities"},
    "vote": {"classifier": "vote", "read_head": "identity", "memory_only": True, "scale": 5.0},
    "classifier vote": {"classifier": "vote", "read_head": "classifier", "memory_only": True},
}
# A vote has no labels to count in training.
TRAINED = [name for name in VARIANTS if "vote" not in name]
BACKBONES = ("test_resnet", "test_vit", "test_efficientnet", "test_convnext")


def _model(variant: str = "mlp", backbone: str = "test_resnet", num_classes: int = CLASSES) -> MemoryWrapModel:
    torch.manual_seed(0)
    args = dict(VARIANTS[variant])
    prefix = "memwrap_baseline_" if args.pop("memory_only", False) else "memwrap_"
    size = {"img_size": 32} if backbone == "test_vit" else {}
    model = timm.create_model(prefix + backbone, num_classes=num_classes, **size, **args)
    assert isinstance(model, MemoryWrapModel)
    return model.eval()


def _images(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _fill(model: MemoryWrapModel, size: int = 20, seed: int = 2) -> MemoryWrapModel:
    data = torch.utils.data.TensorDataset(_images(size, seed), torch.arange(size) % model.num_classes)
    build_memory_bank(model, data, size=None, progress=False)
    return model


def _dense(readout: MemoryReadout, size: int) -> Tensor:
    dense = torch.zeros(len(readout.logits), size, dtype=readout.weights.dtype)
    return dense.scatter_add(1, readout.indices, readout.weights)


def _naive(model: MemoryWrapModel, encoding: Tensor, memory: Tensor, labels: Tensor | None = None) -> Tensor:
    """Logits of one encoding `[D]` by the paper's formulas, one memory sample at a time."""
    head, args = model.head, model.memory_args
    query, keys = head.head(encoding[None])[0], [head.head(sample[None])[0] for sample in memory]
    similarity = {
        "cosine": lambda k: (query @ k) / (query.norm() * k.norm()),
        "l2": lambda k: -(query - k).square().sum(),
        "dot": lambda k: query @ k,
    }[args["distance"]]
    weights = sparsemax(torch.stack([args["scale"] * similarity(k) for k in keys]), dim=0)
    if args["classifier"] == "vote":
        votes = torch.zeros(model.num_classes)
        for weight, label in zip(weights, labels, strict=True):
            votes[label] += weight
        return votes.clamp_min(1e-6).log() / args["temperature"]
    vector = sum(weight * sample for weight, sample in zip(weights, memory, strict=True))
    if model.keeps_classifier:
        both = vector if model.memory_only else (encoding + vector) / 2
        return both[-model.num_classes :] / args["temperature"]
    return head.classifier((vector if model.memory_only else torch.cat([encoding, vector]))[None])[0]


# -- where the memory set comes from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", TRAINED)
@pytest.mark.parametrize("training", [False, True])
def test_images_given_as_memory_are_the_memory_set(variant: str, training: bool) -> None:
    model = _fill(_model(variant))
    if training:
        model.train()
        model.backbone.eval()  # batch statistics would make encodings depend on the batch
    images, memory = _images(), _images(9, 7)
    with torch.no_grad():
        readout = model(images, memory=memory, return_readout=True)
        encodings = model.encode(memory)
        expected = torch.stack([_naive(model, e, encodings) for e in model.encode(images)])
    torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
    assert int(readout.indices.max()) < 9


@pytest.mark.parametrize("variant", TRAINED)
def test_in_training_a_sample_reads_the_rest_of_its_batch(variant: str) -> None:
    model = _model(variant).train()
    model.backbone.eval()
    images = _images()
    with torch.no_grad():
        readout = model(images, return_readout=True)
        logits = model(images)
        encodings = model.encode(images)
        for i, encoding in enumerate(encodings):
            others = torch.cat([encodings[:i], encodings[i + 1 :]])
            torch.testing.assert_close(readout.logits[i], _naive(model, encoding, others), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, readout.logits)
    weights = _dense(readout, len(images))
    assert bool((weights.diagonal() == 0).all()), "a sample never reads itself"
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(images)))


def test_two_equal_images_read_each_other_and_not_themselves() -> None:
    model = _model("linear identity l2").train()
    model.backbone.eval()
    images = _images()
    images[3] = images[0]
    weights = _dense(model(images, return_readout=True), len(images))
    assert weights[0, 0] == weights[3, 3] == 0
    assert weights[0, 3] > 0
    assert weights[3, 0] > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_evaluation_the_bank_is_read(variant: str, backbone: str) -> None:
    model = _fill(_model(variant, backbone))
    bank, images = model.memory_bank, _images()
    with torch.no_grad():
        readout = model.read_memory(images)
        expected = torch.stack([_naive(model, e, bank.encodings, bank.labels) for e in model.encode(images)])
        torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(images), readout.logits)
        assert torch.equal(model.forward_head(model.forward_features(images)), readout.logits)
        assert torch.equal(model.read_encoding(readout.encoding).logits, readout.logits)
    assert bool((readout.weights >= 0).all())
    torch.testing.assert_close(readout.weights.sum(dim=1), torch.ones(len(images)))


def test_an_empty_bank_gives_way_to_what_training_saw() -> None:
    model = _model().train()
    seen = _images(12, 3)
    for batch in seen.split(4):
        model(batch)
    model.train().backbone.eval()
    for batch in seen.split(4):  # encodings without batch statistics, so that they can be computed again
        model(batch)
    model.eval()
    with torch.no_grad():
        readout = model(_images(), return_readout=True)
        queued = torch.cat([model.queue[:24]])
        torch.testing.assert_close(queued[12:], model.encode(seen))
        expected = torch.stack([_naive(model, e, queued) for e in model.encode(_images())])
    torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
    _fill(model)
    assert not torch.allclose(model(_images()), readout.logits), "the bank comes first"


def test_the_queue_keeps_the_last_encodings_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_memwrap.model.QUEUE_SIZE", 10)
    model = _model().train()
    model.backbone.eval()
    seen = _images(28, 3)
    with torch.no_grad():
        for batch in seen.split(4):
            model(batch)
        last = model.encode(seen)[-10:]
        got = model.queue
        assert got.shape == last.shape
        for row in last:
            assert bool(torch.isclose(got, row, atol=1e-5).all(dim=1).any())
        model(_images(25, 4))  # more at once than it can hold
        torch.testing.assert_close(
            sorted(model.queue.sum(1).tolist()),
            sorted(model.encode(_images(25, 4))[-10:].sum(1).tolist()),
            atol=1e-3,
            rtol=1e-4,
        )
    assert not any("queue" in name for name in model.state_dict())


def test_other_weights_forget_the_queue() -> None:
    model = _model().train()
    model(_images())
    model.load_state_dict(_model("mlp").state_dict())
    model.eval()
    with torch.no_grad():
        assert model.read_memory(_images()).weights.shape[1] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_any_memory_the_read_is_zero_and_one_warning_says_what_to_call(
    variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(variant)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        readout = model(_images(), return_readout=True)
        model(_images())
    assert [r.getMessage() for r in caplog.records if "build_memory_bank" in r.getMessage()] == [
        "The memory is empty, so the model reads nothing from it. Call timm_memwrap.build_memory_bank(model, data) "
        "before evaluation."
    ]
    assert readout.weights.shape == (6, 0)
    zero = torch.zeros(6, model.num_classes if "vote" in variant else model.encoding_size)
    assert torch.equal(readout.logits, model.head.classify(readout.encoding, zero))


# -- properties of a read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_the_memory_permutes_the_weights_and_leaves_the_logits(variant: str) -> None:
    model, order = _fill(_model(variant)), torch.randperm(20)
    with torch.no_grad():
        before = model.read_memory(_images())
        model.memory_bank.select(order.tolist())
        after = model.read_memory(_images())
    torch.testing.assert_close(_dense(after, 20), _dense(before, 20)[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_the_others(variant: str) -> None:
    model, images, order = _fill(_model(variant)), _images(), torch.randperm(6)
    with torch.no_grad():
        together = model.read_memory(images)
        permuted = model.read_memory(images[order])
        torch.testing.assert_close(permuted.logits, together.logits[order], atol=1e-5, rtol=1e-5)
        for i in range(6):
            alone = model.read_memory(images[i : i + 1])
            torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(_dense(alone, 20)[0], _dense(together, 20)[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_is_deterministic(variant: str) -> None:
    model = _fill(_model(variant))
    with torch.no_grad():
        first, again = model.read_memory(_images()), model.read_memory(_images())
        copied = copy.deepcopy(model).read_memory(_images())
    for one in (again, copied):
        assert all(torch.equal(a, b) for a, b in zip(first, one, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_gives_the_float32_read(variant: str) -> None:
    model = _fill(_model(variant))
    with torch.no_grad():
        encoding = model.encode(_images())
        expected = model.read_encoding(encoding)
        with torch.autocast("cpu", torch.bfloat16):
            got = model.read_encoding(encoding)
            whole = model(_images())
    assert torch.equal(_dense(got, 20), _dense(expected, 20))
    torch.testing.assert_close(got.logits.float(), expected.logits, atol=0.02, rtol=0.02)
    assert whole.isfinite().all()


@pytest.mark.parametrize("variant", TRAINED)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_trains_without_nan(variant: str, autocast: bool, batch: int) -> None:
    # Batch normalisation could not train on one image that it has pooled to one pixel.
    model = _model(variant, "test_vit").train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        readout = model(_images(batch), return_readout=True)
    assert readout.weights.shape[1] in (0, batch)
    readout.logits.float().square().sum().backward()
    assert readout.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", TRAINED)
def test_a_loss_on_the_weights_reaches_the_encoder(variant: str) -> None:
    model = _model(variant).train()
    model.head.scale = 1e-3  # several samples a row: one alone has weight 1, whatever its score
    readout = model(_images(), return_readout=True)
    assert isinstance(readout, MemoryReadout)
    readout.weights.square().sum().backward()
    first = next(model.backbone.parameters())
    assert first.grad is not None
    assert first.grad.isfinite().all()
    assert bool(first.grad.any())


def test_gradient_flows_into_given_memory_images() -> None:
    model, memory = _model().train(), _images(5, 3).requires_grad_()
    model(_images(), memory=memory).sum().backward()
    assert bool(memory.grad.any())


# -- the classifier as read head --------------------------------------------------------------------------------------


def _plain_parts(plain: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-logits and logits of a plain timm model, as any user of timm gets them."""
    return plain.forward_head(plain.forward_features(images), pre_logits=True), plain(images)  # type: ignore[operator]


def _naive_similarity(read_head: str, inputs: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor]) -> Tensor:
    """Similarities as the documentation says them, each by itself."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a[:, None], b[None], dim=-1)

    (features, logits), (memory_features, memory_logits) = inputs, memory
    if read_head == "classifier":
        return cosine(logits - logits.mean(1, keepdim=True), memory_logits - memory_logits.mean(1, keepdim=True))
    if read_head == "pre_logits":
        return cosine(features, memory_features)
    probabilities = cosine(logits.softmax(dim=1), memory_logits.softmax(dim=1))
    return (probabilities + 4 * cosine(features, memory_features)) / 5


@pytest.mark.parametrize("memory_only", [True, False])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize(("read_head", "scale"), [("classifier", 10), ("pre_logits", 10), ("probabilities", 20)])
def test_a_kept_classifier_gives_the_weighted_sum_of_the_memorys_logits(
    read_head: str, scale: float, name: str, memory_only: bool
) -> None:
    plain = timm.create_model(name, num_classes=CLASSES).eval()
    model = _fill(timm_memwrap.wrap(plain, read_head=read_head, memory_only=memory_only))
    with torch.no_grad():
        inputs, memory = _plain_parts(plain, _images()), _plain_parts(plain, _images(20, 2))
        weights = sparsemax(scale * _naive_similarity(read_head, inputs, memory), dim=1)
        expected = weights @ memory[1]
        if not memory_only:
            expected = (inputs[1] + expected) / 2
        readout = model.read_memory(_images())
    torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(_dense(readout, 20), weights, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_a_tensor_of_their_own(variant: str) -> None:
    """As a part of an encoding they would keep it alive, and safetensors would refuse to write them."""
    with torch.no_grad():
        logits = _fill(_model(variant))(_images())
    assert logits.is_contiguous()
    assert logits.untyped_storage().nbytes() == logits.numel() * logits.element_size()


def test_classifier_read_head_is_the_baseline_layer_on_penultimate_features() -> None:
    plain = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    model = _fill(timm_memwrap.wrap(plain, read_head="classifier"))
    classifier = plain.get_classifier()
    layer = BaselineMemory(
        plain.head_hidden_size,
        CLASSES,
        head=nn.Sequential(classifier, CentreClasses()),
        classifier=classifier,
        scale=10,
    )
    with torch.no_grad():
        (features, _), (memory_features, _) = _plain_parts(plain, _images()), _plain_parts(plain, _images(20, 2))
        expected, weights = layer(features, memory_features, return_weights=True)
        readout = model.read_memory(_images())
    torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(_dense(readout, 20), weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["mlp", "baseline", "classifier and input", "vote", "probabilities"])
def test_temperature_divides_logits_and_changes_nothing_else(variant: str) -> None:
    model = _fill(_model(variant))
    model.temperature = 1.0
    with torch.no_grad():
        before = model.read_memory(_images())
        model.temperature = 2.5
        after = model.read_memory(_images())
    torch.testing.assert_close(after.logits * 2.5, before.logits)
    assert torch.equal(after.weights, before.weights)
    assert torch.equal(after.indices, before.indices)
    model.reset_classifier(CLASSES + 1)
    assert model.head.temperature == 2.5


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "hot", True])
def test_a_temperature_that_is_none_is_refused(temperature: Any) -> None:
    model = _model("probabilities")
    with pytest.raises(ValueError, match=re.escape(f"temperature={temperature!r}")):
        model.temperature = temperature
    assert model.temperature == model.head.temperature == 1.0
    with pytest.raises(ValueError, match=re.escape(f"temperature={temperature!r}")):
        timm.create_model("memwrap_test_resnet", num_classes=2, temperature=temperature)
    with pytest.raises(ValueError, match="num_classes=0"):
        timm.create_model("memwrap_test_resnet", num_classes=0).temperature = 2.0  # type: ignore[assignment]


def test_probabilities_without_confidence_or_features_have_a_finite_gradient() -> None:
    """Zero pre-logits (after a ReLU) and saturated or level logits."""
    encoding = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 200.0, -200.0], [0.0, 1.0, 5.0, 5.0]], requires_grad=True)
    head = BaselineMemory(4, 2, head=Probabilities(2), classifier=Columns(2, 4), scale=20)
    output = head(encoding, encoding.detach().clone())
    assert output.isfinite().all()
    output.square().sum().backward()
    assert encoding.grad is not None
    assert encoding.grad.isfinite().all()


def test_take_the_memory_away_and_nothing_is_left() -> None:
    """A memory-only prediction of a memory without content is the same for every input."""
    for variant in ("baseline", "classifier", "pre_logits", "probabilities", "vote", "classifier vote"):
        model = _fill(_model(variant))
        bank = model.memory_bank
        with torch.no_grad():
            full = model(_images())
            if "vote" in variant:
                bank.labels.fill_(1)
            else:
                bank.encodings.zero_()
            gone = model(_images())
        assert not torch.allclose(full[0], full[1])
        torch.testing.assert_close(gone, gone[:1].expand(6, -1), atol=1e-5, rtol=0)


def test_vote_is_the_weight_of_the_samples_of_a_class() -> None:
    model = _fill(_model("vote"))
    with torch.no_grad():
        readout = model.read_memory(_images())
    for row in range(6):
        for label in range(CLASSES):
            of_class = model.memory_bank.labels[readout.indices[row]] == label
            expected = float(readout.weights[row][of_class].sum().clamp_min(1e-6))
            assert float(readout.logits[row, label].exp()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("variant", ["vote", "classifier vote"])
def test_vote_cannot_be_trained_and_says_so(variant: str) -> None:
    model = _model(variant).train()
    for arguments in ({}, {"memory": _images()}):
        with pytest.raises(ValueError, match="build_memory_bank"):
            model(_images(), **arguments)


# -- hiding samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [0, 1, 5, 19])
def test_hidden_samples_are_as_if_not_there(variant: str, count: int) -> None:
    model = _fill(_model(variant))
    encoding = model.encode(_images()).detach()
    hidden = torch.stack([torch.randperm(20)[:count] for _ in range(6)])
    with torch.no_grad():
        readout = model.read_encoding(encoding, hidden)
        dense = _dense(readout, 20)
        for i in range(6):
            without = copy.deepcopy(model)
            rest = [j for j in range(20) if j not in hidden[i].tolist()]
            without.memory_bank.select(rest)
            expected = without.read_encoding(encoding[i : i + 1])
            torch.testing.assert_close(readout.logits[i : i + 1], expected.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(dense[i, rest], _dense(expected, len(rest))[0], atol=1e-5, rtol=0)
    assert bool((dense.gather(1, hidden) == 0).all())


def test_hiding_all_reads_zero() -> None:
    model = _fill(_model())
    encoding = model.encode(_images(2)).detach()
    with torch.no_grad():
        readout = model.read_encoding(encoding, torch.arange(20).expand(2, -1))
        assert readout.weights.shape == (2, 0)
        assert torch.equal(readout.logits, model.head.classify(encoding, torch.zeros(2, model.encoding_size)))


# -- the prepared keys are never stale --------------------------------------------------------------------------------


def _train_step(model: MemoryWrapModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(_images(4, 5)).square().sum().backward()
    optimizer.step()
    model.eval()


def _append(model: MemoryWrapModel) -> None:
    model.memory_bank.append(
        torch.randn(3, model.encoding_size), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), ["a", "b", "c"]
    )


def _reset(model: MemoryWrapModel) -> None:
    model.reset_classifier(3)
    _fill(model)


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


CHANGES: dict[str, Callable[[MemoryWrapModel], Any]] = {
    "train step": _train_step,
    "load_state_dict": _other_weights,
    "load_state_dict assign": _other_weights_assigned,
    "in place": _in_place,
    "half and back": lambda m: m.half().float(),
    "double": lambda m: m.double(),
    "append": _append,
    "remove": lambda m: m.memory_bank.remove([0, 5]),
    "encodings in place": lambda m: m.memory_bank.encodings.mul_(-1),
    "labels in place": lambda m: m.memory_bank.labels.copy_((m.memory_bank.labels + 1) % CLASSES),
    "another bank": lambda m: _fill(m, 7, seed=9),
    "reset_classifier": _reset,
}


@pytest.mark.parametrize("variant", ["mlp", "linear identity l2", "classifier", "vote"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_prepared_keys_are_those_of_the_present_weights_and_bank(variant: str, change: str, inference: bool) -> None:
    if change == "train step" and variant == "vote":
        pytest.skip("a vote has nothing to train")
    model = _fill(_model(variant))
    grad = torch.inference_mode if inference else torch.no_grad
    with grad():
        model(_images())
    assert model._prepared is not None, "else this tests nothing"
    CHANGES[change](model)
    images = _images().to(next(model.parameters()).dtype)
    with grad():
        got = model(images)
        fresh = copy.deepcopy(model)
        assert fresh._prepared is None
        assert torch.equal(got, fresh(images))


def test_keys_prepared_without_gradient_do_not_cut_one_later() -> None:
    model = copy.deepcopy(_fill(_model()))
    with torch.inference_mode():
        model(_images())
    model(_images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
    gradient = model.head.head.weight.grad.clone()
    fresh = copy.deepcopy(model)
    fresh.zero_grad()
    fresh(_images()).sum().backward()
    torch.testing.assert_close(fresh.head.head.weight.grad, gradient)


@pytest.mark.parametrize("variant", ["classifier", "linear identity l2"])
def test_keys_prepared_in_inference_mode_serve_a_gradient_of_the_input(variant: str) -> None:
    """A read head without parameters keeps its prepared keys, and a heatmap wants a gradient through them."""
    # A copy has no prepared keys; those of the original were made while its bank was built.
    model = copy.deepcopy(_fill(_model(variant)))
    with torch.inference_mode():
        model(_images())
    images = _images().requires_grad_()
    model(images).sum().backward()
    fresh, again = copy.deepcopy(model), _images().requires_grad_()
    fresh(again).sum().backward()
    torch.testing.assert_close(images.grad, again.grad)


# -- copies and casts -------------------------------------------------------------------------------------------------


def test_a_copy_is_independent() -> None:
    model = _fill(_model())
    with torch.no_grad():
        before = model(_images())
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.add_(1.0)
        other.memory_bank.remove([0, 1])
        other.memory_bank.encodings.zero_()
        other(_images())
        assert torch.equal(model(_images()), before)
    assert len(model.memory_bank) == 20


@pytest.mark.parametrize("variant", ["mlp", "classifier"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_banks_digits_and_its_freshness(variant: str, dtype: torch.dtype) -> None:
    model = _fill(_model(variant))
    encodings = model.memory_bank.encodings.clone()
    with torch.no_grad():
        expected = model(_images())
        model.to(dtype)
        got = model(_images().to(dtype))
    assert torch.equal(model.memory_bank.encodings, encodings)
    assert not model.memory_is_stale()
    assert got.isfinite().all()
    torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)


def test_a_stale_bank_stays_stale_through_a_cast() -> None:
    model = _fill(_model())
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1.0)
    assert model.memory_is_stale()
    assert model.half().memory_is_stale()
    assert model.float().memory_is_stale()


def test_every_changed_weight_of_the_encoder_makes_the_bank_stale() -> None:
    model = _fill(_model())
    assert not model.memory_is_stale()
    for tensor in model.backbone.state_dict().values():
        old = tensor.clone()
        tensor.add_(1)
        assert model.memory_is_stale()
        tensor.copy_(old)
        assert not model.memory_is_stale()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(1)
    assert not model.memory_is_stale(), "the head encodes nothing"


def test_a_vote_on_features_takes_new_classes_and_keeps_its_bank() -> None:
    model = _fill(_model("vote"))
    model.reset_classifier(CLASSES + 1)
    model.head.scale = 1e4
    assert len(model.memory_bank) == 20
    model.memory_bank.append(model.encode(_images(1)).detach(), torch.tensor([CLASSES]), torch.tensor([0]), ["new"])
    with torch.no_grad():
        logits = model(_images(1))
    assert logits.shape == (1, CLASSES + 1)
    assert int(logits.argmax()) == CLASSES


@pytest.mark.parametrize("variant", ["mlp", "classifier", "vote"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_other_classes_drop_the_bank_with_a_warning(
    variant: str, num_classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = _fill(_model(variant))
    with caplog.at_level(logging.WARNING):
        model.reset_classifier(num_classes)
    assert len(model.memory_bank) == 0
    assert "drops the memory bank of 20 samples" in caplog.text


# -- loading weights --------------------------------------------------------------------------------------------------


def test_a_loose_load_of_backbone_weights_keeps_the_bank_which_is_then_stale() -> None:
    model, other = _fill(_model()), timm.create_model("memwrap_test_resnet", num_classes=CLASSES)
    torch.nn.init.normal_(next(other.backbone.parameters()))
    backbone = {name: tensor for name, tensor in other.state_dict().items() if name.startswith("backbone.")}
    model.load_state_dict(backbone, strict=False)
    assert len(model.memory_bank) == 20
    assert model.memory_is_stale()
    model.load_state_dict(other.state_dict())
    assert len(model.memory_bank) == 0


def test_a_bank_that_the_head_cannot_read_is_refused() -> None:
    model, wide = _model(), _fill(_model(backbone="test_efficientnet"))
    bank = {k: v for k, v in wide.state_dict().items() if k.startswith("memory_bank.")}
    with pytest.raises(RuntimeError, match=r"encodings have shape \[20, 256\]; this model reads \[M, 96\]"):
        model.load_state_dict({**model.state_dict(), **bank})
    more = _fill(_model(num_classes=CLASSES + 1))
    bank = {k: v for k, v in more.state_dict().items() if k.startswith("memory_bank.")}
    with pytest.raises(RuntimeError, match=r"label 4, outside num_classes=4"):
        model.load_state_dict({**model.state_dict(), **bank})


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        ({"distance": "euclid"}, "distance='euclid'"),
        ({"read_head": "mlp"}, "read_head='mlp'"),
        ({"classifier": "knn"}, "classifier='knn'"),
        ({"read_head": "classifier", "classifier": "mlp"}, "read_head='classifier'.*classifier='linear'"),
        ({"classifier": "vote"}, "memwrap_baseline_<name>"),
        ({"scale": 0}, "scale=0"),
        ({"scale": "x"}, "scale='x'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_construction(arguments: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        timm.create_model("memwrap_test_resnet", num_classes=CLASSES, **arguments)


def test_reading_where_there_is_nothing_to_read_is_refused() -> None:
    model = _model()
    with pytest.raises(ValueError, match="build_memory_bank"):
        model.read_encoding(torch.zeros(1, 96))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train().read_memory(_images())
    headless = _model(num_classes=0)
    for arguments in ({"memory": _images()}, {"return_readout": True}):
        with pytest.raises(ValueError, match=r"reset_classifier\(n\)"):
            headless(_images(), **arguments)
    assert headless(_images()).shape == (6, 96)


@pytest.mark.parametrize("memory_only", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "l2", "dot"])
def test_samples_encoded_anew_are_read_as_by_a_bank_that_holds_them(distance: str, memory_only: bool) -> None:
    name = "memwrap_baseline_test_resnet" if memory_only else "memwrap_test_resnet"
    model = timm.create_model(name, num_classes=3, distance=distance, scale=3.0).eval()
    width = model.encoding_size
    labels = torch.arange(9) % 3
    model.memory_bank.replace(torch.randn(9, width), labels, labels, range(9))
    encoding, positions, anew = torch.randn(4, width), torch.tensor([5, 2]), torch.randn(4, 2, width)
    with torch.no_grad():
        readout = model.read_encoded_anew(encoding, positions, anew)
        for row in range(4):
            other = copy.deepcopy(model)
            encodings = model.memory_bank.encodings.clone()
            encodings[positions] = anew[row]
            other.memory_bank.replace(encodings, labels, labels, range(9))
            expected = other.read_encoding(encoding[row : row + 1])
            assert torch.allclose(readout.logits[row], expected.logits[0], atol=1e-5)
            used = readout.indices[row][readout.weights[row] > 0].tolist()
            new = {9 + row * 2 + k: int(position) for k, position in enumerate(positions)}
            assert [new.get(i, i) for i in used] == expected.indices[0][expected.weights[0] > 0].tolist()
    with pytest.raises(ValueError, match=r"has shape \[4, 1, \d+\]; expected \[4, 2"):
        model.read_encoded_anew(encoding, positions, anew[:, :1])
    model.memory_bank.clear()
    with pytest.raises(ValueError, match="bank is empty"):
        model.read_encoded_anew(encoding, positions, anew)


@pytest.mark.parametrize("distance", ["cosine", "l2", "dot"])
def test_a_read_of_the_bank_has_the_gradient_of_all_scores(distance: str) -> None:
    model = timm.create_model("memwrap_test_resnet", num_classes=3, distance=distance, read_head="identity").double()
    model.eval()
    bank = timm_memwrap.MemoryBank()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    bank.replace(torch.randn(300, model.encoding_size, generator=generator), labels, labels, range(300))
    model.memory_bank = bank
    encoding = torch.randn(2, model.encoding_size, generator=generator, dtype=torch.float64) * 0.3
    assert torch.autograd.gradcheck(
        lambda x: model.read_encoding(x).logits, encoding.requires_grad_(), atol=1e-6, fast_mode=True
    )
    readout = model.read_encoding(encoding)
    with torch.no_grad():
        torch.testing.assert_close(model.read_encoding(encoding).logits, readout.logits)
