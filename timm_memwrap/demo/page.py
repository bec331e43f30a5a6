"""The page: its three parts, and the server that shows it."""

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from timm_memwrap._utils import optional_import
from timm_memwrap.demo.asking import add_ask
from timm_memwrap.demo.looking import add_look
from timm_memwrap.demo.options import Page
from timm_memwrap.demo.teaching import add_teach
from timm_memwrap.memory_checks import check_memory

__all__ = ["build_page", "launch"]

MAX_UPLOAD = "20mb"
# Seconds between looks for files of visitors, and how old they may get.
_SWEEP = (60, 120)
# A visitor who does nothing for so many seconds loses what they have changed.
SESSION = 3600


def build_page(page: Page) -> Any:
    """Returns the page as a `gradio.Blocks`, and does not start it.

    Raises:
        ValueError: If the model has no memory.
    """
    gr = optional_import("gradio", extra="demo", what="The page")
    check_memory(page.model)
    page.model.eval()
    with gr.Blocks(title=page.title, analytics_enabled=False, delete_cache=_SWEEP) as blocks:
        memory = f"It remembers {len(page.model.memory_bank):,} images, and shows which of them an answer is made of."
        gr.HTML(f"<h1>{_escape(page.title)}</h1><p>An image classifier. {memory}</p>")
        visitor = gr.State(None, time_to_live=SESSION)
        with gr.Tab("Ask"):
            add_ask(page, visitor)
        with gr.Tab("Look into its memory") as tab:
            add_look(page, visitor, tab)
        if page.teach:
            with gr.Tab("Teach"):
                add_teach(page, visitor)
    return blocks


def launch(page: Page, host: str | None = None, port: int | None = None, **options: Any) -> Any:
    """Shows the page until it is interrupted, and returns what gradio's `launch` returns.

    Args:
        page: What to show.
        host: Address to listen at; `None` for this machine alone, or what `GRADIO_SERVER_NAME` says.
        port: Port; `None` for the first free one from 7860 on.
        **options: Passed to gradio's `launch`.

    Raises:
        ValueError: If the port is taken.
    """
    gr = optional_import("gradio", extra="demo", what="The page")
    if port is not None:
        _check_port(host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1", port)
    # Files of visitors go with the server, and lie where no other server writes.
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="timm-memwrap-demo-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Fonts of the visitor's own system: the default theme would load Google's.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return (
        build_page(page)
        .queue(default_concurrency_limit=2)
        .launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            theme=theme,
            css_paths=Path(__file__).parent / "page.css",
            **options,
        )
    )


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port={port} cannot be used on {host}: {error}. Pass another --port.") from error


def _escape(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))
