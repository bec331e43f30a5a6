import json
from pathlib import Path

import pytest

from timm_memwrap.arguments import expand
from timm_memwrap.cli import main


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
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_short_forms_are_written_out(given: list[str], expected: list[str]) -> None:
    assert expand(given) == expected


def test_a_recipe_is_given_by_name_and_brings_what_it_inherits() -> None:
    command, config = expand(["train", "--config", "memwrap_resnet18.svhn_1k"])
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
        (["--model.scale", "big"], "expected"),
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


def test_help_lists_every_option_once(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.count("--training.lr ") == 1
    assert "usage: timm-memwrap train [--config RECIPE]" in text
