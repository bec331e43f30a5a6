"""Runs a script that knows no plugins, such as timm's own, with the Memory Wrap architectures registered.

`python -m timm_memwrap.run path/to/train.py --model memwrap_resnet18 ...`
"""

import runpy
import sys
from pathlib import Path

import timm_memwrap  # noqa: F401  (registers the architectures)

__all__ = ["main"]


def main(args: list[str] | None = None) -> None:
    """Runs a script as `python` would, with what follows its path as its arguments.

    Args:
        args: Path of the script, and its arguments; `None` for the command line's.
    """
    args = sys.argv[1:] if args is None else args
    if not args or not Path(args[0]).is_file():
        raise SystemExit(
            f"usage: python -m timm_memwrap.run SCRIPT [ARGUMENTS ...]\n"
            f"{args[0] if args else 'SCRIPT'!r} is no file. Pass the path of a script, e.g. of timm's train.py."
        )
    sys.argv = list(args)
    sys.path.insert(0, str(Path(args[0]).resolve().parent))
    runpy.run_path(args[0], run_name="__main__")


if __name__ == "__main__":
    main()
