"""Filling a bank: from any kind of data the same samples, and nothing half done."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from timm_memwrap import MemoryWrapModel, build_memory_bank, building, wrap
from timm_memwrap.building import points_to_herd
from timm_memwrap.data import Images
from timm_memwrap.selection import herd

CLASSES = 3


def _model(name: str = "memwrap_test_resnet", **kwargs: Any) -> MemoryWrapModel:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **kwargs).eval()


def _data(size: int = 24) -> TensorDataset:
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images, torch.arange(size) % CLASSES)


class _Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from _data()


def _batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = _data().tensors
    return list(zip(images.split(5), labels.split(5), strict=True))


SOURCES: dict[str, Callable[[], Any]] = {
    "dataset": _data,
    "loader": lambda: DataLoader(_data(), batch_size=5),
    "shuffled loader": lambda: DataLoader(_data(), batch_size=5, shuffle=True),
    "loader that drops the last": lambda: DataLoader(_data(), batch_size=7, shuffle=True, drop_last=True),
    "any iterable of batches": _batches,
    "stream": lambda: DataLoader(_Stream(), batch_size=5),
    "subset of all": lambda: Subset(_data(), list(range(24))),
    "sampler of all": lambda: DataLoader(_data(), sampler=SubsetRandomSampler(range(24))),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("selection", ["herding", "balanced", "random", "all"])
def test_the_bank_is_the_same_whatever_the_data_comes_in(source: str, selection: str) -> None:
    if source == "any iterable of batches":
        data: Any = iter(_batches())
    else:
        data = SOURCES[source]()
    model, other = _model(), _model()
    expected = build_memory_bank(other, _data(), size=9, selection=selection, progress=False)
    bank = build_memory_bank(model, data, size=9, selection=selection, progress=False)
    assert bank.ids == expected.ids
    assert torch.equal(bank.labels, expected.labels)
    assert torch.equal(model.own_predictions(), other.own_predictions())
    torch.testing.assert_close(bank.encodings, expected.encodings, atol=1e-5, rtol=1e-5)
    assert bank.provenance.population == 24


class _Counting(TensorDataset):
    """Lists its labels, and counts the images that are read."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels)
        self.targets, self.read = labels.tolist(), 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.read += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("selection", "read"), [("herding", 103), ("balanced", 6), ("random", 6), ("all", 123)])
def test_only_what_a_choice_looks_at_is_read(selection: str, read: int) -> None:
    data = _Counting(torch.zeros(123, 3, 8, 8), torch.tensor([0] * 120 + [1, 2, 2]))
    build_memory_bank(_model(), data, size=6, selection=selection, progress=False)
    assert data.read == read


def test_herding_compares_encodings_and_the_logits_of_a_classifier_that_is_kept() -> None:
    encodings = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    assert points_to_herd(_model(), encodings) is encodings
    model = _model("memwrap_evidence_test_resnet")
    seen, predicted = points_to_herd(model, encodings).split([96, CLASSES], dim=1)
    logits = model.backbone.get_classifier()(encodings)
    torch.testing.assert_close(seen, F.normalize(encodings))
    torch.testing.assert_close(predicted, F.normalize(logits - logits.mean(dim=1, keepdim=True)))
    chosen = herd(torch.arange(24) % CLASSES, points_to_herd(model, model.encode(_data().tensors[0])), 9)
    assert build_memory_bank(model, _data(), size=9, progress=False).ids == chosen


def test_a_candidate_that_is_not_finite_is_refused_even_if_it_would_not_be_chosen() -> None:
    model, data = _model(), _data()
    with torch.no_grad():
        next(iter(model.backbone.parameters())).mul_(torch.nan)
    with pytest.raises(ValueError, match=r"24 of 24 encodings have NaN"):
        build_memory_bank(model, data, size=3, progress=False)


def test_encodings_are_those_of_the_samples_that_the_ids_name() -> None:
    model, data = _model(), _data()
    bank = build_memory_bank(model, data, size=10, progress=False)
    with torch.no_grad():
        expected = model.encode(torch.stack([data[i][0] for i in bank.ids]))
    torch.testing.assert_close(bank.encodings, expected, atol=1e-5, rtol=1e-5)
    assert bank.labels.tolist() == [int(data[i][1]) for i in bank.ids]


