"""The `timm-memwrap` command: a file per group of commands, each of which parses, calls and prints."""

import logging
import sys
from collections.abc import Callable
from difflib import get_close_matches

from timm_memwrap import __version__
from timm_memwrap._utils import printable
from timm_memwrap.cli import measuring, sharing, showing, teaching, training
from timm_memwrap.cli.arguments import expand, make_parser

__all__ = ["COMMANDS", "main"]

# Each is called with the options that its signature names; `run` passes what follows it on.
COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": training.quickstart,
    "train": training.train,
    "wrap": training.wrap,
    "push": sharing.push,
    "pull": sharing.pull,
    "inspect": sharing.inspect,
    "explain": measuring.explain,
    "evaluate": measuring.evaluate,
    "report": measuring.report,
    "remember": teaching.remember,
    "forget": teaching.forget,
    "export": sharing.export,
    "demo": showing.demo,
    "compare": measuring.compare,
    "benchmark": measuring.benchmark,
    "run": training.run,
}


def main(args: list[str] | None = None) -> int:
    """Runs a command, and returns its exit status."""
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: timm-memwrap [--version] COMMAND [--help] ...\n")
        for each, function in COMMANDS.items():
            print(f"  {each:10}  {(function.__doc__ or '').splitlines()[0]}")
        return 0
    if name == "--version":
        import timm
        import torch

        # What a report of a bug needs.
        print(f"timm-memwrap {__version__} (timm {timm.__version__}, torch {torch.__version__})")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "See timm-memwrap --help."
        print(f"timm-memwrap: there is no command {name!r}. {hint}", file=sys.stderr)
        return 2
    if name == "run":
        # Its errors are the script's.
        training.run(*rest)
        return 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("timm_memwrap").setLevel(logging.INFO)
    try:
        parser = make_parser(name, COMMANDS[name])
        values = parser.instantiate(parser.parse_args(list(expand(rest, name, parser))))
        values.pop("config")
        COMMANDS[name](**values)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # A connection that breaks is an error of the HTTP library of the Hub's client, which is not ours to import.
        if not isinstance(error, ValueError | OSError | ImportError) and not type(error).__module__.startswith("httpx"):
            raise
        # One line: the errors of the Hub's client have several.
        print(f"timm-memwrap: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    return 0
