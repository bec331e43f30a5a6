"""The part of the page where a visitor looks through the memory."""

from typing import TYPE_CHECKING, Any

import torch

from timm_memwrap.data import class_names
from timm_memwrap.demo import showing
from timm_memwrap.demo.asking import model_input, picture_input, tell
from timm_memwrap.demo.visitor import Visitor
from timm_memwrap.explaining import memory_report

if TYPE_CHECKING:
    from timm_memwrap.demo.page import Page

__all__ = ["add_look"]

_SHOWN = 48


def add_look(page: "Page", visitor: Any, tab: Any) -> None:
    """Adds the part to the page that is being built, in this tab."""
    import gradio as gr

    stored = page.stored

    def classes(state: Visitor | None) -> Any:
        model = page.model if state is None else state.model
        counts = model.memory_bank.class_counts
        choices = [(f"{name} ({counts.get(i, 0):,})", i) for i, name in enumerate(class_names(model)) if i in counts]
        return gr.update(choices=[("all classes", -1), *choices], value=-1)

    def look(state: Visitor | None, label: int, start: int = 0) -> list[Any]:
        model = page.model if state is None else state.model
        positions = showing.positions_of_class(model, None if label is None or label < 0 else label)
        some = positions[start : start + _SHOWN]
        captions = [showing.name_of(model, position) for position in some]
        pictures = list(zip(showing.pictures_of(model, some, stored), captions, strict=True))
        more = len(positions) - start - len(some)
        text = f"{start + 1:,} to {start + len(some):,} of {len(positions):,}" if some else "There is none."
        return [pictures, showing.note(text, "quiet"), start, gr.update(visible=start > 0), gr.update(visible=more > 0)]

    def turned(step: int, state: Visitor | None, label: int, start: int) -> list[Any]:
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
            label = gr.Dropdown([("all classes", -1)], value=-1, label="Class", interactive=True)
            given = picture_input("Search by a picture")
        with gr.Column(scale=3, min_width=260):
            text = gr.HTML("")
            gallery = gr.Gallery(
                show_label=False, columns=6, height="auto", object_fit="contain", buttons=[], interactive=False,
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
    tab.select(classes, [visitor], [label], api_visibility="private").then(
        look, [visitor, label], outputs, api_visibility="private"
    )
    label.input(look, [visitor, label], outputs, api_name="look")
    before.click(
        lambda v, c, s: look(v, c, max(0, s - _SHOWN)), [visitor, label, start], outputs, api_visibility="private"
    )
    after.click(lambda v, c, s: look(v, c, s + _SHOWN), [visitor, label, start], outputs, api_visibility="private")
    given.change(search, [visitor, given], outputs, api_name="search")
    suspect.click(check, [visitor], [report], api_name="report")