@pytest.mark.parametrize("name", ["memwrap_test_resnet", "memwrap_baseline_test_resnet"])
def test_own_predictions_are_made_with_the_sample_hidden(name: str) -> None:
    model = timm.create_model(name, num_classes=CLASSES, scale=20.0).eval()
    bank = build_memory_bank(model, _data(12), size=None, progress=False)
    encodings, labels = bank.encodings.clone(), bank.labels.clone()
    for i in range(12):
        rest = [j for j in range(12) if j != i]
        with torch.no_grad():
            logits = model.head(encodings[i : i + 1], encodings[rest])
        assert int(model.own_predictions()[i]) == int(logits.argmax())
    assert torch.equal(labels, bank.labels)


def test_a_trained_classifiers_own_predictions_are_the_plain_models() -> None:
    model, data = _model("memwrap_evidence_test_resnet"), _data()
    bank = build_memory_bank(model, data, size=10, progress=False)
    with torch.no_grad():
        logits = model.backbone(torch.stack([data[i][0] for i in bank.ids]))
    torch.testing.assert_close(model.own_logits(torch.arange(10)), logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.own_predictions(), logits.argmax(dim=-1))


def test_a_samples_own_label_cannot_vote_for_it() -> None:
    model = timm.create_model(
        "memwrap_baseline_test_resnet", num_classes=CLASSES, classifier="vote", read_head="identity", scale=1e3
    )
    data = TensorDataset(_data(3).tensors[0], torch.tensor([0, 1, 2]))
    bank = build_memory_bank(model, data, size=None, progress=False)
    assert bool((model.own_predictions() != bank.labels).all())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_every_modules_mode_is_as_before(fails: bool, training: bool) -> None:
    model = _model().train(training)
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][:2]
    for module in frozen:
        module.train(not training)
    before = {name: module.training for name, module in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    data = _data()
    if fails:
        data.tensors[0][5] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            build_memory_bank(model, data, size=None, progress=False)
    else:
        build_memory_bank(model, data, size=9, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items()), "no running statistic has moved"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("where", ["data", "selection", "bank"])
def test_an_exception_midway_leaves_the_old_bank(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    old = build_memory_bank(model, _data(6), size=None, progress=False)
    before, predictions = old.state_dict(), model.own_predictions()

    def broken(*args: Any) -> Any:
        raise KeyboardInterrupt

    def stream() -> Iterator[Any]:
        yield from _batches()[:2]
        raise KeyboardInterrupt

    if where == "selection":
        monkeypatch.setattr("timm_memwrap.building.find_candidates", broken)
    if where == "bank":
        monkeypatch.setattr("timm_memwrap.bank_state.check_state", broken)
    with pytest.raises(KeyboardInterrupt):
        build_memory_bank(model, stream() if where == "data" else _data(), size=None, progress=False)
    assert model.memory_bank is old
    after = old.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name] is not None and torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model.own_predictions(), predictions)


class _Named(TensorDataset):
    """Images with class names, as torchvision's folders have."""

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str]) -> None:
        super().__init__(images, labels)
        self.classes = classes


