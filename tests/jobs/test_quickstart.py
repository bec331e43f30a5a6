from pathlib import Path

import pytest
import timm
from safetensors import safe_open

from timm_memwrap.cli import main
from timm_memwrap.jobs.quickstart import run_quickstart
from timm_memwrap.training.recipes import find_recipe, load_recipe


def test_a_short_run_leaves_a_model_a_figure_and_true_figures(tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("quickstart"))
    recipe.training.epochs, recipe.data.img_size, recipe.memory.size = 2, 16, 200
    for _ in range(2):
        report = run_quickstart(recipe, tmp_path / "out", progress=False)

    assert report.reloaded_equal
    assert len(report.trained.model.memory_bank) == 200
    assert report.test_size == 355
    # Ten classes: two epochs are far from enough, and far better than nothing.
    assert min(report.trained.plain_accuracy, report.trained.accuracy) > 0.3
    assert 0 <= report.trained.metrics.identical_class_rate <= 1 <= report.trained.metrics.support_size <= 200
    assert report.figure.read_bytes().startswith(b"\x89PNG")
    model = timm.create_model(f"local-dir:{report.trained.directory}", pretrained=True)
    assert model.memory_bank.class_names == list("0123456789")
    with safe_open(report.trained.directory / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_recipe_that_does_not_train_the_plain_classifier_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("quickstart"))
    recipe.memory.mode = "batch"
    with pytest.raises(ValueError, match=r"memory\.mode='batch'"):
        run_quickstart(recipe, tmp_path / "out", progress=False)


def test_the_command_reads_the_recipe_that_it_is_given(tmp_path: Path, capsys) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("model:\n  name: no_such_model\n")
    assert main(["quickstart", "--recipe", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "'no_such_model'" in capsys.readouterr().err
    assert main(["quickstart", "--recipe", "nope"]) == 1
    assert "'nope'" in capsys.readouterr().err
