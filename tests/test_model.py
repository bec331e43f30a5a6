"""What a model reads, and from where: against loops written out sample by sample."""

import copy
import logging
import pickle
import re
from typing import Any

import pytest
import timm
import torch
from memory_models import (
    CLASSES,
    TRAINED,
    VARIANTS,
    dense,
    fill,
    naive_logits,
    new_images,
    new_model,
)

from timm_memwrap import MemoryReadout, MemoryWrapModel

BACKBONES = ("test_resnet", "test_vit", "test_efficientnet", "test_convnext")


@pytest.mark.parametrize("variant", TRAINED)
@pytest.mark.parametrize("training", [False, True])
def test_images_given_as_memory_are_the_memory_set(variant: str, training: bool) -> None:
    model = fill(new_model(variant))
    if training:
        model.train()
        model.backbone.eval()  # batch statistics would make encodings depend on the batch
    images, memory = new_images(), new_images(9, 7)
    with torch.no_grad():
        readout = model(images, memory=memory, return_readout=True)
        encodings = model.encode(memory)
        expected = torch.stack([naive_logits(model, e, encodings) for e in model.encode(images)])
        from_encodings = model(images, memory=encodings)
    torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(from_encodings, expected, atol=1e-4, rtol=1e-4)
    assert int(readout.positions.max()) < 9


@pytest.mark.parametrize("variant", TRAINED)
def test_in_training_a_sample_reads_the_rest_of_its_batch(variant: str) -> None:
    model = new_model(variant).train()
    model.backbone.eval()
    images = new_images()
    with torch.no_grad():
        readout = model(images, return_readout=True)
        logits = model(images)
        encodings = model.encode(images)
        for i, encoding in enumerate(encodings):
            others = torch.cat([encodings[:i], encodings[i + 1 :]])
            torch.testing.assert_close(readout.logits[i], naive_logits(model, encoding, others), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, readout.logits)
    weights = dense(readout, len(images))
    assert bool((weights.diagonal() == 0).all()), "a sample never reads itself"
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(images)))


def test_two_equal_images_read_each_other_and_not_themselves() -> None:
    model = new_model("linear identity l2").train()
    model.backbone.eval()
    images = new_images()
    images[3] = images[0]
    weights = dense(model(images, return_readout=True), len(images))
    assert weights[0, 0] == weights[3, 3] == 0
    assert weights[0, 3] > 0
    assert weights[3, 0] > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_evaluation_the_bank_is_read(variant: str, backbone: str) -> None:
    model = fill(new_model(variant, backbone))
    bank, images = model.memory_bank, new_images()
    with torch.no_grad():
        readout = model(images, return_readout=True)
        assert torch.equal(model.read(readout.encoding).weights, readout.weights)
        expected = torch.stack([naive_logits(model, e, bank.encodings, bank.labels) for e in model.encode(images)])
        torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(images), readout.logits)
        assert torch.equal(model.forward_head(model.forward_features(images)), readout.logits)
        assert torch.equal(model.read(readout.encoding).logits, readout.logits)
    assert bool((readout.weights >= 0).all())
    torch.testing.assert_close(readout.weights.sum(dim=1), torch.ones(len(images)))


def test_an_empty_bank_gives_way_to_what_training_saw() -> None:
    model = new_model().train()
    seen = new_images(12, 3)
    for batch in seen.split(4):
        model(batch)
    model.train().backbone.eval()
    for batch in seen.split(4):  # encodings without batch statistics, so that they can be computed again
        model(batch)
    model.eval()
    with torch.no_grad():
        readout = model(new_images(), return_readout=True)
        queued = model.queue.encodings[:24]
        torch.testing.assert_close(queued[12:], model.encode(seen))
        expected = torch.stack([naive_logits(model, e, queued) for e in model.encode(new_images())])
    torch.testing.assert_close(readout.logits, expected, atol=1e-4, rtol=1e-4)
    fill(model)
    assert not torch.allclose(model(new_images()), readout.logits), "the bank comes first"


