"""The command that shows a model as a page, and makes a Space of it."""

from pathlib import Path

from timm_memwrap import hub
from timm_memwrap.data import open_remembered, open_source

__all__ = ["demo"]


def demo(
    source: str,
    data: str | None = None,
    split: str = "validation",
    memory_data: str | None = None,
    teach: bool | None = None,
    port: int | None = None,
    push: str | None = None,
    private: bool | None = None,
) -> None:
    """Shows a page on this machine where a model is asked, looked into and taught, or makes a Space of it.

    Args:
        source: The model: a folder, or a repository, owner/name or owner/name@revision.
        data: Labelled images to measure the accuracy on, before and after teaching: as in evaluate.
        split: Split of the data.
        memory_data: What the memory was built from, if the model holds no images, as in explain.
        teach: Whether visitors may teach a copy of their own; by default on this machine, and not in a Space.
        port: Port on this machine; null for the first free one from 7860 on.
        push: Space to make of it, owner/name, instead of showing it here; the source must be on the Hub.
        private: Whether a new Space is private.
    """
    if push is not None:
        if Path(source).expanduser().exists():
            raise ValueError(f"{source!r} is a folder, which a Space cannot load. Push it first: timm-memwrap push.")
        commit = hub.push_space(source, push, teach=bool(teach), private=private)
        print(f"Pushed the page of {source} to {push}: {commit.commit_url}")
        return
    from timm_memwrap.demo import Page, launch

    model = hub.from_pretrained(source)
    page = Page(
        model,
        title=Path(source).name,
        dataset=None if memory_data is None else open_remembered(memory_data),
        validation=None if data is None else open_source(data, split),
        teach=teach is not False,
    )
    launch(page, port=port)
