"""The commands that go to the Hub: what they print, and that an error is one line."""

import json
import re
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from torch import Tensor

import timm_memwrap
from timm_memwrap import MemoryWrapModel
from timm_memwrap.cli import main
from timm_memwrap.experiments.benchmark import benchmark


def test_push_pull_inspect(
    hub: Hub,
    token: str,
    model: MemoryWrapModel,
    images: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets", model_card={"license": "mit"})
    assert main(["push", str(folder), "me/pets", "--private", "true", "--message", "By hand"]) == 0
    repo = hub.repos["me/pets"]
    assert repo.private
    assert repo.history()[0].title == "By hand"
    assert f"{hub.endpoint}/me/pets/commit/{repo.history()[0].oid}" in capsys.readouterr().out
    card = repo.files()["README.md"].decode()
    assert "license: mit" in card
    assert 'timm.create_model("hf-hub:me/pets", pretrained=True)' in card
    assert "local-dir" not in card
    # The images stayed, and the card says so.
    assert "not inside" in card

    assert main(["pull", "me/pets", str(tmp_path / "pulled")]) == 0
    assert "README.md, config.json, model.safetensors" in capsys.readouterr().out
    loaded = timm_memwrap.from_pretrained(tmp_path / "pulled")
    assert torch.equal(loaded(images), model(images))

    assert main(["inspect", "me/pets"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [
        "me/pets",
        "architecture memwrap_evidence_test_resnet",
        "classes 3",
        f"parameters {sum(p.numel() for p in model.parameters()):,}",
    ]
    assert re.fullmatch(r"files 1\.5. MB: weights 1\.5. MB, memory 0\.01 MB", lines[4])
    assert lines[6:8] == ["from pets: all of 12", "images not inside"]
    assert lines[8:10] == ["fingerprint not checked; a load checks it", "calibrated no"]
    assert lines[10:] == ["by class", "cat 4", "dog 4", "a|b <i>*c*</i> 4"]


def test_push_of_the_memory_alone(
    hub: Hub, token: str, model: MemoryWrapModel, images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm_memwrap.push_to_hub(model, "me/whole")
    assert main(["pull", "me/whole", str(tmp_path / "pulled")]) == 0
    assert main(["push", str(tmp_path / "pulled"), "me/memory", "--memory-only", "true"]) == 1
    assert "No repository is known to have the model's weights" in capsys.readouterr().err
    loaded = timm_memwrap.from_pretrained("me/whole")
    loaded.forget(loaded.memory_bank.ids[:2])
    loaded.save_pretrained(tmp_path / "memory", memory_only=True)
    assert main(["push", str(tmp_path / "memory"), "me/memory", "--memory-only", "true"]) == 0
    assert "Pushed" in capsys.readouterr().out
    assert hub.repos["me/memory"].history()[0].title == "Push a new memory"
    assert torch.equal(timm_memwrap.from_pretrained("me/memory")(images), loaded(images))
    assert main(["pull", "me/memory", str(tmp_path / "again")]) == 0
    assert "memory.safetensors" in capsys.readouterr().out
    assert main(["push", str(tmp_path / "memory"), "me/whole", "--memory-only", "true"]) == 0
    assert len(timm_memwrap.from_pretrained("me/whole").memory_bank) == 10


def test_inspect_says_empty(
    hub: Hub, token: str, model: MemoryWrapModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model.memory_bank.clear()
    timm_memwrap.save_pretrained(model, tmp_path / "empty", allow_empty_memory=True)
    assert main(["inspect", str(tmp_path / "empty")]) == 0
    assert "empty: call" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "me/missing"], "Repository Not Found"),
        (["pull", "me/missing", "{}/x"], "Repository Not Found"),
        (["push", "{}/nothing", "me/pets"], "nothing' is not a directory"),
        (["push", "{}", "me/pets"], "config.json in "),
    ],
)
def test_an_error_is_one_line(
    hub: Hub, token: str, tmp_path: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arg.format(tmp_path) for arg in args]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("timm-memwrap: ")
    assert message in error
    assert not hub.repos
    assert not list(tmp_path.iterdir())


def test_a_broken_connection_is_one_line(
    hub: Hub, token: str, model: MemoryWrapModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = timm_memwrap.save_pretrained(model, tmp_path / "pets")
    hub.fail("POST", "/commit/", times=100, cut_after=100)
    assert main(["push", str(folder), "me/pets"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("timm-memwrap: ")


def test_a_training_is_pushed_with_its_accuracy(hub: Hub, token: str, tmp_path: Path) -> None:
    args = ["--config", "quickstart", "--out", str(tmp_path / "out"), "--data.img_size", "16", "--training.epochs", "1"]
    assert main(["train", *args, "--push", "me/digits", "--hub.private", "true", "--hub.license", "mit"]) == 0
    repo = hub.repos["me/digits"]
    assert repo.private
    assert set(repo.files()) >= {"model.safetensors", "config.json", "README.md"}
    card = repo.files()["README.md"].decode()
    assert "license: mit" in card
    accuracy = json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]
    assert f"value: {accuracy}" in card
    loaded = timm_memwrap.from_pretrained("me/digits").eval()
    local = timm_memwrap.from_pretrained(tmp_path / "out").eval()
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded(x), local(x))
    assert loaded.memory_bank.images is None
    assert local.memory_bank.images is not None


def test_the_benchmark_pushes_to_a_hub_on_loopback_only(hub: Hub, token: str) -> None:
    rows = benchmark(["test_resnet"], parts=["push"], rounds=1)
    assert [row.what for row in rows] == ["save", "push"]
    assert len(hub.repos) == 2
    assert all("model.safetensors" in repo.files() for repo in hub.repos.values())
