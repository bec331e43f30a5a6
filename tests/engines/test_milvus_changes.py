"""What is taught reaches Milvus, and what is there is never of other weights, half, or another's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import fill, new_images, new_model
from torch.utils.data import IterableDataset, TensorDataset

from timm_memwrap import MemoryWrapModel, explaining, stream_memory
from timm_memwrap.data import class_names

SIZE = 40
TESTS = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(TESTS), *filter(None, sys.path)])


@pytest.fixture
def model(uri: str) -> MemoryWrapModel:
    """A model whose memory is in Milvus alone."""
    fill(new_model("joint"), SIZE).use_index("milvus", uri=uri)
    return new_model("joint").use_index("milvus", uri=uri)


def agree(model: MemoryWrapModel, uri: str) -> bool:
    """Returns whether the bank and what another model finds in Milvus are the same memory."""
    found = new_model("joint").use_index("milvus", uri=uri)
    bank, images = found.engine.fetch(found), new_images(4, seed=9)
    same = (bank.ids, bank.labels.tolist()) == (model.memory_bank.ids, model.memory_bank.labels.tolist())
    with torch.no_grad():
        here = model.use_index(None)(images)
        return same and torch.allclose(here, found(images), atol=1e-5)


CHANGES: dict[str, Any] = {
    "remember": lambda model: model.remember(new_images(3, seed=7), [1, 2, 3], ids=["x", "y", "z"], progress=False),
    "forget": lambda model: model.forget([0, 5]),
    "forget a class": lambda model: model.forget(classes=2),
    "relabel": lambda model: model.relabel({3: 0, 4: 1}),
    "the bank itself": lambda model: model.memory_bank.remove([7, 9]),
    "precision": lambda model: model.memory_bank.store_as(torch.float16),
    "another bank": lambda model: fill(model, SIZE + 5, seed=11),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_reach_milvus(change: Any, uri: str) -> None:
    model = fill(new_model("joint"), SIZE).use_index("milvus", uri=uri)
    change(model)
    with torch.no_grad():
        model(new_images(1))
    assert agree(model, uri)


@pytest.mark.parametrize("change", list(CHANGES)[:4])
def test_a_memory_in_milvus_alone_is_taught(change: str, model: MemoryWrapModel, uri: str) -> None:
    CHANGES[change](model)
    expected = fill(new_model("joint"), SIZE)
    CHANGES[change](expected)
    assert not len(model.memory_bank)
    assert agree(expected, uri)


def test_a_new_class_is_learned_with_the_bank_alone(model: MemoryWrapModel, uri: str) -> None:
    with pytest.raises(ValueError, match="have no names"):
        model.remember(new_images(2), "zebra")
    with_bank = new_model("joint")
    names = ["a", "b", "c", "d"]
    with_bank.memory_bank.load_state_dict(fill(new_model("joint"), SIZE).memory_bank.state_dict())
    with_bank.memory_bank.set_class_names(names)
    with_bank.use_index("milvus", uri=uri)
    model.engine._known = None
    with pytest.raises(ValueError, match="fetch"):
        model.remember(new_images(2), "zebra", progress=False)
    with_bank.remember(new_images(2, seed=4), "zebra", progress=False)
    assert explaining.explain(with_bank, new_images(2, seed=4))[0].samples[0].class_name == "zebra"


def test_wrong_ids_change_nothing(model: MemoryWrapModel) -> None:
    before = model.engine.fetch(model).ids
    with pytest.raises(ValueError, match="already"):
        model.remember(new_images(2), 0, ids=["new", 3], progress=False)
    with pytest.raises(ValueError, match="No sample with id 'gone'"):
        model.forget([1, "gone"])
    with pytest.raises(ValueError, match="No sample with id 'gone'"):
        model.relabel({1: 2, "gone": 0})
    with pytest.raises(ValueError, match="would leave the memory empty"):
        model.forget(before)
    assert model.engine.fetch(model).ids == before


def test_a_memory_of_other_weights_is_not_read(model: MemoryWrapModel, uri: str) -> None:
    with torch.no_grad():
        model.backbone.get_classifier().bias.add_(1)
    with pytest.raises(ValueError, match=r"no memory 'memwrap' of these weights. .*40 samples of TensorDataset"):
        model(new_images(1))
    with pytest.raises(ValueError, match="of these weights"):
        explaining.explain(model, new_images(1))
    with pytest.raises(ValueError, match="of these weights"):
        new_model("mlp").use_index("milvus", uri=uri)


def test_a_stale_bank_is_not_written(uri: str) -> None:
    model = fill(new_model("joint"), SIZE)
    with torch.no_grad():
        model.backbone.get_classifier().bias.add_(1)
    with pytest.raises(ValueError, match="stale"):
        model.use_index("milvus", uri=uri)
    assert model.engine is None


def test_another_memory_of_the_same_weights_is_not_overwritten(model: MemoryWrapModel, uri: str) -> None:
    other = fill(new_model("joint"), SIZE, seed=8)
    with pytest.raises(ValueError, match=r"holds another memory 'memwrap' .*40 samples"):
        other.use_index("milvus", uri=uri)
    other.use_index("milvus", uri=uri, collection="second")
    assert agree(other, uri) is False
    assert model.engine.fetch(model).ids == list(range(SIZE))


def test_a_change_of_another_process_is_seen(uri: str) -> None:
    model = fill(new_model("joint"), SIZE).use_index("milvus", uri=uri)
    other = new_model("joint").use_index("milvus", uri=uri)
    other.forget([0])
    with pytest.raises(ValueError, match="Another process"):
        model.forget([1])
    # And it is read where the memory is in Milvus alone.
    third = new_model("joint").use_index("milvus", uri=uri)
    assert 0 not in third.engine.fetch(third).ids


def test_streaming_is_building(uri: str) -> None:
    data = TensorDataset(new_images(SIZE, seed=2), torch.arange(SIZE) % 4)
    model = new_model("joint")
    memory = stream_memory(model, data, uri, progress=False, store_images=True)
    assert model.engine is memory
    assert agree(fill(new_model("joint"), SIZE), uri)
    assert explaining.explain(model, new_images(1))[0].samples[0].image is not None
    with pytest.raises(ValueError, match="clear"):
        stream_memory(fill(new_model("joint")), data, uri)


def test_processes_stream_their_shares(server: Any) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(Path(__file__).with_name("streaming_process.py")), server.uri]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env={**os.environ, "PYTHONPATH": PATHS})
    assert ran.returncode == 0, ran.stderr[-2000:]
    found, expected = new_model("joint").use_index("milvus", uri=server.uri), fill(new_model("joint"), SIZE)
    bank = found.engine.fetch(found)
    assert (bank.ids, bank.labels.tolist()) == (expected.memory_bank.ids, expected.memory_bank.labels.tolist())
    assert torch.allclose(found(new_images(3)), expected(new_images(3)), atol=1e-5)


def test_a_file_cannot_be_streamed_to_by_several(uri: str) -> None:
    data = TensorDataset(new_images(8), torch.arange(8) % 4)
    with pytest.raises(ValueError, match="torchrun"):
        stream_memory(new_model("joint"), data, uri, distributed=True)


def test_a_stream_that_stops_is_not_read(uri: str) -> None:
    class Stopping(IterableDataset):
        def __iter__(self) -> Any:
            for i in range(100):
                yield new_images(1, seed=i)[0], i % 4
            raise KeyboardInterrupt

    model = new_model("joint")
    with pytest.raises(KeyboardInterrupt):
        stream_memory(model, Stopping(), uri, progress=False)
    with pytest.raises(ValueError, match="no memory"):
        new_model("joint").use_index("milvus", uri=uri)
    # The next one takes its place, and is whole.
    stream_memory(model, TensorDataset(new_images(8), torch.arange(8) % 4), uri, progress=False)
    assert model.engine.open(model).size == 8
    assert len(model.engine.collections.milvus.collections()) == 2


def test_another_process_predicts_from_the_file(uri: str) -> None:
    from milvus_lite.server_manager import server_manager_instance

    model = fill(new_model("joint"), SIZE).use_index("milvus", uri=uri)
    with torch.no_grad():
        expected = model(new_images(2))
    server_manager_instance.release_server(uri)
    code = (
        "import sys; from memory_models import *; model = new_model('joint').use_index('milvus', uri=sys.argv[1])\n"
        "with torch.no_grad(): print(model(new_images(2)).tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=True, cwd=TESTS)
    assert torch.allclose(torch.tensor(eval(ran.stdout)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"uri": "memory"}, "ends in .db"),
        ({"uri": "ftp://host/memory.db"}, "is not a place of Milvus"),
        ({"uri": "/nowhere/at/all/memory.db"}, "does not exist"),
        ({"uri": "a.db", "collection": "my memory"}, "is not a name"),
        ({"uri": "a.db", "index": "ivf"}, "Unknown index='ivf'"),
        ({"uri": "a.db", "path": "x"}, "takes no path"),
    ],
    ids=str,
)
def test_wrong_arguments_say_what_is_expected(args: dict[str, Any], message: str) -> None:
    model = fill(new_model("joint"))
    with pytest.raises(ValueError, match=message):
        model.use_index("milvus", **args)
    with pytest.raises(ValueError, match="takes no uri"):
        model.use_index("flat", uri="a.db")
    assert model.engine is None


def test_long_class_names_are_kept(uri: str) -> None:
    """A text in Milvus has 65,535 letters at most."""
    model, names = fill(new_model("joint"), SIZE), [letter * 50_000 for letter in "abcd"]
    model.memory_bank.set_class_names(names)
    model.use_index("milvus", uri=uri)
    other = new_model("joint").use_index("milvus", uri=uri)
    assert class_names(other) == names
    model.memory_bank.set_class_names(["a", "b", "c", "d"])
    model.engine.open(model)
    assert class_names(new_model("joint").use_index("milvus", uri=uri)) == ["a", "b", "c", "d"]


def test_a_memory_of_other_classes_is_refused(uri: str) -> None:
    fill(new_model("mlp"), SIZE).use_index("milvus", uri=uri)
    other = new_model("mlp", num_classes=2)
    other.head.head.load_state_dict(new_model("mlp").head.head.state_dict())
    with pytest.raises(ValueError, match="outside num_classes=2"):
        other.use_index("milvus", uri=uri)


def test_a_damaged_sample_is_refused(model: MemoryWrapModel) -> None:
    store, collection = model.engine.collections.milvus, model.engine.open(model).collection
    rows = store.query(collection, ["name", "place", "label", "encoding", "image", "key"], where="place == 3")
    store.upsert(collection, [{**rows[0], "encoding": rows[0]["encoding"][:8]}])
    with pytest.raises(ValueError, match="Write the memory again"):
        model(new_images(1))


def test_labels_of_several_classes_are_refused(uri: str) -> None:
    model = new_model("joint")
    model.memory_bank.replace(torch.randn(3, model.encoding_size), torch.eye(4, dtype=torch.uint8)[:3], range(3))
    with pytest.raises(ValueError, match="several classes"):
        model.use_index("milvus", uri=uri)
