"""The command `run`: a script that knows no plugins, such as timm's own, with the Memory Wrap architectures."""

import runpy
import sys
from pathlib import Path

__all__ = ["run"]


def run(*args: str) -> None:
    """Runs a Python script, such as timm's train.py, with the Memory Wrap architectures registered in timm.

    Args:
        *args: Path of the script, and its arguments.

    Raises:
        SystemExit: If there is no such script.
    """
    if not args or not Path(args[0]).is_file():
        raise SystemExit(
            f"usage: timm-memwrap run SCRIPT [ARGUMENTS ...]\n"
            f"{args[0] if args else 'SCRIPT'!r} is not a file. Pass the path of a script, e.g. of timm's train.py."
        )
    sys.argv = list(args)
    sys.path.insert(0, str(Path(args[0]).resolve().parent))
    runpy.run_path(args[0], run_name="__main__")
