"""What stands in figures and pages of correspondences. How they look was judged by eye."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from timm_memwrap import explain
from timm_memwrap.data import to_picture
from timm_memwrap.explaining import plot_correspondences, write_html
from timm_memwrap.explaining.figures.pictures import MATCHES
from timm_memwrap.model import MemoryWrapModel

MakeModel = Callable[..., MemoryWrapModel]
MakeImages = Callable[..., torch.Tensor]
HOSTILE = "\"><img src=x onerror=document.title='ran'>"


def _memory(make_images: MakeImages) -> dict[int, torch.Tensor]:
    return dict(enumerate(make_images(12, seed=1)))


def test_a_figure_marks_each_pair_in_the_input_and_in_the_sample(
    make_model: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model, images, memory = make_model("memory wrap"), make_images(2), _memory(make_images)
    explanations = explain(model, images, 2, correspondences=7, dataset=memory)
    path = tmp_path / "figure.png"
    figure = plot_correspondences(model, images, explanations, [0, 1], path, memory, top_k=2, dpi=50)
    assert path.stat().st_size > 0
    texts = [text.get_text() for text in figure.texts]
    samples = [sample for explanation in explanations for sample in explanation.samples]
    counts = [len(sample.correspondences) for sample in samples]
    assert max(counts) > len(MATCHES)
    for number in range(1, 8):
        assert texts.count(str(number)) == 2 * sum(count >= number for count in counts)
    # Inside the pictures of the input and of the sample, at the place that the box names.
    shown = [(axes.get_position(), axes.images[0].get_array()) for axes in figure.axes]
    frames = [artist for artist in figure.artists + figure.patches if isinstance(artist, Rectangle)]
    corners = [(round(f.get_x(), 4), round(f.get_y() + f.get_height(), 4)) for f in frames]
    for image, explanation in zip(images, explanations, strict=True):
        for sample in explanation.samples:
            for picture, box in (
                (image, sample.correspondences[0].box),
                (memory[sample.position], sample.correspondences[0].sample_box),
            ):
                places = [place for place, found in shown if np.array_equal(found, to_picture(model, picture))]
                expected = [(p.x0 + box[0] * p.width, p.y1 - box[1] * p.height) for p in places]
                assert any((round(x, 4), round(y, 4)) in corners for x, y in expected)


def test_a_figure_finds_the_correspondences_itself(make_model: MakeModel, make_images: MakeImages) -> None:
    model = make_model("memory wrap", store_images=True)
    assert "1" in [text.get_text() for text in plot_correspondences(model, make_images(1)).texts]
    with pytest.raises(ValueError, match=r"no correspondences.*correspondences=5"):
        plot_correspondences(model, make_images(1), explain(model, make_images(1)))


def test_a_page_shows_them_side_by_side_and_hostile_names_as_text(
    make_model: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model, images, memory = make_model("memory wrap", class_names=[HOSTILE] * 4), make_images(2), _memory(make_images)
    bank, ids = model.memory_bank, [f"{i}{HOSTILE}" for i in range(12)]
    bank.replace(bank.encodings, bank.labels, ids, None, [f"{i}{HOSTILE}" for i in range(4)])
    named = dict(zip(ids, memory.values(), strict=True))
    explanations = explain(model, images, 2, correspondences=6, dataset=named)
    html = write_html(model, images, explanations, tmp_path / "r.html", dataset=named).read_text(encoding="utf-8")
    assert "Where they match" in html
    assert HOSTILE not in html
    assert "url(" not in html
    drawn = re.findall(
        r'left: ([\d.]+)%; top: ([\d.]+)%; width: ([\d.]+)%; height: ([\d.]+)%; --match: (#\w+)"><b>(\d)</b>', html
    )
    expected = [
        (box, number)
        for explanation in explanations
        for sample in explanation.samples
        for boxes in ([m.box for m in sample.correspondences], [m.sample_box for m in sample.correspondences])
        for number, box in enumerate(boxes, start=1)
    ]
    assert len(drawn) == len(expected) > 6
    for (left, top, width, height, color, number), (box, which) in zip(drawn, expected, strict=True):
        found = [float(left), float(top), float(left) + float(width), float(top) + float(height)]
        assert found == pytest.approx([100 * side for side in box], abs=0.02)
        assert int(number) == which
        assert color == MATCHES[(which - 1) % len(MATCHES)]
    plain = write_html(model, images, explain(model, images, 2), tmp_path / "r.html", dataset=named)
    assert "Where they match" not in plain.read_text(encoding="utf-8")
