"""A repository that holds a memory alone: the base is fetched from where it lives, and must be what it was."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Hub
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import MemoryWrapModel, build_memory_bank, push_memory_bank, tensor_files
from timm_memwrap import hub as our_hub
from timm_memwrap.tensor_files import FileError, read_tensors, write_tensors

NAMES = ["cat", "dog", "cow"]


def _data(size: int = 12, classes: int = 3) -> TensorDataset:
    return TensorDataset(torch.randn(size, 3, 64, 64), torch.arange(size) % classes)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def base(hub: Hub, token: str, tmp_path: Path) -> str:
    """A trained classifier of timm on the Hub, as timm saves it."""
    torch.manual_seed(1)
    backbone = timm.create_model("test_resnet", num_classes=3)
    torch.nn.init.normal_(backbone.get_classifier().weight)
    save_for_hf(backbone, tmp_path / "base", safe_serialization=True)
    hub.repo("timm/base", **_files(tmp_path / "base"))
    return "timm/base"


def _wrapped(base: str) -> MemoryWrapModel:
    model = timm_memwrap.wrap(timm.create_model(f"hf-hub:{base}", pretrained=True)).eval()
    build_memory_bank(model, _data(), size=None, progress=False, class_names=NAMES)
    return model


def _trained(base: str) -> MemoryWrapModel:
    """A head that is trained on the frozen encoder."""
    overlay = json.loads(json.dumps({"hf_hub_id": base, "num_classes": 3}))
    model = timm.create_model("memwrap_test_resnet", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    build_memory_bank(model.eval(), _data(), size=None, progress=False, class_names=NAMES)
    return model


def _voting(base: str) -> MemoryWrapModel:
    backbone = timm.create_model(f"hf-hub:{base}", pretrained=True)
    model = timm_memwrap.wrap(backbone, num_classes=5, read_head="identity", classifier="vote", memory_only=True).eval()
    build_memory_bank(model, _data(10, 5), size=None, progress=False)
    return model


def _grown(base: str) -> MemoryWrapModel:
    model = _wrapped(base)
    model.remember(torch.randn(2, 3, 64, 64), "zebra", ids=["z1", "z2"])
    return model


def _several(base: str) -> MemoryWrapModel:
    model = timm_memwrap.wrap(timm.create_model(f"hf-hub:{base}", pretrained=True), read_head="joint_equal").eval()
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    build_memory_bank(model, TensorDataset(torch.randn(4, 3, 64, 64), labels), size=None, progress=False)
    return model


KINDS = {"wrapped": _wrapped, "trained head": _trained, "vote": _voting, "new class": _grown, "several": _several}


def _logits(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("load", ["ours", "timm"])
def test_the_memory_finds_its_base(
    hub: Hub, base: str, images: Tensor, make: Callable[[str], MemoryWrapModel], load: str
) -> None:
    model = make(base)
    push_memory_bank(model, "me/memory", base_model=base)
    sent = hub.repos["me/memory"].files()
    assert "model.safetensors" not in sent
    assert len(sent["memory.safetensors"]) < 0.6 * len(hub.repos[base].files()["model.safetensors"])
    if load == "ours":
        loaded = timm_memwrap.from_pretrained("me/memory")
    else:
        loaded = timm.create_model("hf-hub:me/memory", pretrained=True).eval()
    assert torch.equal(_logits(loaded, images), _logits(model, images))
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected if name != "memory_bank.meaning")
    assert not loaded.memory_is_stale()


def test_the_base_is_known_from_the_model(hub: Hub, base: str) -> None:
    push_memory_bank(_wrapped(base), "me/memory")
    config = json.loads(hub.repos["me/memory"].files()["config.json"])
    commit = hub.repos[base].history()[0].oid
    content = hub.repos[base].files()["model.safetensors"]
    assert config["base"] == {"hf_hub_id": base, "revision": commit, "sha256": hashlib.sha256(content).hexdigest()}
    card = ModelCard(hub.repos["me/memory"].files()["README.md"].decode())
    assert card.data.base_model == base
    assert card.data.to_dict()["base_model_relation"] == "adapter"


def test_a_whole_model_is_a_base_too(hub: Hub, base: str, images: Tensor) -> None:
    timm_memwrap.push_to_hub(_wrapped(base), "me/whole")
    model = timm_memwrap.from_pretrained("me/whole")
    build_memory_bank(model, _data(9), size=None, progress=False)
    push_memory_bank(model, "me/other-memory")
    config = json.loads(hub.repos["me/other-memory"].files()["config.json"])
    assert config["base"]["hf_hub_id"] == "me/whole"
    assert torch.equal(_logits(timm_memwrap.from_pretrained("me/other-memory"), images), _logits(model, images))


def test_a_memory_is_changed_and_pushed_again(hub: Hub, base: str, images: Tensor) -> None:
    push_memory_bank(_wrapped(base), "me/memory")
    hub.commit("me/memory", {"README.md": hub.repos["me/memory"].files()["README.md"] + b"\nMine.\n"})
    model = timm_memwrap.from_pretrained("me/memory")
    model.forget(model.memory_bank.ids[:2])
    push_memory_bank(model, "me/memory")
    again = timm_memwrap.from_pretrained("me/memory")
    assert len(again.memory_bank) == 10
    assert torch.equal(_logits(again, images), _logits(model, images))
    card = hub.repos["me/memory"].files()["README.md"].decode()
    assert "Mine." in card
    assert "10 of" in card
    assert json.loads(hub.repos["me/memory"].files()["config.json"])["base"]["hf_hub_id"] == base


def test_a_base_that_moved_on_is_loaded_as_it_was(hub: Hub, base: str, images: Tensor) -> None:
    model = _wrapped(base)
    push_memory_bank(model, "me/memory")
    hub.commit(base, {"model.safetensors": b"something else"})
    assert torch.equal(_logits(timm_memwrap.from_pretrained("me/memory"), images), _logits(model, images))


def test_what_is_in_the_cache_needs_no_hub(hub: Hub, base: str, run: Callable[..., str]) -> None:
    push_memory_bank(_wrapped(base), "me/memory")
    timm_memwrap.from_pretrained("me/memory")
    code = (
        "import timm_memwrap; print(len(timm_memwrap.from_pretrained('me/memory', local_files_only=True).memory_bank))"
    )
    assert run(code, HF_HUB_OFFLINE="1").strip() == "12"


def _gone(hub: Hub, base: str) -> None:
    del hub.repos[base]


def _gated(hub: Hub, base: str) -> None:
    hub.repos[base].gated = True


def _forced(hub: Hub, base: str) -> None:
    files = hub.repos[base].files()
    del hub.repos[base]
    hub.repo(base, **{name: content for name, content in files.items() if name != ".gitattributes"}, other=b"1")


def _refused(hub: Hub, base: str) -> None:
    hub.fail("HEAD", f"{base}/resolve/.*/model.safetensors", status=403, times=9)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_gone, RepositoryNotFoundError),
        (_gated, GatedRepoError),
        (_forced, RevisionNotFoundError),
        (_refused, LocalEntryNotFoundError),
    ],
)
def test_a_base_that_cannot_be_had_is_named_beside_the_memory(
    hub: Hub, base: str, change: Callable[[Hub, str], None], error: type[Exception], tmp_path: Path
) -> None:
    push_memory_bank(_wrapped(base), "me/memory")
    change(hub, base)
    with pytest.raises(error) as caught:
        timm_memwrap.from_pretrained("me/memory", cache_dir=tmp_path / "empty")
    assert base in str(caught.value)
    assert "me/memory" in str(caught.value)


def test_a_base_of_other_bytes_is_not_parsed(
    hub: Hub, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_memory_bank(_wrapped(base), "me/memory")
    config = json.loads(hub.repos["me/memory"].files()["config.json"])
    path = Path(hf_hub_download(base, "model.safetensors"))
    blob = path.resolve()
    os.chmod(blob, 0o644)
    blob.write_bytes(b"evil" + blob.read_bytes())
    parsed = []
    load = tensor_files.load
    monkeypatch.setattr(tensor_files, "load", lambda content: parsed.append(content[:4]) or load(content))
    with pytest.raises(FileError, match="has changed") as caught:
        timm_memwrap.from_pretrained("me/memory")
    assert config["base"]["sha256"] in str(caught.value)
    assert b"evil" not in parsed
    assert base in str(caught.value)
    assert "me/memory" in str(caught.value)


def test_a_repository_names_no_file_of_this_machine(hub: Hub, base: str, tmp_path: Path) -> None:
    push_memory_bank(_wrapped(base), "me/memory")
    folder = tmp_path / "pulled"
    our_hub.pull("me/memory", folder)
    assert len(timm_memwrap.from_pretrained(folder).memory_bank) == 12
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(hub.repos[base].files()["model.safetensors"])
    config = json.loads((folder / "config.json").read_text())
    config["base"] = {"file": str(secret), "sha256": config["base"]["sha256"]}
    tensors = read_tensors(folder / "memory.safetensors", "memory").tensors
    write_tensors(tensors, folder / "memory.safetensors", {"config": json.dumps(config)})
    (folder / "config.json").write_text(json.dumps(config))
    hub.repo("me/evil", **_files(folder))
    with pytest.raises(FileError, match="a file of this machine"):
        timm_memwrap.from_pretrained("me/evil")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_base_on_disk_serves_offline_and_is_not_pushed(
    hub: Hub, base: str, images: Tensor, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "base"
    if kind == "folder":
        model = timm_memwrap.wrap(timm.create_model(f"local-dir:{folder}", pretrained=True)).eval()
    else:
        overlay = {"file": str(folder / "model.safetensors"), "num_classes": 3}
        model = timm.create_model("memwrap_test_resnet", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    build_memory_bank(model.eval(), _data(), size=None, progress=False)
    before = len(hub.requests)
    model.save_pretrained(tmp_path / "memory", memory_only=True)
    loaded = timm_memwrap.from_pretrained(tmp_path / "memory")
    assert len(hub.requests) == before
    assert torch.equal(_logits(loaded, images), _logits(model, images))
    assert set(load_file(tmp_path / "memory" / "memory.safetensors")) < set(model.state_dict())
    with pytest.raises(ValueError, match="is on this machine only"):
        push_memory_bank(model, "me/memory", base_model=f"local-dir:{folder}")
    if kind == "folder":
        with pytest.raises(ValueError, match="No repository is known to have the model's weights"):
            push_memory_bank(loaded, "me/memory")
    assert "me/memory" not in hub.repos
    push_memory_bank(loaded, "me/memory", base_model=base)
    assert torch.equal(_logits(timm_memwrap.from_pretrained("me/memory"), images), _logits(model, images))


def test_an_encoder_that_was_trained_is_refused(hub: Hub, base: str) -> None:
    model = _wrapped(base)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.1)
    build_memory_bank(model, _data(), size=None, progress=False)
    with pytest.raises(ValueError, match=r"not encoded with the weights of .*timm/base.* 1 tensors differ"):
        push_memory_bank(model, "me/memory")
    assert "me/memory" not in hub.repos


@pytest.mark.parametrize("held", [{"config.json": b"{}"}, {"config.json": b'{"model_type": "bert"}', "a.bin": b"1"}])
def test_another_model_is_not_overwritten(hub: Hub, base: str, held: dict[str, bytes]) -> None:
    hub.repo("me/memory", **held)
    with pytest.raises(FileError, match="'me/memory' holds another model"):
        push_memory_bank(_wrapped(base), "me/memory")
    assert hub.repos["me/memory"].files()["config.json"] == held["config.json"]


def test_without_a_base_the_error_says_what_to_do(hub: Hub, token: str) -> None:
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3, pretrained_cfg=None)).eval()
    build_memory_bank(model, _data(), size=None, progress=False)
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "hf_hub_id"}
    model.base_model = None
    with pytest.raises(ValueError, match="Pass base_model='owner/name'"):
        push_memory_bank(model, "me/memory")


def test_a_push_that_is_cut_leaves_nothing(hub: Hub, base: str) -> None:
    hub.fail("POST", "me/memory/commit", status=500, times=9)
    with pytest.raises(OSError, match=r"500|busy"):
        push_memory_bank(_wrapped(base), "me/memory")
    assert "memory.safetensors" not in hub.repos["me/memory"].files()


def test_transformers_does_not_take_a_memory_for_a_model(hub: Hub, base: str) -> None:
    transformers = pytest.importorskip("transformers")
    push_memory_bank(_wrapped(base), "me/memory")
    with pytest.raises(OSError, match="me/memory does not appear to have a file named"):
        transformers.AutoModelForImageClassification.from_pretrained("me/memory")
