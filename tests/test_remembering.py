"""Samples that are remembered, relabelled and forgotten: what follows, what stays, and what is refused unchanged."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from memory_models import CLASSES, fill, new_images, new_model
from PIL import Image
from torch import Tensor

import timm_memwrap
from timm_memwrap import MemoryWrapModel, build_memory_bank, explain

NAMES = ["ant", "bee", "cow", "dog"]
GROWING = ("joint", "probabilities", "pre_logits", "logits", "vote", "logits vote")


def _named(variant: str = "joint", backbone: str = "test_resnet") -> MemoryWrapModel:
    model = fill(new_model(variant, backbone))
    model.memory_bank.set_class_names(NAMES)
    return model


def _state(model: MemoryWrapModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_unchanged(model: MemoryWrapModel, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def _remember(model: MemoryWrapModel, images: Any, labels: Any, ids: Any = None) -> None:
    timm_memwrap.remember(model, images, labels, ids, progress=False)


@pytest.mark.parametrize("variant", ["mlp", "joint", "vote", "logits vote"])
def test_remembered_images_are_those_of_a_bank_that_was_built_with_them(variant: str) -> None:
    model, images = _named(variant), new_images(5, seed=9)
    _remember(model, images, ["bee", 0, "dog", 1, 3])
    expected = new_model(variant)
    both = torch.cat([new_images(20, seed=2), images])
    labels = torch.tensor([*(i % CLASSES for i in range(20)), 1, 0, 3, 1, 3])
    build_memory_bank(expected, torch.utils.data.TensorDataset(both, labels), size=None, progress=False)
    assert torch.equal(model.memory_bank.labels, labels)
    assert model.memory_bank.ids[20:] == [f"remembered-{i}" for i in range(1, 6)]
    assert model.memory_bank.provenance.appended == 5
    assert not model.memory_is_stale()
    with torch.no_grad():
        assert torch.allclose(model(new_images()), expected(new_images()), atol=1e-5)


@pytest.mark.parametrize("variant", GROWING)
def test_a_new_name_is_a_class_in_all_that_follows(variant: str, tmp_path: Path) -> None:
    model, images = _named(variant), new_images(6, seed=9)
    _remember(model, images, "zebra")
    assert model.num_classes == CLASSES + 1
    assert model.memory_bank.class_names == [*NAMES, "zebra"]
    assert model.memory_bank.class_counts[CLASSES] == 6
    assert not model.memory_is_stale()
    with torch.no_grad():
        logits, others = model(images), model(new_images())
    assert logits.shape == (6, CLASSES + 1)
    assert logits.softmax(dim=1)[:, CLASSES].mean() > 1.1 * others.softmax(dim=1)[:, CLASSES].mean()
    assert "zebra" in {sample.class_name for sample in explain(model, images)[0].samples}
    model.save_pretrained(tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), logits)
    assert loaded.memory_bank.class_names == model.memory_bank.class_names
    assert not loaded.memory_is_stale()


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext"])
def test_what_is_known_of_other_classes_stays_to_the_bit(backbone: str) -> None:
    model = _named(backbone=backbone)
    before = _state(model)
    _remember(model, new_images(3, seed=9), "zebra")
    after = model.state_dict()
    grown = [name for name, tensor in before.items() if tensor.shape != after[name].shape]
    layer = model.classifier_name()
    assert {f"{layer}.weight", f"{layer}.bias"} == {name for name in grown if not name.startswith("memory_bank")}
    for name, tensor in before.items():
        if name != "memory_bank.meaning":
            assert torch.equal(after[name][: len(tensor)] if name in grown else after[name], tensor), name


@pytest.mark.parametrize("args", [{"model_name": "resnetv2_18"}, {"model_name": "repvit_m1", "distillation": False}])
def test_a_row_is_added_to_a_convolution_and_behind_a_norm(args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    name = f"memwrap_evidence_{args.pop('model_name')}"
    model = fill(timm.create_model(name, num_classes=CLASSES, **args).eval())
    model.memory_bank.set_class_names(NAMES)
    images = new_images(3, seed=9)
    _remember(model, images, "zebra")
    with torch.no_grad():
        assert model(images).argmax(dim=1).tolist() == [CLASSES] * 3


@pytest.mark.parametrize("variant", ["joint", "vote", "logits vote"])
def test_forgetting_undoes_remembering(variant: str) -> None:
    model, images = _named(variant), new_images(3, seed=9)
    with torch.no_grad():
        before = model(new_images())
    _remember(model, images, "zebra", ["z1", "z2", "z3"])
    _remember(model, images[:1] + 1, "yak", ["y"])
    model.forget(classes="zebra")
    assert model.num_classes == CLASSES + 1
    assert model.memory_bank.class_names == [*NAMES, "yak"]
    with torch.no_grad():
        assert int(model(images[:1] + 1).argmax()) == CLASSES
    model.forget("y")
    assert model.num_classes == CLASSES
    assert model.memory_bank.class_names == NAMES
    with torch.no_grad():
        assert torch.equal(model(new_images()), before)


@pytest.mark.parametrize("variant", ["joint", "logits vote"])
def test_classes_are_the_same_however_their_samples_came(variant: str) -> None:
    images, at_once, one_by_one = new_images(6, seed=9), _named(variant), _named(variant)
    _remember(at_once, images, ["yak", "zebra"] * 3, [*range(100, 106)])
    for i in range(6):
        _remember(one_by_one, images[i : i + 1], ["yak", "zebra"][i % 2], [100 + i])
    _remember(one_by_one, new_images(2, seed=8), "zebra", ["wrong", "copy"])
    one_by_one.relabel({"wrong": "ant"})
    one_by_one.forget(["copy", "wrong"])
    assert one_by_one.memory_bank.ids == at_once.memory_bank.ids
    with torch.no_grad():
        one, other = at_once(new_images()).softmax(dim=1), one_by_one(new_images()).softmax(dim=1)
    # The encodings differ in their last digits, which a fit enlarges.
    assert torch.allclose(one, other, atol=1e-2)


def test_a_label_is_corrected_and_the_class_follows() -> None:
    model = _named()
    _remember(model, new_images(2, seed=9), "zebra", ["z", "y"])
    model.relabel({"z": "ant", 0: 1})
    assert model.memory_bank.labels[[0, 20, 21]].tolist() == [1, 0, CLASSES]
    model.relabel({"y": "bee"})
    assert model.num_classes == CLASSES


@pytest.mark.parametrize("labels", [[["bee", 3], []], torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])])
def test_images_of_several_classes_are_remembered(labels: Any) -> None:
    model = new_model("joint")
    hot = torch.eye(CLASSES).repeat(2, 1)
    hot[:, 1] = 1
    build_memory_bank(model, torch.utils.data.TensorDataset(new_images(8), hot), class_names=NAMES, progress=False)
    _remember(model, new_images(2, seed=9), labels)
    assert model.memory_bank.labels is not None
    assert model.memory_bank.labels[8:].tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    model.forget("remembered-1")
    assert len(model.memory_bank) == 9
    for call, message in (
        (lambda: _remember(model, new_images(1), [["zebra"]]), "'zebra' is neither"),
        (lambda: _remember(model, new_images(1), torch.zeros(1, 9)), r"\[1, 9\]; expected \[1, 4\]"),
        (lambda: model.forget(classes="bee"), "multi-hot"),
        (lambda: model.forget(classes=0), "multi-hot"),
        (lambda: model.relabel({0: "bee"}), "multi-hot"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert len(model.memory_bank) == 9


def test_pictures_are_kept_if_the_bank_has_some() -> None:
    model = new_model("joint")
    data = torch.utils.data.TensorDataset(new_images(8), torch.arange(8) % CLASSES)
    build_memory_bank(model, data, size=None, store_images=True, progress=False)
    picture = Image.new("RGB", (32, 32), (255, 0, 0))
    _remember(model, [picture], 2)
    assert model.memory_bank.images is not None
    assert model.memory_bank.images[-1].float().mean(dim=(1, 2)).tolist() == pytest.approx([255, 0, 0], abs=2)


def test_files_are_named_as_a_data_set_names_them(tmp_path: Path) -> None:
    model = _named()
    (tmp_path / "bee").mkdir()
    for name in ("bee/1.png", "2.png"):
        Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / name)
    _remember(model, [tmp_path / "bee" / "1.png", str(tmp_path / "2.png")], "bee")
    assert model.memory_bank.ids[-2:] == ["bee/1.png", "2.png"]


@pytest.mark.parametrize("given", [{"dtype": torch.float16}, {"mode": True}])
def test_neither_the_precision_of_the_bank_nor_the_mode_changes_a_row(given: dict[str, Any]) -> None:
    """The classifier of this model has a norm, which would follow the batch in training mode."""
    rows = []
    for dtype, mode in ((torch.float32, False), (given.get("dtype", torch.float32), given.get("mode", False))):
        torch.manual_seed(0)
        name = "memwrap_evidence_repvit_m1"
        model = fill(timm.create_model(name, num_classes=CLASSES, distillation=False).eval())
        model.memory_bank.set_class_names(NAMES)
        model.memory_bank.store_as(dtype)
        _remember(model.train(mode), new_images(3, seed=9), "zebra")
        assert model.training is mode
        rows.append(model.get_classifier().state_dict())
    for one, other in zip(*(row.values() for row in rows), strict=True):
        assert torch.allclose(one, other, atol=2e-2 * float(one.abs().max()))


def test_only_added_classes_may_be_left() -> None:
    model = _named()
    _remember(model, (image for image in new_images(3, seed=9)), "zebra")
    model.forget(classes=NAMES)
    with torch.no_grad():
        logits = model(new_images(3, seed=9))
    assert logits.isfinite().all()
    # Nothing says how much the trained classes can bear, so half of the new samples are enough.
    assert CLASSES in logits.argmax(dim=1)


def test_a_memory_read_through_an_index_grows(tmp_path: Path) -> None:
    model = _named()
    model.use_index("flat", path=tmp_path / "memory.faiss")
    model(new_images())
    images = new_images(3, seed=9)
    _remember(model, images, "zebra")
    with torch.no_grad():
        found = model(images)
        assert torch.allclose(model.use_index(None)(images), found, atol=1e-4)


def test_what_was_derived_and_calibrated_is_dropped() -> None:
    model = _named()
    model.own_predictions()
    model.calibration.confidence.fill_(1.0)
    _remember(model, new_images(1, seed=9), "bee")
    assert model.memory_bank.derived is None
    assert model.calibration.confidence.any(), "no class came"
    _remember(model, new_images(1, seed=8), "zebra")
    assert not model.calibration.confidence.any()
    assert model.own_predictions().shape == (22,)


def test_a_model_with_a_new_class_trains_on() -> None:
    model = _named()
    _remember(model, new_images(3, seed=9), "zebra")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy(model.train()(new_images(5)), torch.arange(5))
    loss.backward()
    row = model.get_classifier().weight[CLASSES].clone()
    optimizer.step()
    assert not torch.equal(model.get_classifier().weight[CLASSES], row)
    with pytest.raises(ValueError, match="stale"):
        _remember(model.eval(), new_images(1, seed=8), "zebra")


def test_a_new_class_and_a_possible_misspelling_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "timm_memwrap")
    _remember(_named(), new_images(1, seed=9), "beee")
    assert "New class: beee (there is also bee)" in caplog.text


def test_a_class_without_samples_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = _named()
    model.forget(classes=["bee", 2])
    assert "no sample of bee, cow any more" in caplog.text
    assert model.num_classes == CLASSES
    assert model.memory_bank.class_counts.keys() == {0, 3}


REFUSED: dict[str, tuple[Callable[[MemoryWrapModel], Any], str]] = {
    "an id that is there": (lambda m: _remember(m, new_images(2), "zebra", ["a", 3]), r"has 3 already"),
    "an id that comes twice": (lambda m: _remember(m, new_images(2), "zebra", ["a", "a"]), "more than once"),
    "an id of another kind": (lambda m: _remember(m, new_images(1), "zebra", [1.5]), "neither text nor"),
    "too few ids": (lambda m: _remember(m, new_images(2), "zebra", ["a"]), "1 ids for 2"),
    "a label outside": (lambda m: _remember(m, new_images(1), 4), r"4 is neither.*0 to 3"),
    "a label below 0": (lambda m: _remember(m, new_images(1), -1), "-1 is neither"),
    "a label that is no number": (lambda m: _remember(m, new_images(1), [1.0]), "1.0 is neither"),
    "a label that is a boolean": (lambda m: _remember(m, new_images(1), [True]), "True is neither"),
    "an empty name": (lambda m: _remember(m, new_images(1), " "), "' ' is neither"),
    "too few labels": (lambda m: _remember(m, new_images(3), ["a", "b"]), "2 labels for 3 images"),
    "no images": (lambda m: _remember(m, [], "zebra"), "the list is empty"),
    "other channels": (lambda m: _remember(m, torch.zeros(1, 4, 32, 32), "zebra"), "4 channels, but the model takes 3"),
    "a picture that is not there": (lambda m: _remember(m, ["no.png"], "zebra"), r"no\.png"),
    "images that are not finite": (lambda m: _remember(m, new_images(1) / 0, "zebra"), "NaN or infinite"),
    "forgetting an unknown id": (lambda m: m.forget(["x", 0]), "No sample with id 'x'"),
    "forgetting an unknown class": (lambda m: m.forget(classes=["zebra"]), "'zebra' is neither"),
    "forgetting nothing": (lambda m: m.forget([]), "Nothing to forget"),
    "forgetting all": (lambda m: m.forget(classes=NAMES), "would leave"),
    "relabelling an unknown id": (lambda m: m.relabel({"x": 0}), "No sample with id 'x'"),
    "relabelling as an unknown class": (lambda m: m.relabel({0: "zebra"}), "'zebra' is neither"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(name: str) -> None:
    call, message = REFUSED[name]
    model = _named()
    before = _state(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert model.num_classes == CLASSES
    _assert_unchanged(model, before)


@pytest.mark.parametrize("variant", ["mlp", "baseline", "linear identity l2"])
def test_a_trained_head_cannot_be_given_a_class(variant: str) -> None:
    model = _named(variant)
    before = _state(model)
    with pytest.raises(ValueError, match=r"'zebra' is not a class.*only learns a class by training"):
        _remember(model, new_images(1), "zebra")
    _assert_unchanged(model, before)


@pytest.mark.parametrize("backbone", ["caformer_s18", "repvit_m1"])
def test_a_classifier_of_several_layers_cannot_be_given_a_class(backbone: str) -> None:
    model = fill(new_model("joint", backbone))
    model.memory_bank.set_class_names(NAMES)
    with pytest.raises(ValueError, match=r"'zebra' is not a class.*not one layer"):
        _remember(model, new_images(1), "zebra")


def test_a_name_is_no_class_of_a_model_without_names() -> None:
    model = fill(new_model("joint"))
    with pytest.raises(ValueError, match="'zebra' cannot be told from the classes"):
        _remember(model, new_images(1), "zebra")


def test_a_model_without_a_memory_is_refused() -> None:
    for call in (lambda m: _remember(m, new_images(1), 0), lambda m: m.forget(0), lambda m: m.relabel({0: 0})):
        with pytest.raises(ValueError, match="memory bank is empty"):
            call(new_model("joint"))
