"""Labels of a data set are matched to the model's classes by name, or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Subset

import timm_memwrap
from timm_memwrap.data import Samples, class_names, known_class_names
from timm_memwrap.data.classes import dataset_classes
from timm_memwrap.explaining import evaluate_explanations
from timm_memwrap.model import MemoryWrapModel

NAMES = ["doe", "ant", "cow", "bee"]


class _Data:
    def __init__(self, classes: list[str] | None, labels: list[int]) -> None:
        if classes is not None:
            self.classes = classes
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return image, self.labels[index]


def _labels(data: object, model: MemoryWrapModel) -> list[int]:
    return [int(label) for _, labels in Samples(data, model).batches() for label in labels]


@pytest.fixture
def named(make_model: Callable[..., MemoryWrapModel]) -> MemoryWrapModel:
    """A model whose bank names its classes."""
    model = make_model(num_classes=4)
    timm_memwrap.build_memory_bank(model, _Data(None, [0, 1, 2, 3]), size=None, class_names=NAMES, progress=False)
    return model


@pytest.mark.parametrize(
    ("classes", "given", "expected"),
    [
        (NAMES, [0, 1, 2, 3], [0, 1, 2, 3]),
        (["ant", "bee", "cow", "doe"], [0, 1, 2, 3], [1, 3, 2, 0]),  # in another order
        (["bee", "doe"], [0, 1, 1], [3, 0, 0]),  # some of them
        (["0", "1", "2", "3"], [0, 1, 2, 3], [0, 1, 2, 3]),  # numbers are no names
        (None, [0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_labels_become_those_of_the_models_classes(
    named: MemoryWrapModel, classes: list[str] | None, given: list[int], expected: list[int]
) -> None:
    data = Samples(_Data(classes, given), named)
    ((images, labels),) = data.batches()
    assert data.labels.tolist() == labels.tolist() == expected
    assert torch.equal(images[1], _Data(classes, given)[1][0])


def test_the_pretrained_cfg_names_classes_too(make_model: Callable[..., MemoryWrapModel]) -> None:
    model = make_model(num_classes=4)
    model.pretrained_cfg["label_names"] = NAMES
    assert _labels(_Data(["bee"], [0]), model) == [3]


def test_an_image_folder_of_some_classes_is_evaluated_by_the_models_labels(
    named: MemoryWrapModel, tmp_path: Path
) -> None:
    """Against the numbers that a person would write down; by the folder's own, accuracy would be another."""
    model = named
    pictures = [Image.effect_noise((160, 160), 90 + 10 * i).convert("RGB") for i in range(6)]
    names = ["cow", "bee"] * 3
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        (tmp_path / name).mkdir(exist_ok=True)
        picture.save(tmp_path / name / f"{i}.png")
    folder = create_dataset("", str(tmp_path))
    assert dataset_classes(Subset(folder, [0, 1])) == ["bee", "cow"]
    by_hand = [(picture, NAMES.index(name)) for picture, name in zip(pictures, names, strict=True)]
    found = evaluate_explanations(model, folder, progress=False)
    expected = evaluate_explanations(model, by_hand, progress=False)
    assert found.accuracy == expected.accuracy
    assert sorted(_labels(folder, model)) == [2, 2, 2, 3, 3, 3]


def test_what_cannot_be_matched_is_refused(named: MemoryWrapModel) -> None:
    model = named
    with pytest.raises(ValueError, match=r"does not know: 'elk', 'fox'.*It knows 'doe', 'ant', 'cow', 'bee'"):
        Samples(_Data(["ant", "fox", "elk"], [0]), model)
    with pytest.raises(ValueError, match=r"has 3 classes and the model 4"):
        Samples(_Data(["0", "1", "2"], [0]), model)
    with pytest.raises(ValueError, match=r"Labels of the data are -1, outside num_classes=2"):
        _labels(_Data(["bee", "ant"], [0, -1]), model)
    model.memory_bank.set_class_names(["ant", "ant", "bee", "cow"])
    with pytest.raises(ValueError, match=r"'ant' as the name of several classes"):
        Samples(_Data(["ant", "bee"], [0]), model)
    model.memory_bank.set_class_names([])
    with pytest.raises(ValueError, match=r"has 2 classes and the model 4.*label_names"):
        Samples(_Data(["bee", "ant"], [0]), model)


@pytest.mark.parametrize(("classes", "said"), [(["0", "1", "2", "3"], True), (NAMES, False)])
def test_numbers_for_names_are_said(
    named: MemoryWrapModel, caplog: pytest.LogCaptureFixture, classes: list[str], said: bool
) -> None:
    Samples(_Data(classes, [0]), named)
    assert ("by number" in caplog.text) == said


def test_every_class_has_a_name(named: MemoryWrapModel, make_model: Callable[..., MemoryWrapModel]) -> None:
    assert class_names(named) == known_class_names(named) == NAMES
    unnamed = make_model(num_classes=2)
    assert known_class_names(unnamed) == []
    assert class_names(unnamed) == ["class 0", "class 1"]


def test_samples_have_the_models_class_names(named: MemoryWrapModel) -> None:
    assert Samples(_Data(["bee", "ant"], [0, 1]), named).class_names == NAMES
