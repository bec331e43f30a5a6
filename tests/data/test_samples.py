"""Samples are those that their positions, ids and labels name, whatever the data comes in."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform
from timm.data.loader import MultiEpochsDataLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import timm_memwrap
from timm_memwrap.data import Samples, data_config, encoded_batches, size_of
from timm_memwrap.model import MemoryWrapModel

N = 24
MakeModel = Callable[..., MemoryWrapModel]


def _data(size: int = N) -> TensorDataset:
    """Images whose pixels are their position."""
    return TensorDataset(torch.arange(size).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8), torch.arange(size) % 3)


class _Pictures(Dataset):
    """PIL images whose pixels are their position, as timm's data sets give."""

    def __init__(self, size: int = N, mode: str = "RGB") -> None:
        self.size, self.mode, self.transform = size, mode, None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.new("L", (32, 32), index).convert(self.mode)
        return image if self.transform is None else self.transform(image), index % 3


class _Stream(IterableDataset):
    """In an order of its own, and, as timm's streams, with a length."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from (_data()[i] for i in reversed(range(N)))


class _Negating(DataLoader):
    """A loader that does something to each batch."""

    def __iter__(self) -> Iterator[Any]:
        for images, labels in super().__iter__():
            yield -images, labels


class _ByClass(Sampler[list[int]]):
    """A batch sampler that draws as many samples of each class."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([i, i + 1, i + 2] for i in range(N - 3, -1, -3))

    def __len__(self) -> int:
        return N // 3


def _prefetching(**kwargs: Any) -> Any:
    return create_loader(
        _Pictures(),
        (3, 32, 32),
        batch_size=5,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        no_aug=True,
        num_workers=0,
        device=torch.device("cpu"),
        **kwargs,
    )


def _running(loader: DataLoader) -> DataLoader:
    next(iter(loader))
    return loader


# By the factor that a loader multiplies images with.
LOADERS: dict[str, tuple[Callable[[], Any], float]] = {
    "data set": (_data, 1),
    "in order": (lambda: DataLoader(_data(), batch_size=5), 1),
    "shuffled": (lambda: DataLoader(_data(), batch_size=5, shuffle=True), 1),
    "dropping the last batch": (lambda: DataLoader(_data(), batch_size=7, shuffle=True, drop_last=True), 1),
    "workers": (lambda: DataLoader(_data(), batch_size=5, shuffle=True, num_workers=2, persistent_workers=True), 1),
    "subclass": (lambda: _Negating(_data(), batch_size=5), -1),
    "shuffled subclass": (lambda: _Negating(_data(), batch_size=5, shuffle=True), -1),
    "multi-epoch": (lambda: MultiEpochsDataLoader(_data(), batch_size=5, shuffle=True), 1),
    "running multi-epoch": (lambda: _running(MultiEpochsDataLoader(_data(), batch_size=5, shuffle=True)), 1),
    "prefetching": (_prefetching, 1 / 255),
    "shuffled prefetching": (lambda: _prefetching(is_training=True), 1 / 255),
    "without prefetcher": (lambda: _prefetching(is_training=True, use_prefetcher=False), 1 / 255),
    "multi-epoch prefetching": (lambda: _prefetching(is_training=True, use_multi_epochs_loader=True), 1 / 255),
    "weighted": (lambda: DataLoader(_data(), 5, sampler=WeightedRandomSampler([1.0] * N, N)), 1),
    "with replacement": (lambda: DataLoader(_data(), 5, sampler=RandomSampler(_data(), replacement=True)), 1),
    "some at random": (lambda: DataLoader(_data(), 5, sampler=RandomSampler(_data(), num_samples=7)), 1),
    "a process's share": (lambda: DataLoader(_data(), 5, sampler=DistributedSampler(_data(), 2, 0)), 1),
    "batch sampler": (lambda: DataLoader(_data(), batch_sampler=BatchSampler(RandomSampler(_data()), 5, True)), 1),
    "by class": (lambda: DataLoader(_data(), batch_sampler=_ByClass()), 1),
}


