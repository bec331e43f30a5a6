"""Where recipes are, and how they are read: YAML files, each of which may inherit from another."""

import os
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from timm_memwrap.files import write_text
from timm_memwrap.training.configuration import Recipe

__all__ = [
    "find_recipe",
    "first_difference",
    "list_comparisons",
    "list_recipes",
    "load_recipe",
    "read_recipe",
    "settings_of",
    "write_recipe",
]

# Names a recipe that is read first, and whose keys this one overrides.
_BASE = "base"
# Recipes that only others inherit from.
_SHARED = "_"
# Those that compare heads.
_COMPARISON = "compare_"


def list_recipes() -> list[str]:
    """Lists the recipes for training that come with the package."""
    return [name for name in _names() if not name.startswith(_COMPARISON)]


def list_comparisons() -> list[str]:
    """Lists the comparisons of heads that come with the package."""
    return [name for name in _names() if name.startswith(_COMPARISON)]


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Returns the file of a recipe: the given path, or one that comes with the package, by its stem.

    Args:
        name: A path or a stem.
        beside: A file in whose folder to look first.

    Raises:
        ValueError: If there is none.
    """
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    folders = [*([beside.parent] if beside else []), *_folders()]
    for folder in folders:
        for file in (folder / f"{name}.yaml", folder / name):
            if file.is_file():
                return file
    near = get_close_matches(name, _names(), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(map(repr, _names()))}."
    raise ValueError(f"No recipe {name!r}. {hint} Or pass the path of a YAML file.")


def load_recipe(path: Path, kind: type[Recipe] = Recipe) -> Recipe:
    """Reads a recipe, whose fields and types must be known.

    Args:
        path: The file.
        kind: `Recipe`, or a dataclass that adds sections to it.

    Raises:
        ValueError: If the file, or one that it inherits from, has unknown keys or wrong types.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "recipe")
    try:
        parsed = parser.parse_object({"recipe": read_recipe(path, kind)})
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return parser.instantiate(parsed).recipe


def read_recipe(path: Path, kind: type[Recipe] = Recipe) -> dict[str, Any]:
    """Returns what a recipe and those that it inherits from say, the nearer before the farther.

    Args:
        path: The file.
        kind: As in `load_recipe`.

    Raises:
        ValueError: If one is not YAML, has a key that is unknown, or inherits from itself.
    """
    return _read(path, (), kind)


def write_recipe(recipe: Recipe, path: str | os.PathLike) -> None:
    """Writes a recipe with all of its values."""
    import yaml

    plain = {
        section: {key: _read_back(value) for key, value in values.items()} for section, values in asdict(recipe).items()
    }
    write_text(path, yaml.safe_dump(plain, sort_keys=False))


def settings_of(recipe: Recipe, free: Mapping[str, Sequence[str] | None]) -> dict[str, dict[str, Any]]:
    """Returns a recipe's values by section and key.

    Args:
        recipe: The recipe.
        free: Keys by section that are left out; `None` for the whole section.
    """
    found = {}
    for section, values in asdict(recipe).items():
        left_out = free.get(section, ())
        if left_out is not None:
            found[section] = {key: value for key, value in values.items() if key not in left_out}
    return found


def first_difference(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Any, Any] | None:
    """Returns the first of the settings `now` that was another before, as read from a file: its name, old and new."""
    for section, values in now.items():
        for key, value in values.items():
            old = before.get(section, {}).get(key)
            if old != _read_back(value):
                return f"{section}.{key}", old, value
    return None


def _read_back(value: Any) -> Any:
    # Neither YAML nor JSON has tuples.
    return list(value) if isinstance(value, tuple) else value


def _names() -> list[str]:
    names = {path.stem for folder in _folders() for path in folder.glob("*.yaml")}
    return sorted(name for name in names if not name.startswith(_SHARED))


def _folders() -> list[Path]:
    # Inside the package once installed, beside it in the repository.
    package = Path(__file__).parent.parent
    return [package / "hub_configs", package.parent / "hub_configs"]


def _read(path: Path, heirs: tuple[Path, ...], kind: type[Recipe]) -> dict[str, Any]:
    if path.resolve() in heirs:
        raise ValueError(f"{path} inherits from itself, through {' and '.join(heir.name for heir in heirs)}.")
    content = _read_yaml(path)
    base = content.pop(_BASE, None)
    _refuse_unknown(content, kind, path)
    if base is None:
        return content
    inherited = _read(find_recipe(str(base), beside=path), (*heirs, path.resolve()), kind)
    return {
        section: {**(inherited.get(section) or {}), **(content.get(section) or {})}
        for section in dict.fromkeys([*inherited, *content])
    }


def _refuse_unknown(content: dict, config_class: type, path: Path, section: str = "") -> None:
    """Names an unknown key and the nearest known one; the parser would pass over an empty section."""
    types = get_type_hints(config_class)
    for key, value in content.items():
        if key not in types:
            near = get_close_matches(str(key), types, n=1)
            hint = f"Did you mean {section + near[0]!r}?" if near else f"Known are {', '.join(types)}."
            raise ValueError(f"{path}: unknown key {section + str(key)!r}. {hint}")
        if is_dataclass(types[key]):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{path}: {section + str(key)!r} is {value!r}. Expected keys and values below it.")
            _refuse_unknown(value or {}, types[key], path, f"{section}{key}.")


def _read_yaml(path: Path) -> dict:
    """Reads a YAML file that holds a mapping.

    Raises:
        ValueError: If the file is not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not sections such as 'model:'.")
    return content
