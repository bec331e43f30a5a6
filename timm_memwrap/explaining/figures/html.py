"""Writes explanations as one self-contained HTML file, without scripts and without resources from elsewhere."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from timm_memwrap._utils import write_text
from timm_memwrap.data import SampleImages, batches_of, class_names, picture_of, to_picture
from timm_memwrap.explaining.contenders import NearSample
from timm_memwrap.explaining.correspondences import sample_input
from timm_memwrap.explaining.explanation import Explanation, MemorySample
from timm_memwrap.explaining.figures.markup import data_url, template
from timm_memwrap.explaining.figures.pictures import MATCHES, aligned, overlays
from timm_memwrap.explaining.heatmaps import Attribution
from timm_memwrap.explaining.nearby import memory_size
from timm_memwrap.explaining.stored_images import stored_images
from timm_memwrap.model import MemoryWrapModel

__all__ = ["match_rows", "write_html"]

# In pixels: twice the size on the page, for screens of double density.
_INPUT_SIZE, _SAMPLE_SIZE = 448, 256


def write_html(
    model: MemoryWrapModel,
    images: Any,
    explanations: Sequence[Explanation] | None,
    path: str | os.PathLike,
    labels: Sequence[int] | Tensor | None = None,
    names: Sequence[str] | None = None,
    attributions: Sequence[Attribution] | None = None,
    dataset: Any = None,
    top_k: int = 5,
    title: str = "Explanations",
) -> Path:
    """Writes a report of explanations, one HTML file with its pictures inside, and returns its path.

    It has no scripts, and does not let the browser load anything. Class names, ids and file names are shown as text.
    The file holds pictures of the memory, so share it as you would share those.

    Args:
        model: The model that was explained.
        images: What was explained: see `plot_explanations`.
        explanations: What `explain` returned for them; `None` to call it.
        path: File to write. It is written whole or not at all.
        labels: True classes of the inputs, if known; not where images may have several.
        names: Titles of the inputs; `None` for their file names, or their numbers.
        attributions: What `attribute` returned for them, to show heatmaps too.
        dataset: As in `plot_explanations`.
        top_k: As in `explain`, if `explanations` is `None`.
        title: Title of the report.

    Raises:
        ValueError: If images, explanations, labels, names or attributions differ in number.
    """
    several, explanations, true = aligned(model, images, explanations, labels, top_k)
    for name, given in (("names", names), ("attributions", attributions)):
        if given is not None and len(given) != len(several):
            raise ValueError(f"{len(given)} {name} for {len(several)} images. Pass one for each image, or None.")
    if names is None:
        names = [PurePath(image).name if isinstance(image, str | os.PathLike) else f"Image {i}"
                 for i, image in enumerate(several, start=1)]  # fmt: skip
    stored = stored_images(model, dataset)
    heat: Sequence[Attribution | None] = [None] * len(several) if attributions is None else attributions
    html = template("explanations.html.jinja").render(
        title=title,
        architecture=model.pretrained_cfg.get("architecture", type(model.backbone).__name__),
        memory_size=memory_size(model),
        stale=model.memory_is_stale(),
        heatmaps=attributions is not None,
        match_colors=MATCHES,
        classes=dict(enumerate(class_names(model))),
        several=model.multi_label,
        inputs=[_input(model, stored, *parts) for parts in zip(names, several, explanations, true, heat, strict=True)],
    )
    return write_text(path, html)


def _input(
    model: MemoryWrapModel,
    stored: SampleImages | None,
    name: str,
    image: Any,
    explanation: Explanation,
    label: int | None,
    attribution: Attribution | None,
) -> dict[str, Any]:
    heat: list[str | None] = [None] * (1 + len(explanation.samples))
    shares = [0.0] * len(heat)
    if attribution is not None:
        if [sample.id for sample in attribution.explanation.samples] != [sample.id for sample in explanation.samples]:
            raise ValueError(
                f"The attribution for {name!r} is of other samples than its explanation. Pass the explanations of the "
                f"attributions: [attribution.explanation for attribution in attributions]."
            )
        heat = [*(data_url(picture, _INPUT_SIZE) for picture in overlays(model, attribution))]
        shares = attribution.shares

    def picture_row(sample: MemorySample | NearSample) -> dict[str, Any]:
        picture = picture_of(model, sample.image, sample.id, stored)
        return {"sample": sample, "picture": None if picture is None else data_url(picture, _SAMPLE_SIZE)}

    def row(sample: MemorySample, overlay: str | None = None, share: float = 0.0) -> dict[str, Any]:
        return {**picture_row(sample), "overlay": overlay, "share": share}

    def part(one: Explanation, overlays_of: list[str | None], shares_of: list[float]) -> dict[str, Any]:
        shown = {sample.position for sample in one.samples}
        more = [
            ("More examples: the model sees the predicted class in them too", one.examples),
            ("More counterfactuals: the model sees another class in them", one.counterfactuals),
        ]
        groups = [(heading, [row(each) for each in samples if each.position not in shown]) for heading, samples in more]
        return {
            "explanation": one,
            "samples": [row(*parts) for parts in zip(one.samples, overlays_of, shares_of, strict=True)],
            "groups": [(heading, rows) for heading, rows in groups if rows],
        }

    best = explanation.most_alike
    contenders = [
        {
            "contender": contender,
            "rows": [picture_row(sample) for sample in contender.samples],
            "most_alike": contender == best,
        }
        for contender in explanation.contenders
    ]
    # Heat is of the first of several classes, the most probable.
    parts = [part(explanation, heat[1:], shares[1:])]
    for other in explanation.classes[1:]:
        parts.append(part(other, [None] * len(other.samples), [0.0] * len(other.samples)))
    return {
        "name": name,
        "matches": match_rows(model, stored, image, explanation),
        "picture": data_url(to_picture(model, image), _INPUT_SIZE),
        "overlay": heat[0],
        "share": shares[0],
        "explanation": explanation,
        "label": label,
        "parts": parts,
        "contenders": contenders,
    }


def match_rows(
    model: MemoryWrapModel, stored: SampleImages | None, image: Any, explanation: Explanation
) -> list[dict[str, Any]]:
    """Returns the samples with correspondences, each beside the input, both as the model gets them."""
    matched = [sample for sample in explanation.samples if sample.correspondences]
    if not matched:
        return []
    (model_input,) = batches_of(model, [image])[0]
    size, picture = (model_input.shape[-2], model_input.shape[-1]), to_picture(model, model_input)
    inputs = [(sample, sample_input(model, stored, sample.position, size)) for sample in matched]
    return [
        {
            "sample": sample,
            "input": data_url(picture, _SAMPLE_SIZE),
            "picture": data_url(to_picture(model, remembered), _SAMPLE_SIZE),
        }
        for sample, remembered in inputs
        if remembered is not None
    ]