def _read(samples: Samples, positions: list[int] | None = None) -> tuple[list[int], list[int]]:
    batches = list(samples.batches(positions))
    return (
        torch.cat([images[:, 0, 0, 0] for images, _ in batches]).tolist(),
        torch.cat([labels for _, labels in batches]).tolist(),
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_ids_are_those_of_the_samples_read(make_model: MakeModel, loader: str) -> None:
    make, factor = LOADERS[loader]
    samples = Samples(make(), make_model())
    assert samples.length == N
    images, labels = _read(samples)
    assert images == pytest.approx([factor * i for i in samples.ids(range(N))], abs=1e-4)
    assert labels == [i % 3 for i in range(N)]
    assert samples.ids([20, 4]) == [20, 4]
    assert _read(samples, [20, 4])[0] == pytest.approx([factor * 20, factor * 4], abs=1e-4)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_bank_remembers_the_samples_that_its_ids_name(make_model: MakeModel, loader: str) -> None:
    make, factor = LOADERS[loader]
    model = make_model()
    bank = timm_memwrap.build_memory_bank(model, make(), size=None, progress=False)
    assert sorted(bank.ids) == list(range(N))
    side = 8 if "prefetch" not in loader else 32
    images = torch.tensor(bank.ids).float().view(-1, 1, 1, 1).expand(-1, 3, side, side) * factor
    with torch.no_grad():
        expected = model.encode(images)
    torch.testing.assert_close(bank.encodings, expected, atol=1e-4, rtol=1e-4)
    assert bank.labels.tolist() == [i % 3 for i in bank.ids]


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ("weighted", "WeightedRandomSampler"),
        ("with replacement", "RandomSampler"),
        ("some at random", "RandomSampler"),
        ("a process's share", "DistributedSampler"),
        ("by class", "_ByClass"),
        ("shuffled", None),
        ("batch sampler", None),
        ("shuffled prefetching", None),
    ],
)
def test_a_sampler_that_is_passed_over_is_logged(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, loader: str, said: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        Samples(LOADERS[loader][0](), make_model())
    assert bool(caplog.text) == (said is not None)
    assert (said or "") in caplog.text


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(_data(), sampler=SubsetRandomSampler([8, 3, 5])),
        lambda: DataLoader(_data(), sampler=SubsetRandomSampler(torch.tensor([8, 3, 5]))),
        lambda: DataLoader(_data(), sampler=[8, 3, 5, 3]),
        lambda: DataLoader(_data(), sampler=np.array([8, 3, 5])),
        lambda: DataLoader(_data(), batch_sampler=[[8, 3], [5]]),
    ],
)
def test_a_sampler_of_fixed_positions_limits_the_samples(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, loader: Callable[[], DataLoader]
) -> None:
    samples = Samples(loader(), make_model())
    assert samples.length == size_of(loader()) == 3
    assert samples.ids(range(3)) == [3, 5, 8]
    assert _read(samples) == ([3, 5, 8], [0, 2, 2])
    assert _read(samples, [2]) == ([8], [2])
    assert not caplog.text


def test_a_subset_has_positions_of_its_own(make_model: MakeModel) -> None:
    samples = Samples(Subset(_data(), [20, 4, 7]), make_model())
    assert samples.ids(range(3)) == [0, 1, 2]
    assert _read(samples)[0] == [20, 4, 7]
    assert samples.name == "TensorDataset"


@pytest.mark.parametrize(
    "stream", [_Stream, lambda: DataLoader(_Stream(), batch_size=5), lambda: iter(DataLoader(_Stream(), batch_size=5))]
)
def test_samples_of_a_stream_are_numbered_as_they_come(make_model: MakeModel, stream: Callable[[], Any]) -> None:
    samples = Samples(stream(), make_model())
    assert samples.length is None
    assert samples.labels is None
    assert samples.ids(range(N)) == list(range(N))
    assert _read(samples)[0] == list(reversed(range(N)))


