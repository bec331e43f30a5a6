"""Queries with another answer or another picture, against keys made by hand, and what the two tests must say."""

import random

import pytest
import timm
import torch
import torch.nn.functional as F
from entmax import sparsemax
from memory_models import closest, fill, new_images
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import timm_memwrap
from timm_memwrap.explaining import evaluate_explanations
from timm_memwrap.explaining.answers import answers, exchange, holds_answer, measure_answers, query_as_if
from timm_memwrap.model import MemoryWrapModel

CLASSES = 4
ANSWERING = ("joint", "probabilities", "logits", "joint vote")


def _model(kind: str, backbone: str = "test_resnet", **options: object) -> MemoryWrapModel:
    """Returns a model with classes far enough apart that rounding decides nothing, and an empty memory."""
    torch.manual_seed(0)
    plain = timm.create_model(backbone, num_classes=CLASSES, **options).eval()
    read_head, *vote = kind.split()
    model = timm_memwrap.wrap(plain, read_head=read_head, classifier="vote" if vote else None).eval()
    if backbone == "test_resnet":
        with torch.no_grad():
            plain.fc.weight *= 30
            plain.fc.bias -= plain(new_images(40, seed=7)).mean(dim=0)
    return model


def _clusters(model: MemoryWrapModel, noise: float, per_class: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns encodings around a corner for each class, which is its logit, and labels."""
    with torch.no_grad():
        model.backbone.fc.weight.copy_(torch.eye(CLASSES, model.encoding_size))
        model.backbone.fc.bias.zero_()
    labels = torch.arange(CLASSES * per_class) % CLASSES
    rest = noise * torch.randn(len(labels), model.encoding_size, generator=torch.Generator().manual_seed(seed))
    return rest + 9 * F.one_hot(labels, model.encoding_size), labels


def _measure(model: MemoryWrapModel, encoding: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = measure_answers(model, model.read(encoding), random.Random(seed))
    return found["follows_exchanged_answer"], found["stays_with_answer"]


@pytest.mark.parametrize("kind", ANSWERING)
@torch.no_grad()
def test_the_same_answer_is_the_same_query(kind: str) -> None:
    model = _model(kind)
    encoding = model.encode(new_images())
    logits = answers(model, encoding)
    torch.testing.assert_close(logits, model.backbone(new_images()))
    query = model.head.query(encoding)
    assert torch.equal(query_as_if(model, encoding, logits), query)
    assert torch.equal(query_as_if(model, encoding, exchange(exchange(logits))), query)
    assert not torch.equal(query_as_if(model, encoding, exchange(logits)), query)
    if "logits" not in kind:
        # The picture is as it was.
        width = model.head_hidden_size
        pictures = query_as_if(model, encoding, exchange(logits))[:, :width]
        torch.testing.assert_close(pictures, query[:, :width], rtol=1e-6, atol=0)


def test_the_best_and_the_second_are_exchanged() -> None:
    logits = torch.tensor([[1.0, 5.0, -2.0, 3.0], [0.0, 0.0, 1.0, -1.0]])
    assert exchange(logits)[0].tolist() == [1.0, 3.0, -2.0, 5.0]
    assert exchange(logits)[1].sort().values.equal(logits[1].sort().values)
    assert exchange(logits)[1].argmax() != 2


@pytest.mark.parametrize("kind", ANSWERING)
@torch.no_grad()
def test_logits_that_are_a_part_of_the_encoding_are_exchanged_too(kind: str) -> None:
    model = _model(kind, backbone="deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    assert model.encodes_logits
    for classifier in model.backbone.get_classifier():
        torch.nn.init.normal_(classifier.weight, std=10.0)
    encoding = model.encode(new_images())
    width = model.head_hidden_size
    by_hand = torch.cat([encoding[:, :width], exchange(encoding[:, width:])], dim=1)
    assert torch.equal(query_as_if(model, encoding, exchange(encoding[:, width:])), model.head.query(by_hand))
    fill(model, size=8)
    follows, stays = _measure(model, encoding)
    assert 0 < len(follows) <= len(stays) == 6


def _keys(kind: str, seen: Tensor, logits: Tensor) -> Tensor:
    """Returns what the read head makes of pre-logits and logits, by its formula."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    if kind.startswith("joint"):
        keys = torch.cat([F.normalize(seen), 0.4 * F.normalize(centred)], dim=1)
    elif kind == "probabilities":
        keys = torch.cat([2 * F.normalize(seen), F.normalize(logits.softmax(dim=1))], dim=1)
    else:
        keys = centred
    return F.normalize(keys)


@pytest.mark.parametrize("kind", ANSWERING)
@torch.no_grad()
def test_they_agree_with_a_naive_implementation(kind: str) -> None:
    model = fill(_model(kind), size=16)
    classifier, encoding = model.backbone.get_classifier(), model.encode(new_images(12))
    memory, labels = model.memory_bank.filled()
    keys = _keys(kind, memory, classifier(memory))

    def predict(seen: Tensor, logits: Tensor, without: int | None = None) -> int:
        kept = [i for i in range(len(memory)) if i != without]
        query = _keys(kind, seen[None], logits[None])[0]
        if kind.startswith("joint"):
            weights = closest(query, keys[kept])
        else:
            weights = sparsemax(model.head.scale * (keys[kept] @ query), dim=0)
        if kind.endswith("vote"):
            return int((weights[:, None] * F.one_hot(labels[kept], CLASSES)).sum(dim=0).argmax())
        return int(classifier(weights @ memory[kept]).argmax())

    rng, follows, stays = random.Random(3), [], []
    for one in encoding:
        logits = classifier(one)
        best, second = logits.argsort(descending=True)[:2].tolist()
        swapped = logits.clone()
        swapped[[best, second]] = logits[[second, best]]
        prediction = predict(one, logits)
        if prediction == best:
            follows.append(predict(one, swapped) == second)
        for position in rng.choices(range(len(memory)), k=16):
            if int(classifier(memory[position]).argmax()) != prediction:
                stays.append(predict(memory[position], logits, without=position) == prediction)
                break
    found = _measure(model, encoding, seed=3)
    assert [each.tolist() for each in found] == [follows, stays]
    assert 0 < sum(follows) + sum(stays) < len(follows) + len(stays)


@pytest.mark.parametrize("kind", ["logits", "logits vote"])
def test_a_query_of_the_answer_alone_follows_it_always(kind: str) -> None:
    model = _model(kind)
    encodings, labels = _clusters(model, noise=0.1)
    model.memory_bank.replace(encodings, labels, range(len(labels)))
    follows, stays = _measure(model, _clusters(model, noise=0.1, seed=1)[0])
    assert follows.all()
    assert stays.all()
    assert len(stays) == len(follows)


def test_a_query_of_the_picture_with_a_hint_of_the_answer_follows_the_picture() -> None:
    model = _model("joint")
    encodings, labels = _clusters(model, noise=0.1)
    model.memory_bank.replace(encodings, labels, range(len(labels)))
    model.head.head.logit_weight = 1e-3
    follows, stays = _measure(model, _clusters(model, noise=0.1, seed=1)[0])
    assert not follows.any()
    assert not stays.any()


@pytest.mark.parametrize("name", ["memwrap_test_resnet", "memwrap_baseline_test_resnet", "pre_logits"])
def test_where_the_query_holds_no_answer_there_is_nothing_to_say(name: str) -> None:
    model = _model(name) if name == "pre_logits" else timm.create_model(name, num_classes=CLASSES).eval()
    fill(model)
    assert not holds_answer(model)
    metrics = evaluate_explanations(model, TensorDataset(new_images(), torch.zeros(6).long()), progress=False)
    assert metrics.follows_exchanged_answer is None
    assert metrics.stays_with_answer is None


def test_one_class_has_no_second() -> None:
    plain = timm.create_model("test_resnet", num_classes=1)
    assert not holds_answer(timm_memwrap.wrap(plain, read_head="joint"))


@pytest.mark.parametrize("kind", ANSWERING)
def test_without_a_picture_of_another_class_none_is_taken(kind: str) -> None:
    model = _model(kind)
    encodings, labels = _clusters(model, noise=0.1)
    same = labels == 2
    model.memory_bank.replace(encodings[same], labels[same], range(int(same.sum())))
    _, stays = _measure(model, encodings)
    assert len(stays) == 0


def test_with_nothing_else_to_read_nothing_stays() -> None:
    model = _model("joint vote")
    encodings, _ = _clusters(model, noise=0.1)
    # Of class 1, remembered as class 0, which is also the first where no class has a vote.
    model.memory_bank.replace(encodings[1:2], torch.tensor([0]), [0])
    _, stays = _measure(model, encodings)
    assert len(stays) == len(encodings)
    assert not stays.any()


@pytest.mark.parametrize("kind", ANSWERING)
def test_the_model_stays_as_it_is(kind: str) -> None:
    model = fill(_model(kind))
    encoding = model.encode(new_images()).detach()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, readout = dict(model.named_modules()), model.read(encoding)
    derived = model.memory_bank.derived
    _measure(model, encoding)
    assert dict(model.named_modules()) == modules
    assert model.memory_bank.derived is derived
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model.read(encoding).logits, readout.logits)


@pytest.mark.parametrize("kind", ANSWERING)
def test_the_size_of_a_batch_changes_nothing(kind: str) -> None:
    model = fill(_model(kind))
    data = TensorDataset(new_images(11, seed=4), torch.arange(11) % CLASSES)
    found = [
        evaluate_explanations(model, DataLoader(data, batch_size=size), progress=False).to_dict() for size in (1, 4, 11)
    ]
    for name in ("follows_exchanged_answer", "stays_with_answer", "random_flip_rate"):
        assert len({metrics[name] for metrics in found}) == 1, name


def test_large_memories_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fill(_model("joint"))
    encoding = model.encode(new_images()).detach()
    expected = _measure(model, encoding)
    monkeypatch.setattr("timm_memwrap.bank_memory.LARGE", 1)
    model.memory_bank.derived = None
    found = _measure(model, encoding)
    assert model.memory_bank.derived.memory.key_index is not None
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]
