"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

__all__ = ["write_text"]


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes text as UTF-8, to a temporary place first, and makes the folder if it is absent.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, a file gets the permissions that the user's files get.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".write-") as folder:
        temporary = Path(folder) / "text"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    return path
