import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from training_images import CLASSES, write_images

import timm_memwrap
from timm_memwrap.data import Images, open_dataset, open_remembered, open_source, opening, split_off


def test_a_folder_gives_images_labels_names_and_files(folder: Path) -> None:
    images = open_dataset("", folder, "train")
    assert images.classes == sorted(CLASSES, key=str.lower) or images.classes == sorted(CLASSES)
    assert len(images) == 36
    for i in (0, 17, 35):
        image, label = images[i]
        assert image.mode == "RGB"
        assert images.filename(i).split("/")[0] == images.classes[label]


def test_a_tar_file_is_the_same_as_its_folder(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as file:
        file.add(folder / "train", arcname="train")
    packed, unpacked = open_dataset("", path, "train"), open_dataset("", folder, "train")
    assert packed.classes == unpacked.classes
    assert packed.targets == unpacked.targets
    assert packed[5][0].tobytes() == unpacked[5][0].tobytes()
    assert not list(tmp_path.glob("*pickle*"))


def test_labels_follow_the_classes_of_the_training_images(folder: Path) -> None:
    order = ["dog", "Zebra", "cat"]
    images = open_dataset("", folder, "validation", classes=order)
    assert images.classes == order
    for i in range(len(images)):
        assert order[images.targets[i]] == images.filename(i).split("/")[0]


def test_some_of_the_classes_are_enough(folder: Path) -> None:
    known = open_dataset("", folder, "train").classes
    for file in (folder / "validation" / known[0]).iterdir():
        file.unlink()
    images = open_dataset("", folder, "validation", classes=known)
    assert images.classes == known
    assert set(images.targets) == {1, 2}


def test_classes_that_nobody_knows_are_refused_and_not_left_out(folder: Path) -> None:
    known = open_dataset("", folder, "train").classes
    write_images(folder / "validation", 1, ("fish",))
    with pytest.raises(ValueError, match="'fish'"):
        open_dataset("", folder, "validation", classes=known)


def test_what_is_remembered_is_the_training_split_or_the_folder_itself(folder: Path) -> None:
    assert len(open_remembered(folder)) == len(open_remembered(folder / "train")) == 36
    assert len(open_remembered("digits")) == 1442


def test_a_split_that_is_not_there_is_never_the_whole_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder 'test'.*'train', 'validation'"):
        open_dataset("", folder, "test")
    assert len(open_dataset("", folder / "train", "")) == 36


@pytest.mark.parametrize(
    ("dataset", "data_dir", "message"),
    [
        ("", None, "No data"),
        ("", "nowhere", "no 'nowhere'"),
        ("numbers", None, "Unknown dataset='numbers'"),
        ("tfds/mine", None, "stream"),
        ("wds/mine", "nowhere", "no shards"),
        ("torch/nothing", None, "torch/nothing"),
    ],
)
def test_what_is_not_there_is_refused_and_named(dataset: str, data_dir: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        open_dataset(dataset, data_dir)


@pytest.mark.parametrize("names", [True, False], ids=["names", "indices"])
def test_shards_give_what_is_in_them_in_any_order(folder: Path, tmp_path: Path, names: bool) -> None:
    import io

    plain = open_dataset("", folder, "train")
    paths = []
    for part in range(3):
        path = tmp_path / f"pets-train-{part:04}.tar"
        with tarfile.open(path, "w") as file:
            for i in range(part, len(plain), 3):
                label = plain.classes[plain.targets[i]] if names else str(plain.targets[i])
                content = (folder / "train" / plain.filename(i)).read_bytes()
                for suffix, data in (("png", content), ("cls", label.encode()), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
        paths.append(path)
    packed = open_dataset("wds/pets", tmp_path, "train")
    assert len(packed) == len(plain)
    assert packed.classes == (sorted(plain.classes) if names else ["0", "1", "2"])
    assert packed.filename(0) == "pets-train-0000.tar/000000.png"
    for i in (35, 0, 17):
        original = int(PurePosixPath(packed.filename(i)).stem)
        assert packed[i][0].tobytes() == plain[original][0].tobytes()
        name = plain.classes[plain.targets[original]]
        assert packed.classes[packed.targets[i]] == (name if names else str(plain.targets[original]))

    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"pets-train-0001\.tar"):
        open_dataset("wds/pets", tmp_path, "train")


def test_torchvisions_data_sets_are_read_through_timm(folder: Path) -> None:
    images = open_dataset("torch/image_folder", folder, "train")
    assert len(images) == 36
    assert images.classes == sorted(CLASSES)
    assert images[0][0].mode == "RGB"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        open_dataset("", tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_an_unreadable_image_is_named_or_left_out_and_never_another_in_its_place(
    folder: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "train" / "cat" / "003.png"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    images = open_dataset("", folder, "train")
    bad = next(i for i in range(len(images)) if images.filename(i) == "cat/003.png")
    with pytest.raises(ValueError, match=r"cat/003\.png.*cannot be read.*unreadable"):
        images[bad]
    kept = images.readable(progress=False)
    assert len(kept) == 35
    assert "cat/003.png" not in [kept.filename(i) for i in range(len(kept))]
    assert "1 of 36 images" in caplog.text


def test_a_subset_has_as_many_of_each_class_and_is_the_same_again() -> None:
    images = open_dataset("digits", split="train")
    first, again, other = (images.subset(50, seed) for seed in (0, 0, 1))
    assert set(Counter(first.targets).values()) == {5}
    assert first.positions == again.positions != other.positions
    assert len(images.subset(2000)) == 1442


def test_what_is_held_out_is_of_every_class_and_in_neither_twice() -> None:
    images = open_dataset("digits", split="train")
    train, held_out = split_off(images, 0.1, seed=3)
    assert sorted(train.positions + held_out.positions) == images.positions
    assert set(Counter(held_out.targets)) == set(range(10))
    assert len(held_out) == pytest.approx(0.1 * len(images), abs=10)
    with pytest.raises(ValueError, match=r"1\.5"):
        split_off(images, 1.5)


def test_a_class_of_one_image_cannot_be_divided(folder: Path) -> None:
    write_images(folder / "train", 1, ("ant",))
    with pytest.raises(ValueError, match="one image"):
        split_off(open_dataset("", folder, "train"), 0.5)


def test_the_bank_of_such_images_names_their_files(folder: Path) -> None:
    import timm

    model = timm.create_model("memwrap_test_resnet", num_classes=3)
    images: Images = open_source(folder, "train")
    bank = timm_memwrap.build_memory_bank(model, images, size=6, progress=False)
    assert all((folder / "train" / str(name)).is_file() for name in bank.ids)
    assert bank.class_names == images.classes


def test_a_missing_library_of_a_data_set_is_named(capsys: pytest.CaptureFixture) -> None:
    if find_spec("datasets") is not None:
        pytest.skip("datasets is installed")
    with pytest.raises(ImportError, match=r"dataset='hfds/me/cats' needs .*pip install datasets"):
        open_dataset("hfds/me/cats")
    assert capsys.readouterr().out == ""  # timm prints


@pytest.mark.parametrize("column", ["label", "labels"])
def test_labels_of_a_hub_data_set_are_in_either_column(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        class_to_idx: ClassVar = {"cat": 0, "dog": 1}

        def __init__(self, key: str) -> None:
            self.dataset, self.key = SimpleNamespace(features={"image": None, column: None}), key

        def __len__(self) -> int:
            return 3

        def iter_targets(self) -> Iterator[list[int]]:
            assert self.key == column
            yield from ([0, 1], [], [1])

    def create(name: str, root: str | None, split: str, target_key: str = "label") -> Any:
        return Found(Reader(target_key))

    class Found:
        def __init__(self, reader: Reader) -> None:
            self.reader = reader

        def __len__(self) -> int:
            return len(self.reader)

    monkeypatch.setattr(opening, "create_dataset", create)
    monkeypatch.setattr(opening, "find_spec", lambda name: True)
    images = open_source("hfds/me/pets", "train")
    assert images.classes == ["cat", "dog"]
    assert images.targets.tolist() == [[1, 1], [0, 0], [0, 1]]
    column = "tags"
    with pytest.raises(ValueError, match=r"columns \['image', 'tags'\], none of which is 'label' or 'labels'"):
        open_source("hfds/me/pets", "train")
