"""A memory in Milvus is read and explained as the same memory in a bank is."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import fill, new_images, new_model
from torch.utils.data import TensorDataset

from timm_memwrap import MemoryWrapModel, build_memory_bank, explaining, from_pretrained

SIZE = 150


@pytest.fixture(params=["joint", "probabilities", "linear identity l2", "mlp", "vote"])
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def near(found: Any, expected: Any) -> bool:
    """Returns whether two explanations are alike but for positions and rounding."""
    if isinstance(expected, dict):
        return all(near(found[key], value) for key, value in expected.items() if key not in ("position", "image"))
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(near, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=1e-4)
    return found == expected


def test_reads_are_those_of_the_bank(variant: str, uri: str) -> None:
    model, images = fill(new_model(variant), SIZE), new_images(5)
    with torch.no_grad():
        expected = model(images, return_readout=True)
        model.use_index("milvus", uri=uri)
        assert torch.allclose(model(images), expected.logits, atol=1e-5)
        found = model(images, return_readout=True)
        assert torch.allclose(found.weights, expected.weights, atol=1e-5)
        assert torch.allclose(found.remainder, expected.remainder, atol=1e-5)
        model.use_index(None)
        assert torch.equal(model(images), expected.logits)


def test_explanations_are_those_of_the_bank(variant: str, uri: str) -> None:
    model, images = fill(new_model(variant), SIZE), new_images(3)
    expected = [asdict(each) for each in explaining.explain(model, images)]
    explained = explaining.explain(model.use_index("milvus", uri=uri), images)
    assert near([asdict(each) for each in explained], expected)

    other = new_model(variant).use_index("milvus", uri=uri)
    assert not len(other.memory_bank)
    assert near([asdict(each) for each in explaining.explain(other, images)], expected)


@pytest.mark.parametrize("variant", ["joint", "mlp"])
def test_figures_are_those_of_the_bank(variant: str, uri: str) -> None:
    model, data = fill(new_model(variant), SIZE), TensorDataset(new_images(12, seed=5), torch.arange(12) % 4)
    expected = explaining.evaluate_explanations(model, data, progress=False).to_dict()
    model.use_index("milvus", uri=uri)
    other = new_model(variant).use_index("milvus", uri=uri)
    # What is drawn at random is drawn from what was found.
    drawn = ("random_flip_rate", "random_drop", "stays_with_answer")
    for each in (model, other):
        found = explaining.evaluate_explanations(each, data, progress=False).to_dict()
        assert near(
            {name: value for name, value in found.items() if name not in drawn},
            {name: value for name, value in expected.items() if name not in drawn},
        )


def test_a_memory_in_milvus_alone_is_calibrated_as_a_bank(uri: str) -> None:
    model, data = fill(new_model("joint"), SIZE), TensorDataset(new_images(30, seed=5), torch.arange(30) % 4)
    expected = explaining.calibrate(model, data, progress=False)
    fill(new_model("joint"), SIZE).use_index("milvus", uri=uri)
    other = new_model("joint").use_index("milvus", uri=uri)
    assert explaining.calibrate(other, data, progress=False) == pytest.approx(expected, rel=1e-3)
    explained = (explaining.explain(each, new_images(3)) for each in (model, other))
    for one, two in zip(*explained, strict=True):
        assert one.familiarity == pytest.approx(two.familiarity, abs=1e-4)
        assert one.confidence == pytest.approx(two.confidence, abs=1e-3)


def test_places_are_matched_with_the_pictures_in_milvus(uri: str) -> None:
    model, data = new_model("joint"), TensorDataset(new_images(8, seed=2), torch.arange(8) % 4)
    build_memory_bank(model, data, size=None, store_images=True, progress=False)
    expected = explaining.explain(model, new_images(2), correspondences=2)
    model.use_index("milvus", uri=uri)
    found = explaining.explain(new_model("joint").use_index("milvus", uri=uri), new_images(2), correspondences=2)
    for one, other in zip(found, expected, strict=True):
        assert [sample.correspondences for sample in one.samples] == [
            sample.correspondences for sample in other.samples
        ]
        assert torch.equal(one.samples[0].image, other.samples[0].image)


@pytest.mark.filterwarnings("ignore")
def test_other_ways_to_call_a_model_read_milvus_too(uri: str, tmp_path: Path) -> None:
    model, images = fill(new_model("joint"), SIZE).use_index("milvus", uri=uri), new_images(2)
    with torch.no_grad():
        expected = model(images)
        model.memory_bank.clear()
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
        assert torch.equal(torch.compile(model, backend="eager")(images), expected)
        assert torch.equal(model.forward_head(model.forward_features(images)), expected)
        model.save_pretrained(tmp_path / "saved", allow_empty_memory=True)
        again = from_pretrained(tmp_path / "saved").use_index("milvus", uri=uri)
        assert torch.equal(again(images), expected)
        with pytest.raises(ValueError, match="takes all samples"):
            torch.fx.symbolic_trace(model)
        with pytest.raises(ValueError, match="no memory 'memwrap' of these weights"):
            copy.deepcopy(model).half()(images.half())


def test_gradients_reach_the_input(uri: str) -> None:
    model, images = fill(new_model("mlp"), SIZE), new_images(2)
    gradients = []
    for kind, place in ((None, {}), ("milvus", {"uri": uri})):
        model.use_index(kind, **place)
        given = images.clone().requires_grad_()
        model(given).sum().backward()
        gradients.append(given.grad)
    assert torch.allclose(*gradients, atol=1e-5)


def test_a_wide_support_is_read_whole(
    uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many samples as are asked for at first are not enough: each has weight."""
    model, images = fill(new_model("dot"), SIZE), new_images(2)
    model.head.scale = 1e-3
    with torch.no_grad():
        expected = model(images, return_readout=True)
        assert expected.weights.shape[1] > 64
        model.use_index("milvus", uri=uri)
        assert torch.allclose(model(images), expected.logits, atol=1e-5)
        assert "approximate" not in caplog.text
        monkeypatch.setattr("timm_memwrap.engines.memory.MOST_HITS", 64)
        model(images)
    assert "approximate" in caplog.text


