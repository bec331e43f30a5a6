"""The page as a program asks it: answers, limits, and nothing of one visitor for another."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demo_pages import Shown, make_model, pictures
from gradio_client import Client, handle_file

import timm_memwrap
from timm_memwrap.cli import main
from timm_memwrap.demo import Page, build_page, launch


@pytest.fixture
def client(shown: Shown) -> Client:
    return Client(shown.url, verbose=False)


def test_an_answer_is_what_explain_says(client: Client, shown: Shown, files: list[str]) -> None:
    answer, samples, *_ = client.predict(handle_file(files[0]), api_name="/ask")
    (expected,) = timm_memwrap.explain(shown.page.model, [files[0]], top_k=8)
    assert f"{expected.probability:.0%}" in answer or "<1%" in answer
    assert [item["caption"].split(" ", 1)[1] for item in samples] == [s.class_name for s in expected.samples]


def test_names_from_outside_are_text(client: Client, files: list[str]) -> None:
    answer, *_ = client.predict(handle_file(files[0]), api_name="/ask")
    assert "&lt;img src=x" in answer
    assert "<img src=x" not in answer
    report = client.predict(api_name="/report")
    assert "<img src=x" not in report
    done = client.predict([handle_file(files[0])], "<script>alert(2)</script>", api_name="/remember")[0]
    assert "<script>" not in done
    assert "&lt;script&gt;" in done


@pytest.mark.parametrize("kind", ["bomb", "text"])
def test_what_is_not_a_picture_is_refused_with_a_reason(client: Client, bomb: str, tmp_path: Path, kind: str) -> None:
    path = bomb
    if kind == "text":
        path = str(tmp_path / "a.png")
        Path(path).write_text("hello")
    with pytest.raises(Exception, match=r"at most 40 million|not a picture that can be read"):
        client.predict(handle_file(path), api_name="/ask")


def test_visitors_do_not_see_what_others_teach(shown: Shown, files: list[str]) -> None:
    one, other = Client(shown.url, verbose=False), Client(shown.url, verbose=False)
    taught = one.predict([handle_file(file) for file in files], "zebra", api_name="/remember")[0]
    assert "Learned 3 pictures of zebra" in taught
    assert "remembers 15 images of 4 classes" in taught
    assert "before" in taught
    assert "remembers 14 images of 4 classes" in one.predict(["zebra/2 i.png"], api_name="/forget")[0]
    assert "zebra" in one.predict(handle_file(files[0]), api_name="/ask")[0]
    assert "zebra" not in other.predict(handle_file(files[0]), api_name="/ask")[0]
    assert "remembers 11 images of 3 classes" in other.predict(["0"], api_name="/forget")[0]
    assert "remembers 15 images of 4 classes" in one.predict(api_name="/undo")[0]
    assert len(shown.page.model.memory_bank) == 12


def test_the_memory_is_searched_by_a_picture(client: Client, files: list[str]) -> None:
    found, *_ = client.predict(handle_file(files[0]), api_name="/search")
    assert len(found) == 12
    values = [float(item["caption"].split(" ", 1)[0]) for item in found]
    assert values == sorted(values, reverse=True)
    some, text, *_ = client.predict(1, api_name="/look")
    assert len(some) == 4
    assert "1 to 4 of 4" in text


def _endpoints(page: Page) -> set[str]:
    return {str(fn.api_name) for fn in build_page(page).fns.values() if fn.api_visibility == "public"}


def test_a_page_to_read_has_nothing_to_teach_and_nothing_to_save() -> None:
    assert not {"remember", "forget", "undo"} & _endpoints(Page(make_model(), "a", teach=False))
    for page, saves in ((Page(make_model(), "a"), True), (Page(make_model(), "a", save=False), False)):
        values = [getattr(block, "value", None) for block in build_page(page).blocks.values()]
        assert ("Save" in values) is saves


def test_uploads_lie_in_a_folder_that_goes_with_the_server(tmp_path: Path) -> None:
    timm_memwrap.save_pretrained(make_model(), tmp_path / "pets")
    code = f"""
import os, timm_memwrap
from gradio_client import Client, handle_file
from timm_memwrap.demo import Page, launch
model = timm_memwrap.from_pretrained({str(tmp_path / "pets")!r})
_, url, _ = launch(Page(model, "a"), prevent_thread_lock=True, quiet=True)
Client(url, verbose=False).predict(handle_file({str(tmp_path / "a.png")!r}), api_name="/ask")
folder = os.environ["GRADIO_TEMP_DIR"]
print(any(name == "a.png" for _, _, names in os.walk(folder) for name in names))
print(folder)
"""
    pictures(1, 4)[0].save(tmp_path / "a.png")
    environment = {key: value for key, value in os.environ.items() if key != "GRADIO_TEMP_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    there, folder = done.stdout.split()[-2:]
    assert there == "True"
    assert not Path(folder).exists()


def test_a_port_that_is_taken_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port} cannot be used on 127.0.0.1"):
            launch(Page(make_model(), "a"), port=port)


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"timm-memwrap\[demo\]|'\.\[demo\]'"):
        build_page(Page(make_model(), "a"))


def test_the_command_shows_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    timm_memwrap.save_pretrained(make_model(), tmp_path / "pets")
    seen: list[Any] = []
    monkeypatch.setattr("timm_memwrap.demo.launch", lambda page, **options: seen.append((page, options)))
    assert main(["demo", str(tmp_path / "pets"), "--port", "7999"]) == 0
    ((page, options),) = seen
    assert (page.title, page.teach, page.save, options) == ("pets", True, True, {"port": 7999})
    assert main(["demo", str(tmp_path / "missing")]) == 1
    assert "neither a directory nor a repo id" in capsys.readouterr().err
