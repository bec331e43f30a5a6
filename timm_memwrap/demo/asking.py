"""The part of the page where a visitor asks about a picture."""

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from timm_memwrap.data.transforms import to_batch
from timm_memwrap.demo import showing
from timm_memwrap.demo.options import Page
from timm_memwrap.demo.visitor import Visitor
from timm_memwrap.explaining import explain
from timm_memwrap.model import MemoryWrapModel

__all__ = ["add_ask", "model_input", "picture_input", "tell"]

_logger = logging.getLogger(__name__)

# Of an upload. A file of few bytes can hold a picture that does not fit into memory.
_MAX_PIXELS = 40_000_000
_MATCHES = 5
_HINT = "Add a picture, and the model says what it is, and which remembered images it says so from."


def add_ask(page: Page, visitor: Any) -> None:
    """Adds the part to the page that is being built."""
    import gradio as gr

    stored = page.stored

    def items(asked: Any) -> Any:
        positions = [sample.position for sample in asked.explanation.samples]
        pictures = showing.pictures_of(asked.model, positions, stored)
        captions = [showing.caption(asked.explanation, asked.left_out, position) for position in positions]
        return list(zip(pictures, captions, strict=True))

    def shown(state: Visitor | None) -> list[Any]:
        asked = None if state is None else state.asked
        if asked is None:
            return [showing.note(_HINT, "hint"), [], gr.update(visible=False), ""]
        return [showing.answer(asked, stored), items(asked), gr.update(visible=True), ""]

    def ask(state: Visitor | None, path: str | None) -> list[Any]:
        state = state or Visitor(page.model)
        state.asked = None
        if path is not None:
            with tell():
                # In memory, since the file is soon deleted.
                image = picture(path).copy()
                state.ask(image, to_batch(state.model, [image]))
        return [state, *shown(state)]

    def leave_out(state: Visitor | None, event: gr.SelectData) -> list[Any]:
        if state is not None and state.asked is not None:
            asked = state.asked
            position = asked.explanation.samples[event.index].position
            asked.left_out = sorted({*asked.left_out} ^ {position})
        return [state, *shown(state)]

    def put_back(state: Visitor | None) -> list[Any]:
        if state is not None and state.asked is not None:
            state.asked.left_out = []
        return [state, *shown(state)]

    def match(state: Visitor | None) -> str:
        if state is None or state.asked is None:
            return ""
        asked = state.asked
        with tell():
            options = {"top_k": 3, "contenders": 0, "correspondences": _MATCHES, "dataset": page.dataset}
            (explanation,) = explain(asked.model, [asked.picture], **options)
            return showing.matches(asked.model, stored, asked.picture, explanation)

    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            given = picture_input("Your picture")
        with gr.Column(scale=3, min_width=260):
            verdict = gr.HTML(showing.note(_HINT, "hint"), elem_id="answer")
    with gr.Column(visible=False, elem_id="evidence") as evidence:
        gr.HTML(
            '<div class="mw"><h3>The remembered images that the answer is made of</h3>'
            '<p class="mw-quiet">With their share of it. Choose one to leave it out, and see what becomes of the '
            "answer.</p></div>"
        )
        gallery = gr.Gallery(
            show_label=False, columns=6, allow_preview=False, object_fit="contain", elem_id="samples",
            buttons=[], interactive=False,
        )  # fmt: skip
        with gr.Row():
            back = gr.Button("Put all back", size="sm")
            where = gr.Button("Show places that look alike", size="sm")
        places = gr.HTML("", elem_id="matches")
    outputs = [visitor, verdict, gallery, evidence, places]
    given.change(ask, [visitor, given], outputs, api_name="ask")
    gallery.select(leave_out, [visitor], outputs, api_visibility="private")
    back.click(put_back, [visitor], outputs, api_visibility="private")
    where.click(match, [visitor], [places], api_visibility="private")


def picture_input(label: str) -> Any:
    """Adds a place to drop a picture on. Its file is opened here, after a look at its size, and not by gradio."""
    import gradio as gr

    image = gr.Image(label=label, sources=["upload", "clipboard"], type="filepath", height=300, buttons=[])
    # Not by a subclass, for which gradio would write a stub beside this file.
    vars(image)["preprocess"] = lambda payload: None if payload is None else payload.path
    return image


def picture(path: str) -> Image.Image:
    """Opens an uploaded picture, or raises a `ValueError` that a visitor understands."""
    try:
        image = Image.open(path)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError("This is not a picture that can be read. Use a JPEG or PNG file.") from error
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(
            f"The picture has {image.width} x {image.height} pixels. Use one of at most {_MAX_PIXELS // 10**6} million."
        )
    return image


def model_input(model: MemoryWrapModel, path: str) -> Tensor:
    """Makes a model input `[1, C, H, W]` of an uploaded picture."""
    return to_batch(model, [picture(path)])


@contextmanager
def tell() -> Iterator[None]:
    """Shows a visitor what is wrong, as text: it may hold what they have sent."""
    import gradio as gr

    try:
        yield
    except (ValueError, OSError) as error:
        _logger.info("Told a visitor: %s", error)
        raise gr.Error(html.escape(str(error)), print_exception=False) from error
