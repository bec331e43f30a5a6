"""Finds the function of a command, parses its arguments and calls it."""

import logging
import sys
from collections.abc import Callable
from difflib import get_close_matches

from timm_memwrap.cli import experiments, explaining, exporting, hub, training
from timm_memwrap.cli.arguments import expand, make_parser
from timm_memwrap.cli.script import run

__all__ = ["COMMANDS", "main"]

# Each is called with the options that its signature names; `run` passes what follows it on.
COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": training.quickstart,
    "train": training.train,
    "wrap": training.wrap,
    "push": hub.push,
    "pull": hub.pull,
    "inspect": hub.inspect,
    "explain": explaining.explain,
    "evaluate": explaining.evaluate,
    "report": explaining.report,
    "export": exporting.export,
    "compare": experiments.compare,
    "benchmark": experiments.benchmark,
    "run": run,
}


def main(args: list[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "See timm-memwrap --help."
        print(f"timm-memwrap: there is no command {name!r}. {hint}", file=sys.stderr)
        return 2
    if name == "run":
        # Its errors are the script's.
        run(*rest)
        return 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("timm_memwrap").setLevel(logging.INFO)
    try:
        parser = make_parser(name, COMMANDS[name])
        values = parser.instantiate(parser.parse_args(expand(rest, name, parser)))
        values.pop("config")
        COMMANDS[name](**values)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"timm-memwrap: {error}", file=sys.stderr)
        return 1
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(["usage: timm-memwrap COMMAND [--help] ...", "", *lines])
