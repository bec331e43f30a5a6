"""Nothing that leaves the machine says where on it anything was, or whose machine it is."""

import base64
import getpass
import io
import itertools
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import timm_memwrap
from timm_memwrap.cli import main
from timm_memwrap.hub import pull
from timm_memwrap.sample_ids import public_ids, short_name

# Some are what another with a number would become.
NAMES = ("a.png", "a.png (2)", "a.png (2) (2)", "a.png (4)", "b.png")


def unpacked(content: bytes) -> Iterator[bytes]:
    """Yields a file and all that is packed in it."""
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            for name in file.namelist():
                yield name.encode()
                yield from unpacked(file.read(name))
    elif content.startswith(b"\x89PNG"):
        yield repr(Image.open(io.BytesIO(content)).info).encode()
    for packed in re.findall(rb"base64,([A-Za-z0-9+/=]+)", content):
        yield from unpacked(base64.b64decode(packed))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user, with a data set and a trained classifier."""
    home = tmp_path / "home" / "jane.7f3a"
    for number in range(24):
        split, kind = "val" if number < 6 else "train", ("cat", "dog", "eel")[number % 3]
        path = home / "private" / "pets" / split / kind / f"{number // 3:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 10 * number + 10).convert("RGB").save(path)
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=3), home / "private" / "plain")
    monkeypatch.setenv("HOME", str(home))
    for name in ("USER", "LOGNAME", "USERNAME", "LNAME"):
        monkeypatch.setenv(name, home.name)
    monkeypatch.chdir(home)
    assert getpass.getuser() == Path.home().name == home.name
    return home


def test_no_file_that_leaves_the_machine_holds_a_path_of_it(hub: Hub, token: str, home: Path) -> None:
    private, out = home / "private", home / "made"
    data, model = private / "pets", out / "model"
    for command in (
        f"wrap {private}/plain --data {data} --val_split val --out {model}",
        f"push {model} me/folder --include_images true",
        f"export {model} --out {out}/model.onnx --with_evidence true",
        f"export {model} --out {out}/model.pt2 --format export",
        f"explain {model} {data}/val/cat --memory_data {data} --out {out}/explained.html --heatmaps saliency",
        f"report {model} --data {data} --split val --memory_data {data} --out {out}/report.png",
    ):
        assert main(command.split()) == 0, command
    loaded = timm_memwrap.from_pretrained(model)
    loaded.push_to_hub("me/model", model_card={"accuracy": 0.5})
    loaded.memory_bank.save(out / "bank.safetensors")
    pull("me/model", out / "pulled")

    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, repo in hub.repos.items():
        files |= {f"{name}/{path}": content for path, content in repo.files().items()}
    places = (home.parents[1], tempfile.gettempdir() + "/", Path(timm_memwrap.__file__).parents[1], sys.prefix)
    secrets = {home.name, private.name, *map(str, places)}
    found = [
        (name, secret)
        for name, content in files.items()
        for part in unpacked(content)
        for secret in secrets
        if secret.encode() in part
    ]
    assert not found
    kinds = {Path(name).suffix for name in files}
    assert kinds >= {".safetensors", ".json", ".md", ".onnx", ".pt2", ".html", ".png"}


def _one_by_one(ids: list[int | str]) -> list[int | str]:
    """Published ids by their definition: the first of a name and its numbers that no id before has, nor any kept."""
    taken = {i for i in ids if isinstance(i, int) or short_name(i) == i}
    public: list[int | str] = []
    for old in ids:
        name = old if isinstance(old, int) else short_name(old)
        candidates = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        public.append(old if name == old else next(each for each in candidates if each not in taken))
        taken.add(public[-1])
    return public


@given(st.lists(st.sampled_from([3, *(f"{a}{b}" for a in ("", "/x/", "/y/", "z/") for b in NAMES)]), unique=True))
@settings(derandomize=True)
def test_published_ids_are_unique_and_the_first_that_are_free(ids: list[int | str]) -> None:
    public = public_ids(ids, [""] * len(ids))
    assert len(set(public)) == len(ids)
    assert public == _one_by_one(ids)
