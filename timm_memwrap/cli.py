"""The `timm-memwrap` command: parses, calls, prints. Each function below `COMMANDS` is a subcommand.

Heavy imports stand inside the functions, so that `--help` is quick.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli

__all__ = ["main"]


COMMANDS: dict[str, Callable[..., Any]] = {}


def main(args: list[str] | None = None) -> int:
    """Runs the command line, and returns the exit status: 0, or 1 with one line that says what is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        auto_cli(COMMANDS, args=args, prog="timm-memwrap", as_positional=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"timm-memwrap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