def test_the_models_names_win_and_labels_follow(caplog: pytest.LogCaptureFixture) -> None:
    """A classifier that is right of all its images, and data that numbers the classes otherwise."""
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=3).eval()
    with torch.no_grad():
        plain.fc.weight *= 30
        plain.fc.bias -= plain(images).mean(dim=0)
        own = plain(images).argmax(dim=1)
    assert len(own.unique()) == 3
    data = _Named(images, (own + 2) % 3, ["ten", "two", "one"])
    build_memory_bank(wrap(plain), data, size=None, progress=False)
    assert "classifier puts 0 % of the memory samples into the class of their label" in caplog.text
    caplog.clear()
    model = wrap(plain)
    model.pretrained_cfg["label_names"] = ["one", "ten", "two"]
    for class_names in (None, data.classes):
        bank = build_memory_bank(model, data, size=None, progress=False, class_names=class_names)
        assert torch.equal(bank.labels, own)
        assert bank.class_names == ["one", "ten", "two"]
    assert not caplog.records
    with pytest.raises(ValueError, match=r"does not know: 'three'.*'one', 'ten', 'two'"):
        build_memory_bank(model, _Named(images, own, ["one", "two", "three"]), progress=False)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_random_augmentation_is_told(augmented: bool, caplog: pytest.LogCaptureFixture) -> None:
    data = [(Image.new("RGB", (40, 40)), 0), (Image.new("RGB", (40, 40), "red"), 1)]
    images = Images(data, "pictures").with_transform(create_transform(32, is_training=augmented))
    build_memory_bank(_model(), images, size=None, progress=False)
    assert ("augmented at random" in caplog.text) == augmented


def test_one_class_is_refused() -> None:
    model = wrap(timm.create_model("test_resnet", num_classes=1))
    with pytest.raises(ValueError, match=r"num_classes=1: .*num_classes=2"):
        build_memory_bank(model, TensorDataset(torch.zeros(2, 3, 32, 32), torch.zeros(2).long()), progress=False)


@pytest.mark.parametrize("labels", [torch.full((2,), 0.9), torch.tensor([[0, 0.5], [1, 1]])], ids=["float", "soft"])
def test_labels_that_are_no_classes_are_refused(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected .* one class index per image"):
        build_memory_bank(_model(), TensorDataset(torch.zeros(2, 3, 32, 32), labels), progress=False)


@pytest.mark.parametrize(
    ("data", "arguments", "quoted"),
    [
        (TensorDataset(torch.zeros(0, 3, 32, 32), torch.zeros(0).long()), {"size": None}, "empty"),
        ([], {"size": None}, "empty"),
        (_data(), {"size": 0}, "size=0"),
        (_data(), {"size": 2.5}, r"size=2\.5"),
        (_data(), {"size": True}, "size=True"),
        (_data(), {"selection": "best"}, r"'best'.*'balanced'"),
        (TensorDataset(torch.zeros(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])), {"size": 2}, "3.*num_classes=4"),
        (TensorDataset(torch.zeros(2, 3, 32, 32), torch.tensor([0, -1])), {"size": 2}, "-1"),
        (TensorDataset(torch.zeros(2, 3, 32, 32), torch.full((2, 3), 0.3)), {"size": 2}, "Mixup"),
        (TensorDataset(torch.zeros(2, 3, 32, 32), torch.zeros(2, 9)), {"size": 2}, "9.*num_classes=9"),
        (TensorDataset(torch.zeros(2, 3, 32, 32)), {"size": 2}, r"\(image, label\)"),
        ([torch.zeros(2, 3, 32, 32)], {"size": 2}, r"\(image"),
        (7, {}, "int is neither"),
    ],
)
def test_data_that_cannot_be_remembered_is_refused(data: Any, arguments: dict[str, Any], quoted: str) -> None:
    model = _model()
    with pytest.raises(ValueError, match=quoted):
        build_memory_bank(model, data, progress=False, **arguments)
    assert len(model.memory_bank) == 0


def test_models_without_a_memory_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wrap\(model\)"):
        build_memory_bank(timm.create_model("test_resnet"), _data())
    headless = timm.create_model("memwrap_test_resnet", num_classes=0)
    with pytest.raises(ValueError, match=r"reset_classifier\(n\)"):
        build_memory_bank(headless, _data())


