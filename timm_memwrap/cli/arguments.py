"""How a command's arguments are read: recipes by name, hyphens as well as underscores, and one line per mistake."""

import json
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser

from timm_memwrap._utils import printable
from timm_memwrap.experiments.configuration import Comparison
from timm_memwrap.training.recipes import find_recipe, read_recipe

__all__ = ["IN_TERMINAL", "expand", "make_parser"]

# Whether someone can see a progress bar move.
IN_TERMINAL = sys.stderr.isatty()

# Commands with the sections of a recipe, and short names of options by command.
_WITH_RECIPE = ("train", "compare")
_SECTIONS = {
    "--freeze_backbone": "--training.freeze_backbone",
    "--push": "--hub.push",
    "--data_dir": "--data.data_dir",
}
# Python would not have an argument of the name `from`.
_SHORT = {**dict.fromkeys(_WITH_RECIPE, _SECTIONS), "forget": {"--from": "--from_report"}}
# Arguments that are words, as a shell lists files, where jsonargparse expects one JSON list.
_WORDS = {"images": ("+", "IMAGE"), "ids": ("*", "ID")}


class _Parser(ArgumentParser):
    """A parser that reports a mistake in one line."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Adds an argument; one of `_WORDS` as several of them."""
        if args[0] in _WORDS:
            nargs, metavar = _WORDS[args[0]]
            kwargs = {"nargs": nargs, "type": str, "metavar": metavar, "help": kwargs.get("help")}
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong, and exits with status 2."""
        sys.stderr.write(f"{self.prog}: {printable(' '.join(str(message).split()))}\n")
        sys.exit(2)


def make_parser(name: str, function: Callable[..., None]) -> _Parser:
    """Makes the parser of a command from the signature and docstring of its function."""
    description = (function.__doc__ or "").splitlines()[0]
    parser = _Parser(prog=f"timm-memwrap {name}", description=description, allow_abbrev=False)
    help = "Options from a YAML file, or a recipe that comes with the package, by its name."
    parser.add_argument("--config", action=ActionConfigFile, help=help)
    parser.add_function_arguments(function, as_group=False, as_positional=True, sub_configs=True)
    if name in _WITH_RECIPE:
        # All options twice would fill the screen.
        parser.usage = f"{parser.prog} [--config RECIPE] [--SECTION.OPTION VALUE ...]"
    return parser


def expand(args: list[str], command: str, parser: _Parser) -> Iterator[str]:
    """Yields arguments with what is short written out; exits with status 2 at an unknown option.

    `--freeze-backbone` becomes `--training.freeze_backbone=true`, and the name of a recipe its text.
    """
    short = _SHORT.get(command, {})
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    waiting = list(args)
    while waiting:
        option = waiting.pop(0)
        if option == "--":
            # The rest is not options, whatever it begins with.
            yield from (option, *waiting)
            return
        if not option.startswith("--"):
            yield option
            continue
        given, equals, value = option.partition("=")
        name = "--" + given[2:].replace("-", "_")
        name = short.get(name, name)
        # Keys of an option that is a dict are free, e.g. --model.kwargs.depth.
        parent = name.rpartition(".")[0]
        is_key = parent in options and not any(option.startswith(f"{parent}.") for option in options)
        if name not in options and not is_key:
            near = get_close_matches(name, options, n=1)
            parser.error(f"there is no option {given}. {f'Did you mean {near[0]}?' if near else 'See --help.'}")
        if name in ("--help", "--print_config"):
            yield name + equals + value
            continue
        if not equals:
            # An option without a value is a switch that is turned on.
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        if name == "--config":
            # The parser takes the text, with all that the recipe inherits, in place of a file.
            value = json.dumps(read_recipe(find_recipe(value), Comparison))
        yield f"{name}={value}"