def test_the_queue_keeps_the_last_encodings_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm_memwrap.model.QUEUE_SIZE", 10)
    model = new_model().train()
    model.backbone.eval()
    seen = new_images(28, 3)
    with torch.no_grad():
        for batch in seen.split(4):
            model(batch)
        last = model.encode(seen)[-10:]
        got = model.queue.encodings
        assert got.shape == last.shape
        for row in last:
            assert bool(torch.isclose(got, row, atol=1e-5).all(dim=1).any())
        model(new_images(25, 4))  # more at once than it can hold
        torch.testing.assert_close(
            sorted(model.queue.encodings.sum(1).tolist()),
            sorted(model.encode(new_images(25, 4))[-10:].sum(1).tolist()),
            atol=1e-3,
            rtol=1e-4,
        )
        model.eval()
        readout = model(new_images(3, 5), return_readout=True)
    assert int(readout.positions.max()) < 10
    torch.testing.assert_close(readout.weights.sum(dim=1), torch.ones(3))
    assert not any("queue" in name for name in model.state_dict())


def test_other_weights_forget_the_queue() -> None:
    model = new_model().train()
    model(new_images())
    assert len(model.queue) == 6
    model.load_state_dict(new_model("mlp").state_dict())
    model.eval()
    with torch.no_grad():
        assert model(new_images(), return_readout=True).weights.shape[1] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_classifier_keeps_the_precision(variant: str) -> None:
    model = new_model(variant).double()
    model.reset_classifier(CLASSES + 1)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
    assert fill(model)(new_images().double()).shape == (6, CLASSES + 1)


