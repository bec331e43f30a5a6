"""Recipes as models: what is trained under a name is pushed under it, and its card alone repeats the training."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from hub_server import Hub, check_card
from huggingface_hub import ModelCard
from PIL import Image
from small_training import digits, folder  # noqa: F401  (fixtures)

import timm_memwrap
from timm_memwrap.cli import main
from timm_memwrap.hub import check_repo_id
from timm_memwrap.jobs.train import train
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.recipes import find_recipe, load_recipe, recipe_names, write_recipe

Make = Callable[..., Recipe]
# What makes of the quickstart a training of a second.
SMALL = ["--config", "quickstart", "--data.img_size", "16", "--data.train_samples", "200", "--data.val_samples", "60"]
SMALL += ["--training.epochs", "1", "--memory.size", "40"]


@pytest.mark.parametrize("mode", ["none", "batch"])
def test_a_model_of_the_hub_is_trained_further_and_stays_named(
    tmp_path: Path,
    digits: Make,  # noqa: F811
    token: str,
    mode: str,
) -> None:
    options = {"training": {"epochs": 1}, "memory": {"mode": mode}}
    train(digits(**options), tmp_path / "first", progress=False)
    timm_memwrap.push_to_hub(timm_memwrap.from_pretrained(tmp_path / "first"), "me/digits")
    report = train(digits(**options, model={"name": "hf-hub:me/digits"}), tmp_path / "second", progress=False)
    assert report.model.base_model == "me/digits"
    assert "base_model: me/digits" in (tmp_path / "second" / "README.md").read_text()
    assert len(timm_memwrap.from_pretrained(tmp_path / "second").memory_bank) == 40


def save_recipe(hub: Hub, repo_id: str) -> list[list[str]]:
    """Saves the recipe on a card as the card says, and returns the arguments of its commands."""
    card = hub.repos[repo_id].files()["README.md"].decode()
    assert check_card(card) == ([], [])
    Path("recipe.yaml").write_text(block(card, "yaml"))
    commands = [shlex.split(line) for line in block(card, "bash").splitlines()]
    assert all(command[:2] == ["OMP_NUM_THREADS=1", "timm-memwrap"] for command in commands)
    return [command[2:] for command in commands]


def block(card: str, language: str) -> str:
    [code] = re.findall(rf"```{language}\n(.*?)```\n", card, re.DOTALL)
    return code


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("compare_")])
def test_a_recipe_is_a_repository_and_comes_back_from_its_whole_text(name: str, tmp_path: Path) -> None:
    check_repo_id(f"me/{name}")
    recipe = load_recipe(find_recipe(name))
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("mode", ["none", "sample"])
def test_the_card_alone_repeats_a_training_to_the_bit(
    hub: Hub, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    first, again = tmp_path / "digits", tmp_path / "again"
    assert main(["train", *SMALL, "--memory.mode", mode, "--push", "me/digits", "--out", str(first)]) == 0
    again.mkdir()
    monkeypatch.chdir(again)
    [arguments] = save_recipe(hub, "me/digits")
    before = len(hub.requests)
    assert main(arguments) == 0
    assert len(hub.requests) == before
    assert Path("digits", "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_the_command_on_the_card_repeats_a_training_on_a_machine_with_other_threads(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    again.mkdir()

    def run(command: str, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        result = subprocess.run(
            ["bash", "-ec", command], cwd=again, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr

    run(f"timm-memwrap train {shlex.join(SMALL)} --out {shlex.quote(str(first))}", threads=2)
    card = (first / "README.md").read_text()
    assert re.search(r"\| Device \| .*cpu .*, 2 threads", card)
    (again / "recipe.yaml").write_text(block(card, "yaml"))
    run(block(card, "bash"), threads=1)
    assert (again / "first" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_a_training_that_went_on_is_repeated_in_its_parts(
    hub: Hub, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "digits"
    assert main(["train", *SMALL, "--training.epochs", "2", "--out", str(out)]) == 0
    longer = ["train", *SMALL, "--training.epochs", "4", "--out", str(out), "--push", "me/digits", "--resume"]
    assert main(longer) == 0
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    first, second = save_recipe(hub, "me/digits")
    assert main(second[: second.index("--resume")]) == 0
    weights, found = Path("digits", "model.safetensors"), (out / "model.safetensors").read_bytes()
    # Four epochs at once have other learning rates.
    assert weights.read_bytes() != found
    assert main([*first, "--overwrite"]) == 0
    assert main(second) == 0
    assert weights.read_bytes() == found
    # Once more, only to push: what was before is not forgotten.
    assert main(longer) == 0
    assert save_recipe(hub, "me/digits") == [first, second]


def test_the_card_does_not_promise_what_a_training_whose_length_was_changed_midway_cannot_hold(
    hub: Hub,
    token: str,
    digits: Make,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = tmp_path / "out" / "checkpoints" / "last.safetensors"

    def stop(rows: list[dict], out: Path) -> None:
        if checkpoint.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("timm_memwrap.training.fitting.write_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            train(digits(training={"epochs": 3}), tmp_path / "out", progress=False)
    train(digits(hub={"push": "me/digits"}), tmp_path / "out", resume=True, progress=False)
    card = hub.repos["me/digits"].files()["README.md"].decode()
    assert "changed before it was over: 3 epochs until epoch 1, then 2 epochs." in card
    assert "trains the same model" not in card
    assert block(card, "bash").count("timm-memwrap") == 1


@pytest.mark.parametrize("mode", ["none", "batch"])
def test_a_model_that_is_trained_further_and_replaced_is_repeated_from_what_it_was(
    hub: Hub,
    token: str,
    digits: Make,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    options = {"memory": {"mode": mode}, "hub": {"push": "me/digits"}}
    train(digits(**options), tmp_path / "first", progress=False)
    before = hub.repos["me/digits"].history()[0].oid
    train(digits(**options, model={"name": "hf-hub:me/digits"}), tmp_path / "second", progress=False)
    card = hub.repos["me/digits"].files()["README.md"].decode()
    assert f"name: hf-hub:me/digits@{before}\n" in card
    assert "base_model: me/digits\n" in card
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    [arguments] = save_recipe(hub, "me/digits")
    assert main(arguments) == 0
    weights = (tmp_path / "second" / "model.safetensors").read_bytes()
    assert Path("second", "model.safetensors").read_bytes() == weights
    assert "base_model: me/digits\n" in Path("second", "README.md").read_text()


def test_a_folder_of_images_that_is_here_is_named_and_repeats_a_training(
    hub: Hub,
    token: str,
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    small = ["--model.name", "test_resnet", "--data.img_size", "24", "--data.workers", "0", "--training.epochs", "2"]
    assert main(["train", "--data-dir", ".", *small, "--push", "me/pets", "--out", str(tmp_path / "pets")]) == 0
    results = ModelCard(hub.repos["me/pets"].files()["README.md"].decode()).data.eval_results
    assert {result.dataset_name for result in results} == {"data"}
    monkeypatch.chdir(tmp_path)
    [arguments] = save_recipe(hub, "me/pets")
    assert "data_dir: data\n" in Path("recipe.yaml").read_text()
    first = Path("pets", "model.safetensors").read_bytes()
    assert main([*arguments, "--overwrite"]) == 0
    assert Path("pets", "model.safetensors").read_bytes() == first


def test_the_card_has_the_results_of_the_recipe(hub: Hub, token: str, digits: Make, tmp_path: Path) -> None:  # noqa: F811
    report = train(digits(hub={"push": "digits"}), tmp_path / "out", progress=False)
    text = hub.repos["me/digits"].files()["README.md"].decode()
    metrics = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert metrics["accuracy"] == report.accuracy
    assert {"accuracy of the plain classifier", "explanation accuracy", "samples a prediction"} <= metrics.keys()
    # Also those that are low where the evidence is decoration.
    assert metrics["accuracy without a memory"] == report.metrics.accuracy_without_memory
    assert metrics["changed without the strongest samples"] == report.metrics.deletion_flip_rate
    assert metrics["changed without random samples"] == report.metrics.random_flip_rate
    assert "| Data | digits, 200 of 1,797 images for training and 60 of 1,797 images for validation |" in text
    assert f"timm_memwrap {timm_memwrap.__version__}, timm " in text


@pytest.mark.parametrize("include_images", [True, False])
def test_a_figure_goes_with_the_pictures_alone(
    hub: Hub,
    token: str,
    digits: Make,  # noqa: F811
    tmp_path: Path,
    include_images: bool,
) -> None:
    recipe = digits(hub={"push": "me/digits", "include_images": include_images}, memory={"store_images": True})
    train(recipe, tmp_path / "out", progress=False)
    files = hub.repos["me/digits"].files()
    assert (timm_memwrap.from_pretrained("me/digits").memory_bank.images is not None) == include_images
    assert ("explanation.png" in files) == include_images
    assert (b"](explanation.png)" in files["README.md"]) == include_images


def test_the_card_of_a_folder_names_it_and_holds_no_path(
    hub: Hub,
    token: str,
    digits: Make,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = {"dataset": "", "data_dir": str(folder), "train_samples": None, "val_samples": None, "val_split": "val"}
    model = timm.create_model("memwrap_test_resnet", num_classes=3)
    source = timm_memwrap.save_pretrained(model, tmp_path / "source", allow_empty_memory=True)
    recipe = digits(data=data, model={"name": str(source)}, memory={"mode": "batch"}, hub={"push": "me/pets"})
    recipe.data.mean = recipe.data.std = None
    train(recipe, tmp_path / "out", progress=False)
    card = hub.repos["me/pets"].files()["README.md"].decode()
    assert "| Data | data, 36 images for training and 12 images for validation |" in card
    assert "data_dir: data\n" in card
    assert "name: source\n" in card
    assert str(tmp_path) not in card
    assert "push: null" in card


def test_the_card_names_the_commit_of_a_data_set_on_the_hub(
    hub: Hub,
    token: str,
    digits: Make,  # noqa: F811
    tmp_path: Path,
) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [Image.new("L", (16, 16), 20 * i) for i in range(12)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(12)]}, features)
    rows.to_parquet(tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation")]
    repo = hub.repo("datasets/me/pets", **dict.fromkeys(names, content))
    data = {"dataset": "hfds/me/pets", "train_samples": None, "val_samples": None, "val_split": "validation"}
    recipe = digits(data=data)
    recipe.data.mean = recipe.data.std = None
    train(recipe, tmp_path / "out", progress=False)
    commit = repo.history()[0].oid
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"hfds/me/pets, 12 images of commit {commit} for training" in card


@pytest.mark.parametrize(
    ("who", "repo_id", "private", "message"),
    [
        (None, "me/new", None, "no token found"),
        ("hf_wrong", "me/new", None, "Invalid user token"),
        ("read", "me/new", None, "403"),
        ("read", "me/open", None, "403"),
        ("other", "me/open", None, "403"),
        ("other", "me/secret", None, "403"),
        ("write", "me/no repo id", None, "not a valid repo id"),
        ("write", "me/open", True, "'me/open' exists and is public"),
    ],
)
def test_what_could_not_be_pushed_is_not_trained(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    who: str | None,
    repo_id: str,
    private: bool | None,
    message: str,
) -> None:
    hub.repo("me/open")
    hub.repo("me/secret", private=True)
    users = {"read": hub.user("me", "read"), "other": hub.user("other"), "write": hub.user("me")}
    if who is not None:
        monkeypatch.setenv("HF_TOKEN", users.get(who, who))
    out = tmp_path / "out"
    options = [] if private is None else ["--hub.private", str(private).lower()]
    assert main(["train", *SMALL, "--push", repo_id, *options, "--out", str(out)]) == 1
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("timm-memwrap: ")]
    assert message in error
    assert not out.exists()
    assert set(hub.repos) == {"me/open", "me/secret"}
    assert all(len(repo.history()) == 1 for repo in hub.repos.values())


@pytest.mark.parametrize(("method", "path"), [("GET", "/whoami"), ("POST", "/repos/create"), ("GET", "/auth-check")])
def test_nothing_is_trained_while_the_hub_is_down(
    hub: Hub, token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, path: str
) -> None:
    hub.fail(method, path, times=100, status=503, retry_after=0)
    assert main(["train", *SMALL, "--push", "me/digits", "--out", str(tmp_path / "out")]) == 1
    assert "503" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_cannot_be_makes_no_repository(hub: Hub, token: str, digits: Make, tmp_path: Path) -> None:  # noqa: F811
    recipe = digits(hub={"push": "me/digits"}, model={"name": "no_such_model"})
    with pytest.raises(ValueError, match="no_such_model"):
        train(recipe, tmp_path / "out", progress=False)
    assert not hub.requests


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/commit/", {"cut_after": 100}),
        ("PUT", "/upload/", {"cut_after": 5_000}),
        ("PUT", "/", {"status": 400}),
    ],
)
def test_a_push_that_fails_after_the_training_says_the_command_that_pushes_it(
    hub: Hub, token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, path: str, fault: dict
) -> None:
    out = tmp_path / "my out"
    failing = hub.fail(method, path, times=100, **fault)
    options = ["--push", "me/digits", "--hub.private", "true", "--hub.include_images", "true", "--out", str(out)]
    assert main(["train", *SMALL, *options]) == 1
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("timm-memwrap: ")]
    assert error.startswith(f"timm-memwrap: The model is saved in {out}, but was not pushed: ")
    command = shlex.split(error.partition(" Push it with: ")[2])
    assert len(hub.repos["me/digits"].history()) == 1
    failing.times = 0
    assert command[0] == "timm-memwrap"
    assert main(command[1:]) == 0
    pushed = timm_memwrap.from_pretrained("me/digits")
    assert pushed.memory_bank.images is not None
    assert hub.repos["me/digits"].private
    assert pushed.memory_bank.encodings.equal(timm_memwrap.from_pretrained(out).memory_bank.encodings)
    assert os.fspath(tmp_path) not in hub.repos["me/digits"].files()["README.md"].decode()


def test_the_card_of_another_training_replaces_the_card_that_is_there(
    hub: Hub,
    token: str,
    digits: Make,  # noqa: F811
    tmp_path: Path,
) -> None:
    for epochs in (1, 2):
        recipe = digits(hub={"push": "me/digits"}, training={"epochs": epochs})
        report = train(recipe, tmp_path / str(epochs), progress=False)
    card = hub.repos["me/digits"].files()["README.md"].decode()
    assert ModelCard(card).data.eval_results[0].metric_value == report.accuracy
    assert "  epochs: 2\n" in card