class _Elsewhere(DataLoader):
    """Reads its data set in an order of its own."""

    def __iter__(self) -> Iterator[Any]:
        yield from (self.collate_fn([self.dataset[i]]) for i in reversed(range(N)))


class _Foreign:
    def __init__(self) -> None:
        self.dataset = _data()

    def __iter__(self) -> Iterator[Any]:
        yield from DataLoader(self.dataset, batch_size=5, shuffle=True)


@pytest.mark.parametrize(
    "loader",
    [_Foreign, lambda: DataLoader(_data(), batch_size=None), lambda: _Elsewhere(_data(), batch_size=5)],
    ids=["foreign", "without batches", "another order"],
)
def test_loaders_of_unknown_order_are_refused_unless_numbered_as_read(
    make_model: MakeModel, loader: Callable[[], Any]
) -> None:
    with pytest.raises(ValueError, match=r"told apart.*iter\(loader\)"):
        _read(Samples(loader(), make_model()))
    if not isinstance(loader(), DataLoader) or loader().batch_size:
        assert len(_read(Samples(iter(loader()), make_model()))[0]) == N


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA"])
@pytest.mark.parametrize("wrapped", ["data set", "loader"])
def test_pil_images_are_converted_and_transformed_for_the_model(
    make_model: MakeModel, in_chans: int, mode: str, wrapped: str
) -> None:
    model = make_model(in_chans=in_chans)
    pictures = _Pictures(4, mode)
    data: Any = pictures if wrapped == "data set" else DataLoader(pictures, batch_size=3, shuffle=True)
    transform = create_transform(**data_config(model))
    expected = torch.stack(
        [transform(Image.new("L" if in_chans == 1 else "RGB", (32, 32), (i,) * in_chans)) for i in range(4)]
    )
    images = torch.cat([images for images, _ in Samples(data, model).batches()])
    assert torch.equal(images, expected)
    bank = timm_memwrap.build_memory_bank(model, data, size=None, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(bank.encodings, model.encode(expected), atol=1e-5, rtol=1e-5)
        encodings = torch.cat([encoding for encoding, _ in encoded_batches(model, data)])
        torch.testing.assert_close(encodings, model.encode(expected), atol=1e-5, rtol=1e-5)


def test_a_loaders_own_collate_function_gets_the_images_as_they_are(make_model: MakeModel) -> None:
    def collate(samples: list[tuple[Image.Image, int]]) -> tuple[Tensor, Tensor]:
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image, _ in samples]
        return torch.stack(pixels), torch.tensor([label for _, label in samples])

    loader = DataLoader(_Pictures(), batch_size=5, shuffle=True, collate_fn=collate)
    assert _read(Samples(loader, make_model()))[0] == list(range(N))


def test_timms_default_loader_gives_what_the_models_transform_does(make_model: MakeModel, folder: Path) -> None:
    model = make_model()
    config = data_config(model)
    loader = create_loader(
        ImageDataset(str(folder / "train")),
        config["input_size"],
        batch_size=5,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        num_workers=0,
        device=torch.device("cpu"),
    )
    ours = Samples(ImageDataset(str(folder / "train")), model)
    theirs = Samples(loader, model)
    assert theirs.ids(range(36)) == ours.ids(range(36))
    assert theirs.class_names == ours.class_names == ["cat", "dog", "Zebra"]
    for (images, labels), (expected, same) in zip(theirs.batches(range(5)), ours.batches(range(5)), strict=True):
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(labels, same)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("subset", [False, True])
def test_samples_of_an_image_folder_are_named_by_their_files(
    make_model: MakeModel, folder: Path, library: str, subset: bool
) -> None:
    root = folder / "train"  # the same names in every class
    if library == "timm":
        data: Any = ImageDataset(str(root))
    else:
        data = pytest.importorskip("torchvision.datasets").ImageFolder(str(root))
    if subset:
        data = Subset(data, range(1, 36, 7))
    samples = Samples(data, make_model())
    ids = samples.ids(range(samples.length))
    assert len(set(ids)) == samples.length == len(data)
    assert samples.labels is not None
    for sample_id, label in zip(ids, samples.labels, strict=True):
        path = root / str(sample_id)
        assert path.is_file()
        assert path.parent.name == samples.class_names[int(label)]


