"""Images become inputs as timm makes them, and pictures that look like the originals."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from timm_memwrap.data import data_config, enlarged, image_mode, one_by_one, small_images, to_batch, to_picture
from timm_memwrap.model import MemoryWrapModel

MakeModel = Callable[..., MemoryWrapModel]


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_the_data_config_has_a_mean_and_a_std_for_each_channel(make_model: MakeModel, in_chans: int) -> None:
    for model in (make_model(in_chans=in_chans), timm.create_model("test_resnet", in_chans=in_chans)):
        config, known = data_config(model), model.pretrained_cfg
        assert config["input_size"][0] == in_chans
        for key in ("mean", "std"):
            average = sum(known[key]) / len(known[key])
            assert config[key] == pytest.approx(known[key] if in_chans == 3 else (average,) * in_chans)


def test_images_are_read_in_grey_or_colour() -> None:
    assert (image_mode(1), image_mode(3)) == ("L", "RGB")
    with pytest.raises(ValueError, match="5 channels"):
        image_mode(5)


def _normalised(model: MemoryWrapModel, pictures: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(data_config(model)[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (pictures / 255 - mean) / std


def test_small_images_look_like_the_originals(make_model: MakeModel) -> None:
    # Smooth pictures: noise would not survive any resizing.
    ramp = torch.linspace(0, 255, 160).expand(3, 160, 160)
    pictures = torch.stack([ramp, ramp.mT, 255 - ramp])
    found = small_images(_normalised(make_model(), pictures), make_model())
    assert found.dtype == torch.uint8
    assert found.shape == (3, 3, 64, 64)
    small, got = (nn.functional.adaptive_avg_pool2d(images.float(), 16) for images in (pictures, found))
    assert float((small - got).abs().max()) < 3


@pytest.mark.parametrize("in_chans", [1, 3])
def test_small_images_that_are_small_stay_as_they_are(make_model: MakeModel, in_chans: int) -> None:
    model = make_model(in_chans=in_chans)
    pictures = torch.randint(256, (2, in_chans, 32, 20)).float()
    found = small_images(_normalised(model, pictures), model)
    assert torch.equal(found, pictures.to(torch.uint8))
    shown = to_picture(model, _normalised(model, pictures)[0])
    assert torch.equal(torch.from_numpy(shown.copy()), pictures[0].to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_enlarged_small_images_are_the_inputs_again(make_model: MakeModel, in_chans: int) -> None:
    model = make_model(in_chans=in_chans)
    pictures = torch.randint(256, (2, in_chans, 32, 20)).float()
    inputs = _normalised(model, pictures)
    assert torch.allclose(enlarged(small_images(inputs, model), model, (32, 20)), inputs, atol=1e-6)
    larger = enlarged(small_images(inputs, model), model, (96, 60))
    assert torch.allclose(larger[..., 1::3, 1::3], inputs, atol=1e-5)


def test_images_that_cannot_be_shown_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"5 channels.*store_images=False"):
        small_images(torch.zeros(1, 5, 8, 8), make_model(in_chans=5))


@pytest.mark.parametrize(
    ("images", "quoted"),
    [
        (torch.zeros(2, 2), r"shape \[2, 2\]"),
        (torch.zeros(0, 3, 8, 8), r"\[0, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "uint8"),
        ([torch.zeros(3, 8, 8), 7], "An image is int"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], "do not make a batch"),
        ("nowhere.png", "'nowhere.png' cannot be read"),
    ],
)
def test_images_that_do_not_fit_are_refused(make_model: MakeModel, images: object, quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        to_batch(make_model(), images)


def test_images_are_listed_one_by_one() -> None:
    assert len(one_by_one(torch.zeros(4, 3, 8, 8))) == 4
    assert len(one_by_one(torch.zeros(3, 8, 8))) == len(one_by_one("a.png")) == 1
    assert one_by_one(("a.png", "b.png")) == ["a.png", "b.png"]
