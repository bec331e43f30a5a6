"""A Space of the page: made in one commit, for reading alone unless asked for."""

import ast
from typing import Any

import pytest
import yaml
from hub_server import Hub

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.cli import main
from timm_memwrap.hub import push_space

pytest.importorskip("gradio")


@pytest.fixture
def pushed(hub: Hub, token: str, model: MemoryWrapModel) -> str:
    timm_memwrap.push_to_hub(model, "me/pets")
    return "me/pets"


def _files(hub: Hub, name: str) -> dict[str, bytes]:
    return hub.repos[next(key for key in hub.repos if str(key).endswith(name))].files()


@pytest.mark.parametrize("teach", [False, True])
def test_a_space_is_made_in_one_commit(hub: Hub, pushed: str, teach: bool, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["demo", pushed, "--push", "me/page", *(["--teach", "true"] if teach else [])]
    assert main(args) == 0
    assert "Pushed the page of me/pets to me/page" in capsys.readouterr().out
    files = _files(hub, "me/page")
    assert {"app.py", "requirements.txt", "README.md"} <= set(files)
    tree = ast.parse(files["app.py"].decode())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Page")
    options: dict[str, Any] = {each.arg or "": ast.literal_eval(each.value) for each in call.keywords}
    assert options == {"title": "pets", "teach": teach, "save": False}
    assert len(files["app.py"].decode().splitlines()) < 10
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["me/pets"])
    requirements = files["requirements.txt"].decode().split()
    assert all("==" in line for line in requirements)
    assert any(line.startswith("timm-memwrap[demo]==") for line in requirements)
    # As it stands, it can be pushed again.
    push_space(pushed, "me/page", teach=teach)


def test_the_app_shows_the_model(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    push_space(pushed, "me/page", title='A "quoted"\n<title>')
    seen: list[Any] = []
    monkeypatch.setattr("timm_memwrap.demo.launch", seen.append)
    exec(compile(_files(hub, "me/page")["app.py"], "app.py", "exec"), {})
    assert seen[0].title == 'A "quoted"\n<title>'
    assert len(seen[0].model.memory_bank) == 12


def test_another_app_is_not_overwritten(hub: Hub, pushed: str) -> None:
    push_space(pushed, "me/page")
    key = next(key for key in hub.repos if str(key).endswith("me/page"))
    hub.commit(key, {"app.py": b"print('mine')"})
    with pytest.raises(ValueError, match="holds another app"):
        push_space(pushed, "me/page")
    assert _files(hub, "me/page")["app.py"] == b"print('mine')"


@pytest.mark.parametrize(
    ("model_id", "space", "message"),
    [
        ("me/missing", "me/page", "404|not found|Repository Not Found"),
        ("me/pets", "someone/page", "403|rights|Forbidden"),
        ("me/pets", "me/pa ge", "is not a valid repo id"),
    ],
)
def test_nothing_is_half_pushed(
    hub: Hub, pushed: str, model_id: str, space: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", model_id, "--push", space]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert __import__("re").search(message, error)
    assert not any(str(key).endswith("page") and "app.py" in hub.repos[key].files() for key in hub.repos)


def test_a_folder_cannot_be_a_space(hub: Hub, token: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path), "--push", "me/page"]) == 1
    assert "which a Space cannot load. Push it first" in capsys.readouterr().err
