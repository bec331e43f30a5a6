"""When things go wrong: one clear error that names repository, file and cure, and everything as it was before."""

import json
import re
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
from safetensors.torch import load_file, save_file
from torch import Tensor

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.hub import FileError, HubError, pull


def one_line(error: BaseException) -> str:
    return str(error).replace("\n", " ")


# -- who may do what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "repo_id", "message"),
    [
        (None, "me/new", "push to 'me/new': the Hub does not accept the token, or there is none"),
        ("hf_wrong", "me/new", r"does not accept the token, or there is none \(Invalid credentials"),
        ("read", "me/new", "'me/new': the token may not do that .* Use one with the role 'write'"),
        ("read", "me/open", "'me/open': the token may not do that"),
        ("other", "me/open", "'me/open': the token may not do that .*write access"),
        ("other", "me/secret", "'me/secret': the token may not do that"),
    ],
)
def test_pushing_without_the_right(
    hub: Hub, model: MemoryWrapModel, monkeypatch: pytest.MonkeyPatch, who: str | None, repo_id: str, message: str
) -> None:
    hub.repo("me/open")
    hub.repo("me/secret", private=True)
    token = {"read": hub.user("me", "read"), "other": hub.user("other")}.get(who or "", who)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as caught:
        timm_memwrap.push_to_hub(model, repo_id)
    if who in (None, "hf_wrong"):
        assert "hf auth login" in str(caught.value)
    assert set(hub.repos) == {"me/open", "me/secret"}
    assert all(len(repo.history()) == 1 for repo in hub.repos.values())
    assert not hub.objects


@pytest.mark.parametrize(
    ("who", "name", "message"),
    [
        (None, "me/missing", "config.json of 'me/missing': there is no such repository, or it is private .*hf auth"),
        (None, "me/secret", "config.json of 'me/secret': there is no such repository, or it is private"),
        ("other", "me/secret", "config.json of 'me/secret': there is no such repository, or it is private"),
        ("hf_wrong", "me/secret", "config.json of 'me/secret': the Hub does not accept the token"),
        (None, "me/gated", "config.json of 'me/gated': the repository is gated. Ask for access on http.*/me/gated"),
        ("other", "me/gated", "config.json of 'me/gated': the repository is gated"),
        (None, "me/open@nope", "config.json of 'me/open@nope': the repository has no such revision"),
        (None, "me/empty", "config.json of 'me/empty': the repository has no such file"),
    ],
)
def test_loading_without_the_right(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, who: str | None, name: str, message: str
) -> None:
    hub.repo("me/open", **{"config.json": b"{}"})
    hub.repo("me/secret", private=True, **{"config.json": b"{}"})
    hub.repo("me/gated", gated=True, **{"config.json": b"{}"})
    hub.repo("me/empty")
    token = hub.user("other") if who == "other" else who
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message):
        timm_memwrap.from_pretrained(name, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("blobs/*"))