def test_a_backbone_whose_logits_are_not_its_classifiers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory sums pre-logits and classifies the sum: with another head the logits would be silently others."""
    model = _model("memwrap_evidence_test_resnet")
    forward_head = model.backbone.forward_head

    def doubled(x: Tensor, pre_logits: bool = False) -> Tensor:
        return forward_head(x, pre_logits=pre_logits) * (1 if pre_logits else 2)

    monkeypatch.setattr(model.backbone, "forward_head", doubled)
    with pytest.raises(ValueError, match=r"logits of ResNet.*get_classifier\(\) agree"):
        build_memory_bank(model, _data(), progress=False, size=9)
    assert len(model.memory_bank) == 0


def test_the_encodings_of_a_backbone_with_two_heads_carry_its_logits() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=32, depth=2).eval()
    model = wrap(backbone)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % CLASSES
    build_memory_bank(model, TensorDataset(images, labels), size=None, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model.own_logits(torch.arange(6)), backbone(images), atol=1e-5, rtol=1e-5)


def test_images_are_stored_on_request_only_and_small_ones_as_they_are() -> None:
    assert build_memory_bank(_model(), _data(), size=3, progress=False).images is None
    bank = build_memory_bank(_model(), _data(), size=3, store_images=True, progress=False)
    assert bank.images.shape == (3, 3, 32, 32)


def test_grey_images_are_stored_with_one_channel() -> None:
    model = _model(in_chans=1)
    data = TensorDataset(torch.zeros(4, 1, 32, 32), torch.arange(4) % CLASSES)
    bank = build_memory_bank(model, data, size=None, store_images=True, progress=False)
    assert bank.images.shape == (4, 1, 32, 32)


def test_progress_is_shown_or_nothing_at_all(capfd: pytest.CaptureFixture[str]) -> None:
    build_memory_bank(_model(), _data(), size=9, progress=False)
    assert capfd.readouterr() == ("", "")
    build_memory_bank(_model(), _data(), size=9)
    assert "Memory bank" in capfd.readouterr().err


def test_provenance_says_where_the_samples_come_from() -> None:
    model = _model()
    bank = build_memory_bank(
        model,
        _data(),
        size=9,
        selection="random",
        seed=5,
        progress=False,
        class_names=["a", "b", "c"],
        dataset_name="x",
    )
    provenance = bank.provenance
    assert (provenance.dataset, provenance.selection, provenance.seed, provenance.population) == ("x", "random", 5, 24)
    assert provenance.encoder == model.encoder_fingerprint()
    assert bank.class_names == ["a", "b", "c"]
    assert bank is model.memory_bank


def test_a_bank_of_one_sample_is_built_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(build_memory_bank(_model(), _data(), size=1, progress=False)) == 1
    assert "one sample" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("selection", ["herding", "balanced", "random"])
def test_samples_of_several_classes_are_remembered_with_all_of_them(selection: str, stream: bool) -> None:
    labels = (torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    data = TensorDataset(torch.randn(20, 3, 32, 32), labels)
    model = _model()
    given = iter(DataLoader(data, 6)) if stream else data
    bank = build_memory_bank(model, given, size=8, selection=selection, progress=False)
    assert model.multi_label
    assert len(bank) == 8
    assert torch.equal(bank.labels, labels[bank.ids].to(torch.uint8))
    assert bank.provenance.selection == selection


@pytest.mark.parametrize(
    ("factor", "size", "expected"),
    [
        (1.0, 9, torch.float16),
        (1.0, 8, torch.float32),
        (1e6, 9, torch.float32),
        (1e-7, 9, torch.float32),
        (float("nan"), 9, torch.float32),
    ],
    ids=["many", "few", "too large for float16", "too small for float16", "broken"],
)
def test_many_encodings_are_stored_in_half_precision_if_it_holds_them(
    factor: float, size: int, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "LARGE", 8)
    monkeypatch.setattr(building, "_ROWS", 4)
    encodings = torch.randn(size, 5, generator=torch.Generator().manual_seed(0))
    encodings[-1] *= factor
    assert building._dtype_for(encodings) == expected


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_what_encodings_are_stored_in_is_what_was_asked_for(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "LARGE", 8)
    model = timm.create_model("memwrap_test_resnet", num_classes=2).eval()
    data = TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) % 2)
    bank = build_memory_bank(model, data, size=None, dtype=dtype, progress=False)
    assert bank.encodings.dtype == (dtype or torch.float16)
    model(torch.randn(2, 3, 32, 32))
