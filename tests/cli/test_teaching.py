"""The commands remember and forget: what the saved model then is, and that an error is one line and changes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from training_images import write_noise

import timm_memwrap
from timm_memwrap.cli import main
from timm_memwrap.constants import MEMORY_CONFIG_KEY
from timm_memwrap.data import open_source

CLASSES = ["ant", "bee", "cow"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model`, and images in `data`, of which its memory is, and in `more`."""
    root = tmp_path_factory.mktemp("place")
    write_noise(root / "data", dict.fromkeys(CLASSES, 1), 4, seed=0, prefix="0-")
    write_noise(root / "more", dict.fromkeys(["bee", "yak", "zebra"], 1), 2, seed=1, prefix="1-")
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    model = timm_memwrap.wrap(backbone).eval()
    timm_memwrap.build_memory_bank(model, open_source(root / "data", ""), size=None, progress=False)
    timm_memwrap.save_pretrained(model, root / "model")
    return root


@pytest.fixture
def saved(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "model", tmp_path / "model"))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_are_remembered_with_their_classes(place: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remember", str(saved), str(place / "more")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "Remembered 2 of bee.",
        "Remembered 2 of yak, a new class.",
        "Remembered 2 of zebra, a new class.",
    ]
    assert printed[3] == f"The memory has 18 samples of 5 classes. Saved in {saved}."
    model = timm.create_model(f"local-dir:{saved}", pretrained=True)
    assert model.memory_bank.class_names == [*CLASSES, "yak", "zebra"]
    assert model.memory_bank.ids[12:] == [f"{name}/1-{i}.png" for name in ("bee", "yak", "zebra") for i in range(2)]
    config = json.loads((saved / "config.json").read_text())
    assert config["num_classes"] == 5
    assert config["label_names"] == [*CLASSES, "yak", "zebra"]
    assert config[MEMORY_CONFIG_KEY]["class_counts"] == {"0": 4, "1": 6, "2": 4, "3": 2, "4": 2}
    card = (saved / "README.md").read_text()
    assert "| zebra | 2 |" in card
    assert "6 appended since" in card


def test_images_without_folders_for_classes_get_the_class_that_is_given(
    place: Path, saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = _files(saved)
    assert main(["remember", str(saved), str(place / "more" / "yak"), "--label", "emu", "--out", str(out)]) == 0
    assert _files(saved) == before
    bank = timm_memwrap.from_pretrained(out).memory_bank
    assert bank.class_names == [*CLASSES, "emu"]
    assert bank.ids[12:] == ["1-0.png", "1-1.png"]


def test_samples_and_classes_are_forgotten(place: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remember", str(saved), str(place / "more")]) == 0
    args = ["forget", str(saved), "ant/0-0.png", "bee/1-1.png", "--classes", "[yak]"]
    assert main(args) == 0
    assert "Forgot 4 samples" in capsys.readouterr().out
    model = timm_memwrap.from_pretrained(saved)
    assert model.num_classes == 4
    assert model.memory_bank.class_names == [*CLASSES, "zebra"]
    assert model.memory_bank.class_counts == {0: 3, 1: 5, 2: 4, 3: 2}


def test_ids_may_be_numbers(place: Path, tmp_path: Path) -> None:
    model = timm_memwrap.from_pretrained(place / "model")
    encodings, labels = model.memory_bank.filled()
    model.memory_bank.replace(encodings, labels, [*range(11), "12"])
    timm_memwrap.save_pretrained(model, tmp_path, allow_empty_memory=False)
    assert main(["forget", str(tmp_path), "3", "12"]) == 0
    assert timm_memwrap.from_pretrained(tmp_path).memory_bank.ids == [0, 1, 2, *range(4, 11)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["remember", "MODEL", "DATA"], "has 'ant/0-0.png', "),
        (["remember", "MODEL", "EMPTY"], "holds no images"),
        (["remember", "MODEL", "EMPTY", "--label", "emu"], "holds no images"),
        (["remember", "MODEL", "nowhere"], "'nowhere' is not a directory"),
        (["remember", "me/model", "DATA"], "Pass --out FOLDER"),
        (["forget", "MODEL", "bee/9.png"], "No sample with id 'bee/9.png'"),
        (["forget", "MODEL", "--classes", "[emu]"], "'emu' is neither"),
        (["forget", "MODEL"], "Nothing to forget"),
        (["forget", "MODEL", "--classes", "[ant,bee,cow]"], "would leave"),
        (["forget", "MODEL", "--from", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    args: list[str], message: str, place: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    before = _files(saved)
    places = {"MODEL": str(saved), "DATA": str(place / "data"), "EMPTY": str(tmp_path / "empty")}
    assert main([places.get(arg, arg) for arg in args]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert error.startswith("timm-memwrap: ")
    assert _files(saved) == before
