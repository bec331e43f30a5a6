"""The part of the page where a visitor teaches their own copy of the memory."""

from collections.abc import Callable, Iterable
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_memwrap.data import class_names, encoded_batches
from timm_memwrap.demo import showing
from timm_memwrap.demo.asking import picture, tell
from timm_memwrap.demo.options import Page
from timm_memwrap.demo.visitor import Visitor
from timm_memwrap.labels import present
from timm_memwrap.memory_bank import SampleId
from timm_memwrap.model import MemoryWrapModel

__all__ = ["Validation", "add_teach"]

# Pictures at a time, and ids that a list offers.
_PICTURES, _IDS = 50, 2000


class Validation:
    """Labelled images, encoded once: the encoder does not change."""

    def __init__(self, model: MemoryWrapModel, data: Any) -> None:
        with torch.no_grad():
            batches = list(encoded_batches(model, data))
        self._parts = batches

    @torch.no_grad()
    def accuracy(self, model: MemoryWrapModel) -> float:
        """Returns the share of predictions that are right; of several classes, each counts for its share."""
        right, total = 0.0, 0
        for encoding, labels in self._parts:
            logits = model.read(encoding).logits
            right += float(_right(logits, labels))
            total += len(labels)
        return right / total


def _new_ids(there: Iterable[SampleId], name: str, files: list[str]) -> list[SampleId]:
    """Names uploaded files as an image folder would, with a number where a name is taken."""
    taken, chosen = {*there}, list[SampleId]()
    for file in files:
        stem = f"{name}/{Path(file).name}"
        numbered = (f"{stem} ({number})" for number in count(2))
        chosen.append(next(each for each in chain([stem], numbered) if each not in taken))
        taken.add(chosen[-1])
    return chosen


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        return (present(logits)[:, : labels.shape[1]] == labels.bool()).float().mean(dim=1).sum()
    return (logits.argmax(dim=-1) == labels).sum()


def add_teach(page: Page, visitor: Any) -> None:
    """Adds the part to the page that is being built."""
    import gradio as gr

    validation = None if page.validation is None else Validation(page.model, page.validation)

    def lists(model: MemoryWrapModel) -> list[Any]:
        names = class_names(model)
        return [
            gr.update(choices=names, value=None),
            gr.update(choices=[str(i) for i in model.memory_bank.ids[:_IDS]], value=[]),
        ]

    def told(state: Visitor, text: str, before: float | None = None) -> list[Any]:
        model, bank = state.model, state.model.memory_bank
        lines = [showing.note(text, "done")] if text else []
        lines.append(showing.note(f"Your copy remembers {len(bank):,} images of {model.num_classes} classes."))
        if validation is not None:
            now = validation.accuracy(model)
            change = "" if before is None else f", before {before:.1%}"
            lines.append(showing.note(f"Accuracy on the validation images: {now:.1%}{change}."))
        return [state, "".join(lines), *lists(model), gr.update(interactive=bool(state.history))]

    def edit(state: Visitor | None, text: str, change: Callable[[MemoryWrapModel], object]) -> list[Any]:
        state = state or Visitor(page.model)
        with tell():
            before = None if validation is None else validation.accuracy(state.model)
            state.edit(change)
        return told(state, text, before)

    def remember(
        state: Visitor | None,
        files: list[str] | None,
        name: str | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        name = (name or "").strip()
        with tell():
            if not files or not name:
                raise ValueError("Add at least one picture, and choose a class or type the name of a new one.")
            if len(files) > _PICTURES:
                raise ValueError(f"These are {len(files)} pictures. Add at most {_PICTURES} at a time.")
            images = [picture(file) for file in progress.tqdm(files, desc="Remembering")]
        chosen = _new_ids((state.model if state else page.model).memory_bank.ids, name, files)
        many = "1 picture" if len(files) == 1 else f"{len(files)} pictures"
        text = f"Learned {many} of {name}."
        found = edit(state, text, lambda model: model.remember(images, name, chosen, progress=False))
        return [*found, None]

    def forget(state: Visitor | None, ids: list[str]) -> list[Any]:
        def change(model: MemoryWrapModel) -> None:
            if not ids:
                raise ValueError("Choose at least one image to forget.")
            known = {str(each): each for each in model.memory_bank.ids}
            model.forget([known[each] for each in ids])

        return edit(state, f"Forgot {len(ids)} remembered {'image' if len(ids) == 1 else 'images'}.", change)

    def undo(state: Visitor | None) -> list[Any]:
        state = state or Visitor(page.model)
        return told(state, "Took the last change back." if state.undo() else "There is nothing to take back.")

    def save(state: Visitor | None, target: str) -> str:
        from timm_memwrap.hub import push_to_hub, save_pretrained

        model, target = (page.model if state is None else state.model), target.strip()
        with tell():
            if not target:
                raise ValueError("Say where to: a folder, or hf-hub:owner/name.")
            if target.startswith("hf-hub:"):
                commit = push_to_hub(model, target.removeprefix("hf-hub:"))
                return showing.note(f"Pushed: {commit.commit_url}", "done")
            return showing.note(f"Saved in {save_pretrained(model, target)}", "done")

    gr.HTML(
        '<div class="mw"><p>Show it some pictures, and it knows them at once: nothing is trained. What you change here '
        "is your own copy, which nobody else sees, and which ends with your visit.</p></div>"
    )
    with gr.Row():
        with gr.Column(min_width=260):
            files = gr.File(
                label="Pictures to remember", file_count="multiple", file_types=["image"], type="filepath", height=160
            )
            name = gr.Dropdown(
                class_names(page.model), value=None, allow_custom_value=True, interactive=True, label="They show",
                info="Choose a class, or type a new one.",
            )  # fmt: skip
            learn = gr.Button("Remember", variant="primary")
        with gr.Column(min_width=260):
            status = gr.HTML("", elem_id="taught")
            ids = gr.Dropdown(
                [str(i) for i in page.model.memory_bank.ids[:_IDS]], value=[], multiselect=True, interactive=True,
                label="Images to forget",
            )  # fmt: skip
            drop = gr.Button("Forget")
            back = gr.Button("Undo", interactive=False)
    outputs = [visitor, status, name, ids, back]
    learn.click(remember, [visitor, files, name], [*outputs, files], api_name="remember")
    drop.click(forget, [visitor, ids], outputs, api_name="forget")
    back.click(undo, [visitor], outputs, api_name="undo")
    if page.save:
        with gr.Row():
            target = gr.Textbox(label="Save your copy", placeholder="a folder, or hf-hub:owner/name", max_lines=1)
            keep = gr.Button("Save")
        saved = gr.HTML("")
        keep.click(save, [visitor, target], [saved], api_visibility="private")
