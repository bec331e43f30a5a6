"""The HTML report: what it says, that hostile names stay text, and how a real browser sees it."""

import base64
import io
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from timm_memwrap import explain
from timm_memwrap.explaining import Explanation, attribute, write_html
from timm_memwrap.model import MemoryWrapModel

PLAIN = ["ant", "bee", "cow", "doe"]
HOSTILE = [
    "<script>document.title='ran'</script>",
    "\"><img src=x onerror=document.title='ran'>",
    "javascript:document.title='ran'",
    "</style></title><svg onload=document.title='ran'>{{ 7 * 7 }}{% raw %}",
]
LONG = "w" * 3000


class _Parsed(HTMLParser):
    """The elements with their attributes, the text outside of them, and the values of `alt`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.texts: list[str] = []
        self.alts: list[str] = []
        self.images: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # Names stand in alt only; its value is text, its presence structure.
        kept = tuple((name, "" if name == "alt" else value) for name, value in attrs)
        self.elements.append((tag, kept))
        self.alts += [value or "" for name, value in attrs if name == "alt"]
        self.images += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        if data.strip() and self.cdata_elem != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def _write(
    model: MemoryWrapModel, images: torch.Tensor, path: Path, classes: list[str], ids: list[str], **kwargs: Any
) -> str:
    bank = model.memory_bank
    bank.replace(bank.encodings, bank.labels, ids, bank.images, classes)
    write_html(model, images, None, path, labels=[0, 1], **kwargs)
    return path.read_text(encoding="utf-8")


def _shown(explanation: Explanation) -> int:
    """Counts the pictures of memory samples: those of the contenders are shown beside each other, once more."""
    used = {*explanation.samples, *explanation.examples, *explanation.counterfactuals}
    return len(used) + sum(len(contender.samples) for contender in explanation.contenders)


def test_it_says_what_the_explanations_say(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model, images = make_model("memory wrap", size=40, store_images=True, class_names=PLAIN), make_images(2)
    assert explain(model, images)[0].confidence is None
    model.calibration.confidence[0] = 1.0
    explanations = explain(model, images, top_k=3)
    labels = [explanations[0].prediction, (explanations[1].prediction + 1) % 4]
    path = write_html(model, images, explanations, tmp_path / "new" / "report.html", labels, names=["first", "second"])
    page = _Parsed(path.read_text(encoding="utf-8"))
    assert "2 images, classified by" in page.text
    assert "remembers 40 training images" in page.text
    assert page.text.count("73% likely to be right") == 2
    assert "✓ right" in page.text
    assert f"✗ wrong, it is {PLAIN[labels[1]]}" in page.text
    for explanation in explanations:
        assert f"{explanation.class_name} {explanation.probability:.0%} sure" in page.text
        assert f"From {explanation.support_size} remembered images, of which the strongest 3" in page.text
        without = PLAIN[explanation.prediction_without_memory]
        assert f"say {without}" in page.text
        for sample in {*explanation.samples, *explanation.examples, *explanation.counterfactuals}:
            kind = "example" if sample.is_example else "≠ counterfactual"
            assert f"{sample.weight:.0%} of evidence {kind} the model sees {sample.predicted_class_name}" in page.text
            assert f"id {sample.id}" in page.text
            points = round(-100 * sample.influence)
            said = f"{'−' if points < 0 else '+'}{abs(points)}" if points else "±0"  # noqa: RUF001
            assert f"({said} points)" in page.text
    shown = sum(map(_shown, explanations))
    assert len(page.images) == len(page.alts) == 2 + shown
    for explanation in explanations:
        best = explanation.most_alike
        for contender in explanation.contenders:
            said = "looks most like the input" if contender == best else "on average"
            near = " ".join(f"{sample.similarity:.2f} {sample.id}" for sample in contender.samples)
            percent = "<1%" if contender.probability < 0.01 else f"{contender.probability:.0%}"
            assert f"{contender.class_name} {percent} {near} {said}: {contender.similarity:.3f}" in page.text
        doubted = sum(e.most_alike.prediction != e.prediction for e in explanations)
        assert page.text.count("but it looks more like") == doubted
    assert all(alt for alt in page.alts)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_pictures_are_inside(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model, memory = make_model("wrapped"), TensorDataset(make_images(12, seed=1), torch.zeros(12))
    found = attribute(model, make_images(2), memory, "saliency", top_k=2, progress=False)
    explanations = [attribution.explanation for attribution in found]
    path = write_html(
        model, make_images(2), explanations, tmp_path / "r.html", attributions=found, dataset=memory, top_k=2
    )
    page = _Parsed(path.read_text(encoding="utf-8"))
    shown = sum(map(_shown, explanations))
    overlaid = sum(1 + len(e.samples) for e in explanations)
    assert len(page.images) == 2 + shown + overlaid
    assert "no picture" not in page.text
    for url in page.images:
        head, data = url.split(",", 1)
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            assert picture.format == "PNG"
            assert picture.size == (32, 32)
    assert f"{found[0].shares[0]:.0%} of the heat" in page.text
    without = _Parsed(write_html(model, make_images(2), explanations, tmp_path / "r.html").read_text())
    assert "no picture" in without.text
    assert len(without.images) == 2


def test_nothing_is_loaded_from_elsewhere(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    html = write_html(make_model("wrapped"), make_images(2), None, tmp_path / "r.html").read_text(encoding="utf-8")
    page = _Parsed(html)
    tags = [tag for tag, _ in page.elements]
    assert not set(tags) & {"script", "link", "iframe", "object", "embed", "form", "base", "a", "audio", "video"}
    names = {name for _, attributes in page.elements for name, _ in attributes}
    assert not any(name.startswith("on") for name in names)
    assert not names & {"href", "srcset", "action", "background"}
    assert "url(" not in html
    assert "@import" not in html
    policies = [dict(a)["content"] for tag, a in page.elements if dict(a).get("http-equiv")]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


@pytest.mark.parametrize("where", ["class names", "ids", "names", "title"])
def test_hostile_text_makes_no_element_and_no_attribute(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    tmp_path: Path,
    where: str,
) -> None:
    model, images = make_model("memory wrap", store_images=True), make_images(2)
    plain_ids = [f"{i}.png" for i in range(12)]
    ids = [f"{i}{HOSTILE[i % 4]}" for i in range(12)] if where == "ids" else plain_ids
    plain = _Parsed(
        _write(model, images, tmp_path / "a.html", PLAIN, plain_ids, names=["first", "second"], title="title")
    )
    hostile = _Parsed(
        _write(
            model,
            images,
            tmp_path / "b.html",
            HOSTILE if where == "class names" else PLAIN,
            ids,
            names=HOSTILE[:2] if where == "names" else ["first", "second"],
            title=HOSTILE[3] if where == "title" else "title",
        )
    )
    assert hostile.elements == plain.elements
    shown = explain(model, images)
    expected = {
        "class names": [explanation.class_name for explanation in shown],
        "ids": [str(sample.id) for explanation in shown for sample in explanation.samples],
        "names": HOSTILE[:2],
        "title": [HOSTILE[3]],
    }[where]
    for text in expected:
        assert text in hostile.texts


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("فیل\u200cبچ 漢字 é ü 😀 \u05d0", "فیل\u200cبچ 漢字 é ü 😀 \u05d0"),
        ("a & b &amp; &lt;", "a & b &amp; &lt;"),
        ("\u202eexe.png\u2066", "\ufffdexe.png\ufffd"),
        ("\x00\x1b[31m\x7f", "\ufffd\ufffd[31m\ufffd"),
        ("\udcff.png", "\ufffd.png"),
        (LONG, LONG),
    ],
)
def test_text_comes_through_but_for_what_a_page_cannot_show(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    tmp_path: Path,
    name: str,
    shown: str,
) -> None:
    model = make_model("wrapped")
    path = write_html(model, make_images(1), None, tmp_path / "r.html", names=[name])
    page = _Parsed(path.read_text(encoding="utf-8"))
    assert shown in page.texts
    assert any(alt.startswith(shown) for alt in page.alts)


def test_a_report_is_written_whole_or_not_at_all(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, path = make_model("wrapped"), tmp_path / "report.html"
    path.write_text("before")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_html(model, make_images(1), None, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    write_html(model, make_images(1), None, path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_a_stale_memory_is_said(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model = make_model("wrapped")
    assert "stale" not in _Parsed(write_html(model, make_images(1), None, tmp_path / "r.html").read_text()).text
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(2)
    assert (
        "The memory is stale" in _Parsed(write_html(model, make_images(1), None, tmp_path / "r.html").read_text()).text
    )


def test_counts_that_differ_are_refused(
    make_model: Callable[..., MemoryWrapModel], make_images: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model, images = make_model("wrapped"), make_images(2)
    memory = TensorDataset(make_images(12, seed=1), torch.zeros(12))
    found = attribute(model, images, memory, "saliency", top_k=1, progress=False)
    path = tmp_path / "r.html"
    with pytest.raises(ValueError, match="1 names for 2 images"):
        write_html(model, images, None, path, names=["one"])
    with pytest.raises(ValueError, match="1 attributions for 2 images"):
        write_html(model, images, None, path, attributions=found[:1])
    with pytest.raises(ValueError, match="2 images, 1 explanations"):
        write_html(model, images, explain(model, images[:1]), path)
    with pytest.raises(ValueError, match=r"other samples.*attribution.explanation for"):
        write_html(model, images, explain(model, images, top_k=5), path, attributions=found)
    assert not path.exists()


# -- in a real browser ------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")


class _Site(BaseHTTPRequestHandler):
    pages: dict[str, str]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.pages.get(self.path, "").encode()
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[tuple[dict[str, str], list[str], str]]:
    """Pages by path, the paths that were asked for, and the address."""
    handler = type("Site", (_Site,), {"pages": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler.pages, handler.asked, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _dom(url: str, profile: Path, *options: str) -> str:
    """Opens a page in the browser, runs what it runs, and returns what became of it."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=5000",
        *options,
        "--dump-dom",
        url,
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


