"""CSV files: what a line says of a picture, and what is refused."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from timm_memwrap.data import open_dataset, open_remembered, open_source, split_off
from timm_memwrap.data.tables import Table

FILES = ("a.png", "b.png", "deep/c.png", "d.png")
SEVERAL = "file,label,label\na.png,cat\nb.png,dog,cat\ndeep/c.png,\nd.png,fox 10,fox 9,cat\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i, name in enumerate(FILES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(root: Path, text: str, name: str = "train.csv", encoding: str = "utf-8") -> Path:
    path = root / name
    path.write_bytes(text.encode(encoding))
    return path


def test_a_picture_has_the_classes_of_its_line_or_none(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table = Table(write(root, SEVERAL))
    # As numbers in names count.
    assert table.classes == ["cat", "dog", "fox 9", "fox 10"]
    assert table.targets.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]]
    assert [table.filename(i) for i in range(len(table))] == list(FILES)
    assert table[3][0].getpixel((0, 0)) == (120, 0, 0)
    assert "1.5 labels each: cat 3, dog 1" in caplog.text


def test_one_label_column_says_one_class_each(root: Path) -> None:
    table = Table(write(root, "file_name,label\na.png,dog\nb.png,cat\n"))
    assert table.classes == ["cat", "dog"]
    assert table.targets == [1, 0]
    images = open_source(root / "train.csv", "")
    assert not images.multi_label
    assert images[0][1] == 1


def test_byte_order_marks_spaces_empty_lines_and_quotes_do_no_harm(root: Path) -> None:
    text = 'File, Label ,label\r\n\r\n"a.png"," cat, big ",dog\r\n'
    table = Table(write(root, text, encoding="utf-8-sig"))
    assert table.classes == ["cat, big", "dog"]
    assert table.targets.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"begins with \[\].*Expected a header"),
        ("a.png,cat\n", r"begins with \['a.png', 'cat'\].*file,label,label for several"),
        ("file,label,colour\na.png,cat,red\n", "column 'colour' that is not known"),
        ("file\na.png\n", "no column for labels"),
        ("file,label\n", "lists no pictures"),
        (
            "file,label\na.png,cat\nb.png,cat,dog\n",
            r"line 3 gives 'b.png' 2 labels, but the header file,label says one",
        ),
        ("file,label\na.png\n", "line 2 gives 'a.png' 0 labels"),
        ("file,label,label\na.png,cat,cat\n", "the same label twice"),
        ("file,label,label\na.png\n", "no picture a label"),
        ("file,label,label\n,cat\n", "line 2 names no file"),
        ("file,label,label\na.png,cat\n\n./a.png,dog\n", r"lists './a.png' in lines 2 and 4"),
        (
            "file,label,label\na.png,cat\nx.png,cat\ny.png,dog\n",
            r"2 of 3 pictures that are not there, e.g. \['x.png', 'y",
        ),
        ('file,label,label\na.png,"cat\n', "not a CSV file in UTF-8"),
    ],
)
def test_what_is_not_such_a_file_is_refused_with_the_line(root: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(write(root, text))


def test_a_file_that_is_not_utf_8_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        Table(write(root, "file,label,label\na.png,chaîne\n", encoding="latin-1"))


@pytest.mark.parametrize("split", ["validation", "val", "eval"])
def test_a_folder_has_a_csv_file_for_each_split(root: Path, split: str) -> None:
    write(root, SEVERAL)
    write(root, "file,label,label\na.png,dog\n", "val.csv")
    assert len(open_source(root, "train")) == len(open_remembered(root)) == 4
    known = open_source(root, "train").classes
    images = open_dataset("", root, split, known)
    assert images.classes == known
    assert images.targets.tolist() == [[0, 1, 0, 0]]
    with pytest.raises(ValueError, match="no folder 'test'"):
        open_source(root, "test")
    with pytest.raises(ValueError, match="'dog'"):
        open_dataset("", root, split, ["cat"])


def test_images_give_multi_hot_labels_as_losses_take_them(root: Path) -> None:
    images = open_source(write(root, SEVERAL), "")
    assert images.multi_label
    assert images.name == "train.csv"
    label = images[1][1]
    assert label.dtype == torch.float32
    assert label.tolist() == [1, 1, 0, 0]
    some = images.at([3, 2])
    assert some.targets.tolist() == [[1, 0, 1, 1], [0, 0, 0, 0]]
    assert some.filename(0) == "d.png"
    assert images.with_classes(["dog", "fox 10", "cat", "fox 9", "new"])[1][1].tolist() == [1, 0, 1, 0, 0]


def test_a_share_of_each_class_is_held_out(root: Path) -> None:
    names = [f"{i}.png" for i in range(60)]
    for name in names:
        Image.new("RGB", (4, 4)).save(root / name)
    lines = [f"{name},{'cat' if i % 2 else ''},{'dog' if i % 3 == 0 else ''}" for i, name in enumerate(names)]
    images = open_source(write(root, "\n".join(["file,label,label", *lines])), "")
    kept, held_out = split_off(images, 0.2, seed=1)
    assert len(kept) + len(held_out) == 60
    assert {*map(kept.filename, range(len(kept)))}.isdisjoint(map(held_out.filename, range(len(held_out))))
    whole = images.labels.sum(dim=0)
    assert (held_out.labels.sum(dim=0) / whole - 0.2).abs().max() <= 0.05
    assert abs((~held_out.labels.bool().any(dim=1)).sum() / 20 - 0.2) <= 0.1
    assert len(images.subset(10)) == 10
    with pytest.raises(ValueError, match="too few to hold out"):
        split_off(images.at([0, 1]), 0.1)
