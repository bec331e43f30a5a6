"""Figures and pages where images may have several classes: each that is present is drawn."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_html import _Parsed
from test_plots import _texts

from timm_memwrap import MemoryWrapModel, explain
from timm_memwrap.explaining import (
    Explanation,
    attribute,
    plot_contenders,
    plot_correspondences,
    plot_explanation,
    plot_explanations,
    plot_heatmaps,
    write_html,
)
from timm_memwrap.jobs.explain import describe

NAMES = ["ant", "bee", "cow <b>", "doe"]
Explained = tuple[MemoryWrapModel, torch.Tensor, list[Explanation]]


@pytest.fixture
def explained(
    make_several_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor]
) -> Explained:
    model = make_several_model(store_images=True, class_names=NAMES)
    images = make_images(20)
    with torch.no_grad():
        # So that some have no class.
        bias = model.backbone.get_classifier().bias
        bias -= model(images).amax(dim=1).sort().values[4]
    bank = model.memory_bank
    bank.set_provenance(encoder=model.encoder_fingerprint())
    explanations = explain(model, images, top_k=3)
    # One of two classes at least, and one of none.
    chosen = [
        max(range(20), key=lambda i: len(explanations[i].classes)),
        next(i for i in range(20) if not explanations[i].present),
    ]
    return model, images[chosen], [explanations[i] for i in chosen]


def test_each_class_has_a_row(explained: Explained, tmp_path: Path) -> None:
    model, images, explanations = explained
    texts = _texts(plot_explanations(model, images, explanations, path=tmp_path / "figure.png", top_k=3))
    for explanation in explanations:
        for each in explanation.classes:
            assert f"{each.class_name} {each.probability:.0%}" in texts
    assert texts.count("not predicted") == 1


def test_any_of_the_classes_is_drawn_alone(explained: Explained) -> None:
    model, images, (explanation, _) = explained
    second = explanation.classes[1]
    texts = _texts(plot_explanation(model, images[0], second))
    assert f"{second.class_name} {second.probability:.0%}" in texts
    assert any(second.class_name in text for text in texts if text.startswith("Examples"))


def test_other_figures_name_all_classes(explained: Explained) -> None:
    model, images, (explanation, _) = explained
    contenders = _texts(plot_contenders(model, images[:1], [explanation]))
    assert explanation.title in contenders
    assert not any("looks most like the input:" in text for text in contenders)
    matched = explain(model, images[:1], top_k=2, correspondences=2)
    assert explanation.title in _texts(plot_correspondences(model, images[:1], matched))


def test_heat_is_of_the_most_probable_class_or_of_another(
    explained: Explained, make_images: Callable[..., torch.Tensor]
) -> None:
    model, images, (explanation, _) = explained
    memory = dict(enumerate(make_images(16, seed=1)))
    for target in (None, explanation.classes[1].prediction):
        (found,) = attribute(model, images[:1], memory, "input_x_gradient", top_k=2, target=target, progress=False)
        assert found.target == (explanation.prediction if target is None else target)
        with torch.no_grad():
            assert found.score == pytest.approx(float(model(images[:1])[0, found.target]), abs=1e-3)
        assert _texts(plot_heatmaps(model, [found]))


def test_a_page_has_a_part_for_each_class(explained: Explained, tmp_path: Path) -> None:
    model, images, explanations = explained
    page = _Parsed(write_html(model, images, explanations, tmp_path / "page.html").read_text(encoding="utf-8"))
    for explanation in explanations:
        assert explanation.title in page.text
        for each in explanation.classes:
            assert f"{each.probability:.0%} {each.class_name}" in page.text
            assert f"{each.class_name} : from {each.support_size} remembered images" in page.text
            for sample in each.samples:
                assert f"the model sees {sample.predicted_class_name} labelled {sample.class_name}" in page.text
                if sample.prediction_without is None:
                    assert f"no {each.class_name} , at" in page.text
        assert f"Without its memory the model would not say {explanation.class_name}" in page.text
    assert "looks most like the input" not in page.text


def test_a_terminal_gets_a_table_for_each_class(explained: Explained) -> None:
    model, _, explanations = explained
    for explanation in explanations:
        text = describe(model, "photo.png", explanation)
        assert text.startswith(f"photo.png: {explanation.verdict}")
        for each in explanation.classes:
            assert f"{each.class_name} ({each.probability:.0%}), without its memory no {each.class_name} (50%)" in text
        assert text.count("model sees") == len(explanation.classes)


def test_labels_of_several_classes_are_not_drawn(explained: Explained) -> None:
    model, images, explanations = explained
    with pytest.raises(ValueError, match="labels= is for classes that exclude each other"):
        plot_explanations(model, images, explanations, labels=[0, 1])
