"""Prints results, as text or as JSON."""

import json
import sys
from typing import Any

__all__ = ["IN_TERMINAL", "print_result"]

# Whether someone can see a progress bar move.
IN_TERMINAL = sys.stderr.isatty()


def print_result(text: object, values: Any, target: str | None) -> None:
    """Prints text, and writes `values` to the file `target` as JSON; if that is `-`, prints the JSON alone."""
    from timm_memwrap._utils import write_text

    # ASCII, so that any terminal and any encoding can hold it.
    dumped = json.dumps(values, indent=2)
    print(dumped if target == "-" else text)
    if target not in (None, "-"):
        print(f"\nWritten: {write_text(target, dumped + chr(10))}")
