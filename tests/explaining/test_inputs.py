"""Memory samples' images are found by id, and the dataset's names are read once."""

from collections.abc import Callable

import pytest
from PIL import Image
from torch.utils.data import Subset

from timm_memwrap.explaining.inputs import SampleImages
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
    samples = SampleImages(make_model("wrapped"), Subset(named, range(50)) if subset else named)
    assert [_position(samples, name) for name in names] == list(range(50))
    assert named.asked == 50


@pytest.mark.parametrize(
    ("sample_id", "position"),
    [
        ("a/1.png", 0),
        ("/elsewhere/train/b/1.png", 1),
        ("2.png", 2),  # as it is on the Hub, which gets no folders
        ("1.png", None),  # two files of that name
        ("c/1.png", None),
        ("d/4.png", None),  # two files of that name in folders of that name
        (1, 1),
        (5, None),
        (-1, None),
    ],
)
def test_an_id_finds_its_file_or_none(
    make_model: Callable[..., MemoryWrapModel], sample_id: int | str, position: int | None
) -> None:
    samples = SampleImages(make_model("wrapped"), _Named(["a/1.png", "b/1.png", "a/2.png", "x/d/4.png", "y/d/4.png"]))
    assert _position(samples, sample_id) == position