@needs_browser
def test_a_browser_makes_of_hostile_text_what_it_makes_of_plain_text(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    tmp_path: Path,
    site: tuple[dict[str, str], list[str], str],
) -> None:
    pages, asked, address = site
    model, images = make_model("memory wrap", store_images=True), make_images(2)
    # Without its policy: names must be harmless by themselves.
    for path, names, title in (("/plain", PLAIN, "plain"), ("/hostile", HOSTILE, HOSTILE[3])):
        ids = [f"{i}{name}" for i, name in enumerate(names * 3)]
        html = _write(model, images, tmp_path / "r.html", names, ids, names=names[:2], title=title)
        pages[path] = html.replace("Content-Security-Policy", "X-None")
    plain, hostile = (_Parsed(_dom(f"{address}{path}", tmp_path / "profile")) for path in ("/plain", "/hostile"))
    assert hostile.elements == plain.elements
    assert HOSTILE[3] in hostile.texts
    assert "ran" not in hostile.texts
    assert set(asked) <= {"/plain", "/hostile", "/favicon.ico"}


@needs_browser
@pytest.mark.parametrize("guarded", [True, False])
def test_a_browser_runs_and_loads_nothing_even_if_something_were_in_the_page(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    tmp_path: Path,
    site: tuple[dict[str, str], list[str], str],
    guarded: bool,
) -> None:
    pages, asked, address = site
    html = write_html(make_model("wrapped"), make_images(1), None, tmp_path / "r.html").read_text(encoding="utf-8")
    attack = f"<script>document.title='ran'</script><img src='{address}/beacon'></main>"
    pages["/page"] = html.replace("</main>", attack)
    if not guarded:
        pages["/page"] = pages["/page"].replace("Content-Security-Policy", "X-None")
    page = _Parsed(_dom(f"{address}/page", tmp_path / "profile"))
    # Unguarded, both happen: the attack is one.
    assert ("/beacon" in asked) is not guarded
    assert ("ran" in page.texts) is not guarded


@needs_browser
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_it_fits_the_screen_and_its_pictures_show(
    make_model: Callable[..., MemoryWrapModel],
    make_images: Callable[..., torch.Tensor],
    tmp_path: Path,
    site: tuple[dict[str, str], list[str], str],
    width: int,
) -> None:
    pages, _, address = site
    model = make_model("memory wrap", store_images=True)
    ids = [f"{i}{LONG}" for i in range(12)]
    names = [LONG, "a b", "c", "d"]
    pages["/report"] = _write(model, make_images(2), tmp_path / "r.html", names, ids, names=names[:2], title=LONG)
    pages["/frame"] = f"""<iframe src="/report" width="{width}" height="900" style="border: 0"></iframe><script>
    document.querySelector("iframe").onload = event => {{
      const inner = event.target.contentDocument
      const shown = [...inner.images].filter(image => image.complete && image.naturalWidth > 0).length
      document.title = [inner.documentElement.scrollWidth, inner.images.length, shown].join(" ")
    }}</script><title>waiting</title>"""
    page = _Parsed(_dom(f"{address}/frame", tmp_path / "profile", "--window-size=1400,1000"))
    scroll, images, shown = (int(number) for number in page.texts[-1].split())
    assert scroll <= width
    assert shown == images > 2