def test_a_classifier_that_was_reset_alone_is_refused_with_the_fix() -> None:
    model = new_model("probabilities")
    model.backbone.reset_classifier(CLASSES + 1)
    with pytest.raises(ValueError, match=r"has 5 classes, the model 4.*model\.reset_classifier\(n\)"):
        fill(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_classes", [CLASSES, CLASSES + 1])
def test_reset_classifier_forgets_the_queue(training: bool, num_classes: int) -> None:
    """The new head would be read with what the old one was trained beside."""
    model = new_model().train()
    model(new_images())
    model.train(training).reset_classifier(num_classes)
    assert model.training == training
    model.eval()
    with torch.no_grad():
        assert model(new_images(), return_readout=True).weights.shape[1] == 0
    model.train()(new_images())
    assert len(model.queue) == 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_any_memory_the_read_is_zero_and_one_warning_says_what_to_call(
    variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_model(variant)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        readout = model(new_images(), return_readout=True)
        model(new_images())
    assert [r.getMessage() for r in caplog.records if "build_memory_bank" in r.getMessage()] == [
        "The memory is empty, so the model reads nothing from it. Call timm_memwrap.build_memory_bank(model, data) "
        "before evaluation."
    ]
    assert readout.weights.shape == (6, 0)
    zero = torch.zeros(6, model.num_classes if "vote" in variant else model.encoding_size)
    assert torch.equal(readout.logits, model.head.classify(readout.encoding, zero))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_any_memory_a_model_of_any_precision_reads_zero(variant: str, dtype: torch.dtype) -> None:
    model = new_model(variant).to(dtype)
    with torch.no_grad():
        logits = model(new_images().to(dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_read_from_a_memory_without_samples(variant: str) -> None:
    model = fill(new_model(variant))
    encoding = model.encode(new_images()).detach()
    nothing = model.head.prepare(encoding.new_zeros(0, model.encoding_size), torch.zeros(0, dtype=torch.long))
    with torch.no_grad():
        readout = model.read(encoding, memory=nothing)
        if "vote" not in variant:
            assert torch.equal(model.read(encoding, encoding.new_zeros(0, 96)).logits, readout.logits)
    assert readout.weights.shape == (6, 0)
    zero = torch.zeros(6, CLASSES if "vote" in variant else 96)
    assert torch.equal(readout.logits, model.head.classify(encoding, zero))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_given_set_is_read_as_by_a_bank_that_holds_it(variant: str) -> None:
    model = fill(new_model(variant))
    encoding = model.encode(new_images()).detach()
    encodings, labels = model.encode(new_images(9, 7)).detach(), torch.arange(9) % CLASSES
    hidden = torch.stack([torch.randperm(9)[:2] for _ in range(6)])
    other = copy.deepcopy(model)
    other.memory_bank.replace(encodings, labels, range(9))
    with torch.no_grad():
        for argument in (None, hidden):
            readout = model.read(encoding, model.head.prepare(encodings, labels), argument)
            for got, expected in zip(readout, other.read(encoding, hidden=argument), strict=True):
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_the_memory_permutes_the_weights_and_leaves_the_logits(variant: str) -> None:
    model, order = fill(new_model(variant)), torch.randperm(20)
    with torch.no_grad():
        before = model(new_images(), return_readout=True)
        model.memory_bank.select(order.tolist())
        after = model(new_images(), return_readout=True)
    torch.testing.assert_close(dense(after, 20), dense(before, 20)[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_the_others(variant: str) -> None:
    model, images, order = fill(new_model(variant)), new_images(), torch.randperm(6)
    with torch.no_grad():
        together = model(images, return_readout=True)
        permuted = model(images[order], return_readout=True)
        torch.testing.assert_close(permuted.logits, together.logits[order], atol=1e-5, rtol=1e-5)
        for i in range(6):
            alone = model(images[i : i + 1], return_readout=True)
            torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(dense(alone, 20)[0], dense(together, 20)[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_is_deterministic(variant: str) -> None:
    model = fill(new_model(variant))
    with torch.no_grad():
        first, again = model(new_images(), return_readout=True), model(new_images(), return_readout=True)
        copied = copy.deepcopy(model)(new_images(), return_readout=True)
    for one in (again, copied):
        assert all(torch.equal(a, b) for a, b in zip(first, one, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_gives_the_float32_read(variant: str) -> None:
    model = fill(new_model(variant))
    with torch.no_grad():
        encoding = model.encode(new_images())
        expected = model.read(encoding)
        with torch.autocast("cpu", torch.bfloat16):
            got = model.read(encoding)
            whole = model(new_images())
    assert torch.equal(dense(got, 20), dense(expected, 20))
    torch.testing.assert_close(got.logits.float(), expected.logits, atol=0.02, rtol=0.02)
    assert whole.isfinite().all()


@pytest.mark.parametrize("variant", TRAINED)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_one_trains_without_nan(variant: str, autocast: bool, batch: int) -> None:
    # Batch normalisation could not train on one image that it has pooled to one pixel.
    model = new_model(variant, "test_vit").train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        readout = model(new_images(batch), return_readout=True)
    assert readout.weights.shape[1] in (0, batch)
    readout.logits.float().square().sum().backward()
    assert readout.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", TRAINED)
def test_a_loss_on_the_weights_reaches_the_encoder(variant: str) -> None:
    model = new_model(variant).train()
    model.head.scale = 1e-3  # several samples a row: one alone has weight 1, whatever its score
    readout = model(new_images(), return_readout=True)
    assert isinstance(readout, MemoryReadout)
    readout.weights.square().sum().backward()
    first = next(model.backbone.parameters())
    assert first.grad is not None
    assert first.grad.isfinite().all()
    assert bool(first.grad.any())


def test_gradient_flows_into_given_memory_images() -> None:
    model, memory = new_model().train(), new_images(5, 3).requires_grad_()
    model(new_images(), memory=memory).sum().backward()
    assert bool(memory.grad.any())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_a_tensor_of_their_own(variant: str) -> None:
    """As a part of an encoding they would keep it alive, and safetensors would refuse to write them."""
    with torch.no_grad():
        logits = fill(new_model(variant))(new_images())
    assert logits.is_contiguous()
    assert logits.untyped_storage().nbytes() == logits.numel() * logits.element_size()


def test_take_the_memory_away_and_nothing_is_left() -> None:
    """A memory-only prediction of a memory without content is the same for every input."""
    for variant in ("baseline", "logits", "pre_logits", "probabilities", "joint", "vote", "logits vote"):
        model = fill(new_model(variant))
        bank = model.memory_bank
        with torch.no_grad():
            full = model(new_images())
            if "vote" in variant:
                bank.labels.fill_(1)
            else:
                bank.encodings.zero_()
            gone = model(new_images())
        assert not torch.allclose(full[0], full[1])
        torch.testing.assert_close(gone, gone[:1].expand(6, -1), atol=1e-5, rtol=0)


def test_vote_is_the_weight_of_the_samples_of_a_class() -> None:
    model = fill(new_model("vote"))
    with torch.no_grad():
        readout = model(new_images(), return_readout=True)
    for row in range(6):
        for label in range(CLASSES):
            of_class = model.memory_bank.labels[readout.positions[row]] == label
            expected = float(readout.weights[row][of_class].sum().clamp_min(1e-6))
            assert float(readout.logits[row, label].exp()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("variant", ["vote", "logits vote"])
def test_vote_cannot_be_trained_and_says_so(variant: str) -> None:
    model = new_model(variant).train()
    for arguments in ({}, {"memory": new_images()}):
        with pytest.raises(ValueError, match="build_memory_bank"):
            model(new_images(), **arguments)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [0, 1, 5, 19])
def test_hidden_samples_are_as_if_not_there(variant: str, count: int) -> None:
    model = fill(new_model(variant))
    encoding = model.encode(new_images()).detach()
    hidden = torch.stack([torch.randperm(20)[:count] for _ in range(6)])
    with torch.no_grad():
        readout = model.read(encoding, hidden=hidden)
        weights = dense(readout, 20)
        for i in range(6):
            without = copy.deepcopy(model)
            rest = [j for j in range(20) if j not in hidden[i].tolist()]
            without.memory_bank.select(rest)
            expected = without.read(encoding[i : i + 1])
            torch.testing.assert_close(readout.logits[i : i + 1], expected.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(weights[i, rest], dense(expected, len(rest))[0], atol=1e-5, rtol=0)
        assert torch.equal(model(new_images(), hidden=hidden), readout.logits)
    assert bool((weights.gather(1, hidden) == 0).all())


def test_hiding_all_reads_zero() -> None:
    model = fill(new_model())
    encoding = model.encode(new_images(2)).detach()
    with torch.no_grad():
        readout = model.read(encoding, hidden=torch.arange(20).expand(2, -1))
        assert readout.weights.shape == (2, 0)
        assert torch.equal(readout.logits, model.head.classify(encoding, torch.zeros(2, model.encoding_size)))


def test_samples_to_hide_are_refused_where_the_memory_is_the_batch_or_empty() -> None:
    """They would be positions in a set that the caller does not know."""
    model, hidden = new_model().train(), torch.zeros(6, 1, dtype=torch.long)
    for training in (True, False):
        with pytest.raises(ValueError, match=r"hidden names samples.*build_memory_bank"):
            model.train(training)(new_images(), hidden=hidden)
        assert model(new_images(), memory=new_images(3, 7), hidden=hidden).isfinite().all()
    assert fill(model)(new_images(), hidden=hidden).isfinite().all()


@pytest.mark.parametrize("variant", ["mlp", "baseline", "logits", "vote", "probabilities", "joint"])
def test_temperature_divides_logits_and_changes_nothing_else(variant: str) -> None:
    model = fill(new_model(variant))
    model.temperature = 1.0
    with torch.no_grad():
        before = model(new_images(), return_readout=True)
        model.temperature = 2.5
        after = model(new_images(), return_readout=True)
    torch.testing.assert_close(after.logits * 2.5, before.logits)
    assert torch.equal(after.weights, before.weights)
    assert torch.equal(after.positions, before.positions)
    model.reset_classifier(CLASSES + 1)
    assert model.temperature == 2.5


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "hot", True])
def test_a_temperature_that_is_not_a_divisor_is_refused(temperature: Any) -> None:
    model = new_model("probabilities")
    with pytest.raises(ValueError, match=re.escape(f"temperature={temperature!r}")):
        model.temperature = temperature
    assert model.temperature == 1.0


@pytest.mark.parametrize("variant", ["mlp", "probabilities", "joint", "vote"])
def test_the_temperature_travels_in_the_state_dict(variant: str) -> None:
    model, other = new_model(variant), new_model(variant)
    model.temperature = 2.5
    assert float(model.state_dict()["calibration.temperature"]) == 2.5
    other.load_state_dict(model.state_dict())
    assert other.temperature == 2.5
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.half()):
        assert same.temperature == 2.5


def test_a_copy_is_independent() -> None:
    model = fill(new_model())
    with torch.no_grad():
        before = model(new_images())
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.add_(1.0)
        other.memory_bank.remove([0, 1])
        other.memory_bank.encodings.zero_()
        other(new_images())
        assert torch.equal(model(new_images()), before)
    assert len(model.memory_bank) == 20


@pytest.mark.parametrize("variant", ["mlp", "logits"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_banks_digits_and_its_freshness(variant: str, dtype: torch.dtype) -> None:
    model = fill(new_model(variant))
    encodings = model.memory_bank.encodings.clone()
    with torch.no_grad():
        expected = model(new_images())
        model.to(dtype)
        got = model(new_images().to(dtype))
    assert torch.equal(model.memory_bank.encodings, encodings)
    assert not model.memory_is_stale()
    assert got.isfinite().all()
    torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)


def test_a_stale_bank_stays_stale_through_a_cast() -> None:
    model = fill(new_model())
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1.0)
    assert model.memory_is_stale()
    assert model.half().memory_is_stale()
    assert model.float().memory_is_stale()


def test_every_changed_weight_of_the_encoder_makes_the_bank_stale() -> None:
    model = fill(new_model())
    assert not model.memory_is_stale()
    for name, tensor in model.backbone.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
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
    model = fill(new_model("vote"))
    model.reset_classifier(CLASSES + 1)
    model.head.scale = 1e4
    assert len(model.memory_bank) == 20
    model.memory_bank.append(model.encode(new_images(1)).detach(), torch.tensor([CLASSES]), ["new"])
    with torch.no_grad():
        logits = model(new_images(1))
    assert logits.shape == (1, CLASSES + 1)
    assert int(logits.argmax()) == CLASSES


@pytest.mark.parametrize("variant", ["mlp", "logits", "vote"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_other_classes_drop_the_bank_with_a_warning(
    variant: str, num_classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = fill(new_model(variant))
    with caplog.at_level(logging.WARNING):
        model.reset_classifier(num_classes)
    assert len(model.memory_bank) == 0
    assert "drops the memory bank of 20 samples" in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_loading_weights_without_a_bank_leaves_the_bank_which_is_then_stale(strict: bool) -> None:
    model, other = fill(new_model()), timm.create_model("memwrap_test_resnet", num_classes=CLASSES)
    torch.nn.init.normal_(next(other.backbone.parameters()))
    state = other.state_dict()
    if not strict:
        state = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    result = model.load_state_dict(state, strict=strict)
    assert not any(name.startswith("memory_bank.") for name in result.missing_keys)
    assert len(model.memory_bank) == 20
    assert model.memory_is_stale()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_weights_bank_and_temperature(assign: bool) -> None:
    model = fill(new_model())
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1)
    model.temperature = 3.0
    other = fill(new_model(), 7, seed=9)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    with torch.no_grad():
        assert torch.equal(other(new_images()), model(new_images()))
    assert other.memory_bank.ids == model.memory_bank.ids
    assert not other.memory_is_stale()


def _other_state() -> dict[str, Any]:
    """A state dict of other weights and another bank, which fits."""
    model = new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return fill(model, 9, seed=4).state_dict()


def _bank_of(model: MemoryWrapModel) -> dict[str, Any]:
    return {name: tensor for name, tensor in fill(model).state_dict().items() if name.startswith("memory_bank.")}


MISFITS: dict[str, tuple[Any, str]] = {
    "a missing weight": (lambda s: {k: v for k, v in s.items() if k != "head.head.weight"}, r"missing.*head\.head\.w"),
    "an unknown weight": (lambda s: {**s, "surplus": torch.zeros(1)}, "unexpected.*surplus"),
    "another shape": (lambda s: {**s, "head.head.bias": torch.zeros(3)}, r"head\.head\.bias.*\[3\].*\[96\]"),
    "not a tensor": (lambda s: {**s, "head.head.bias": None}, r"head\.head\.bias"),
    "a bank without labels": (lambda s: {k: v for k, v in s.items() if "labels" not in k}, r"labels"),
    "a bank of another width": (
        lambda s: {**s, **_bank_of(new_model(backbone="test_efficientnet"))},
        r"encodings have shape \[20, 256\]; this model reads \[M, 96\]",
    ),
    "a bank of other classes": (
        lambda s: {**s, **_bank_of(new_model(num_classes=CLASSES + 1))},
        r"label 4, outside num_classes=4",
    ),
    "a bank with NaN": (lambda s: {**s, "memory_bank.encodings": s["memory_bank.encodings"] * torch.nan}, "NaN"),
    "a bank with another meaning": (lambda s: {**s, "memory_bank.meaning": torch.zeros(3, dtype=torch.uint8)}, "JSON"),
    "an unknown part of a bank": (lambda s: {**s, "memory_bank.surplus": torch.zeros(1)}, "surplus"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_refused_load_leaves_weights_and_bank_as_they_were(misfit: str, assign: bool) -> None:
    model = fill(new_model())
    before, ids = copy.deepcopy(model.state_dict()), model.memory_bank.ids
    change, quoted = MISFITS[misfit]
    with pytest.raises(RuntimeError, match=f"(?s){quoted}"):
        model.load_state_dict(change(_other_state()), assign=assign)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.memory_bank.ids == ids
    assert not model.memory_is_stale()


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        ({"distance": "euclid"}, "distance='euclid'"),
        ({"read_head": "mlp"}, "read_head='mlp'"),
        ({"classifier": "knn"}, "classifier='knn'"),
        ({"read_head": "classifier"}, "read_head='classifier'"),
        ({"read_head": "logits"}, "read_head='logits'.*memwrap_evidence_<name>"),
        ({"classifier": "own"}, "classifier='own'.*read_head='linear'"),
        ({"classifier": "vote"}, "memwrap_baseline_<name>"),
        ({"scale": 0}, "scale=0"),
        ({"scale": "x"}, "scale='x'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_at_construction(arguments: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        timm.create_model("memwrap_test_resnet", num_classes=CLASSES, **arguments)


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        ({"read_head": "logits", "classifier": "mlp"}, "read_head='logits'.*classifier='mlp'.*'own' or 'vote'"),
        ({"read_head": "pre_logits", "classifier": "vote"}, "classifier='vote'.*read_head='identity'"),
    ],
)
def test_arguments_that_do_not_fit_an_own_classifier_are_refused(arguments: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        timm.create_model("memwrap_evidence_test_resnet", num_classes=CLASSES, **arguments)


def test_a_model_without_classes_reads_no_memory() -> None:
    headless = new_model(num_classes=0)
    for arguments in ({"memory": new_images()}, {"return_readout": True}):
        with pytest.raises(ValueError, match=r"reset_classifier\(n\)"):
            headless(new_images(), **arguments)
    with pytest.raises(ValueError, match=r"reset_classifier\(n\)"):
        headless.read(torch.zeros(1, 96))
    assert headless(new_images()).shape == (6, 96)
