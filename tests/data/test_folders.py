"""Class folders: which classes there are, what belongs to them, and what was left out."""

import logging
import os
from pathlib import Path

import pytest
from PIL import Image
from timm.data import ImageDataset

from timm_memwrap.data import SUFFIXES
from timm_memwrap.data.folders import Folder


def _write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in SUFFIXES:
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text("text")


def test_the_order_is_timms(folder: Path) -> None:
    _write(folder / "train" / "10" / "1.png", folder / "train" / "2" / "10.png", folder / "train" / "2" / "9.png")
    ours, timms = Folder(folder / "train"), ImageDataset(str(folder / "train"))
    assert [ours.filename(i) for i in range(len(ours))] == [timms.filename(i) for i in range(len(timms))]
    assert ours.targets == [target for _, target in timms.reader.samples]
    assert ours.classes == list(timms.reader.class_to_idx)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".JPG"])
def test_pictures_of_all_formats_are_read(suffix: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix.lower()}")
    (tmp_path / "cat").mkdir()
    os.rename(tmp_path / f"a{suffix.lower()}", tmp_path / "cat" / f"a{suffix}")
    assert Folder(tmp_path)[0][0].size == (8, 8)


def test_what_is_found_and_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "pets"
    _write(
        root / "cat" / "1.png",
        root / "cat" / "indoor" / "2.png",
        root / "cat" / ".ipynb_checkpoints" / "1.png",
        root / "cat" / "notes.txt",
        root / "dog" / "1.png",
        root / ".ipynb_checkpoints" / "1.png",
        root / "stray.png",
        root / "README.md",
        root / ".DS_Store",
    )
    (root / "empty").mkdir()
    with caplog.at_level(logging.INFO):
        images = Folder(root)
    assert images.classes == ["cat", "dog"]
    assert sorted(images.filename(i) for i in range(len(images))) == ["cat/1.png", "cat/indoor/2.png", "dog/1.png"]
    assert images.targets == [0, 0, 1]
    text = caplog.text
    assert "pets: 3 images of 2 classes: cat 2, dog 1" in text
    assert "no images for empty, which are no classes" in text
    assert "left out " in text
    for what in ("1 of .txt", "1 of .png in no class folder", "1 of .md in no class folder"):
        assert what in text
    assert "1 images lie in folders inside their class folder, e.g. cat/indoor/2.png" in text


def test_a_link_that_leads_back_ends(tmp_path: Path) -> None:
    _write(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    assert len(Folder(tmp_path)) == 1


def test_a_folder_without_pictures_is_refused_with_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "cat" / "notes.txt")
    with pytest.raises(ValueError, match=r"no images in class folders.*\.webp"):
        Folder(tmp_path)
    assert "1 of .txt" in caplog.text
