"""When things go wrong: the Hub's client says what about the Hub, we about files, and all is as it was before."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_models import make_model
from hub_server import Hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.cli import main
from timm_memwrap.hub import FileError, pull
from timm_memwrap.tensor_files import read_tensors, write_tensors


@pytest.mark.parametrize(
    ("who", "repo_id", "status"),
    [
        (None, "me/new", 401),
        ("hf_wrong", "me/new", 401),
        ("read", "me/new", 403),
        ("read", "me/open", 403),
        ("other", "me/open", 403),
        ("other", "me/secret", 403),
    ],
)
def test_pushing_without_the_right(
    hub: Hub, model: MemoryWrapModel, monkeypatch: pytest.MonkeyPatch, who: str | None, repo_id: str, status: int
) -> None:
    hub.repo("me/open")
    hub.repo("me/secret", private=True)
    token = {"read": hub.user("me", "read"), "other": hub.user("other")}.get(who or "", who)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises((HfHubHTTPError, LocalTokenNotFoundError)) as caught:
        timm_memwrap.push_to_hub(model, repo_id)
    if isinstance(caught.value, HfHubHTTPError):
        assert caught.value.response.status_code == status
    assert set(hub.repos) == {"me/open", "me/secret"}
    assert all(len(repo.history()) == 1 for repo in hub.repos.values())
    assert not hub.objects


@pytest.mark.parametrize(
    ("who", "name", "error"),
    [
        (None, "me/missing", RepositoryNotFoundError),
        (None, "me/secret", RepositoryNotFoundError),
        ("other", "me/secret", RepositoryNotFoundError),
        ("hf_wrong", "me/secret", HfHubHTTPError),
        (None, "me/gated", GatedRepoError),
        ("other", "me/gated", GatedRepoError),
        (None, "me/open@nope", RevisionNotFoundError),
        (None, "me/empty", RemoteEntryNotFoundError),
    ],
)
def test_loading_without_the_right(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, who: str | None, name: str, error: type[Exception]
) -> None:
    hub.repo("me/open", **{"config.json": b"{}"})
    hub.repo("me/secret", private=True, **{"config.json": b"{}"})
    hub.repo("me/gated", gated=True, **{"config.json": b"{}"})
    hub.repo("me/empty")
    token = hub.user("other") if who == "other" else who
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error):
        timm_memwrap.from_pretrained(name, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("blobs/*"))


@pytest.mark.parametrize(
    "name", ["no spaces", "a/b/c", "-bad/model", "me/--", "/no/such/folder", "../x", "", "me/", "@main"]
)
def test_an_invalid_repo_id(hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, name: str) -> None:
    for call in (
        lambda: timm_memwrap.push_to_hub(model, name),
        lambda: timm_memwrap.push_memory_bank(model, name),
        lambda: timm_memwrap.from_pretrained(f"hf-hub:{name}"),
        lambda: pull(f"{name}@main", tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match=r"is not a valid repo id\. Pass 'owner/name'"):
            call()
    with pytest.raises(ValueError, match="is neither a directory nor a repo id"):
        timm_memwrap.from_pretrained(name)
    assert not hub.requests
    assert not list(tmp_path.iterdir())


NAMES = ["pets", "pets@main", "My Pets", "./pets", "../pets", "/data/pets", "~/pets", "runs/july/pets", r"runs\pets"]


@pytest.mark.parametrize("name", [*NAMES, Path("me/pets"), "local-dir:me/pets"])
def test_a_mistyped_folder_does_not_ask_the_hub(hub: Hub, token: str, name: str | Path) -> None:
    wrong = "is neither a directory nor a repo id" if name in NAMES else "is not a directory"
    with pytest.raises(ValueError, match=rf"{wrong}\. Pass (a directory|one) that timm_memwrap\.save_pretrained wrote"):
        timm_memwrap.from_pretrained(name)
    assert not hub.requests


def test_a_mistyped_folder_that_could_be_a_repository_is_said_to_be_neither(
    hub: Hub, token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RepositoryNotFoundError, match="'runs/pets' is not a directory either"):
        timm_memwrap.from_pretrained("runs/pets")
    with pytest.raises(LocalEntryNotFoundError, match="'runs/pets' is not a directory either"):
        timm_memwrap.from_pretrained("runs/pets", local_files_only=True)
    assert main(["inspect", "runs/pets"]) == 1
    assert "'runs/pets' is not a directory either" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bogus": 1}, "unexpected keyword argument 'bogus'"),
        ({"map_location": "cpu"}, "unexpected keyword argument 'map_location'"),
        ({"num_classes": "3"}, "'str' and 'int'"),
        ({"pretrained": False}, "keyword argument 'pretrained'"),
        ({"pretrained_cfg": "a"}, "pretrained_cfg"),
    ],
)
def test_an_argument_that_no_part_of_the_model_takes(
    model: MemoryWrapModel, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets")
    with pytest.raises(ValueError, match=rf"'{folder}' cannot be loaded with .*{message}.* timm\.create_model"):
        timm_memwrap.from_pretrained(folder, **arguments)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json in .* cannot be read"):
        timm_memwrap.from_pretrained(tmp_path)


def test_the_home_folder_is_expanded(
    model: MemoryWrapModel, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    timm_memwrap.save_pretrained(model, "~/pets")
    assert (tmp_path / "pets" / "model.safetensors").is_file()
    for name in ("~/pets", "local-dir:~/pets", Path("~/pets")):
        assert torch.equal(timm_memwrap.from_pretrained(name)(images), model(images))


def test_a_push_survives_what_passes(hub: Hub, token: str, model: MemoryWrapModel, images: Tensor) -> None:
    """The client repeats what sends files; a push that it gives up before that has changed nothing."""
    faults = [
        hub.fail("POST", "/preupload/", status=429, retry_after=0),
        hub.fail("PUT", "/upload/", cut_after=5_000),
    ]
    timm_memwrap.push_to_hub(model, "me/pets")
    assert [fault.seen for fault in faults] == [1] * len(faults)
    assert len(hub.repos["me/pets"].history()) == 2
    assert torch.equal(timm_memwrap.from_pretrained("me/pets")(images), model(images))


def test_a_load_survives_what_passes(hub: Hub, token: str, model: MemoryWrapModel, images: Tensor) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    fault = hub.fail("GET", "/objects/", cut_after=20_000)
    assert torch.equal(timm_memwrap.from_pretrained("me/pets")(images), model(images))
    assert fault.seen == 1


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/repos/create", {"status": 503, "retry_after": 0}),
        ("POST", "/commit/", {"status": 500, "retry_after": 0}),
        ("POST", "/commit/", {"cut_after": 100}),
        ("PUT", "/upload/", {"status": 400}),
        ("PUT", "/upload/", {"status": 501}),
    ],
)
def test_a_push_that_breaks_off_changes_nothing(
    hub: Hub, token: str, model: MemoryWrapModel, method: str, path: str, fault: dict[str, int]
) -> None:
    hub.repo("me/pets", **{"config.json": b"{}"})
    before = hub.repos["me/pets"].files()
    hub.fail(method, path, times=100, **fault)
    # The transport errors of the client's HTTP library have no base class that we may name.
    with pytest.raises(Exception, match=r"50\d|Error while uploading|disconnected|peer closed|incomplete"):
        timm_memwrap.push_to_hub(model, "me/pets")
    assert hub.repos["me/pets"].files() == before
    assert len(hub.repos["me/pets"].history()) == 2


def test_an_upload_that_fails_says_why(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("PUT", "/upload/", times=2, status=501)
    why = "Error while uploading 'model.safetensors' to the Hub. Server error '501 Not Implemented'"
    with pytest.raises(OSError, match=why):
        timm_memwrap.push_to_hub(model, "me/pets")
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets")
    assert main(["push", str(folder), "me/pets"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"timm-memwrap: {why}")


@pytest.mark.parametrize(
    ("who", "repo_id", "message"),
    [
        (None, "me/new", "hf auth login"),
        (None, "new", "hf auth login"),
        ("hf_wrong", "me/new", "Invalid user token"),
        ("read", "me/new", "You don't have the rights to create a model under the namespace"),
        ("read", "me/open", "you must use a write token"),
        ("other", "me/open", "you don't have write access"),
        ("other", "me/secret", "You don't have the rights to create a model under the namespace"),
        ("write", "no repo id", "'no repo id' is not a valid repo id"),
    ],
)
def test_a_push_that_is_refused_is_one_line_and_sends_nothing(
    hub: Hub,
    model: MemoryWrapModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    who: str | None,
    repo_id: str,
    message: str,
) -> None:
    hub.repo("me/open")
    hub.repo("me/secret", private=True)
    users = {"read": hub.user("me", "read"), "other": hub.user("other"), "write": hub.user("me")}
    if who is not None:
        monkeypatch.setenv("HF_TOKEN", users.get(who, who))
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets")
    assert main(["push", str(folder), repo_id]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("timm-memwrap: ")
    assert message in error
    assert set(hub.repos) == {"me/open", "me/secret"}
    assert all(len(repo.history()) == 1 for repo in hub.repos.values())
    assert not hub.objects


def test_a_server_without_xet_says_what_to_set(
    hub: Hub, token: str, model: MemoryWrapModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(OSError, match=r"404 .*xet-write-token.* set HF_HUB_DISABLE_XET=1"):
        timm_memwrap.push_to_hub(model, "me/pets")


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    before = hub.repos["me/pets"].history()
    # The same once more: what a second try after a lost answer does.
    commit = timm_memwrap.push_to_hub(model, "me/pets")
    assert hub.repos["me/pets"].history() == before
    assert commit.oid == before[0].oid


def test_a_download_that_breaks_off_leaves_the_cache_whole(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path
) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    fault = hub.fail("GET", "/objects/", times=100, status=503, retry_after=0)
    for call in (
        lambda: timm_memwrap.from_pretrained("me/pets", cache_dir=tmp_path / "cache"),
        lambda: timm.create_model("hf-hub:me/pets", pretrained=True, cache_dir=tmp_path / "cache"),
        lambda: pull("me/pets", tmp_path / "pulled"),
    ):
        with pytest.raises(HfHubHTTPError, match="503"):
            call()
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    assert not (tmp_path / "pulled").exists()
    fault.times = 0
    loaded = timm_memwrap.from_pretrained("me/pets", cache_dir=tmp_path / "cache")
    assert torch.equal(loaded(images), model(images))


def test_no_hub_at_all(hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, run: Callable[..., str]) -> None:
    timm_memwrap.save_pretrained(model, tmp_path / "model")
    code = f"""