@pytest.mark.parametrize(
    "name", ["no spaces", "a/b/c", "-bad/model", "me/--", "/no/such/folder", "../x", "", "me/", "@main"]
)
def test_a_name_that_is_none(hub: Hub, token: str, model: MemoryWrapModel, name: str) -> None:
    for call in (lambda: timm_memwrap.push_to_hub(model, name), lambda: timm_memwrap.push_memory_bank(model, name)):
        with pytest.raises(ValueError, match=f"{re.escape(repr(name))} is no name of a repository. Pass 'owner/name'"):
            call()
    with pytest.raises(ValueError, match="is neither a folder nor the name of a repository"):
        timm_memwrap.from_pretrained(name)
    assert not hub.requests


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no folder. Pass a folder that timm_memwrap\.save_pretrained wrote"):
        timm_memwrap.from_pretrained(f"local-dir:{tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        timm_memwrap.from_pretrained(tmp_path)


# -- the way to the Hub -----------------------------------------------------------------------------------------------


def test_a_push_survives_what_passes(hub: Hub, token: str, model: MemoryWrapModel, images: Tensor) -> None:
    faults = [
        hub.fail("POST", "/repos/create", status=503, retry_after=0),
        hub.fail("GET", "/api/models/me/pets$", status=500, retry_after=0),
        hub.fail("HEAD", "/resolve/main/README", status=502, retry_after=0),
        hub.fail("POST", "/preupload/", status=429, retry_after=0),
        hub.fail("PUT", "/upload/", cut_after=5_000),
        hub.fail("POST", "/commit/", status=503, retry_after=0),
    ]
    timm_memwrap.push_to_hub(model, "me/pets")
    assert [fault.seen for fault in faults] == [1] * len(faults)
    assert len(hub.repos["me/pets"].history()) == 2
    assert torch.equal(timm_memwrap.from_pretrained("me/pets").eval()(images), model(images))


def test_a_load_survives_what_passes(hub: Hub, token: str, model: MemoryWrapModel, images: Tensor) -> None:
    timm_memwrap.push_to_hub(model, "me/pets")
    faults = [
        hub.fail("GET", "/resolve/main/config.json", status=500, retry_after=0),
        hub.fail("GET", "/objects/", status=503, retry_after=0),
        hub.fail("GET", "/objects/", cut_after=20_000),
        hub.fail("GET", "/objects/", status=429, retry_after=0),
    ]
    assert torch.equal(timm_memwrap.from_pretrained("me/pets").eval()(images), model(images))
    assert [fault.seen for fault in faults] == [1] * len(faults)


@pytest.mark.parametrize(
    ("method", "path", "fault", "message"),
    [
        ("POST", "/repos/create", {"status": 503, "retry_after": 0}, "'me/pets': the Hub answers with status 503"),
        ("POST", "/repos/create", {"status": 429, "retry_after": 0}, "'me/pets': the Hub has had too many requests"),
        ("POST", "/commit/", {"status": 500, "retry_after": 0}, "'me/pets': the Hub answers with status 500"),
        ("POST", "/commit/", {"cut_after": 100}, "'me/pets': the connection to the Hub broke"),
        ("PUT", "/upload/", {"status": 400}, "'me/pets': the Hub refuses with status 400"),
    ],
)
def test_a_push_that_breaks_off_changes_nothing(
    hub: Hub, token: str, model: MemoryWrapModel, method: str, path: str, fault: dict[str, int], message: str
) -> None:
    hub.repo("me/pets", **{"config.json": b"{}"})
    before = hub.repos["me/pets"].files()
    hub.fail(method, path, times=100, **fault)
    with pytest.raises(HubError, match=message):
        timm_memwrap.push_to_hub(model, "me/pets")
    assert hub.repos["me/pets"].files() == before
    assert len(hub.repos["me/pets"].history()) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: Hub, token: str, model: MemoryWrapModel) -> None:
    original = hub._api_routes
    timm_memwrap.push_to_hub(model, "me/pets")
    assert original
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
        with pytest.raises(HubError, match=r"download model\.safetensors of 'me/pets.*the Hub answers with status 503"):
            call()
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    assert not (tmp_path / "pulled").exists()
    fault.times = 0
    loaded = timm_memwrap.from_pretrained("me/pets", cache_dir=tmp_path / "cache").eval()
    assert torch.equal(loaded(images), model(images))


def test_a_connection_that_keeps_breaking(
    hub: Hub, token: str, model: MemoryWrapModel, run: Callable[..., str]
) -> None:
    """The client tries six times, a second apart."""
    timm_memwrap.push_to_hub(model, "me/pets")
    hub.fail("GET", "/objects/", times=100, cut_after=100)
    with pytest.raises(HubError, match=r"model\.safetensors of 'me/pets@\w+': the connection to the Hub broke"):
        timm_memwrap.from_pretrained("me/pets")


def test_no_hub_at_all(hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, run: Callable[..., str]) -> None:
    timm_memwrap.save_pretrained(model, tmp_path / "model")
    code = f"""
import timm_memwrap
from timm_memwrap.hub import HubError
model = timm_memwrap.from_pretrained({str(tmp_path / "model")!r})
for call in (lambda: timm_memwrap.push_to_hub(model, "me/pets"), lambda: timm_memwrap.from_pretrained("me/pets")):
    try:
        call()
    except HubError as error:
        print(error)
"""
    offline = run(code, HF_HUB_OFFLINE="1").splitlines()
    assert offline == [
        f"Could not {what} 'me/pets': HF_HUB_OFFLINE is set, and it is not in the cache. Unset it, or load the model "
        f"once while online."
        for what in ("push to", "download config.json of")
    ]


