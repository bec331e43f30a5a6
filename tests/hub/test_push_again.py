"""A push that is repeated: nothing new makes no commit, and what has arrived is not sent again."""

import hashlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from hub_models import make_model
from hub_server import Hub
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

import timm_memwrap
from timm_memwrap import MemoryWrapModel, build_memory_bank
from timm_memwrap.cli import main
from timm_memwrap.hub import pull, push_folder


def _grown(model: MemoryWrapModel) -> MemoryWrapModel:
    model.remember(torch.randn(2, 3, 64, 64), "zebra", ids=["z1", "z2"])
    return model


def _several(model: MemoryWrapModel) -> MemoryWrapModel:
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    build_memory_bank(model, TensorDataset(torch.randn(4, 3, 64, 64), labels), size=None, progress=False)
    return model


def _half(model: MemoryWrapModel) -> MemoryWrapModel:
    data = TensorDataset(torch.randn(12, 3, 64, 64), torch.arange(12) % 3)
    build_memory_bank(model, data, size=None, progress=False, dtype=torch.float16)
    return model


def _loaded_by_timm(repo_id: str, folder: Path) -> MemoryWrapModel:
    return timm.create_model(f"hf-hub:{repo_id}", pretrained=True).eval()


def _pulled(repo_id: str, folder: Path) -> MemoryWrapModel:
    return timm_memwrap.from_pretrained(pull(repo_id, folder / "pulled"))


def _saved_again(repo_id: str, folder: Path) -> MemoryWrapModel:
    return timm_memwrap.from_pretrained(timm_memwrap.from_pretrained(repo_id).save_pretrained(folder / "saved"))


