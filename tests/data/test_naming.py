"""Ids name samples on every platform, and images of memory samples are found by them."""

from collections.abc import Callable
from pathlib import PureWindowsPath

import pytest
from PIL import Image
from torch.utils.data import Subset

from timm_memwrap.data import SampleImages, Samples, classes
from timm_memwrap.model import MemoryWrapModel


class _Named:
    """As timm's datasets: files have names. Counts how often it is asked for one."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.asked = names, 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (2, 2), (index, 0, 0)), 0

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        self.asked += 1
        return self.names[index]


def _position(samples: SampleImages, sample_id: int | str) -> int | None:
    picture = samples.picture(sample_id)
    return None if picture is None else int(picture[0, 0, 0])


@pytest.mark.parametrize("subset", [False, True])
def test_names_are_read_once_for_all_samples(make_model: Callable[..., MemoryWrapModel], subset: bool) -> None:
    names = [f"{i % 3}/{i}.png" for i in range(50)]
    named = _Named(names)
    samples = SampleImages(make_model(), Subset(named, range(50)) if subset else named)
    assert [_position(samples, name) for name in names] == list(range(50))
    assert named.asked == 50


@pytest.mark.parametrize(
    ("sample_id", "position"),
    [
        ("a/1.png", 0),
        ("/elsewhere/train/b/1.png", 1),
        ("C:\\elsewhere\\b\\1.png", 1),  # a bank from a machine with the other separator
        ("b\\1.png", 1),
        ("2.png", 2),  # as it is on the Hub, which gets no folders
        ("1.png", None),  # two files of that name
        ("c/1.png", None),
        ("d/4.png", None),  # two files of that name in folders of that name
        ("y/d/4.png", 4),
        (1, 1),
        (5, None),
        (-1, None),
    ],
)
def test_an_id_finds_its_file_or_none(
    make_model: Callable[..., MemoryWrapModel], sample_id: int | str, position: int | None
) -> None:
    samples = SampleImages(make_model(), _Named(["a/1.png", "b/1.png", "a/2.png", "x/d/4.png", "y/d/4.png"]))
    assert _position(samples, sample_id) == position


def test_ids_have_slashes_on_windows(
    make_model: Callable[..., MemoryWrapModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes, "PurePath", PureWindowsPath)
    named = _Named(["a\\1.png", "b\\1.png"])
    model = make_model()
    ids = Samples(named, model).ids([0, 1])
    assert ids == ["a/1.png", "b/1.png"]
    assert [_position(SampleImages(model, named), name) for name in ids] == [0, 1]
    folder = type("ImageFolder", (list,), {"samples": [("C:\\data\\a\\1.png", 0), ("C:\\data\\b\\1.png", 1)]})
    assert Samples(folder([(None, 0), (None, 1)]), model).ids([1, 0]) == ["b/1.png", "a/1.png"]


def test_files_that_names_do_not_tell_apart_are_numbered(make_model: Callable[..., MemoryWrapModel]) -> None:
    samples = Samples(_Named(["a/1.png", "a/1.png", "a/2.png"]), make_model())
    assert samples.ids(range(3)) == [0, 1, 2]
    assert samples.ids([1, 2]) == ["a/1.png", "a/2.png"]
