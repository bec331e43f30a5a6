"""Figures of contenders: what stands in them. How they look was judged by eye."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.patches import Rectangle
from torch.utils.data import TensorDataset

from timm_memwrap import explain
from timm_memwrap.explaining import Explanation, plot_contenders
from timm_memwrap.explaining.figures.page import BLUE, ORANGE
from timm_memwrap.model import MemoryWrapModel

NAMES = ["ant", "bee", "cow", "$doe$"]


def _texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def _frames(figure) -> list[tuple[str, bool]]:
    """Returns colour and whether it is solid, of each frame but the two of the legend."""
    frames = [patch for patch in figure.findobj(Rectangle) if not patch.get_fill()]
    colours = ["#{:02X}{:02X}{:02X}".format(*(round(255 * c) for c in frame.get_edgecolor()[:3])) for frame in frames]
    found = [(colour, frame.get_linestyle() == "solid") for colour, frame in zip(colours, frames, strict=True)]
    assert found[-2:] == [(BLUE, True), (ORANGE, False)]
    return found[:-2]


@pytest.fixture
def explained(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> tuple[MemoryWrapModel, torch.Tensor, list[Explanation]]:
    """Explains images of which some look more like another class, and others do not."""
    model, images = make_model("memory wrap", size=40, store_images=True, class_names=NAMES), make_images(8)
    explanations = explain(model, images)
    assert len({e.most_alike.prediction == e.prediction for e in explanations}) == 2
    return model, images, explanations


def test_it_says_class_probability_and_similarities(
    explained: tuple[MemoryWrapModel, torch.Tensor, list[Explanation]], tmp_path: Path
) -> None:
    model, images, explanations = explained
    path = tmp_path / "figure.png"
    texts = _texts(plot_contenders(model, images, explanations, labels=[0] * 8, path=path))
    assert path.stat().st_size > 0
    assert "no picture" not in "".join(texts)
    for explanation in explanations:
        for contender in explanation.contenders:
            assert contender.class_name in texts
            assert f"{contender.probability:.0%}" in texts
            said = "looks most like the input" if contender == explanation.most_alike else "on average"
            assert f"{said}: {contender.similarity:.3f}" in texts
            assert {f"{sample.similarity:.2f}" for sample in contender.samples} <= set(texts)


def test_another_class_that_looks_more_alike_differs_by_more_than_colour(
    explained: tuple[MemoryWrapModel, torch.Tensor, list[Explanation]],
) -> None:
    model, images, explanations = explained
    for image, explanation in zip(images, explanations, strict=True):
        figure, best = plot_contenders(model, image, [explanation]), explanation.most_alike
        if best.prediction == explanation.prediction:
            assert _frames(figure) == [(BLUE, True)]
            assert "but looks more like" not in "".join(_texts(figure))
        else:
            assert _frames(figure) == [(ORANGE, False)]
            assert f"but looks more like {best.class_name}" in _texts(figure)


def test_pictures_come_from_the_dataset_if_the_bank_has_none(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images = make_model("wrapped"), make_images(1)
    assert "no picture" in "".join(_texts(plot_contenders(model, images)))
    dataset = TensorDataset(make_images(12, seed=1), torch.zeros(12))
    figure = plot_contenders(model, images, dataset=dataset)
    assert "no picture" not in "".join(_texts(figure))
    # The input, and three of each of three classes.
    assert len([axes for axes in figure.axes if axes.images]) == 10


def test_a_class_without_samples_is_said_to_have_none(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images = make_model("memory wrap"), make_images(1)
    model.memory_bank.select([2, 6])
    # Four contenders take two lines.
    figure = plot_contenders(model, images, explain(model, images, contenders=4))
    assert _texts(figure).count("The memory has no image of this class.") == 3


def test_explanations_without_contenders_are_refused(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images = make_model("wrapped"), make_images(2)
    one, other = explain(model, images)
    for given in (explain(model, images, contenders=0), [one, replace(other, contenders=())]):
        with pytest.raises(ValueError, match=r"no contenders.*contenders=3"):
            plot_contenders(model, images, given)
