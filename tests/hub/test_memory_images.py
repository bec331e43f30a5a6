"""The pictures of a memory as a data set on the Hub: pushed whole, found one by one, and never another sample's."""

import io
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from hub_server import Hub
from huggingface_hub import DatasetCard
from huggingface_hub.constants import HF_ASSETS_CACHE, HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.cli import main
from timm_memwrap.constants import MEMORY_CONFIG_KEY
from timm_memwrap.data import open_dataset
from timm_memwrap.explaining import memory_report, plot_explanations, write_html, write_memory_report
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.hub import image_tables, summarize
from timm_memwrap.hub.image_tables import INDEX_FILE, ImageIndex

REPO, DATASET = "me/pets-memory-images", "datasets/me/pets-memory-images"
NAMES, COUNT = ("cat", "dog", "eel"), 12


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs as a camera writes them: turned, and with the place where they were taken."""
    folder, rng = tmp_path_factory.mktemp("jane.7f3a") / "pets", np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / NAMES[number % 3] / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (6, 9, 3), dtype=np.uint8)
        image, exif = Image.fromarray(pixels).resize((900, 600), Image.Resampling.BICUBIC), Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        exif[0x010F] = "JaneCam"
        exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 30.0, 7.0)})
        image.save(path, exif=exif, comment=b"JaneComment", quality=95)
    return folder


@pytest.fixture(scope="session")
def _remembered(photos: Path) -> MemoryWrapModel:
    torch.manual_seed(0)
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3))
    timm_memwrap.build_memory_bank(model, data(photos), size=None, progress=False)
    return model.eval()


@pytest.fixture
def model(_remembered: MemoryWrapModel) -> MemoryWrapModel:
    return deepcopy(_remembered)


@pytest.fixture
def pushed(hub: Hub, token: str, model: MemoryWrapModel, photos: Path) -> MemoryWrapModel:
    timm_memwrap.push_memory_images(model, REPO, data(photos), progress=False)
    hub.requests.clear()
    return model


def data(photos: Path) -> Any:
    return open_dataset(data_dir=photos, split="")


def shown(model: MemoryWrapModel, sample_id: Any) -> np.ndarray | None:
    """The picture that a figure shows of a sample."""
    stored = stored_images(model)
    return None if stored is None else stored.picture(sample_id)


def pixels_of(photos: Path, sample_id: Any) -> np.ndarray:
    images = data(photos)
    names = [images.filename(i) for i in range(len(images))]
    image = images[names.index(sample_id)][0]
    image.thumbnail((512, 512), Image.Resampling.LANCZOS)
    return np.asarray(image).astype(int)


def rows_of(hub: Hub, **kwargs: Any) -> Any:
    return datasets.load_dataset(REPO, split="train", download_mode="force_redownload", **kwargs)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "timm_memwrap.hub.pinned_images"]


def forget_downloads() -> None:
    for cache in (HF_HUB_CACHE, HF_ASSETS_CACHE):
        shutil.rmtree(cache, ignore_errors=True)


def test_datasets_reads_pictures_labels_and_ids(
    hub: Hub, token: str, pushed: MemoryWrapModel, tmp_path: Path, photos: Path
) -> None:
    rows = rows_of(hub, cache_dir=str(tmp_path))
    bank = pushed.memory_bank
    assert rows.features["label"].names == list(NAMES)
    assert type(rows.features["image"]).__name__ == "Image"
    assert rows["id"][:] == bank.ids
    assert rows["label"][:] == bank.filled()[1].tolist()
    for row in rows:
        assert row["image"].size == (341, 512)
        assert np.abs(np.asarray(row["image"]).astype(int) - pixels_of(photos, row["id"])).mean() < 2


def test_the_data_set_is_one_commit_with_a_card_for_the_viewer(hub: Hub, pushed: MemoryWrapModel) -> None:
    repo = hub.repos[DATASET]
    assert [commit.title for commit in repo.history()] == ["Push pictures of the memory", "initial commit"]
    assert pushed.memory_bank.provenance.image_dataset == f"{REPO}@{repo.history()[0].oid}"
    files = repo.files()
    assert set(files) == {".gitattributes", "README.md", INDEX_FILE, "data/train-00000-of-00001.parquet"}
    card = DatasetCard(files["README.md"].decode())
    assert card.data.task_categories == ["image-classification"]
    assert card.data.configs[0]["data_files"][0] == {"split": "train", "path": "data/*.parquet"}
    assert [column["name"] for column in card.data.dataset_info["features"]] == ["image", "label", "id"]
    assert card.data.dataset_info["splits"][0]["num_examples"] == COUNT


def test_nothing_private_leaves_with_the_pictures(hub: Hub, pushed: MemoryWrapModel, photos: Path) -> None:
    whole = (photos / "cat" / "0000.jpg").read_bytes()
    assert b"JaneCam" in whole
    assert b"JaneComment" in whole
    for path, content in hub.repos[DATASET].files().items():
        for secret in (
            b"JaneCam",
            b"JaneComment",
            b"Exif",
            b"jane.7f3a",
            str(photos).encode(),
            b"/tmp",
            b"0000.jpg\x00",
        ):
            assert secret not in content, (path, secret)


def test_ids_are_those_that_push_to_hub_publishes(hub: Hub, token: str, model: MemoryWrapModel, photos: Path) -> None:
    bank, images = model.memory_bank, data(photos)
    # The first two are told apart by a folder that is not published.
    ids = ["/home/jane/a/0.jpg", "/home/jane/b/0.jpg", *(f"/home/jane/{each}" for each in bank.ids[2:])]
    paths = {sample_id: images[i][0] for i, sample_id in enumerate(ids)}
    encodings, labels = bank.filled()
    bank.replace(encodings, labels, ids, None, bank.class_names, bank.provenance)
    timm_memwrap.push_memory_images(model, REPO, paths, progress=False)
    timm_memwrap.push_to_hub(model, "me/pets")
    loaded = timm_memwrap.from_pretrained("me/pets")
    assert rows_of(hub)["id"][:] == loaded.memory_bank.ids
    assert loaded.memory_bank.ids[:3] == ["0.jpg", "0.jpg (2)", ids[2].removeprefix("/home/jane/")]
    # The model in hand has its own names for the same pictures.
    for here, there in zip(bank.ids, loaded.memory_bank.ids, strict=True):
        assert (shown(model, here) == shown(loaded, there)).all()
    # Without the first, the second is published under its name, and keeps its own picture.
    before = shown(model, ids[1])
    model.forget(ids[0])
    timm_memwrap.push_to_hub(model, "me/pets")
    loaded = timm_memwrap.from_pretrained("me/pets")
    assert loaded.memory_bank.ids[0] == "0.jpg"
    assert (shown(loaded, "0.jpg") == before).all()


def test_only_the_pictures_that_are_shown_are_fetched_and_once(hub: Hub, pushed: MemoryWrapModel, photos: Path) -> None:
    wanted = pushed.memory_bank.ids[:2]
    for sample_id in wanted:
        picture = shown(pushed, sample_id)
        assert np.abs(picture.astype(int) - pixels_of(photos, sample_id)).mean() < 2
    index = hub.repos[DATASET].find("main").files[INDEX_FILE].sha256
    pictures = [request for request in hub.sent("GET", "/objects/") if index not in request.path]
    assert [request.status for request in pictures] == [206, 206]
    hub.requests.clear()
    for sample_id in wanted:
        assert shown(pushed, sample_id) is not None
    assert not hub.requests


def test_the_bytes_fetched_are_those_of_the_picture(hub: Hub, pushed: MemoryWrapModel, tmp_path: Path) -> None:
    files = hub.repos[DATASET].files()
    (tmp_path / INDEX_FILE).write_bytes(files[INDEX_FILE])
    index = ImageIndex.load(tmp_path / INDEX_FILE, "index")
    rows = rows_of(hub).cast_column("image", datasets.Image(decode=False))
    for i, row in enumerate(rows):
        start, size = int(index.offsets[i]), int(index.sizes[i])
        assert files[index.names[int(index.files[i])]][start : start + size] == row["image"]["bytes"]


@pytest.mark.parametrize("seen", [False, True])
def test_without_a_connection_the_cache_is_shown_or_nothing(
    hub: Hub, pushed: MemoryWrapModel, seen: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    image = torch.randn(1, 3, 160, 160)
    if seen:
        for sample_id in pushed.memory_bank.ids:
            shown(pushed, sample_id)
    hub.fail("GET", "", times=1000, status=404)
    hub.fail("HEAD", "", times=1000, status=404)
    hub.fail("POST", "", times=1000, status=404)
    hub.requests.clear()
    caplog.clear()
    explanations = timm_memwrap.explain(pushed, image)
    html = write_html(pushed, image, explanations, tmp_path / "a.html").read_text()
    pictures = html.count("data:image")
    if seen:
        assert pictures > 1
        assert not hub.requests
        assert not warnings_in(caplog)
    else:
        assert pictures == 1
        (record,) = warnings_in(caplog)
        assert "shown without their pictures" in record.message
        assert REPO in record.message


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_another_process_without_a_connection_shows_what_is_in_the_cache(
    hub: Hub, pushed: MemoryWrapModel, run: Callable[..., str], environment: dict[str, str], tmp_path: Path
) -> None:
    timm_memwrap.save_pretrained(pushed, tmp_path / "model")
    seen, unseen = pushed.memory_bank.ids[:2]
    assert shown(pushed, seen) is not None
    code = f"""
