"""What is pushed comes back: weights and memory as one, and no more of the memory than was asked for."""

import dataclasses
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_models import make_model
from hub_server import Hub
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import timm_memwrap
from timm_memwrap import MemoryWrapModel, sample_ids
from timm_memwrap.cli import main
from timm_memwrap.data import SampleImages
from timm_memwrap.hub import pull, push_folder, pushing, summarize

FILES = {".gitattributes", "README.md", "config.json", "model.safetensors"}


def test_a_push_is_one_commit_and_comes_back_bit_by_bit(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path
) -> None:
    commit = timm_memwrap.push_to_hub(model, "me/pets", private=True, commit_message="First")
    repo = hub.repos["me/pets"]
    assert repo.private
    assert [c.title for c in repo.history()] == ["First", "initial commit"]
    assert commit.oid == repo.history()[0].oid
    assert set(repo.files()) == FILES
    assert len(hub.sent("POST", "/commit/")) == 1

    logits = model(images)
    (tmp_path / "w.safetensors").write_bytes(repo.files()["model.safetensors"])
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        # What must agree lies in one file.
        assert file.metadata()["config"].encode() == repo.files()["config.json"]
    for name in ("me/pets", "me/pets@main", f"me/pets@{commit.oid}", "hf-hub:me/pets", "hf_hub:me/pets@main"):
        loaded = timm_memwrap.from_pretrained(name)
        assert not loaded.training
        assert torch.equal(loaded(images), logits), name
        assert not loaded.memory_is_stale()
        assert loaded.memory_bank.class_names == model.memory_bank.class_names


def test_a_folder_comes_back_by_all_its_names(model: MemoryWrapModel, images: Tensor, tmp_path: Path) -> None:
    timm_memwrap.save_pretrained(model, tmp_path / "pets")
    for name in (tmp_path / "pets", str(tmp_path / "pets"), f"local-dir:{tmp_path / 'pets'}"):
        loaded = timm_memwrap.from_pretrained(name)
        assert torch.equal(loaded(images), model(images))
        # What is saved on disk is whole; only a push leaves something out.
        assert loaded.memory_bank.images is not None
        assert loaded.memory_bank.ids == model.memory_bank.ids


def test_stock_timm_in_a_new_process_and_from_the_cache_alone(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path, run: Callable[..., str]
) -> None:
    timm_memwrap.push_to_hub(model, "me/pets", revision="next")
    torch.save((images, model(images)), tmp_path / "expected.pt")
    code = f"""
import timm, timm_memwrap, torch
images, logits = torch.load({str(tmp_path / "expected.pt")!r})
name, cache = "hf-hub:me/pets@next", {str(tmp_path / "cache")!r}
model = timm.create_model(name, pretrained=True, cache_dir=cache).eval()
assert torch.equal(model(images), logits)
assert len(model.memory_bank) == 12 and not model.memory_is_stale()
assert timm_memwrap.from_pretrained("me/pets@next", cache_dir=cache).memory_bank.ids == model.memory_bank.ids
other = timm.create_model(name, pretrained=True, num_classes=7, cache_dir=cache).eval()
assert other(images).shape == (4, 7) and len(other.memory_bank) == 0
pairs = zip(other.backbone.parameters(), model.backbone.parameters())
assert all(torch.equal(a, b) for a, b in pairs if a.shape == b.shape)
features = timm.create_model(name, pretrained=True, features_only=True, cache_dir=cache).eval()
plain = model.backbone.forward_intermediates(images, intermediates_only=True)
assert torch.equal(features(images)[-1], plain[-1]), "features"
headless = timm.create_model(name, pretrained=True, num_classes=0, cache_dir=cache).eval()
assert torch.equal(headless(images), model.forward_head(model.forward_features(images), pre_logits=True))
print("same")
"""
    assert run(code).strip() == "same"
    before = len(hub.requests)
    assert run(code, HF_HUB_OFFLINE="1").strip() == "same"
    assert len(hub.requests) == before


