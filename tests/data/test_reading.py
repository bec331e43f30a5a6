"""Pictures are read in one way everywhere, or refused by name."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import timm_memwrap
from timm_memwrap.data import ImageError, open_dataset, read_picture, to_batch, to_picture
from timm_memwrap.model import MemoryWrapModel

RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_sixteen_bits_keeps_its_range(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(RAMP).save(path)
    expected = (RAMP >> 8).astype(np.uint8)
    assert np.array_equal(np.asarray(read_picture(path, "L", "it")), expected)
    assert np.array_equal(np.asarray(read_picture(path, "RGB", "it")), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_no_known_range_are_refused(dtype: Any, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 300, dtype=dtype)).save(tmp_path / "deep.tiff")
    with pytest.raises(ImageError, match=r"image 'deep\.tiff' cannot be read: its mode is '[IF]'"):
        read_picture(tmp_path / "deep.tiff", "RGB", "'deep.tiff'")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_camera_was_held(orientation: int, tmp_path: Path) -> None:
    straight = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    held = straight
    for step in undo.get(orientation, []):
        held = held.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    held.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "photo.png", "RGB", "it")), np.asarray(straight))


def test_all_readers_turn_it(make_model: Callable[..., MemoryWrapModel], tmp_path: Path) -> None:
    model, exif = make_model(), Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "train" / "cat" / "photo.png"
    path.parent.mkdir(parents=True)
    held = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype=np.uint8))
    held.save(path, exif=exif)
    straight = held.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(open_dataset("", tmp_path, "train")[0][0]), np.asarray(straight))
    assert np.array_equal(to_picture(model, path), np.asarray(straight))
    assert torch.equal(to_batch(model, path), to_batch(model, straight))
    assert torch.equal(to_batch(model, Image.open(path)), to_batch(model, straight))


def _png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("place", [0, 12, 16, 20, 29, 37, 45, 100, -10])
def test_a_damaged_picture_is_one_error_that_names_it(place: int, tmp_path: Path) -> None:
    """PIL raises SyntaxError, ValueError, OSError and others; or the damage changes pixels alone."""
    content = bytearray(_png())
    content[place] ^= 0xFF
    path = tmp_path / "bad.png"
    for damaged in (content, _png()[: 60 + abs(place)]):
        path.write_bytes(damaged)
        said = "The image 'bad.png' cannot be read: "
        try:
            found = read_picture(path, "RGB", "'bad.png'").mode
        except ImageError as error:
            found = str(error)
        assert found.startswith(("RGB", said))


def test_a_picture_is_not_resized_to_what_fills_the_memory(tmp_path: Path) -> None:
    Image.new("L", (1, 101)).save(tmp_path / "line.png")
    with pytest.raises(ImageError, match=r"'line' cannot be read: 1 by 101 pixels"):
        read_picture(tmp_path / "line.png", "RGB", "'line'")
    Image.new("L", (1, 100)).save(tmp_path / "line.png")
    read_picture(tmp_path / "line.png", "RGB", "'line'")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_a_memory_takes_pictures_of_any_mode(mode: str, make_model: Callable[..., MemoryWrapModel]) -> None:
    model = make_model()
    picture = Image.fromarray(RAMP) if mode == "I;16" else Image.new("RGB", (32, 32), "red").convert(mode)
    bank = timm_memwrap.build_memory_bank(model, [(picture, 0), (picture, 1)], size=None, progress=False)
    assert len(bank) == 2
    assert timm_memwrap.explain(model, picture)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused(value: float, make_model: Callable[..., MemoryWrapModel]) -> None:
    model, image = make_model(), torch.zeros(3, 32, 32)
    timm_memwrap.build_memory_bank(model, [(image, 0), (image, 1)], size=None, progress=False)
    image = image.clone()
    image[0, 0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        timm_memwrap.explain(model, image)
    with pytest.raises(ValueError, match="NaN or infinite"):
        timm_memwrap.build_memory_bank(model, [(image, 0)], size=None, progress=False)


def test_the_error_of_a_worker_is_the_same_line(folder: Path) -> None:
    (folder / "train" / "cat" / "003.png").write_bytes(b"no image")
    images = open_dataset("", folder, "train").with_transform(np.asarray)
    raised = []
    for workers in (0, 1):
        with pytest.raises(ImageError) as caught:
            list(DataLoader(images, num_workers=workers))
        raised.append(str(caught.value))
    assert raised[0] == raised[1]
    assert raised[0].startswith("The image 'cat/003.png' of ")
    assert "\n" not in raised[0]
