import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from training_images import write_images

from timm_memwrap.data import data_config, open_dataset
from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.model import MemoryWrapModel
from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.creation import create_model, in_chans_of, wrap_trained
from timm_memwrap.training.fitting import check_recipe
from timm_memwrap.training.loaders import augmented, eval_loader, train_loader
from timm_memwrap.training.recipes import find_recipe, load_recipe, read_recipe, recipe_names, write_recipe


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("compare_")])
def test_every_recipe_is_named_as_its_model_and_builds_it_and_its_data_pipeline(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe(name))
    check_recipe(recipe)
    prefix = "memwrap_evidence_" if recipe.memory.mode == "none" else "memwrap_"
    assert name == "quickstart" or name.split(".")[0] == prefix + recipe.model.name.split(".")[0]
    recipe.data.workers = 0
    recipe.data.batch_size = 2
    recipe.memory.train_size = 3
    # Weights are not at hand, and not needed for the shapes.
    recipe.model.pretrained = False
    with torch.device("meta"):
        model = create_model(recipe, 3)
        if recipe.memory.mode == "none":
            model = wrap_trained(model, recipe.model)
    assert isinstance(model, MemoryWrapModel)

    write_images(tmp_path / "train", 2)
    images = open_dataset("", tmp_path, "train", mode="L" if in_chans_of(recipe) == 1 else "RGB")
    config = data_config(model)
    assert config["input_size"][-1] == (recipe.data.img_size or 224)
    loader = train_loader(augmented(images, recipe.data, config), recipe.data, recipe.memory)
    batch, labels, extra = next(iter(loader))
    assert list(batch.shape) == [2, *config["input_size"]]
    assert ("memory" in extra) == (recipe.memory.mode == "sample")
    assert labels.shape == (2,)
    assert next(iter(eval_loader(images, recipe.data, config)))[0].shape == batch.shape
    if recipe.memory.mode == "sample":
        with torch.device("meta"):
            assert model.train()(batch.to("meta"), memory=extra["memory"].to("meta")).shape == (2, 3)


def test_no_recipe_says_again_what_it_inherits() -> None:
    for path in find_recipe("quickstart").parent.glob("*.yaml"):
        own = read_recipe(path, Comparison)
        text = path.read_text()
        if "base:" in text:
            base = read_recipe(find_recipe(re.search(r"base: (\S+)", text)[1], beside=path), Comparison)
            for section, values in own.items():
                for key, value in values.items():
                    said = re.search(rf"^  {key}:", text, re.MULTILINE)
                    assert not (said and base.get(section, {}).get(key) == value), f"{path.name}: {section}.{key}"


def test_the_nearer_recipe_overrides_the_farther(tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text("training: {epochs: 7, lr: 0.5}\ndata: {hflip: 0.0}\n")
    (tmp_path / "near.yaml").write_text("base: far\ntraining: {epochs: 3}\nmodel: {name: test_vit}\n")
    recipe = load_recipe(tmp_path / "near.yaml")
    assert (recipe.training.epochs, recipe.training.lr, recipe.data.hflip) == (3, 0.5, 0.0)
    assert recipe.model.name == "test_vit"
    expected = asdict(Recipe())
    for section, key in (("training", "epochs"), ("training", "lr"), ("data", "hflip"), ("model", "name")):
        expected[section][key] = getattr(getattr(recipe, section), key)
    assert asdict(recipe) == expected


def test_a_recipe_that_inherits_from_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b\n")
    (tmp_path / "b.yaml").write_text("base: a\n")
    with pytest.raises(ValueError, match="inherits from itself"):
        load_recipe(tmp_path / "a.yaml")


def test_a_written_recipe_is_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("memwrap_resnet18.svhn_1k"))
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert asdict(load_recipe(tmp_path / "recipe.yaml")) == asdict(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  nam: test_vit\n", "unknown key 'model.nam'. Did you mean 'model.name'"),
        ("modle: {}\n", "unknown key 'modle'. Did you mean 'model'"),
        ("training:\n  lr: fast\n", "fast"),
        ("training:\n  epochs: 1.5\n", "1.5"),
        ("memory:\n  mode: bach\n", "bach"),
        ("model: resnet18\n", "'model' is 'resnet18'"),
        ("- 1\n", "list"),
        ("a: [\n", "not YAML"),
        ("model:\n  name:\n", "'model.name' is empty"),
        ("training: {lr: null}\n", "'training.lr' is empty"),
        ("model: &m\n  kwargs: *m\n", "aliases"),
        ("model:\n  kwargs: {a: &a [x, x], b: &b [*a, *a], c: [*b, *b]}\n", "aliases"),
        (f"model: {{kwargs: {{a: {'[' * 5000}{']' * 5000}}}}}\n", "not YAML"),
        ("training: {epochs: !!int ''}\n", "not YAML"),
        ("model: {kwargs: {a: 2020-01-01}}\n", "date"),
        ("base: nope\n", "No recipe 'nope'"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_recipe(path)
    if "base" not in text:
        assert str(path) in str(caught.value)


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'quickstrat'.*'quickstart'"):
        find_recipe("quickstrat")
