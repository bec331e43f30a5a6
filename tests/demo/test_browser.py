"""The page in a real browser: what a person does, on a phone, in the dark, with the keyboard."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from demo_pages import Shown


@pytest.fixture
def open_page(shown: Shown, chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page as a new visitor, and checks at the end that all went well."""
    contexts, wrong = [], []

    def watch(kind: str, text: str) -> None:
        wrong.append(f"{kind}: {text}")

    def visit(width: int = 1200, dark: bool = False) -> Any:
        scheme = "dark" if dark else "light"
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: message.type == "error" and watch("console", message.text))
        page.on("pageerror", lambda error: watch("error", str(error)))
        page.on("dialog", lambda dialog: watch("dialog", dialog.message))
        page.on(
            "request",
            lambda request: request.url.startswith((shown.url, "data:", "blob:")) or watch("request", request.url),
        )
        page.goto(shown.url)
        page.wait_for_selector("text=Add a picture, and the model says")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


def _ask(page: Any, file: str) -> str:
    page.set_input_files("input[type=file] >> nth=0", file)
    page.wait_for_selector("#answer .mw-bars")
    return page.inner_text("#answer")


def test_a_picture_is_asked_about_and_a_sample_left_out(open_page: Callable[..., Any], files: list[str]) -> None:
    page = open_page()
    answer = _ask(page, files[0])
    assert "Familiarity" in answer
    assert "<img src=x onerror=alert(1)>" in answer
    # With the keyboard alone.
    page.wait_for_selector("#samples button.gallery-item, #samples .thumbnail-item")
    sample = page.locator("#samples button").filter(has=page.locator("img")).first
    sample.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Read again without 1 remembered image")
    page.click("text=Put all back")
    page.wait_for_selector("text=Read again", state="detached")
    page.click("text=Show places that look alike")
    page.wait_for_selector("#matches .mw-pair, #matches p")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, True)])
def test_it_fits_a_phone_and_the_dark(open_page: Callable[..., Any], files: list[str], width: int, dark: bool) -> None:
    page = open_page(width, dark)
    _ask(page, files[0])
    for part in ("Ask", "Look into its memory", "Teach"):
        page.click(f"role=tab[name='{part}']")
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    values = [int(value) for value in background.split("(")[1].rstrip(")").split(",")[:3]]
    assert (sum(values) < 3 * 128) is dark


def test_what_one_visitor_teaches_another_does_not_see(open_page: Callable[..., Any], files: list[str]) -> None:
    one, other = open_page(), open_page()
    one.click("role=tab[name='Teach']")
    one.locator("input[type=file]").last.set_input_files(files)
    one.wait_for_selector("text=.png")
    one.get_by_label("They show").fill("zebra")
    one.keyboard.press("Enter")
    one.click("role=button[name='Remember']")
    one.wait_for_selector("text=Learned 3 pictures of zebra")
    one.click("role=tab[name='Ask']")
    assert "zebra" in _ask(one, files[0])
    assert "zebra" not in _ask(other, files[0])
    one.click("role=tab[name='Look into its memory']")
    one.wait_for_selector("text=1 to 15 of 15")
    other.click("role=tab[name='Look into its memory']")
    other.wait_for_selector("text=1 to 12 of 12")