import logging, sys, timm_memwrap
from timm_memwrap.explaining.stored_images import stored_images
logging.basicConfig(stream=sys.stdout)
stored = stored_images(timm_memwrap.from_pretrained({str(tmp_path / "model")!r}))
print(stored.picture({seen!r}).shape, stored.picture({unseen!r}), stored.picture({seen!r}).shape)
"""
    warning, pictures = run(code, **environment).splitlines()
    assert pictures == "(512, 341, 3) None (512, 341, 3)"
    assert warning.startswith("WARNING:timm_memwrap.hub.pinned_images:Samples are shown without their pictures")


def test_a_connection_that_breaks_for_one_picture_leaves_the_others(
    hub: Hub, pushed: MemoryWrapModel, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = pushed.memory_bank.ids[:2]
    stored = stored_images(pushed)
    assert stored.picture(first) is not None
    hub.fail("GET", "/objects/", times=1000, status=403)
    assert stored.picture(second) is None
    assert stored.picture(first) is not None
    assert stored.picture(second) is None
    assert len(warnings_in(caplog)) == 1
    # The first attempt failed, and no other was made.
    assert len([request for request in hub.sent("GET", "/objects/") if request.status == 403]) == 1


def test_figures_reports_and_correspondences_show_the_pictures(
    hub: Hub, pushed: MemoryWrapModel, photos: Path, tmp_path: Path
) -> None:
    image = photos / "cat" / "0000.jpg"
    (explanation,) = timm_memwrap.explain(pushed, image, correspondences=3)
    figure = plot_explanations(pushed, [image], [explanation])
    assert not [text for text in figure.texts if "no picture" in text.get_text()]
    assert any(sample.correspondences for sample in explanation.samples)
    html = write_html(pushed, [image], [explanation], tmp_path / "a.html").read_text()
    assert "no picture" not in html
    pushed.relabel({pushed.memory_bank.ids[0]: "eel"})
    found = memory_report(pushed, progress=False)
    assert found.findings
    assert "data:image" in write_memory_report(pushed, found, tmp_path / "b.html").read_text()


def test_correspondences_leave_out_samples_without_a_picture(hub: Hub, pushed: MemoryWrapModel) -> None:
    hub.fail("HEAD", "", times=1000, status=404)
    hub.fail("GET", "", times=1000, status=404)
    (explanation,) = timm_memwrap.explain(pushed, torch.randn(3, 160, 160), correspondences=3)
    assert explanation.samples
    assert not any(sample.correspondences for sample in explanation.samples)


@pytest.mark.parametrize("how", ["never pushed", "images inside", "dataset given"])
def test_nothing_is_asked_of_the_hub_without_need(
    hub: Hub, token: str, model: MemoryWrapModel, photos: Path, how: str
) -> None:
    if how != "never pushed":
        timm_memwrap.push_memory_images(model, REPO, data(photos), progress=False)
    bank = model.memory_bank
    if how == "images inside":
        encodings, labels = bank.filled()
        small = torch.zeros(COUNT, 3, 8, 8, dtype=torch.uint8)
        bank.replace(encodings, labels, bank.ids, small, bank.class_names, bank.provenance)
    hub.requests.clear()
    image = torch.randn(1, 3, 160, 160)
    plot_explanations(model, image, dataset=data(photos) if how == "dataset given" else None)
    assert not hub.requests


def test_the_pin_travels_with_the_model(hub: Hub, pushed: MemoryWrapModel, photos: Path, tmp_path: Path) -> None:
    pin = pushed.memory_bank.provenance.image_dataset
    timm_memwrap.save_pretrained(pushed, tmp_path / "saved")
    timm_memwrap.push_to_hub(pushed, "me/pets")
    for source in (tmp_path / "saved", "me/pets"):
        loaded = timm_memwrap.from_pretrained(source)
        assert loaded.memory_bank.provenance.image_dataset == pin
        assert shown(loaded, loaded.memory_bank.ids[3]) is not None
    files = hub.repos["me/pets"].files()
    assert json.loads(files["config.json"])[MEMORY_CONFIG_KEY]["image_dataset"] == pin
    repo, commit = pin.split("@")
    assert f"[`{repo}`](https://huggingface.co/datasets/{repo}/tree/{commit})" in files["README.md"].decode()
    assert pin in summarize("me/pets").report()
    # The pictures are those of the commit, whatever is pushed later.
    hub.commit(DATASET, {INDEX_FILE: b"", "data/train-00000-of-00001.parquet": b""})
    forget_downloads()
    assert shown(pushed, pushed.memory_bank.ids[3]) is not None
    # Other samples have other pictures.
    timm_memwrap.build_memory_bank(pushed, data(photos), size=6, progress=False)
    assert pushed.memory_bank.provenance.image_dataset == ""


def test_after_forgetting_and_remembering_no_sample_has_the_picture_of_another(
    hub: Hub, pushed: MemoryWrapModel, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bank = pushed.memory_bank
    gone, kept = bank.ids[0], bank.ids[5]
    pushed.forget(gone)
    # The same name, another picture; and a name of its own.
    pushed.remember(torch.randn(2, 3, 160, 160), ["cat", "cat"], ids=[gone, "new"], progress=False)
    assert shown(pushed, gone) is None
    assert shown(pushed, "new") is None
    assert np.abs(shown(pushed, kept).astype(int) - pixels_of(photos, kept)).mean() < 2
    assert not warnings_in(caplog)
    pushed.relabel({kept: "eel"})
    bank.store_as(torch.bfloat16)
    assert all((shown(pushed, each) is not None) == (each in bank.ids[:-2]) for each in bank.ids)


def test_samples_of_several_classes_have_lists_of_labels(hub: Hub, token: str) -> None:
    torch.manual_seed(0)
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3))
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    several = torch.utils.data.TensorDataset(torch.randn(4, 3, 64, 64), labels)
    timm_memwrap.build_memory_bank(model, several, size=None, progress=False, class_names=["cat", "dog", "dog"])
    timm_memwrap.push_memory_images(model, REPO, several, progress=False)
    rows = rows_of(hub)
    assert rows["label"][:] == [[0, 2], [], [1], [0, 1, 2]]
    # `datasets` takes no name twice.
    assert rows.features["label"].feature.names == ["cat", "dog", "dog (2)"]
    assert rows["id"][:] == [0, 1, 2, 3]
    assert {row["image"].format for row in rows} == {"PNG"}


def test_a_second_push_replaces_the_pictures_and_keeps_the_text(
    hub: Hub, pushed: MemoryWrapModel, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = hub.repos[DATASET].files()["README.md"].decode() + "\nMine.\n"
    hub.commit(DATASET, {"README.md": card.encode()})
    pushed.forget(pushed.memory_bank.ids[0])
    # Several files.
    monkeypatch.setattr(image_tables, "_FILE_BYTES", 10_000)
    timm_memwrap.push_memory_images(pushed, REPO, data(photos), max_size=256, progress=False)
    files = hub.repos[DATASET].files()
    tables = [path for path in files if path.startswith("data/")]
    assert len(tables) > 1
    assert all(re.fullmatch(rf"data/train-\d{{5}}-of-{len(tables):05}.parquet", path) for path in tables)
    assert "\nMine.\n" in files["README.md"].decode()
    rows = rows_of(hub)
    assert rows["id"][:] == pushed.memory_bank.ids
    assert max(rows[0]["image"].size) == 256
    assert all(shown(pushed, sample_id) is not None for sample_id in pushed.memory_bank.ids)


def refusals() -> Iterator[Any]:
    def no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN")

    def reader(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", hub.user("me", "read"))

    def of_another(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repo(DATASET)
        monkeypatch.setenv("HF_TOKEN", hub.user("you"))

    def something_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repo(DATASET, **{"train.csv": b"a,b"})

    def public(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repo(DATASET)

    def cut(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.fail("PUT", "/upload/", times=1000, cut_after=1000)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)

    def late(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.fail("POST", "/commit/", times=1000, status=400)

    def no_pyarrow(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)

    def nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        pass

    yield pytest.param(no_token, {}, (OSError, LocalTokenNotFoundError), "401|token", id="no token")
    yield pytest.param(reader, {}, HfHubHTTPError, "403", id="read-only token")
    yield pytest.param(of_another, {}, HfHubHTTPError, "403", id="another's")
    yield pytest.param(something_else, {}, ValueError, "holds something else.*train.csv", id="something else")
    yield pytest.param(public, {"private": True}, ValueError, "public", id="public")
    yield pytest.param(cut, {}, OSError, "upload", id="cut")
    yield pytest.param(late, {}, OSError, "busy", id="refused at the end")
    yield pytest.param(no_pyarrow, {}, ImportError, r"timm-memwrap\[images\]", id="without pyarrow")
    yield pytest.param(nothing, {"repo_id": "me/a b"}, ValueError, "not a valid repo id", id="name")
    yield pytest.param(nothing, {"max_size": 0}, ValueError, "max_size=0", id="too small")
    yield pytest.param(nothing, {"max_size": 10_000}, ValueError, "at most 8192", id="too large")
    yield pytest.param(nothing, {"dataset": {}}, ValueError, "12 of the 12 samples.*the first 'cat/", id="all missing")


@pytest.mark.parametrize(("prepare", "options", "error", "match"), list(refusals()))
def test_a_push_that_fails_leaves_everything_as_it_was(
    hub: Hub,
    token: str,
    model: MemoryWrapModel,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable,
    options: dict[str, Any],
    error: Any,
    match: str,
) -> None:
    prepare(hub, monkeypatch)
    options = {"repo_id": REPO, "dataset": data(photos), **options}
    before = {name: repo.files() for name, repo in hub.repos.items()}
    with pytest.raises(error, match=match):
        timm_memwrap.push_memory_images(model, progress=False, **options)
    assert model.memory_bank.provenance.image_dataset == ""
    for name, repo in hub.repos.items():
        assert repo.files() == before.get(name, {".gitattributes": repo.files()[".gitattributes"]})


def test_an_empty_memory_has_no_pictures_to_push(hub: Hub, token: str, photos: Path) -> None:
    model = timm_memwrap.wrap(timm.create_model("test_resnet", num_classes=3))
    with pytest.raises(ValueError, match="empty"):
        timm_memwrap.push_memory_images(model, REPO, data(photos), progress=False)
    assert not hub.repos


@pytest.mark.parametrize("private", [False, True])
def test_a_public_data_set_is_warned_of(
    hub: Hub, token: str, model: MemoryWrapModel, photos: Path, private: bool, caplog: pytest.LogCaptureFixture
) -> None:
    timm_memwrap.push_memory_images(model, REPO, data(photos), private=private, progress=False)
    assert hub.repos[DATASET].private == private
    assert ("visible to everyone" in caplog.text) != private
    assert shown(model, model.memory_bank.ids[0]) is not None


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "kind", ["not an image", "gif", "bomb", "short", "no index", "an index of something else", "pin"]
)
def test_a_damaged_or_foreign_data_set_is_warned_of(
    hub: Hub, pushed: MemoryWrapModel, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bank, repo = pushed.memory_bank, hub.repos[DATASET]
    name, files = "data/train-00000-of-00001.parquet", repo.files()
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    if kind == "pin":
        bank.set_provenance(image_dataset="../../evil@main")
    else:
        (tmp_path / INDEX_FILE).write_bytes(files[INDEX_FILE])
        index = ImageIndex.load(tmp_path / INDEX_FILE, "index")
        content = {"not an image": b"x" * 5000, "gif": gif.getvalue(), "bomb": bomb()}.get(kind, files[name])
        offset = len(content) if kind == "short" else 0 if kind in ("not an image", "gif", "bomb") else None
        if offset is not None:
            size = min(len(content), image_tables.MOST_BYTES)
            changed = (torch.full_like(index.offsets, offset), torch.full_like(index.sizes, size))
            ImageIndex(index.keys, index.files, *changed, index.names).save(tmp_path / INDEX_FILE)
        written: bytes | None = (tmp_path / INDEX_FILE).read_bytes()
        if kind == "no index":
            written = None
        elif kind == "an index of something else":
            written = b"PK"
        commit = hub.commit(DATASET, {name: content, INDEX_FILE: written})
        bank.set_provenance(image_dataset=f"{REPO}@{commit.oid}")
    caplog.clear()
    assert shown(pushed, bank.ids[0]) is None
    (record,) = warnings_in(caplog)
    assert record.levelno == logging.WARNING
    assert "shown without their pictures" in record.message
    assert str(tmp_path) not in record.message


def test_the_command_pushes_the_pictures_and_then_the_model(
    hub: Hub, token: str, model: MemoryWrapModel, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    timm_memwrap.save_pretrained(model, tmp_path / "model")
    folder = str(tmp_path / "model")
    assert main(["push", folder, "me/pets", "--images_to", REPO]) == 1
    assert "--memory_data" in capsys.readouterr().err
    assert main(["push", folder, "me/pets", "--images_to", REPO, "--memory_data", str(photos)]) == 0
    assert "12 remembered images" in capsys.readouterr().out
    pin = f"{REPO}@{hub.repos[DATASET].history()[0].oid}"
    for source in (folder, "me/pets"):
        assert timm_memwrap.from_pretrained(source).memory_bank.provenance.image_dataset == pin
