from collections import Counter

import pytest
import torch
from timm.data import Mixup

from timm_memwrap.data import open_dataset
from timm_memwrap.training.configuration import DataConfig, MemoryConfig
from timm_memwrap.training.loaders import augmented, check_batch_size, create_mixup, eval_loader, train_loader

CONFIG = {
    "input_size": (1, 8, 8),
    "interpolation": "bilinear",
    "mean": (0.5,),
    "std": (0.5,),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def _config(**kwargs: object) -> DataConfig:
    return DataConfig(dataset="digits", workers=0, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, **kwargs)


@pytest.fixture(scope="module")
def images():
    return open_dataset("digits", split="train", mode="L").subset(60)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_memory_of_a_step_holds_no_image_of_its_batch_and_none_twice(images, workers: int) -> None:
    config = _config(batch_size=20, color_jitter=0.0)
    loader = train_loader(augmented(images, config, CONFIG), config, MemoryConfig("sample", 40), workers)
    drawn = []
    for batch, _, extra in loader:
        assert extra["memory"].shape == (40, 1, 8, 8)
        rows = [tuple(image.flatten().tolist()) for image in torch.cat([batch, extra["memory"]])]
        # Without augmentation the 60 images of batch and memory are the 60 training images.
        assert len(set(rows)) == len({tuple(loader.dataset[i][0][0].flatten().tolist()) for i in range(60)})
        drawn.append(rows[20:])
    assert drawn[0] != drawn[1]


def test_positions_are_those_of_the_samples(images) -> None:
    config = _config(batch_size=20, color_jitter=0.0)
    loader = train_loader(augmented(images, config, CONFIG), config, MemoryConfig("queue", 10))
    for batch, labels, extra in loader:
        for image, label, position in zip(batch, labels, extra["positions"].tolist(), strict=True):
            assert label == images.targets[position]
            assert torch.equal(image, loader.dataset[position][0][0])


def test_shares_of_several_processes_are_all_images_once(images) -> None:
    labels = Counter()
    for rank in range(7):
        for _, part in eval_loader(images, _config(batch_size=4), CONFIG, rank, 7):
            labels.update(part.tolist())
    assert labels == Counter(images.targets)


def test_evaluation_has_no_randomness(images) -> None:
    first, second = (torch.cat([x for x, _ in eval_loader(images, _config(batch_size=7), CONFIG)]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("batch", {"batch_size": 1}, r"rest of the batch"),
        ("sample", {"batch_size": 30}, r"train_size=40.*batches of 30.*60 training images"),
        ("none", {"batch_size": 15, "mixup": 0.2}, r"batch_size=15 is odd"),
    ],
)
def test_batches_that_cannot_be_are_refused(images, mode: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch_size(_config(**options), MemoryConfig(mode, 40), len(images))


@pytest.mark.parametrize(("options", "expected"), [({}, 59), ({"mixup": 0.2}, 58)], ids=["plain", "mixup"])
def test_fewer_images_than_a_batch_are_one_batch(images, options: dict, expected: int) -> None:
    few, config = images.at(range(59)), _config(batch_size=128, **options)
    check_batch_size(config, MemoryConfig("none"), len(few))
    loader = train_loader(augmented(few, config, CONFIG), config, MemoryConfig("none"))
    assert [len(labels) for _, labels, _ in loader] == [expected]


def test_more_processes_than_images_are_refused(images) -> None:
    with pytest.raises(ValueError, match="60 training images are too few for 61 processes"):
        check_batch_size(_config(batch_size=4), MemoryConfig("none"), len(images), 61)


def test_a_batch_of_one_is_enough_without_memory(images) -> None:
    config = _config(batch_size=1)
    check_batch_size(config, MemoryConfig("none"), len(images))
    batch, _, extra = next(iter(train_loader(augmented(images, config, CONFIG), config, MemoryConfig("none"))))
    assert batch.shape == (1, 1, 8, 8)
    assert extra == {}


def test_mixup_is_timms_and_only_if_asked_for() -> None:
    assert create_mixup(_config(), 0.1, 10) is None
    mixup = create_mixup(_config(mixup=0.3, cutmix=1.0), 0.1, 10)
    assert isinstance(mixup, Mixup)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.3, 1.0, 0.1)


def test_augmentation_leaves_the_images_as_they_were(images) -> None:
    assert augmented(images, _config(), CONFIG)[3][0].shape == (1, 8, 8)
    assert images.transform is None


def test_what_is_drawn_depends_on_the_generator_alone(images) -> None:
    tensors = images.with_transform(lambda image: torch.tensor(list(image.tobytes())))
    draws = []
    for seed in (0, 0, 1):
        loader = train_loader(tensors, _config(batch_size=2), MemoryConfig("sample", 5))
        torch.manual_seed(seed)
        draws.append(next(iter(loader))[2]["memory"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
