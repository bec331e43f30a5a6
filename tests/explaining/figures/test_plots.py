"""Figures: what stands in them. How they look was judged by eye."""

import ast
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from torch.utils.data import TensorDataset

from timm_memwrap import explain
from timm_memwrap.data import to_picture
from timm_memwrap.explaining import (
    attribute,
    plot_explanation,
    plot_explanations,
    plot_heatmaps,
)
from timm_memwrap.explaining.figures import plots
from timm_memwrap.explaining.figures.page import BLUE, ORANGE
from timm_memwrap.explaining.figures.pictures import overlays
from timm_memwrap.model import MemoryWrapModel


def _texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_a_row_says_prediction_verdict_names_and_weights(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model = make_model("memory wrap", store_images=True, class_names=["ant", "bee", "cow", "doe"])
    model.calibration.confidence[0] = 1.0
    images = make_images(2)
    explanations = explain(model, images, top_k=3)
    labels = torch.tensor([explanations[0].prediction, (explanations[1].prediction + 1) % 4])
    path = tmp_path / "new" / "figure.png"
    figure = plot_explanations(model, images, explanations, labels=labels, path=path, top_k=3)
    texts = _texts(figure)
    assert f"{explanations[0].class_name} {explanations[0].probability:.0%}" in texts
    assert sum("73% likely right" in text for text in texts) == 2
    assert "✓ right" in texts
    assert f"✗ wrong, it is {['ant', 'bee', 'cow', 'doe'][labels[1]]}" in texts
    for explanation in explanations:
        for sample in explanation.samples:
            assert f"{sample.weight:.0%}" in texts
            mark = "" if sample.is_example else "≠ "
            assert f"{mark}{sample.predicted_class_name}" in texts
    assert "no picture" not in "".join(texts)
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
    with Image.open(path) as file:
        assert file.size[0] > 500


def test_counterfactuals_differ_by_more_than_colour(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("memory wrap", size=40)
    explanation = explain(model, make_images(1), top_k=3)[0]
    assert explanation.examples
    assert explanation.counterfactuals
    figure = plot_explanation(model, make_images(1)[0], explanation, top_k=3)
    frames = [patch for patch in figure.findobj(Rectangle) if not patch.get_fill()]
    # And the two of the legend.
    assert len(frames) == len(explanation.examples) + len(explanation.counterfactuals) + 2
    colours = {BLUE: set(), ORANGE: set()}
    for frame in frames:
        colour = "#{:02X}{:02X}{:02X}".format(*(round(255 * c) for c in frame.get_edgecolor()[:3]))
        colours[colour].add(frame.get_linestyle() == "solid")
    assert colours == {BLUE: {True}, ORANGE: {False}}


def test_one_explanation_says_what_each_sample_changes(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("memory wrap")
    explanation = explain(model, make_images(1))[0]
    text = "\n".join(_texts(plot_explanation(model, make_images(1)[0], explanation, label=0)))
    assert text.count("without it:") == len(explanation.examples) + len(explanation.counterfactuals)
    assert "Without its memory" in text


def test_pictures_come_from_the_bank_the_dataset_or_a_tile(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images = make_model("wrapped"), make_images(1)
    sample = explain(model, images)[0].samples[0]
    assert "no picture" in "".join(_texts(plot_explanations(model, images)))
    dataset = TensorDataset(make_images(12, seed=1), torch.zeros(12))
    for source in (dataset, {i: dataset[i][0] for i in range(12)}):
        figure = plot_explanations(model, images, dataset=source)
        assert "no picture" not in "".join(_texts(figure))
        shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
        assert np.array_equal(shown[1], to_picture(model, dataset[sample.id][0]))
    assert "no picture" in "".join(_texts(plot_explanations(model, images, dataset={})))


class _Folder:
    """As torchvision's image folders and timm's datasets name their files."""

    def __init__(self, names: list[str]) -> None:
        self.samples = [(f"/data/{name}", 0) for name in names]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (index, 0, 0)), 0


def test_file_names_find_the_dataset_s_picture(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, names = make_model("wrapped"), [f"{'ab'[i % 2]}/{i // 2}.png" for i in range(12)]
    bank = model.memory_bank
    bank.replace(bank.encodings, bank.labels, names)
    sample = explain(model, make_images(1))[0].samples[0]
    figure = plot_explanations(model, make_images(1), dataset=_Folder(names))
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert shown[1][0, 0].tolist() == [names.index(sample.id), 0, 0]


def test_a_picture_undoes_the_normalisation(make_model: Callable[..., MemoryWrapModel], tmp_path: Path) -> None:
    model = make_model("wrapped")
    pixels = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3) * 4
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    raw = torch.from_numpy(pixels).permute(2, 0, 1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for image in ((raw / 255 - mean) / std, raw, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(to_picture(model, image), pixels)
    assert to_picture(model, raw[:1]).shape == (5, 4, 3)
    with pytest.raises(ValueError, match="expected a tensor"):
        to_picture(model, torch.zeros(2, 2))


def test_hostile_and_long_names_stay_text(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    names = ["$\\frac{$", "a" * 500, "<script>\n\n", "{%s}"]
    model = make_model("wrapped", class_names=names)
    plot_explanations(model, make_images(2), labels=[0, 1], path=tmp_path / "a.svg", dpi=40)
    plot_explanation(model, make_images(1), path=tmp_path / "b.pdf", dpi=40)
    assert {file.name for file in tmp_path.iterdir()} == {"a.svg", "b.pdf"}


def test_counts_that_differ_are_refused(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model, images = make_model("wrapped"), make_images(2)
    with pytest.raises(ValueError, match="2 images, 1 explanations and 2 labels"):
        plot_explanations(model, images, explain(model, images[:1]))
    with pytest.raises(ValueError, match="3 labels"):
        plot_explanations(model, images, labels=[0, 1, 2])
    with pytest.raises(ValueError, match="plot_explanations"):
        plot_explanation(model, images)


def test_matplotlib_is_imported_for_a_figure_only() -> None:
    for file in Path(plots.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            assert "matplotlib" not in ast.unparse(node) or not isinstance(node, ast.Import | ast.ImportFrom), file


def test_absent_matplotlib_is_missed_by_the_name_of_the_extra(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"timm-memwrap\[plot\]"):
        plot_explanations(make_model("wrapped"), make_images(1))


def test_heatmaps_are_drawn_below_their_pictures(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model, images = make_model("memory wrap"), make_images(2)
    memory = TensorDataset(make_images(12, seed=1), torch.zeros(12))
    found = attribute(model, images, memory, "saliency", top_k=3, progress=False)
    labels = [found[0].target, (found[1].target + 1) % 4]
    figure = plot_heatmaps(model, found, labels=labels, path=tmp_path / "heat.png", dpi=50)
    texts = _texts(figure)
    for attribution in found:
        for share in attribution.shares:
            assert f"{share:.0%} of the heat" in texts
    assert "✓ right" in texts
    assert any(text.startswith("✗ wrong") for text in texts)
    # The input and three samples, each twice.
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 2 * 2 * 4
    assert all(any(np.array_equal(picture, part) for part in shown) for picture in overlays(model, found[0]))
    assert (tmp_path / "heat.png").stat().st_size > 0
    with pytest.raises(ValueError, match="0 images, 0 explanations and 0 labels"):
        plot_heatmaps(model, [])
    with pytest.raises(ValueError, match="2 explanations and 1 labels"):
        plot_heatmaps(model, found, labels=[0])


def test_heat_is_yellow_where_the_attribution_is_and_grey_elsewhere(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    model = make_model("memory wrap")
    memory = TensorDataset(make_images(12, seed=1), torch.zeros(12))
    found = attribute(model, make_images(1), memory, "saliency", top_k=2, progress=False)[0]
    spot = torch.zeros(3, 32, 32)
    spot[0, 4:8, 20:24] = -1.0
    nothing = torch.zeros(2, 3, 32, 32)
    first, *others = overlays(model, dataclasses.replace(found, heatmap=spot, memory_heatmaps=nothing))
    assert first.dtype == np.uint8
    # Yellow has little blue; grey as much as red.
    assert first[5, 21, 0] > first[5, 21, 2] + 100
    assert np.array_equal(first[20:, :10, 0], first[20:, :10, 2])
    for picture in others:
        assert np.array_equal(picture[..., 0], picture[..., 2])


def test_heat_of_a_narrow_image_is_laid_over_it(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> None:
    """The blur reaches further than such an image is high."""
    model = make_model("memory wrap")
    memory = TensorDataset(make_images(12, seed=1), torch.zeros(12))
    found = attribute(model, make_images(1), memory, "saliency", top_k=1, progress=False)[0]
    narrow = dataclasses.replace(found, image=torch.zeros(3, 4, 128), heatmap=torch.rand(3, 4, 128))
    assert overlays(model, narrow)[0].shape == (4, 128, 3)