# -- the disk ---------------------------------------------------------------------------------------------------------


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
        assert "Free some space on the disk" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model: MemoryWrapModel, tmp_path: Path) -> Path:
    return timm_memwrap.save_pretrained(model, tmp_path / "pets")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] |= value
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Changes tensors of the bank, and takes the checksum away, as whoever edits a file would."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".") if "__" in key else f"memory_bank.{key}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["memory_bank"]["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))


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
    refused_everywhere(folder, r"model\.safetensors .*(is not the file that was saved|whole safetensors file)", hub)
    # Without a checksum, too.
    edit_config(folder, memory_bank=None)
    refused_everywhere(folder, r"model\.safetensors .*is not a whole safetensors file", hub)


@pytest.mark.parametrize("where", [3, 50, 0.3, 0.6, 0.95, -5])
def test_a_flipped_bit(hub: Hub, folder: Path, where: float) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(where * len(content)) if isinstance(where, float) else where] ^= 4
    path.write_bytes(content)
    refused_everywhere(folder, r"model\.safetensors .*is not the file that was saved: its checksum", hub)
    with pytest.raises(FileError, match="checksum"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    with pytest.raises(FileError, match="checksum"):
        timm.create_model("hf-hub:me/pets", pretrained=True)


BANK = {
    "width": ({"encodings": torch.randn(12, 5)}, r"encodings have shape \[12, 5\]; this model reads \[M, 99\]"),
    "type": ({"encodings": torch.randn(12, 3).double()}, r"encodings are torch\.float64 .*expected torch\.float32"),
    "type of labels": ({"labels": torch.zeros(12)}, r"labels are torch\.float32"),
    "nan": ({"encodings": torch.full((12, 3), torch.nan)}, "12 of 12 encodings have NaN"),
    "infinite": ({"encodings": torch.full((12, 3), torch.inf)}, "12 of 12 encodings have NaN or infinite"),
    "label above": ({"labels": torch.full((12,), 3)}, "a label 3, outside num_classes=3"),
    "label below": ({"labels": torch.full((12,), -1)}, "Label -1 is below 0"),
    "length": ({"labels": torch.zeros(11, dtype=torch.long)}, "expected .* length 11"),
    "missing": ({"labels": None}, r"memory_bank\.labels"),
    "unknown": ({"surprise": torch.zeros(1)}, r"memory_bank\.surprise"),
    "meaning": ({"meaning": torch.zeros(9, dtype=torch.uint8)}, "meaning is not JSON"),
    "deep meaning": ({"meaning": torch.full((99999,), ord("["), dtype=torch.uint8)}, "recursion"),
    "newer meaning": (
        {"meaning": torch.frombuffer(bytearray(b'{"format_version": 99}'), dtype=torch.uint8)},
        "format_version=99; .*Upgrade timm-memwrap",
    ),
    "no width": ({"encodings": torch.zeros(12)}, "encodings"),
    "weights of another shape": ({"backbone__conv1.0.weight": torch.zeros(2, 2)}, r"has shape \[2, 2\]"),
    "whole numbers for weights": (
        {"backbone__fc.weight": torch.zeros(3, 96, dtype=torch.int64)},
        r"backbone\.fc\.weight is of type I64",
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
        "is of 'resnet18', which is no Memory Wrap model. Load it with timm",
    ),
    "newer": ({"memory_bank": {"format_version": 2}}, "has format_version=2; .*Upgrade it: pip install"),
    "of another timm": ({"architecture": "memwrap_resnet9000"}, "'memwrap_resnet9000', which timm 1.* does not have"),
    "another backbone": ({"architecture": "memwrap_baseline_test_vit"}, "does not fit 'memwrap_baseline_test_vit'"),
    "unknown argument": ({"model_args": {"bogus": 1}}, "cannot be built .*bogus"),
    "unknown value": ({"model_args": {"distance": "manhattan"}}, "cannot be built .*'manhattan'"),
    "other classes": ({"num_classes": 4, "model_args": {"num_classes": 4}}, "describes"),
    "two numbers of classes": ({"num_classes": 0}, "has num_classes=3, but the rest of it describes 0"),
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


@pytest.mark.parametrize("case", CONFIG)
def test_a_configuration_that_is_not_ours(hub: Hub, folder: Path, case: str) -> None:
    change, message = CONFIG[case]
    if isinstance(change, bytes):
        (folder / "config.json").write_bytes(change)
    else:
        edit_config(folder, **change)
    refused_everywhere(folder, rf"config\.json.*({message})|({message}).*config\.json", hub)


def test_depth_without_end_is_stopped(tmp_path: Path) -> None:
    model = timm.create_model("memwrap_test_vit", num_classes=3)
    folder = timm_memwrap.save_pretrained(model, tmp_path / "vit", allow_empty_memory=True)
    before = (folder / "config.json").read_bytes()
    # The last two are numbers that a large network could have. What they ask for is stopped while it is being made.
    for args in ({"depth": 10**9}, {"embed_dim": 10**9}, {"img_size": 10**6}, {"depth": 60_000}, {"embed_dim": 60_000}):
        edit_config(folder, model_args=args)
        started = time.monotonic()
        with pytest.raises(FileError, match="larger model than"):
            timm_memwrap.from_pretrained(folder)
        assert time.monotonic() - started < 30
        (folder / "config.json").write_bytes(before)


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
    edit_config(folder, memory_bank=None)
    refused_everywhere(folder, r"model\.safetensors.* is not a whole safetensors file")


def test_stale_memory_of_a_stock_push_is_said(
    hub: Hub, token: str, model: MemoryWrapModel, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    timm.models.push_to_hf_hub(model, "me/stale", safe_serialization=True)
    timm_memwrap.from_pretrained("me/stale")
    assert "its memory bank is stale" in caplog.text
    caplog.clear()
    timm_memwrap.push_to_hub(make_model(), "me/fresh")
    timm_memwrap.from_pretrained("me/fresh")
    assert not caplog.text