import timm_memwrap
model = timm_memwrap.from_pretrained({str(tmp_path / "model")!r})
for call in (lambda: timm_memwrap.push_to_hub(model, "me/pets"), lambda: timm_memwrap.from_pretrained("me/pets")):
    try:
        call()
    except OSError as error:
        print(type(error).__name__)
"""
    assert run(code, HF_HUB_OFFLINE="1").split() == ["OfflineModeIsEnabled", "LocalEntryNotFoundError"]


def test_a_full_disk_leaves_what_was_saved_before(
    model: MemoryWrapModel, images: Tensor, tmp_path: Path, run: Callable[..., str]
) -> None:
    timm_memwrap.save_pretrained(model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    # No file may grow beyond this: writing fails in the middle, as on a full disk.
    code = f"""
import resource, signal, timm_memwrap
model = timm_memwrap.from_pretrained({str(tmp_path / "model")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
model.memory_bank.select(range(6))
for call in (lambda: timm_memwrap.save_pretrained(model, {str(tmp_path / "model")!r}),
             lambda: timm_memwrap.push_to_hub(model, "me/pets")):
    try:
        call()
    except OSError as error:
        print(error)
"""
    for line in run(code).splitlines():
        assert "Could not write model.safetensors" in line
        assert "free some space" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


@pytest.fixture
def folder(model: MemoryWrapModel, tmp_path: Path) -> Path:
    return timm_memwrap.save_pretrained(model, tmp_path / "pets")


def edit_config(folder: Path, inside: bool = True, **changes: Any) -> None:
    """Changes the configuration as its author could: in `config.json`, and in the weights or nowhere else."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] |= value
        else:
            config[key] = value
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    rewrite(folder, {"config": text} if inside else {})


def rewrite(folder: Path, metadata: dict[str, str]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path, "weights").tensors.items()}
    write_tensors(tensors, path, metadata)


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Changes tensors, and leaves the checksum out, as whoever edits a file would."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".") if "__" in key else f"memory_bank.{key}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused_everywhere(folder: Path, message: str, hub: Hub | None = None) -> None:
    """Checks that a folder is refused from disk, and pushed by hand, from the Hub: by our function and by timm's."""
    calls = [lambda: timm_memwrap.from_pretrained(folder)]
    if hub is not None:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.repo("me/pets", **files)
        calls.append(lambda: timm_memwrap.from_pretrained("me/pets"))
    for call in calls:
        with pytest.raises(FileError, match=message) as caught:
            call()
        source = "me/pets" if call is not calls[0] else str(folder)
        assert source in str(caught.value), caught.value


@pytest.mark.parametrize("size", [0, 4, 8, 1000, -1000, -1])
def test_truncated_weights(hub: Hub, folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused_everywhere(folder, r"model\.safetensors .*is not a whole safetensors file", hub)


@pytest.mark.parametrize("where", [3, 50, 300, 0.3, 0.6, 0.95, -5])
def test_a_flipped_bit(hub: Hub, folder: Path, where: float) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(where * len(content)) if isinstance(where, float) else where] ^= 4
    path.write_bytes(content)
    message = r"model\.safetensors .*(is damaged: it does not have the checksum|is not a whole safetensors file)"
    refused_everywhere(folder, message, hub)
    for name in (f"local-dir:{folder}", "hf-hub:me/pets"):
        with pytest.raises(FileError, match=message):
            timm.create_model(name, pretrained=True)


BANK = {
    "width": ({"encodings": torch.randn(12, 5)}, r"encodings have shape \[12, 5\]; this model reads \[M, 96\]"),
    "type": ({"encodings": torch.randn(12, 96).double()}, r"encodings are torch\.float64 .*expected torch\.float32"),
    "type of labels": ({"labels": torch.zeros(12)}, r"labels are torch\.float32"),
    "nan": ({"encodings": torch.full((12, 96), torch.nan)}, "12 of 12 encodings have NaN"),
    "infinite": ({"encodings": torch.full((12, 96), torch.inf)}, "12 of 12 encodings have NaN or infinite"),
    "label above": ({"labels": torch.full((12,), 3)}, "a label 3, outside num_classes=3"),
    "label below": ({"labels": torch.full((12,), -1)}, "Label -1 is below 0"),
    "length": ({"labels": torch.zeros(11, dtype=torch.long)}, "expected .* length 11"),
    "missing": ({"labels": None}, r"Missing .*labels"),
    "unknown": ({"surprise": torch.zeros(1)}, r"Unexpected .*surprise"),
    "meaning": ({"meaning": torch.zeros(9, dtype=torch.uint8)}, "meaning is not JSON"),
    "deep meaning": ({"meaning": torch.full((99999,), ord("["), dtype=torch.uint8)}, "recursion"),
    "newer meaning": (
        {"meaning": torch.frombuffer(bytearray(b'{"format_version": 99}'), dtype=torch.uint8)},
        "format_version=99; .*Upgrade timm-memwrap",
    ),
    "no width": ({"encodings": torch.zeros(12)}, "encodings"),
    "weights of another shape": (
        {"backbone__conv1.0.weight": torch.zeros(2, 2)},
        r"backbone\.conv1\.0\.weight: its shape is \[2, 2\]",
    ),
    "whole numbers for weights": (
        {"backbone__fc.weight": torch.zeros(3, 96, dtype=torch.int64)},
        r"backbone\.fc\.weight is of torch.int64",
    ),
    "weights missing": ({"backbone__fc.weight": None}, r"missing \['backbone\.fc\.weight'\]"),
    "weights too many": ({"backbone__fc2.weight": torch.zeros(1)}, r"unexpected \['backbone\.fc2\.weight'\]"),
}


@pytest.mark.parametrize("case", BANK)
def test_tensors_that_do_not_fit(folder: Path, case: str) -> None:
    changes, message = BANK[case]
    edit_tensors(folder, **changes)
    refused_everywhere(folder, rf"model\.safetensors.*{message}")
    with pytest.raises(FileError, match=message):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


CONFIG: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "is not JSON"),
    "not text": (b"\xff\xfe\x00", "is not JSON"),
    "empty": (b"", "is not JSON"),
    "a list": (b"[]", "holds a list"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "no architecture": (b"{}", "names no architecture"),
    "another model": (
        {"architecture": "resnet18"},
        "is of 'resnet18', which is not a Memory Wrap model. Load it with timm",
    ),
    "newer": ({"memory_bank": {"format_version": 2}}, "has format_version=2; .*Upgrade it: pip install"),
    "of another timm": ({"architecture": "memwrap_resnet9000"}, "'memwrap_resnet9000', which timm 1.* does not have"),
    "another backbone": ({"architecture": "memwrap_evidence_test_vit"}, "does not fit 'memwrap_evidence_test_vit'"),
    "unknown argument": ({"model_args": {"bogus": 1}}, "cannot be built .*bogus"),
    "unknown value": ({"model_args": {"distance": "manhattan"}}, "cannot be built .*'manhattan'"),
    "other classes": ({"num_classes": 4, "model_args": {"num_classes": 4}}, "size mismatch for backbone.fc"),
    "two numbers of classes": (
        {"num_classes": 0, "model_args": {"num_classes": 3}},
        "has num_classes=3, but the rest of it describes 0",
    ),
    "no classes": ({"num_classes": 0}, "does not fit 'memwrap_evidence_test_resnet'"),
    "classes not a number": ({"num_classes": "3"}, "num_classes is '3'"),
    "classes without end": (
        {"num_classes": 10**12, "model_args": {"num_classes": 10**12}},
        "larger model than",
    ),
    "more classes than numbers": (
        {"num_classes": 10**400, "model_args": {"num_classes": 10**400}},
        "larger model than",
    ),
    "an image without end": ({"model_args": {"in_chans": 10**9}}, "larger model than|cannot be built"),
    "loose loading": ({"model_args": {"pretrained_strict": False}}, r"model_args has \['pretrained_strict'\]"),
    "steered loading": ({"model_args": {"pretrained": 0}}, r"model_args has \['pretrained'\]"),
    "features": ({"model_args": {"features_only": True}}, r"model_args has \['features_only'\]"),
    "mean": ({"pretrained_cfg": {"mean": "bright"}}, "mean is 'bright'"),
    "size": ({"pretrained_cfg": {"input_size": [3, 224]}}, r"input_size is \[3, 224\]"),
    "no cfg": ({"pretrained_cfg": 5}, "pretrained_cfg is 5"),
    "unknown field of the cfg": ({"pretrained_cfg": {"bogus": 1}}, "cannot be built .*bogus"),
    "no memory block": ({"memory_bank": 5}, "memory_bank is 5"),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("case", CONFIG)
def test_a_configuration_that_is_not_ours(hub: Hub, folder: Path, case: str, inside: bool) -> None:
    change, message = CONFIG[case]
    if isinstance(change, bytes):
        (folder / "config.json").write_bytes(change)
        rewrite(folder, {"config": change.decode(errors="replace")} if inside else {})
    else:
        edit_config(folder, inside, **change)
    refused_everywhere(folder, rf"config\.json.*({message})|({message}).*config\.json", hub)


def test_a_configuration_that_is_not_utf_8(folder: Path, model: MemoryWrapModel, images: Tensor) -> None:
    """timm reads it as UTF-8, so another encoding is a fault, and mended where there is a copy."""
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(before, encoding="utf-16")
    assert torch.equal(timm_memwrap.from_pretrained(folder)(images), model(images))
    assert json.loads(path.read_text()) == json.loads(before)
    path.write_text(before, encoding="utf-16")
    rewrite(folder, {})
    refused_everywhere(folder, r"config\.json.* is not JSON")


def test_an_argument_of_a_damaged_configuration_is_not_the_users(
    folder: Path, model: MemoryWrapModel, images: Tensor
) -> None:
    for create in (timm_memwrap.from_pretrained, lambda f: timm.create_model(f"local-dir:{f}", pretrained=True).eval()):
        config = json.loads((folder / "config.json").read_text())
        config["model_args"]["bogus"] = float("nan")
        (folder / "config.json").write_text(json.dumps(config))
        assert torch.equal(create(folder)(images), model(images))


@pytest.mark.parametrize("block", ["model_args", "pretrained_cfg"])
def test_an_error_does_not_steer_the_terminal(folder: Path, block: str) -> None:
    edit_config(folder, **{block: {"a\x1b[31m\u202e\n": 1}})
    with pytest.raises(FileError, match=r"unexpected keyword argument 'a\?\[31m\? '") as caught:
        timm_memwrap.from_pretrained(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("case", CONFIG)
def test_the_configuration_inside_the_weights_wins(
    folder: Path, case: str, model: MemoryWrapModel, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    before, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    change, _ = CONFIG[case]
    if isinstance(change, bytes):
        (folder / "config.json").write_bytes(change)
    else:
        edit_config(folder, **change)
        (folder / "model.safetensors").write_bytes(weights)
    assert torch.equal(timm_memwrap.from_pretrained(folder)(images), model(images))
    assert "is not the one that the weights beside it were saved with" in caplog.text
    assert json.loads((folder / "config.json").read_text()) == json.loads(before)


def test_depth_without_end_is_stopped(tmp_path: Path) -> None:
    model = timm.create_model("memwrap_test_vit", num_classes=3)
    folder = timm_memwrap.save_pretrained(model, tmp_path / "vit", allow_empty_memory=True)
    before = (folder / "config.json").read_text()
    # The last two are numbers that a large network could have. What they ask for is stopped while it is being made.
    for args in ({"depth": 10**9}, {"embed_dim": 10**9}, {"img_size": 10**6}, {"depth": 60_000}, {"embed_dim": 60_000}):
        edit_config(folder, model_args=args)
        started = time.monotonic()
        with pytest.raises(FileError, match="larger model than"):
            timm_memwrap.from_pretrained(folder)
        assert time.monotonic() - started < 30
        (folder / "config.json").write_text(before)


def test_a_configuration_cannot_name_another_file(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path
) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    other = make_model(seed=1)
    torch.save(other.state_dict(), tmp_path / "other.bin")
    config = json.loads(hub.repos["me/pets"].files()["config.json"])
    config["pretrained_cfg"] |= {"hf_hub_filename": "other.bin", "custom_load": "hf", "url": "http://127.0.0.1:9/x.pth"}
    files = {"config.json": json.dumps(config).encode(), "other.bin": (tmp_path / "other.bin").read_bytes()}
    hub.commit("me/pets", dict(files))
    for create in (timm_memwrap.from_pretrained, lambda name: timm.create_model(f"hf-hub:{name}", pretrained=True)):
        assert torch.equal(create("me/pets").eval()(images), model(images))
    assert not hub.sent("GET", r"other\.bin")


@pytest.mark.parametrize("source", ["local", "hub"])
def test_a_pickle_is_never_opened(hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, source: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    timm.models.save_for_hf(model, tmp_path / "model", safe_serialization=False)
    torch.save({"trap": Trap()}, tmp_path / "model" / "pytorch_model.bin")
    name = f"local-dir:{tmp_path / 'model'}"
    if source == "hub":
        hub.repo("me/pickle", **{path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
        name = "hf-hub:me/pickle"
    for create in (timm_memwrap.from_pretrained, lambda name: timm.create_model(name, pretrained=True)):
        for kwargs in ({}, {"features_only": True}) if create is timm_memwrap.from_pretrained else ({},):
            with pytest.raises(FileError, match=r"has no model\.safetensors, only pytorch_model\.bin: a pickle"):
                create(name, **kwargs)
    if source == "hub":
        with pytest.raises(FileError, match="a pickle, which can run any code"):
            pull("me/pickle", tmp_path / "pulled")
    assert not (tmp_path / "sprung").exists()


def test_a_shape_that_the_header_lies_about(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["memory_bank.encodings"]["shape"] = [2**40, 2**20]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    refused_everywhere(folder, r"model\.safetensors.* is not a whole safetensors file")


def test_stale_memory_of_a_stock_push_is_said(
    hub: Hub, token: str, model: MemoryWrapModel, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    timm.models.push_to_hf_hub(model, "me/stale", safe_serialization=True)
    timm_memwrap.from_pretrained("me/stale")
    assert "its memory bank is stale" in caplog.text
    fresh = make_model()
    caplog.clear()
    timm_memwrap.push_to_hub(fresh, "me/fresh")
    timm_memwrap.from_pretrained("me/fresh")
    assert not caplog.text
