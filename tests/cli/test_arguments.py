import json
from pathlib import Path

import pytest
import timm
import torch

import timm_memwrap
from timm_memwrap.cli import COMMANDS, main
from timm_memwrap.cli.arguments import expand, make_parser


def _expand(args: list[str]) -> list[str]:
    command, *rest = args
    return [command, *expand(rest, command, make_parser(command, COMMANDS[command]))]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["train", "--training.epochs", "3"], ["train", "--training.epochs=3"]),
        (["train", "--training.epochs=3"], ["train", "--training.epochs=3"]),
        (["train", "--freeze-backbone"], ["train", "--training.freeze_backbone=true"]),
        (["train", "--resume", "--out", "a-b"], ["train", "--resume=true", "--out=a-b"]),
        (["train", "--resume", "false"], ["train", "--resume=false"]),
        (["train", "--push", "me/a-b"], ["train", "--hub.push=me/a-b"]),
        (["train", "--data-dir=/x-y"], ["train", "--data.data_dir=/x-y"]),
        (["train", "--print-config"], ["train", "--print_config"]),
        (["train", "--help"], ["train", "--help"]),
        (["wrap", "resnet18", "--store-images"], ["wrap", "resnet18", "--store_images=true"]),
        (["push", "a-folder", "me/x"], ["push", "a-folder", "me/x"]),
        (["train", "--model.kwargs.depth", "3"], ["train", "--model.kwargs.depth=3"]),
        (["compare", "--comparison.heads+", "knn"], ["compare", "--comparison.heads+=knn"]),
        (["explain", "m", "--top-k", "2", "--", "--a.png"], ["explain", "m", "--top_k=2", "--", "--a.png"]),
    ],
)
def test_short_forms_are_written_out(given: list[str], expected: list[str]) -> None:
    assert _expand(given) == expected


def test_a_recipe_is_given_by_name_and_brings_what_it_inherits() -> None:
    command, config = _expand(["train", "--config", "memwrap_resnet18.svhn_1k"])
    recipe = json.loads(config.removeprefix("--config="))
    assert command == "train"
    assert recipe["model"]["name"] == "resnet18"
    assert recipe["training"]["opt"] == "sgd"
    assert recipe["data"] | {"hflip": 0.0, "train_samples": 1000} == recipe["data"]


def test_options_override_the_recipe_and_the_result_is_shown(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", "quickstart", "--training.epochs", "3", "--freeze-backbone", "--print-config"])
    assert caught.value.code == 0
    import yaml

    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["epochs"] == 3
    assert shown["training"]["freeze_backbone"] is True
    assert shown["data"]["dataset"] == "digits"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--training.epoch", "3"], "no option --training.epoch. Did you mean --training.epochs?"),
        (["--zzz", "3"], "no option --zzz. See --help."),
        (["--training.lr", "fast"], "fast"),
        (["--training.epochs", "1.5"], "1.5"),
        (["--memory.mode", "bach"], "bach"),
        (["--model.scale", "big"], "big"),
        (["--model.kwarg.depth", "3"], "no option --model.kwarg.depth. Did you mean --model.kwargs?"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_option(
    args: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", *args])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_wrong_key_in_a_recipe_is_one_line_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "r.yaml").write_text("training: {epoch: 3}\n")
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 1
    error = capsys.readouterr().err
    assert "Did you mean 'training.epochs'?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "text", ['model: {name: "\\e[31m"}', 'training: {opt: "\\e[31m"}', 'memory: {mode: "\\e[31m"}', '"\\e[31m": 1']
)
def test_what_a_recipe_says_does_not_steer_the_terminal(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    args = ["--data.dataset", "digits", "--data.workers", "0", "--out", str(tmp_path / "out"), "--progress", "false"]
    try:
        status: object = main(["train", "--config", str(tmp_path / "r.yaml"), *args])
    except SystemExit as error:  # the parser's
        status = error.code
    assert status in (1, 2)
    shown = "".join(capsys.readouterr())
    assert "[31m" in shown
    assert all(character.isprintable() for character in shown.replace("\n", ""))


def test_help_lists_every_option_once(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.count("--training.lr ") == 1
    assert "usage: timm-memwrap train [--config RECIPE]" in text


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"run"}))
def test_every_command_describes_each_of_its_options(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: timm-memwrap {command}" in text
    parser = make_parser(command, COMMANDS[command])
    for action in parser._actions:
        assert action.help, action.option_strings
    # What a command passes on is in its help too.
    passed = {"wrap": "val_split", "benchmark": "bank_sizes", "compare": "comparison.heads", "train": "hub.push"}
    assert f"--{passed.get(command, 'config')} " in text


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_overview_lists_every_command(args: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(args) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in text


def test_the_version_is_printed_with_those_of_what_it_builds_on(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"timm-memwrap {timm_memwrap.__version__} (timm {timm.__version__}, torch {torch.__version__})\n"


def test_an_unknown_command_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "timm-memwrap: there is no command 'trian'. Did you mean 'train'?\n"