def test_hnsw_is_called_approximate(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    model, images = fill(new_model("joint"), SIZE), new_images(5)
    with torch.no_grad():
        expected = model(images).argmax(dim=1)
        model.use_index("milvus", uri=uri, index="hnsw")
        assert "approximate" in caplog.text
        assert torch.equal(model(images).argmax(dim=1), expected)


def test_samples_are_hidden_by_their_position_among_the_nearest(uri: str) -> None:
    bank, images = fill(new_model("joint"), SIZE), new_images(2)
    encoding = bank.encode(images)
    expected = bank.read(encoding)
    without = bank.read(encoding, hidden=expected.positions[:, :1]).logits
    model = bank.use_index("milvus", uri=uri)
    model.memory_bank.clear()
    with pytest.raises(ValueError, match="nearby"):
        model.read(encoding, hidden=expected.positions[:, :1])
    near = explaining.nearby(model, encoding)
    found = near.read(encoding)
    assert torch.allclose(near.read(encoding, hidden=found.positions[:, :1]).logits, without, atol=1e-5)
    assert len(near.memory_bank) < SIZE


def test_an_empty_batch_reads_nothing(uri: str) -> None:
    model = fill(new_model("joint")).use_index("milvus", uri=uri)
    assert model.read(torch.zeros(0, model.encoding_size)).logits.shape == (0, 4)


WHOLE: dict[str, Callable[[MemoryWrapModel], Any]] = {
    "report": explaining.memory_report,
    "own predictions": lambda model: model.own_predictions(),
    "save": lambda model: model.save_pretrained("unused"),
}


@pytest.mark.parametrize("call", WHOLE.values(), ids=WHOLE)
def test_what_takes_all_samples_says_how_to_get_them(call: Callable[[MemoryWrapModel], Any], uri: str) -> None:
    bank = fill(new_model("joint"), SIZE).use_index("milvus", uri=uri).memory_bank
    model = new_model("joint").use_index("milvus", uri=uri)
    with pytest.raises(ValueError, match="fetch"):
        call(model)
    model.memory_bank = model.engine.fetch(model)
    assert torch.equal(model.memory_bank.encodings, bank.encodings)
    assert model.memory_bank.ids == bank.ids
    assert model.memory_bank.provenance == bank.provenance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_held_comes_back_to_the_bit(dtype: torch.dtype, uri: str) -> None:
    model = new_model("joint")
    encodings = torch.randn(5, model.encoding_size)
    ids = [3, "3", 'a "quoted" name', "\udcff.png", "é' or true"]
    images = torch.randint(0, 256, (5, 3, 8, 9), dtype=torch.uint8)
    names = ["a", "é", "\udcff", "d"]
    model.memory_bank.replace(encodings, torch.tensor([0, 3, 2, 1, 0]), ids, images, names, dtype=dtype)
    model.use_index("milvus", uri=uri)
    bank = model.engine.fetch(model)
    for name in ("encodings", "labels", "images"):
        assert torch.equal(getattr(bank, name), getattr(model.memory_bank, name))
    assert (bank.ids, bank.class_names) == (ids, names)
