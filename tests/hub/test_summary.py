"""What a model is and remembers, told by a few kilobytes of its files, the same for folders and repositories."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_models import make_model
from hub_server import Hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import MemoryWrapModel, build_memory_bank
from timm_memwrap.cli import main
from timm_memwrap.hub import FileError, Summary, summarize
from timm_memwrap.tensor_files import read_tensors, write_tensors


def _several_classes() -> MemoryWrapModel:
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3), read_head="joint_equal")
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    build_memory_bank(model, TensorDataset(torch.randn(4, 3, 64, 64), labels), size=None, progress=False)
    return model


def _trained_head() -> MemoryWrapModel:
    model = timm.create_model("memwrap_test_vit", num_classes=3, img_size=64)
    data = TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6) % 3)
    build_memory_bank(model, data, size=None, store_images=True, progress=False)
    return model.eval()


def as_loaded(model: MemoryWrapModel) -> dict[str, Any]:
    """What a summary says, told by a model that is loaded whole."""
    bank = model.memory_bank
    names = bank.class_names
    state = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    memory = sum(count for name, count in state.items() if name.startswith("memory_bank."))
    return {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size": len(bank),
        "multi_label": bank.multi_label,
        "class_counts": [(names[i] if names else str(i), count) for i, count in bank.class_counts.items()],
        "weight_bytes": sum(state.values()) - memory,
        "memory_bytes": memory,
        "image_bytes": 0 if bank.images is None else bank.images.nbytes,
        "base": None,
    }


def told(summary: Summary) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(summary).items() if name not in ("source", "memory")}


@pytest.mark.parametrize("make", [make_model, _several_classes, _trained_head])
def test_the_header_says_what_the_loaded_model_is(
    hub: Hub, token: str, make: Callable[[], MemoryWrapModel], tmp_path: Path
) -> None:
    folder = timm_memwrap.save_pretrained(make(), tmp_path / "pets")
    timm_memwrap.push_to_hub(timm_memwrap.from_pretrained(folder), "me/pets")
    for source in (folder, "me/pets"):
        assert told(summarize(source)) == as_loaded(timm_memwrap.from_pretrained(source))
    memory = summarize(folder).memory
    assert memory["selection"] == "all"
    assert memory["population"] == summarize(folder).size


def test_no_weights_are_downloaded(
    hub: Hub, token: str, model: MemoryWrapModel, capsys: pytest.CaptureFixture[str]
) -> None:
    timm_memwrap.push_to_hub(model, "me/pets", private=True)
    size = len(hub.repos["me/pets"].files()["model.safetensors"])
    assert size > 1_500_000
    hub.requests.clear()
    assert main(["inspect", "me/pets"]) == 0
    assert "12 samples" in capsys.readouterr().out
    assert sum(request.bytes for request in hub.requests) < 150_000
    [storage] = hub.sent("GET", "/objects/")
    assert storage.bytes <= 100_001
    assert not storage.authorized


def test_a_memory_alone_is_shown_with_its_base(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    commit = timm_memwrap.push_to_hub(model, "me/whole")
    loaded = timm_memwrap.from_pretrained("me/whole")
    loaded.forget(loaded.memory_bank.ids[:2])
    timm_memwrap.push_memory_bank(loaded, "me/memory")
    hub.requests.clear()
    summary = summarize("me/memory")
    assert sum(request.bytes for request in hub.requests) < 300_000
    assert (summary.size, summary.base) == (10, f"me/whole@{commit.oid}")
    assert summary.parameters == sum(parameter.numel() for parameter in model.parameters())
    files = hub.repos["me/whole"].files()["model.safetensors"], hub.repos["me/memory"].files()["memory.safetensors"]
    total = summary.weight_bytes + summary.memory_bytes
    assert sum(map(len, files)) - 30_000 < total < sum(map(len, files))
    assert f"weights from me/whole@{commit.oid}" in summary.report()


def test_a_push_by_stock_timm_is_shown_as_far_as_it_says(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    timm.models.push_to_hf_hub(model, "me/stock", safe_serialization=True)
    summary = summarize("me/stock")
    assert (summary.size, summary.class_counts, summary.memory) == (12, [], {})
    assert "  from          not recorded" in summary.report().splitlines()


def test_a_repository_that_may_not_be_read(hub: Hub, model: MemoryWrapModel, token: str) -> None:
    timm_memwrap.push_to_hub(model, "me/secret", private=True)
    timm_memwrap.push_to_hub(model, "me/gated")
    hub.repos["me/gated"].gated = True
    for name, error in (("me/secret", RepositoryNotFoundError), ("me/gated", GatedRepoError)):
        with pytest.raises(error):
            summarize(name, token=hub.user("other"))
        assert summarize(name).size == 12


def _cut(content: bytes, header: dict[str, Any]) -> bytes:
    return content[: len(content) // 2]


def _short(content: bytes, header: dict[str, Any]) -> bytes:
    return content[:5]


def _with(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes, dict[str, Any]], bytes]:
    def changed(content: bytes, header: dict[str, Any]) -> bytes:
        header = change(header) or header
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + struct.unpack("<Q", content[:8])[0] :]

    return changed


def _set(header: dict[str, Any], key: str, value: Any) -> None:
    header["backbone.fc.bias"][key] = value


WRONG: dict[str, tuple[Any, str]] = {
    "cut": (_cut, "is not a whole safetensors file"),
    "a few bytes": (_short, "is not a whole safetensors file"),
    "a list": (_with(lambda header: [1]), "is not a whole safetensors file"),
    "a number for metadata": (_with(lambda header: {**header, "__metadata__": 5}), "is not a whole safetensors file"),
    "metadata that is not text": (
        _with(lambda header: {**header, "__metadata__": {"config": 5}}),
        "is not a whole safetensors file",
    ),
    "a size that the file does not have": (
        _with(lambda header: header["backbone.fc.weight"].update(shape=[2**40, 96])),
        "lists no tensors that could be loaded",
    ),
    "a type that nobody knows": (
        _with(lambda header: header["backbone.fc.weight"].update(dtype="X9")),
        "lists no tensors that could be loaded",
    ),
    **{
        f"{key} {value!r}": (_with(lambda header, key=key, value=value: _set(header, key, value)), "safetensors")
        for key, value in (
            ("shape", [-3]),
            ("shape", "x"),
            ("shape", [2**80, 0]),
            ("shape", [2**62, 2**62]),
            ("dtype", []),
            ("data_offsets", "ab"),
            ("data_offsets", [0.5, 12.5]),
            ("data_offsets", [0]),
            ("data_offsets", [-12, 0]),
            ("data_offsets", [0, 2**70]),
            ("data_offsets", [0, 12]),
        )
    },
    "an entry that is text": (_with(lambda header: {**header, "x": "y"}), "safetensors"),
    "weights of another shape": (
        _with(lambda header: header["backbone.fc.weight"].update(shape=[96, 3])),
        r"size mismatch for backbone\.fc\.weight",
    ),
    "room between tensors": (_with(lambda header: header.pop("backbone.fc.weight") and None), "room between them"),
    "no weights": (_with(lambda header: header.update(x=header.pop("backbone.fc.weight"))), "does not fit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_could_not_be_loaded_is_not_shown(
    hub: Hub, model: MemoryWrapModel, tmp_path: Path, case: str
) -> None:
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    change, message = WRONG[case]
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    path.write_bytes(change(content, header))
    hub.repo("me/pets", **{file.name: file.read_bytes() for file in folder.iterdir()})
    for source in (folder, "me/pets"):
        with pytest.raises(FileError, match=message):
            summarize(source)


def test_a_folder_or_repository_without_weights_says_so(hub: Hub, model: MemoryWrapModel, tmp_path: Path) -> None:
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.repo("me/pets", **{file.name: file.read_bytes() for file in folder.iterdir()})
    for source in (folder, "me/pets"):
        with pytest.raises(FileError, match=r"has no model\.safetensors, only pytorch_model\.bin: a pickle"):
            summarize(source)


@pytest.mark.parametrize(
    "block",
    [
        {"class_counts": [1], "population": "many", "dataset": 5},
        {"class_counts": {"a": 1}},
        {"class_counts": {"9" * 5000: 1}},
        {"size": 10**9},
    ],
)
def test_what_the_configuration_makes_up_is_not_believed(model: MemoryWrapModel, tmp_path: Path, block: dict) -> None:
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "memory_bank": block, "label_names": "abc"}))
    summary = summarize(tmp_path)
    assert (summary.size, summary.class_counts) == (12, [])
    assert "12 samples" in summary.report()


def test_names_in_a_summary_do_not_steer_the_terminal(model: MemoryWrapModel, tmp_path: Path) -> None:
    model.memory_bank.set_class_names(["\x1b[31mred", "b", "c"])
    timm_memwrap.save_pretrained(model, tmp_path / "pets")
    assert all(line.isprintable() for line in summarize(tmp_path / "pets").report().splitlines())


@pytest.fixture
def memory(hub: Hub, token: str, model: MemoryWrapModel) -> MemoryWrapModel:
    """A model whose weights are in `me/whole`, and whose memory alone is in `me/memory`."""
    timm_memwrap.push_to_hub(model, "me/whole")
    loaded = timm_memwrap.from_pretrained("me/whole")
    timm_memwrap.push_memory_bank(loaded, "me/memory")
    return loaded


def _without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the cache an empty one, as on another machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_base_that_cannot_be_had_is_named_beside_the_memory(
    hub: Hub, memory: MemoryWrapModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_weights(tmp_path, monkeypatch)
    message = "memory.safetensors of 'me/memory@.*' holds a memory for 'me/whole@.*', which is not to be had"
    hub.repos["me/whole"].gated = True
    with pytest.raises(GatedRepoError, match=message):
        summarize("me/memory", token=hub.user("other"))
    del hub.repos["me/whole"]
    with pytest.raises(RepositoryNotFoundError, match=message):
        summarize("me/memory")


def test_a_memory_of_another_model_than_its_base_is_not_shown(memory: MemoryWrapModel, tmp_path: Path) -> None:
    folder = memory.save_pretrained(tmp_path / "memory", memory_only=True)
    path = folder / "memory.safetensors"
    file = read_tensors(path, "memory")
    for name, shape in (("backbone.fc.weight", [3, 7]), ("backbone.other", [1])):
        write_tensors({**file.tensors, name: torch.zeros(shape)}, path, file.metadata)
        with pytest.raises(FileError, match=rf"memory\.safetensors of .* does not fit .*{name}"):
            summarize(folder)


def test_weights_that_say_they_are_a_memory_alone_are_not_shown(memory: MemoryWrapModel, tmp_path: Path) -> None:
    folder = memory.save_pretrained(tmp_path / "memory", memory_only=True)
    config = json.loads((folder / "config.json").read_text())
    del config["base"]
    (folder / "memory.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"is not described by its config\.json"):
        summarize(folder)


def test_what_is_in_the_cache_needs_no_hub(hub: Hub, memory: MemoryWrapModel, run: Callable[..., str]) -> None:
    timm_memwrap.from_pretrained("me/memory")
    code = (
        "from timm_memwrap.hub import summarize; print(*(summarize(f'me/{name}').size for name in ('whole', 'memory')))"
    )
    assert run(code, HF_HUB_OFFLINE="1").strip() == "12 12"


def test_of_a_folder_nothing_but_the_header_is_read(model: MemoryWrapModel, tmp_path: Path) -> None:
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets")
    whole = summarize(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = content[: 8 + struct.unpack("<Q", content[:8])[0]]
    path.write_bytes(header + bytes(len(content) - len(header)))
    assert summarize(folder) == whole
    with pytest.raises(FileError, match="checksum"):
        timm_memwrap.from_pretrained(folder)
