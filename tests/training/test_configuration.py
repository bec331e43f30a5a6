import re
from dataclasses import asdict
from pathlib import Path

import pytest

from timm_memwrap.training.configuration import QuickstartConfig, find_recipe, load_config

RECIPES = sorted(find_recipe("quickstart").parent.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    assert load_config(QuickstartConfig, path).training.epochs > 0


def test_the_file_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  name: test_vit\ntraining:\n  epochs: 3\n")
    config = load_config(QuickstartConfig, find_recipe(str(path)))
    expected = asdict(QuickstartConfig())
    expected["model"]["name"] = "test_vit"
    expected["training"]["epochs"] = 3
    assert asdict(config) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  nam: test_vit\n", "unknown key 'model.nam'. Did you mean 'model.name'"),
        ("modle: {}\n", "unknown key 'modle'. Did you mean 'model'"),
        ("training:\n  lr: fast\n", "fast"),
        ("training:\n  epochs: 1.5\n", "1.5"),
        ("- 1\n", "list"),
        ("a: [\n", "not YAML"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(QuickstartConfig, path)
    assert str(path) in str(caught.value)


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'nope'.*'quickstart'"):
        find_recipe("nope")
