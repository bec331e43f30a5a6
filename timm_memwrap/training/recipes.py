"""Finds, reads and writes recipes: YAML files, each of which may inherit from another by `base: NAME`."""

import json
import os
from argparse import ArgumentError
from collections.abc import Collection, Mapping
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from timm_memwrap._utils import write_text
from timm_memwrap.training.configuration import Recipe

__all__ = ["find_recipe", "first_difference", "load_recipe", "read_recipe", "recipe_names", "to_dict", "write_recipe"]

_Sections = Mapping[str, Mapping[str, Any]]


def recipe_names() -> list[str]:
    """Lists the recipes that come with the package; those of comparisons start with `compare_`."""
    # Those that only others inherit from start with an underscore.
    return sorted({file.stem for folder in _folders() for file in folder.glob("[!_]*.yaml")})


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Returns the path of a recipe by its path or name; the folder of the file `beside` is searched first."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    for folder in [*([beside.parent] if beside else []), *_folders()]:
        for file in (folder / f"{name}.yaml", folder / name):
            if file.is_file():
                return file
    near = get_close_matches(name, recipe_names(), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(recipe_names())}."
    raise ValueError(f"No recipe {name!r}. {hint} Or pass the path of a YAML file.")


def load_recipe(path: Path, kind: type[Recipe] = Recipe) -> Recipe:
    """Loads a recipe, or a `kind` with more sections, and checks the names and types of its options."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "recipe")
    try:
        parsed = parser.parse_object({"recipe": read_recipe(path, kind)})
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return parser.instantiate(parsed).recipe


def read_recipe(path: Path, kind: type[Recipe] = Recipe, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the options that a recipe and those that it inherits from set, by section.

    `heirs` are the files that inherit from this one.
    """
    if path.resolve() in heirs:
        raise ValueError(f"{path} inherits from itself, through {' and '.join(heir.name for heir in heirs)}.")
    try:
        text = path.read_text(encoding="utf-8")
        events = yaml.parse(text, yaml.SafeLoader)
        # Aliases of aliases make of a few lines more values than can be read.
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ValueError("it has aliases (*name). Write the values out, or inherit them by 'base: NAME'.")
        content = yaml.safe_load(text)
        json.dumps(content)  # a date or a set is no value of an option
    except OSError:
        raise
    except Exception as error:
        # PyYAML fails in any way at a value that is not of the type that it looks like or names.
        raise ValueError(f"{path} is not YAML of a recipe: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not sections such as 'model:'.")
    base = content.pop("base", None)
    _refuse_unknown(content, kind, path)
    if base is None:
        return content
    inherited = read_recipe(find_recipe(str(base), beside=path), kind, (*heirs, path.resolve()))
    return {
        section: {**(inherited.get(section) or {}), **(content.get(section) or {})}
        for section in dict.fromkeys([*inherited, *content])
    }


def to_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Returns all options by section as YAML and JSON give them back, which have no tuples."""
    return json.loads(json.dumps(asdict(recipe)))


def write_recipe(recipe: Recipe, path: str | os.PathLike) -> None:
    """Writes a recipe with all of its options."""
    write_text(path, yaml.safe_dump(to_dict(recipe), sort_keys=False))


def first_difference(
    before: _Sections, now: _Sections, free: Mapping[str, Collection[str] | None]
) -> tuple[str, Any, Any] | None:
    """Returns the name, old and new value of the first option that differs between two results of `to_dict`.

    `free` names the options by section that may differ; `None` for the whole section.
    """
    for section, values in now.items():
        ignored = free.get(section, ())
        for key, value in values.items():
            old = before.get(section, {}).get(key)
            if ignored is not None and key not in ignored and old != value:
                return f"{section}.{key}", old, value
    return None


def _folders() -> list[Path]:
    # Inside the package once installed, beside it in the repository.
    package = Path(__file__).parent.parent
    return [package / "hub_configs", package.parent / "hub_configs"]


def _refuse_unknown(content: dict, config_class: type, path: Path, section: str = "") -> None:
    """Raises at an unknown key and suggests the nearest one; the parser would accept an empty unknown section."""
    types = get_type_hints(config_class)
    for key, value in content.items():
        if key not in types:
            near = get_close_matches(str(key), types, n=1)
            hint = f"Did you mean {section + near[0]!r}?" if near else f"Known are {', '.join(types)}."
            raise ValueError(f"{path}: unknown key {section + str(key)!r}. {hint}")
        if value is None and type(None) not in get_args(types[key]):
            raise ValueError(f"{path}: {section + key!r} is empty. Give it a value, or leave it out.")
        if is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {section + str(key)!r} is {value!r}. Expected keys and values below it.")
            _refuse_unknown(value, types[key], path, f"{section}{key}.")