def test_branches_and_pull_requests(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    first = hub.repos["me/pets"].files()
    other = make_model(seed=1)
    timm_memwrap.push_to_hub(other, "me/pets", revision="next")
    pull_request = timm_memwrap.push_to_hub(make_model(seed=2), "me/pets", create_pr=True, token=hub.user("you"))
    assert pull_request.pr_url.endswith("/me/pets/discussions/1")
    assert hub.repos["me/pets"].files() == first
    for revision, expected in (("next", other), ("refs/pr/1", make_model(seed=2))):
        loaded = timm_memwrap.from_pretrained(f"me/pets@{revision}")
        assert torch.equal(loaded.memory_bank.encodings, expected.memory_bank.encodings)


def test_images_and_folders_stay_here_unless_asked_for(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    bank = deepcopy(model.memory_bank)
    timm_memwrap.push_to_hub(model, "me/pets")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "public" in r.message]
    loaded = timm_memwrap.from_pretrained("me/pets")
    assert loaded.memory_bank.images is None
    # A folder stays where it is the class of the sample. The same names in two folders stay apart.
    assert loaded.memory_bank.ids[:4] == ["0000.png", "0000.png (2)", "0001.png", "cat/0001.png"]
    assert len(set(loaded.memory_bank.ids)) == 12
    files = hub.repos["me/pets"].files()
    assert b"/home/me" not in b"".join(files.values())
    # The model in hand keeps both.
    assert model.memory_bank.ids == bank.ids
    assert torch.equal(model.memory_bank.images, bank.images)

    timm_memwrap.push_to_hub(model, "me/pets", include_images=True)
    assert "me/pets is public: the images of 12 samples" in caplog.text
    assert torch.equal(timm_memwrap.from_pretrained("me/pets").memory_bank.images, bank.images)
    caplog.clear()
    timm_memwrap.push_to_hub(model, "me/secret", include_images=True, private=True)
    assert "public" not in caplog.text


def test_names_of_any_system_are_reduced_and_stay_apart(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    bank = model.memory_bank
    ids = [3, "plain", "a.png", r"C:\me\a.png", "https://host/x/a.png?token=secret", "./a.png", "/", "a.png (2)"]
    bank.select(range(len(ids)))
    bank.replace(bank.encodings, bank.labels, ids, None, bank.class_names, bank.provenance)
    timm_memwrap.push_to_hub(model, "me/pets")
    names = timm_memwrap.from_pretrained("me/pets").memory_bank.ids
    assert names == [3, "plain", "a.png", "a.png (3)", "a.png (4)", "a.png (5)", "unnamed", "a.png (2)"]


def test_the_folder_of_an_id_stays_where_it_is_the_class(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    bank = model.memory_bank
    ids = ["/data/pets/cat/1.png", r"C:\\pets\\dog\\1.png", "cat/2.png", "/data/val/cat/1.png", "cat/1.png (2)", "dog"]
    bank.select([0, 1, 3, 6, 9, 2])
    bank.replace(bank.encodings, bank.labels, ids, None, bank.class_names, bank.provenance)
    timm_memwrap.push_to_hub(model, "me/pets")
    names = timm_memwrap.from_pretrained("me/pets").memory_bank.ids
    assert names == ["cat/1.png", "dog/1.png", "cat/2.png", "cat/1.png (3)", "cat/1.png (2)", "dog"]


def test_pictures_of_a_pushed_memory_are_found_again(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    """By class and name; where that is not in the id, by its position, which is the same in the own bank."""

    class Pictures(list[tuple[Tensor, int]]):
        def __init__(self, paths: list[str]) -> None:
            super().__init__((torch.full((3, 4, 4), number, dtype=torch.uint8), 0) for number in range(len(paths)))
            self.filename = paths.__getitem__

    bank = model.memory_bank
    names = ["cat", "dog", "eel"]
    paths = [f"/data/{names[label]}/{i // 3:04}.png" for i, label in enumerate(bank.labels)]
    bank.replace(bank.encodings, bank.labels, paths, None, names, bank.provenance)
    timm_memwrap.push_to_hub(model, "me/pets")
    ids = timm_memwrap.from_pretrained("me/pets").memory_bank.ids
    stored = SampleImages(model, Pictures(paths[::-1]))
    assert [int(stored.picture(i).max()) for i in ids] == list(range(11, -1, -1))

    bank.set_class_names([])
    timm_memwrap.push_to_hub(model, "me/pets")
    renamed = timm_memwrap.from_pretrained("me/pets").memory_bank.ids
    assert renamed[:4] == ["0000.png", "0000.png (2)", "0000.png (3)", "0001.png"]
    before = dict(zip(renamed, bank.ids, strict=True))
    assert [int(stored.picture(before[i]).max()) for i in renamed] == list(range(11, -1, -1))


def test_no_pushed_file_holds_a_path_of_this_machine(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path
) -> None:
    bank = model.memory_bank
    provenance = dataclasses.replace(bank.provenance, dataset="/home/me/secret/pets")
    bank.replace(bank.encodings, bank.labels, bank.ids, bank.images, bank.class_names, provenance)
    folder = model.save_pretrained(tmp_path / "pets", model_card={"accuracy": 0.5})
    push_folder(folder, "me/folder", include_images=True)
    model.push_to_hub("me/model", model_card={"accuracy": 0.5})
    for repo_id in ("me/folder", "me/model"):
        for content in hub.repos[repo_id].files().values():
            assert b"/home" not in content
            assert b"secret" not in content
            assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("names", [lambda i: "0001.png", lambda i: f"{i % 7}.png"], ids=["one", "seven"])
def test_the_work_of_keeping_names_apart_grows_with_their_number(names: Callable[[int], str]) -> None:
    def lines(count: int) -> int:
        """Counts the lines that run: no clock of a busy machine says as much."""
        found = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal found
            found += event == "line" and frame.f_code.co_filename == sample_ids.__file__
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            made = sample_ids.public_ids([f"/data/{i}/{names(i)}" for i in range(count)], [""] * count)
        finally:
            sys.settrace(before)
        assert len(set(made)) == count
        return found

    assert lines(800) < 2.2 * lines(400)


def test_private_is_not_silently_public(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    hub.repo("me/open")
    with pytest.raises(ValueError, match="'me/open' exists and is public"):
        timm_memwrap.push_to_hub(model, "me/open", private=True)
    assert len(hub.repos["me/open"].history()) == 1


def test_a_readme_on_the_hub_is_kept(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    own = b"---\nlicense: mit\n---\r\n# Mine\r\n"
    hub.repo("me/pets", **{"README.md": own})
    timm_memwrap.push_to_hub(model, "me/pets", model_card={"description": "Theirs"})
    assert hub.repos["me/pets"].files()["README.md"] == own

    # Of a card of ours, the part about the memory alone follows the memory.
    timm_memwrap.push_to_hub(model, "me/other", model_card={"description": "Ours"})
    card = hub.repos["me/other"].files()["README.md"].replace(b"Ours", b"Edited")
    hub.commit("me/other", {"README.md": card})
    model.memory_bank.select(range(6))
    timm_memwrap.push_to_hub(model, "me/other")
    before, _, after = card.partition(b"| Samples | 12 of 3 classes |")
    own, _, rest = hub.repos["me/other"].files()["README.md"].partition(b"| Samples | 6 of 3 classes |")
    memory, mark, rest = rest.partition(end := b"\n<!-- timm_memwrap: end of memory -->")
    assert (own, rest) == (before, after.partition(end)[2])
    assert mark
    assert memory.count(b"| 2 |") == 3


def test_a_readme_that_is_not_utf_8(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = b"# Caf\xe9\n"
    hub.repo("me/pets", **{"README.md": own})
    timm_memwrap.push_to_hub(model, "me/pets")
    assert "The README.md on the Hub is not UTF-8" in caplog.text
    model.memory_bank.select([0, 1])
    timm_memwrap.push_memory_bank(model, "me/pets")
    assert hub.repos["me/pets"].files()["README.md"] == own
    folder = pull("me/pets", tmp_path / "pulled")
    assert (folder / "README.md").read_bytes() == own
    with pytest.raises(ValueError, match=r"README\.md' is not UTF-8 .*\. Save it as UTF-8, or delete it"):
        push_folder(folder, "me/other")
    assert list(hub.repos) == ["me/pets"]


def test_a_readme_that_is_edited_during_a_push_is_not_lost(
    hub: Hub, token: str, model: MemoryWrapModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    update = pushing._update_card

    def and_meanwhile(*args: Any) -> Any:
        hub.commit("me/pets", {"README.md": b"Edited"})
        return update(*args)

    monkeypatch.setattr(pushing, "_update_card", and_meanwhile)
    model.memory_bank.select([0, 1])
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        timm_memwrap.push_to_hub(model, "me/pets")
    assert hub.repos["me/pets"].files()["README.md"] == b"Edited"


def test_a_name_without_an_owner_is_completed_everywhere(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = timm_memwrap.save_pretrained(model, tmp_path / "local")
    loading = 'timm.create_model("hf-hub:me/{}", pretrained=True)'
    for name, push in {
        "pets": lambda name: timm_memwrap.push_to_hub(model, name),
        "folder": lambda name: push_folder(folder, name),
        "command": lambda name: main(["push", str(folder), name]),
    }.items():
        push(name)
        assert loading.format(name) in hub.repos[f"me/{name}"].files()["README.md"].decode()
    printed = capsys.readouterr().out
    assert f"Pushed {folder} to me/command: " in printed
    assert loading.format("command") in printed
    model.memory_bank.select([0, 1])
    timm_memwrap.push_memory_bank(model, "pets")
    assert len(timm_memwrap.from_pretrained("me/pets").memory_bank) == 2


@pytest.mark.parametrize(("options", "revision"), [({"revision": "next"}, "next"), ({"create_pr": True}, "refs/pr/1")])
def test_the_command_says_how_to_load_what_it_pushed(
    hub: Hub,
    token: str,
    model: MemoryWrapModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    revision: str,
) -> None:
    hub.repo("me/pets")
    folder = timm_memwrap.save_pretrained(model, tmp_path / "local")
    main(["push", str(folder), "me/pets", *(f"--{key}={str(value).lower()}" for key, value in options.items())])
    assert f'timm.create_model("hf-hub:me/pets@{revision}", pretrained=True)' in capsys.readouterr().out


def test_what_has_not_changed_makes_no_commit(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes are the same however often the model was saved and loaded in between, so nothing is sent again."""
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets")
    first = push_folder(folder, "me/pets")
    before = hub.repos["me/pets"].history()
    uploads = len(hub.sent("PUT", "/upload/"))
    again = timm_memwrap.save_pretrained(timm_memwrap.from_pretrained(folder), tmp_path / "again")
    for push in (
        lambda: timm_memwrap.push_to_hub(model, "me/pets"),
        lambda: timm_memwrap.push_to_hub(timm_memwrap.from_pretrained("me/pets"), "me/pets"),
        lambda: timm_memwrap.push_memory_bank(timm_memwrap.from_pretrained("me/pets"), "me/pets"),
        lambda: push_folder(again, "me/pets"),
        lambda: push_folder(folder, "me/pets", overwrite_card=True),
        lambda: push_folder(folder, "me/pets", create_pr=True),
    ):
        commit = push()
        assert (commit.oid, commit.commit_message) == (first.oid, "")
    assert main(["push", str(again), "me/pets"]) == 0
    assert f"Nothing has changed since the last commit of me/pets: {first.commit_url}" in capsys.readouterr().out
    assert hub.repos["me/pets"].history() == before
    assert len(hub.sent("PUT", "/upload/")) == uploads


def test_what_of_an_interrupted_push_arrived_is_not_sent_again(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path
) -> None:
    figure = tmp_path / "figure.png"
    Image.effect_noise((512, 512), 90).save(figure)
    options = {"model_card": {"figure": figure}, "include_images": True}
    second = hashlib.sha256(figure.read_bytes()).hexdigest()
    cut = hub.fail("PUT", f"/upload/{second}", times=100, cut_after=figure.stat().st_size // 2)
    with pytest.raises(Exception, match="uploading"):
        timm_memwrap.push_to_hub(model, "me/pets", **options)
    assert cut.seen
    assert set(hub.repos["me/pets"].files()) == {".gitattributes"}
    [first] = hub.objects
    cut.times = 0
    timm_memwrap.push_to_hub(model, "me/pets", **options)
    files = hub.repos["me/pets"].files()
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() == first
    assert files["explanation.png"] == figure.read_bytes()
    assert len(hub.sent("PUT", f"/upload/{first}")) == 1


def test_an_empty_or_stale_memory_is_not_pushed(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    stale, empty = deepcopy(model), deepcopy(model)
    with torch.no_grad():
        next(stale.backbone.parameters()).add_(1)
    empty.memory_bank.clear()
    for wrong, message in ((stale, "stale"), (empty, "empty"), (model.backbone, "not a Memory Wrap model")):
        with pytest.raises(ValueError, match=message):
            timm_memwrap.push_to_hub(wrong, "me/pets")
    assert not hub.requests
    timm_memwrap.push_to_hub(empty, "me/pets", allow_empty_memory=True)
    assert len(timm_memwrap.from_pretrained("me/pets").memory_bank) == 0


def test_a_new_memory_alone(hub: Hub, token: str, model: MemoryWrapModel, images: Tensor) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    model.memory_bank.select([0, 1, 5, 6])
    timm_memwrap.push_memory_bank(model, "me/pets", commit_message="Smaller")
    repo = hub.repos["me/pets"]
    assert repo.history()[0].title == "Smaller"
    loaded = timm_memwrap.from_pretrained("me/pets")
    assert len(loaded.memory_bank) == 4
    assert loaded.memory_bank.images is None
    assert torch.equal(loaded(images), model(images))
    assert b"4 of 3 classes" in repo.files()["README.md"]
    config = json.loads(repo.files()["config.json"])
    assert config["memory_bank"]["size"] == 4

    before = repo.files()
    with pytest.raises(ValueError, match=r"me/pets@\w+' are not those that encoded the memory: \d+ tensors differ"):
        timm_memwrap.push_memory_bank(make_model(seed=1), "me/pets")
    assert repo.files() == before


def test_a_memory_is_not_pushed_over_a_change_in_the_meantime(
    hub: Hub, token: str, model: MemoryWrapModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    repo = hub.repos["me/pets"]
    checked = pushing._check_same_weights

    def and_meanwhile(*args: object) -> None:
        checked(*args)
        hub.commit("me/pets", {"other.txt": b"x"})

    monkeypatch.setattr(pushing, "_check_same_weights", and_meanwhile)
    model.memory_bank.select([0, 1])
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        timm_memwrap.push_memory_bank(model, "me/pets")
    assert repo.history()[0].title == "change"


@pytest.mark.parametrize("safe", ["both", True])
def test_a_push_by_stock_timm_keeps_the_memory(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, safe: str | bool
) -> None:
    timm.models.push_to_hf_hub(model, "me/stock", safe_serialization=safe)
    assert ("pytorch_model.bin" in hub.repos["me/stock"].files()) == (safe == "both")
    for create in (timm_memwrap.from_pretrained, lambda name: timm.create_model(f"hf-hub:{name}", pretrained=True)):
        loaded = create("me/stock").eval()
        assert torch.equal(loaded(images), model(images))
        assert loaded.memory_bank.ids == model.memory_bank.ids
        assert not loaded.memory_is_stale()
    assert summarize("me/stock").size == 12


def test_other_libraries_read_the_repository(hub: Hub, token: str, model: MemoryWrapModel, images: Tensor) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    folder = Path(snapshot_download("me/pets"))
    assert torch.equal(timm_memwrap.from_pretrained(folder)(images), model(images))
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.get_tensor("memory_bank.labels").tolist() == model.memory_bank.labels.tolist()


def test_the_options_of_a_download(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm_memwrap.push_to_hub(model, "me/secret", private=True, revision="next")
    monkeypatch.delenv("HF_TOKEN")
    cache = tmp_path / "cache"
    with pytest.raises(RepositoryNotFoundError):
        timm_memwrap.from_pretrained("me/secret", revision="next", cache_dir=cache)
    with pytest.raises(LocalEntryNotFoundError):
        timm_memwrap.from_pretrained("me/secret", revision="next", cache_dir=cache, local_files_only=True)
    loaded = timm_memwrap.from_pretrained("me/secret", revision="next", cache_dir=cache, token=token)
    assert torch.equal(loaded(images), model(images))
    before = len(hub.requests)
    loaded = timm_memwrap.from_pretrained("me/secret", revision="next", cache_dir=cache, local_files_only=True)
    assert torch.equal(loaded(images), model(images))
    assert len(hub.requests) == before
    timm_memwrap.from_pretrained("me/secret@next", cache_dir=cache, token=token, force_download=True)
    assert len(hub.sent("GET", "/objects/")) == 2


def test_pull_needs_nothing_beside_its_folder(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path
) -> None:
    """Its temporary folder is inside the target, which may be a mount point in a folder that cannot be written."""
    timm_memwrap.push_to_hub(model, "me/pets")
    # The client tries its cache with a temporary folder once.
    timm_memwrap.from_pretrained("me/pets")
    target = tmp_path / "parent" / "pets"
    target.mkdir(parents=True)
    created = []
    with pytest.MonkeyPatch.context() as patch:
        make = tempfile.TemporaryDirectory
        patch.setattr(
            tempfile,
            "TemporaryDirectory",
            lambda *args, **kwargs: created.append(kwargs.get("dir")) or make(*args, **kwargs),
        )
        pull("me/pets", target)
    assert created == [target]
    assert torch.equal(timm_memwrap.from_pretrained(target)(images), model(images))


def test_pull_writes_a_folder_that_loads(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path
) -> None:
    timm.models.push_to_hf_hub(model, "me/pets")
    folder = pull("me/pets@main", tmp_path / "sub" / "pets")
    # No pickle comes along.
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert torch.equal(timm_memwrap.from_pretrained(folder)(images), model(images))
    with pytest.raises(ValueError, match=r"has model\.safetensors, config\.json, README\.md already"):
        pull("me/pets", folder)
    (folder / "notes.txt").write_text("mine")
    pull("me/pets", folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["pets"]