KINDS = {"images": lambda model: model, "new class": _grown, "several": _several, "half": _half}
WAYS = {
    "loaded": lambda repo_id, _: timm_memwrap.from_pretrained(repo_id),
    "timm": _loaded_by_timm,
    "copy": lambda repo_id, _: deepcopy(timm_memwrap.from_pretrained(repo_id)),
    "pulled": _pulled,
    "saved": _saved_again,
    "train": lambda repo_id, _: timm_memwrap.from_pretrained(repo_id).train(),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_an_unchanged_model_makes_no_commit(
    hub: Hub, token: str, model: MemoryWrapModel, make: Callable[[MemoryWrapModel], MemoryWrapModel], tmp_path: Path
) -> None:
    made = make(model)
    first = timm_memwrap.push_to_hub(made, "me/pets", commit_message="First")
    assert first.commit_message == "First"
    history = hub.repos["me/pets"].history()
    again = [made, *(way(f"me/pets@{first.oid}", tmp_path) for way in WAYS.values())]
    uploads = len(hub.sent("PUT", ""))
    for pushed in again:
        for push in (timm_memwrap.push_to_hub, timm_memwrap.push_memory_bank):
            commit = push(pushed, "me/pets", commit_message="Again")
            assert (commit.oid, commit.commit_message, commit.pr_url) == (first.oid, "", None)
    assert hub.repos["me/pets"].history() == history
    assert len(hub.sent("PUT", "")) == uploads


def test_an_unchanged_memory_alone_makes_no_commit(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    loaded = timm_memwrap.from_pretrained("me/pets")
    first = timm_memwrap.push_memory_bank(loaded, "me/memory")
    assert first.commit_message
    for pushed in (loaded, timm_memwrap.from_pretrained("me/memory")):
        commit = timm_memwrap.push_memory_bank(pushed, "me/memory")
        assert (commit.oid, commit.commit_message) == (first.oid, "")
    assert len(hub.repos["me/memory"].history()) == 2


def test_a_branch_and_a_pull_request_without_a_change(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    main_commit = timm_memwrap.push_to_hub(model, "me/pets")
    commit = timm_memwrap.push_to_hub(model, "me/pets", revision="next")
    assert (commit.oid, commit.commit_message) == (main_commit.oid, "")
    request = timm_memwrap.push_to_hub(model, "me/pets", create_pr=True)
    assert (request.oid, request.commit_message, request.pr_url) == (main_commit.oid, "", None)
    assert sorted(hub.repos["me/pets"].refs) == ["refs/heads/main", "refs/heads/next"]


def test_a_change_is_a_commit(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    first = timm_memwrap.push_to_hub(model, "me/pets")
    model.forget(model.memory_bank.ids[:1])
    second = timm_memwrap.push_to_hub(model, "me/pets")
    assert second.oid != first.oid
    assert second.commit_message


def test_a_new_process_writes_the_same_bytes(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, run: Callable[..., str]
) -> None:
    first = timm_memwrap.push_to_hub(model, "me/pets")
    code = """
import timm_memwrap
print(timm_memwrap.from_pretrained("me/pets").push_to_hub("me/pets").oid)
"""
    assert {run(code, PYTHONHASHSEED=seed).strip() for seed in ("1", "2")} == {first.oid}


@pytest.mark.parametrize("alone", [False, True])
def test_the_command_says_that_nothing_is_new(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], alone: bool
) -> None:
    push_folder(timm_memwrap.save_pretrained(model, tmp_path / "whole"), "me/whole")
    folder = pull("me/whole", tmp_path / "pets")
    repo_id, options = ("me/memory", ["--memory-only", "true"]) if alone else ("me/pets", [])
    if alone:
        folder = timm_memwrap.from_pretrained("me/whole").save_pretrained(tmp_path / "memory", memory_only=True)
    assert main(["push", str(folder), repo_id, *options]) == 0
    assert f"Pushed {folder} to {repo_id}: " in capsys.readouterr().out
    history = hub.repos[repo_id].history()
    assert main(["push", str(folder), repo_id, *options]) == 0
    printed = capsys.readouterr().out
    assert (
        f"Nothing has changed since the last commit of {repo_id}: {hub.endpoint}/{repo_id}/commit/{history[0].oid}"
        in printed
    )
    assert "Pushed" not in printed
    assert hub.repos[repo_id].history() == history


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    Image.effect_noise((64, 64), 50).save(tmp_path / "figure.png")
    return tmp_path / "figure.png"


def test_what_an_interrupted_push_has_sent_is_not_sent_again(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, figure: Path
) -> None:
    options = {"include_images": True, "model_card": {"figure": figure}}
    timm_memwrap.push_to_hub(model, "me/trial", **options)
    weights = hashlib.sha256(hub.repos["me/trial"].files()["model.safetensors"]).hexdigest()
    picture = hashlib.sha256(figure.read_bytes()).hexdigest()
    hub.objects.clear()
    hub.requests.clear()
    # The client tries again what was cut, and gives up on this answer.
    hub.fail("PUT", f"/upload/{weights}", cut_after=50_000)
    refused = hub.fail("PUT", f"/upload/{weights}", times=100, status=501)
    with pytest.raises(OSError, match="501"):
        timm_memwrap.push_to_hub(model, "me/pets", **options)
    assert list(hub.objects) == [picture]
    assert len(hub.repos["me/pets"].history()) == 1
    refused.times = 0
    hub.requests.clear()
    hub.fail("POST", "/commit/", times=1, status=500)
    with pytest.raises(OSError, match="500"):
        timm_memwrap.push_to_hub(model, "me/pets", **options)
    assert [request.path.split("?")[0] for request in hub.sent("PUT", "")] == [f"/upload/{weights}"]
    hub.requests.clear()
    timm_memwrap.push_to_hub(model, "me/pets", **options)
    assert not hub.sent("PUT", "")
    assert len(hub.repos["me/pets"].history()) == 2
    assert torch.equal(timm_memwrap.from_pretrained("me/pets")(images), model(images))


def test_a_large_file_cut_between_its_parts_arrives_whole(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor
) -> None:
    hub.part_size = 200_000
    hub.fail("PUT", "/part/.*/3", cut_after=1_000)
    refused = hub.fail("PUT", "/part/.*/3", times=100, status=501)
    with pytest.raises(OSError, match="501"):
        timm_memwrap.push_to_hub(model, "me/pets")
    assert hub.parts
    assert not hub.objects
    refused.times = 0
    timm_memwrap.push_to_hub(model, "me/pets")
    assert len(hub.repos["me/pets"].history()) == 2
    assert torch.equal(timm_memwrap.from_pretrained("me/pets")(images), model(images))


def test_another_model_of_the_same_weights_sends_them_once(hub: Hub, token: str) -> None:
    timm_memwrap.push_to_hub(make_model(), "me/one")
    before = len(hub.sent("PUT", ""))
    timm_memwrap.push_to_hub(make_model(), "me/two")
    assert len(hub.sent("PUT", "")) == before
