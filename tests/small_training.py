"""Fixtures of tests that train: small folders of images, and a recipe that trains in a second."""

from collections.abc import Callable
from pathlib import Path

import pytest
from training_images import write_images

from timm_memwrap.training.configuration import Recipe
from timm_memwrap.training.recipes import find_recipe, load_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "data" / "train", 12)
    write_images(tmp_path / "data" / "validation", 4)
    return tmp_path / "data"


def override(recipe: Recipe, sections: dict[str, dict]) -> None:
    """Sets options of a recipe by section."""
    for section, values in sections.items():
        for key, value in values.items():
            assert hasattr(getattr(recipe, section), key)
            setattr(getattr(recipe, section), key, value)


@pytest.fixture
def digits() -> Callable[..., Recipe]:
    """Returns a recipe on the digits that trains in a second; sections are overridden by name."""

    def make(**sections: dict) -> Recipe:
        recipe = load_recipe(find_recipe("quickstart"))
        recipe.data.img_size, recipe.data.train_samples, recipe.data.val_samples = 16, 200, 60
        recipe.data.batch_size, recipe.training.epochs, recipe.memory.size = 50, 2, 40
        recipe.memory.store_images = False
        override(recipe, sections)
        return recipe

    return make
