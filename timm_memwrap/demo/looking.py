"""The part of the page where a visitor looks through the memory."""

from functools import partial
from typing import Any

import torch

from timm_memwrap.data import class_names
from timm_memwrap.demo import showing
from timm_memwrap.demo.asking import model_input, picture_input, tell
from timm_memwrap.demo.options import Page
from timm_memwrap.demo.visitor import Visitor
from timm_memwrap.explaining import memory_report
from timm_memwrap.model import MemoryWrapModel

__all__ = ["add_look"]

_SHOWN = 48


def add_look(page: Page, visitor: Any, tab: Any) -> None:
    """Adds the part to the page that is being built, in this tab."""
    import gradio as gr

    stored = page.stored

    def choices(model: MemoryWrapModel) -> list[tuple[str, int]]:
        counts, names = model.memory_bank.class_counts, class_names(model)
        return [("all classes", -1), *((f"{names[label]} ({count:,})", label) for label, count in counts.items())]

    def classes(state: Visitor | None) -> Any:
        return gr.update(choices=choices(page.model if state is None else state.model), value=-1)

    def look(state: Visitor | None, label: int, start: int = 0) -> list[Any]:
        model = page.model if state is None else state.model
        positions = showing.positions_of_class(model, None if label is None or label < 0 else label)
        some = positions[start : start + _SHOWN]
        captions = [showing.name_of(model, position) for position in some]
        pictures = list(zip(showing.pictures_of(model, some, stored), captions, strict=True))
        more = len(positions) - start - len(some)
        text = f"{start + 1:,} to {start + len(some):,} of {len(positions):,}" if some else "There is none."
        return [pictures, showing.note(text, "quiet"), start, gr.update(visible=start > 0), gr.update(visible=more > 0)]

    def turn(step: int, state: Visitor | None, label: int, start: int) -> list[Any]:
        return look(state, label, max(0, start + step))

    def search(state: Visitor | None, path: str | None) -> list[Any]:
        model = page.model if state is None else state.model
        if path is None:
            return look(state, -1)
        with tell(), torch.no_grad():
            found = showing.similar(model, model.encode(model_input(model, path)), _SHOWN // 2)
        pictures = showing.pictures_of(model, [position for position, _ in found], stored)
        labels = [f"{value:.2f} {showing.name_of(model, position)}" for position, value in found]
        hidden = gr.update(visible=False)
        text = showing.note("The remembered images that look most like your picture", "quiet")
        return [list(zip(pictures, labels, strict=True)), text, 0, hidden, hidden]

    def check(state: Visitor | None, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        model = page.model if state is None else state.model
        progress(0.1, desc="Comparing the remembered images")
        with tell():
            report = memory_report(model, page.validation, progress=False)
            return showing.findings(model, report, page.dataset, page.validation)

    with gr.Row():
        with gr.Column(scale=1, min_width=220):
            label = gr.Dropdown(choices(page.model), value=-1, label="Class", interactive=True)
            given = picture_input("Search by a picture")
        with gr.Column(scale=3, min_width=260):
            text = gr.HTML("")
            gallery = gr.Gallery(
                show_label=False, columns=6, object_fit="contain", buttons=[], interactive=False,
                elem_id="memory",
            )  # fmt: skip
            with gr.Row():
                before = gr.Button("Previous", size="sm", visible=False)
                after = gr.Button("Next", size="sm", visible=False)
    suspect = gr.Button("Look for what is wrong with the memory")
    report = gr.HTML("", elem_id="report")

    start = gr.State(0)
    outputs = [gallery, text, start, before, after]
    # Whenever the part is opened: the visitor may have taught the model meanwhile.
    opened = tab.select(classes, [visitor], [label], api_visibility="private")
    opened.then(look, [visitor, label], outputs, api_name="opened", api_visibility="private")
    label.input(look, [visitor, label], outputs, api_name="look")
    for button, step in ((before, -_SHOWN), (after, _SHOWN)):
        button.click(partial(turn, step), [visitor, label, start], outputs, api_name="turn", api_visibility="private")
    given.change(search, [visitor, given], outputs, api_name="search")
    suspect.click(check, [visitor], [report], api_name="report")
