"""How the command line is read: recipes by name, hyphens as well as underscores, and one clear line on a mistake."""

import json
import re
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

__all__ = ["Parser", "expand"]

# Short names of options that recipes have under a section.
_SHORT = {
    "--freeze_backbone": "--training.freeze_backbone",
    "--push": "--hub.push",
    "--data_dir": "--data.data_dir",
}
# Commands that have these sections.
_WITH_RECIPE = ("train", "compare")
_MANY_OPTIONS = 15
# What the parser says of a value that is of none of several types.
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)"
)


class Parser(ArgumentParser):
    """A parser that says a mistake in one line, with the nearest right option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Adds an argument. `images` are words, as a shell lists files; the parser's own way is one JSON list."""
        if args == ("images",):
            kwargs = {"nargs": "+", "type": str, "metavar": "IMAGE", "help": kwargs.get("help")}
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and leaves with status 2."""
        text = _UNION.sub(r"expected \1, got \2", " ".join(str(message).split()))
        unknown = re.search(r"unrecognized arguments: --([^=\s]+)|does not accept option '([^']+)'", text)
        if unknown:
            option = f"--{unknown[1] or unknown[2]}"
            near = get_close_matches(option, self._options(), n=1)
            text = f"there is no option {option}." + (f" Did you mean {near[0]}?" if near else " See --help.")
        sys.stderr.write(f"{self.prog.replace(' [options]', '')}: {text}\n")
        sys.exit(2)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Returns the help, in which a long list of options does not come twice."""
        if len(self._actions) > _MANY_OPTIONS and not self.usage:
            self.usage = f"{self.prog.replace(' [options]', '')} [--config RECIPE] [--SECTION.OPTION VALUE ...]"
        return super().format_help(*args, **kwargs)

    def _options(self) -> list[str]:
        own = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action.choices, dict):
                for parser in action.choices.values():
                    own += getattr(parser, "_option_string_actions", {})
        return [option for option in own if option.startswith("--")]


def expand(args: list[str]) -> list[str]:
    """Writes out what people may write shorter.

    `--freeze-backbone` becomes `--training.freeze_backbone=true`, `--resume` becomes `--resume=true`, and `--config`
    takes the name of a recipe that comes with the package, or a recipe that inherits from another.

    Raises:
        ValueError: If there is no such recipe, or it has unknown keys.
    """
    if not args or args[0].startswith("-"):
        return args
    return [args[0], *_expanded(args[1:], args[0])]


def _expanded(args: list[str], command: str) -> Iterator[str]:
    short = _SHORT if command in _WITH_RECIPE else {}
    waiting = list(args)
    while waiting:
        option = waiting.pop(0)
        if option == "--":
            # What follows are words, whatever they begin with.
            yield from (option, *waiting)
            return
        if not option.startswith("--"):
            yield option
            continue
        name, equals, value = option.partition("=")
        name = "--" + name[2:].replace("-", "_")
        name = short.get(name, name)
        if name in ("--help", "--print_config"):
            yield name + equals + value
            continue
        if not equals:
            # An option without a value is a switch that is turned on.
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        yield f"{name}={_recipe(value, command) if name == '--config' else value}"


def _recipe(name: str, command: str) -> str:
    """Returns a recipe, with all that it inherits, as the text that the parser takes in a file's place."""
    from timm_memwrap.training.recipes import find_recipe, read_recipe

    if command != "compare":
        return json.dumps(read_recipe(find_recipe(name)))
    from timm_memwrap.comparing.configuration import Comparison

    # A recipe may say where the model goes; a comparison leaves none.
    return json.dumps({k: v for k, v in read_recipe(find_recipe(name), Comparison).items() if k != "hub"})
