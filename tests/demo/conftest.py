"""A page that is being shown on loopback."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio")

from demo_pages import Pictures, Shown, make_model, pictures

from timm_memwrap.demo import Page, launch


@pytest.fixture(scope="module")
def shown() -> Shown:
    page = Page(make_model(), "Pets <b>&", validation=Pictures(9, 2))
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    return Shown(url, page)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("uploads")
    paths = []
    for i, picture in enumerate(pictures(3, 3)):
        picture.save(folder / f"{i} <i>.png")
        paths.append(str(folder / f"{i} <i>.png"))
    return paths


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser, of the machine: nothing is downloaded."""
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def bomb(tmp_path: Path) -> str:
    """A small file of more pixels than fit into memory."""
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    return str(tmp_path / "bomb.png")