class _NoImages(Dataset):
    """Lists labels, and must not be read."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an image was decoded")


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"targets": [0, 1, 2, 0]}, [0, 1, 2, 0]),
        ({"labels": np.array([0, 1, 2, 0])}, [0, 1, 2, 0]),
        ({"targets": [0, 1, 2, 0], "target_transform": lambda label: 0}, None),
        ({"labels": ["cat", "dog", "newt", "owl"]}, None),  # names of something
        ({"targets": [0, 1]}, None),
        ({"targets": torch.eye(4)[:, :3]}, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]),
        ({"targets": torch.rand(4, 4)}, None),  # boxes, perhaps
        ({}, None),
    ],
)
def test_labels_are_known_without_reading_images(
    make_model: MakeModel, attributes: dict[str, Any], expected: list[int] | None
) -> None:
    data = _NoImages(**attributes)
    for view, positions in ((data, [0, 1, 2, 3]), (Subset(data, [2, 0]), [2, 0])):
        labels = Samples(view, make_model()).labels
        assert labels is None if expected is None else labels.tolist() == [expected[i] for i in positions]


IMAGES = torch.zeros(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("data", "quoted"),
    [
        (7, "int is neither"),
        (TensorDataset(IMAGES, torch.arange(4)), "are 3, outside num_classes=3.*0 to 2.*num_classes=4"),
        (TensorDataset(IMAGES, torch.arange(4) - 1), "are -1"),
        (TensorDataset(IMAGES, torch.tensor([0, 0.5, 1, 2])), "float32; expected.*class index"),
        (TensorDataset(IMAGES, torch.full((4, 3), 0.3)), "float32; expected.*of 0 and 1.*Mixup"),
        (TensorDataset(IMAGES, torch.full((4, 3), 2)), "other than 0 and 1"),
        (
            TensorDataset(IMAGES, torch.zeros(4, 5)),
            r"\[4, 5\], a column for each of 5 classes; expected 3.*num_classes=5",
        ),
        (TensorDataset(IMAGES), r"\(image, label\)"),
        ([{"image": 1}], r"dict; expected \(image, label\)"),
        (iter([7]), r"int; expected \(images, labels\)"),
        (TensorDataset(IMAGES.to(torch.uint8), torch.zeros(4).long()), "uint8.*normalised"),
        ([(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 9, 9), 0)], "do not make a batch"),
    ],
)
def test_data_that_cannot_be_read_is_refused(make_model: MakeModel, data: Any, quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        list(Samples(data, make_model()).batches())


def test_known_labels_outside_the_models_classes_are_refused_before_reading(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="are 5, 7, outside num_classes=3"):
        _ = Samples(_NoImages(targets=[0, 5, 7, 5]), make_model()).labels


def test_class_names_are_the_models_else_the_datas_else_none(make_model: MakeModel) -> None:
    model = make_model()
    assert Samples(_data(), model).class_names == []
    assert Samples(_NoImages(classes=("cat", "dog", "newt")), model).class_names == ["cat", "dog", "newt"]
    with pytest.raises(ValueError, match="has 2 classes and the model 3"):
        Samples(_NoImages(classes=("cat", "dog")), model)
    with pytest.raises(ValueError, match="2 class_names for the 3 classes"):
        Samples(_data(), model, ["cat", "dog"])
    model.pretrained_cfg["label_names"] = ["newt", "cat", "dog"]
    # Those of pretrained weights with other classes are not the model's.
    many = make_model(num_classes=4)
    many.pretrained_cfg["label_names"] = ["newt", "cat", "dog"]
    assert Samples(_NoImages(classes=("a", "b", "c", "d")), many).class_names == ["a", "b", "c", "d"]
    for classes in ((), ("0", "1", "2"), ("cat", "dog", "newt"), ("dog",)):
        assert Samples(_NoImages(classes=classes), model).class_names == ["newt", "cat", "dog"]


def test_labels_are_the_models_for_the_names_of_the_data(make_model: MakeModel) -> None:
    model = make_model()
    model.pretrained_cfg["label_names"] = ["newt", "cat", "dog"]

    def read(data: Any, names: Sequence[str] | None = None) -> list[int]:
        samples = Samples(data, model, names)
        labels = [label for _, labels in samples.batches() for label in labels.tolist()]
        assert samples.labels is None or samples.labels.tolist() == labels
        return labels

    data: Any = _data()
    own = read(data)
    assert set(own) == {0, 1, 2}
    data.classes = ["cat", "dog", "newt"]
    moved = [[1, 2, 0][label] for label in own]
    assert read(data) == read(DataLoader(data, 5)) == read(Subset(data, range(N))) == moved
    # Names that are given are of the data's labels.
    assert read(data, ["newt", "dog", "cat"]) == [[0, 2, 1][label] for label in own]
    # Other names take the place of the model's.
    assert read(data, ["chat", "chien", "triton"]) == own
    assert Samples(data, model, ["chat", "chien", "triton"]).class_names == ["chat", "chien", "triton"]
    model.pretrained_cfg["label_names"] = ["1", "2", "0"]
    data.classes = ["0", "1", "2"]
    assert read(data) == [[2, 0, 1][label] for label in own]
    model.pretrained_cfg["label_names"] = ["newt", "cat", "dog"]
    data.classes = ["cat", "dog", "bat"]
    with pytest.raises(ValueError, match=r"does not know: 'bat'\. It knows 'newt', 'cat', 'dog'.*class_names"):
        read(data)


def test_the_size_is_known_where_it_can_be(make_model: MakeModel) -> None:
    assert size_of(_data()) == size_of(DataLoader(_data(), batch_size=5)) == size_of(_prefetching()) == N
    assert size_of(Subset(_data(), [3, 4])) == 2
    assert size_of(iter([])) is None


class _Several(Dataset):
    """A data set whose samples have several classes, which it may list beforehand."""

    def __init__(self, labels: torch.Tensor, classes: list[str], listed: bool) -> None:
        self.classes, self._labels = classes, labels
        if listed:
            self.targets = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(3, 8, 8), self._labels[index]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_columns_of_several_labels_follow_the_names_of_the_classes(
    make_model: MakeModel, listed: bool, dtype: torch.dtype
) -> None:
    model = make_model()
    model.pretrained_cfg["label_names"] = ["cat", "dog", "newt"]
    data = _Several(torch.tensor([[1, 0], [1, 1], [0, 0]]).to(dtype), ["newt", "cat"], listed)
    samples = Samples(data, model)
    expected = [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    labels = torch.cat([labels for _, labels in samples.batches()])
    assert labels.dtype == torch.uint8
    assert labels.tolist() == expected
    assert samples.labels.tolist() == expected if listed else samples.labels is None


class _Reader:
    """As timm reads Hugging Face data sets: a list of class indices for each sample."""

    class_to_idx: ClassVar = {"cat": 0, "dog": 1, "newt": 2}
    dense_target = False

    def __init__(self, targets: list[list[int]]) -> None:
        self._targets = targets

    def iter_targets(self) -> Iterator[list[int]]:
        yield from self._targets


def test_lists_of_class_indices_are_several_labels(make_model: MakeModel) -> None:
    data = _NoImages(reader=_Reader([[0, 2], [], [1], [2]]))
    assert Samples(data, make_model()).labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"label 3, but 3 classes"):
        Samples(_NoImages(reader=_Reader([[0, 3], [], [1], [2]])), make_model()).labels  # noqa: B018
