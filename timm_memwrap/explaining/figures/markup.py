"""What all HTML pages share: templates that escape all text, and pictures inside the page."""

import base64
import io
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_memwrap.explaining.figures.page import percent

__all__ = ["data_url", "template"]

# Embeddings, overrides and isolates of text direction. The page itself isolates each name.
_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def template(name: str, folder: Path = Path(__file__).parent) -> Any:
    """Returns a Jinja template in `templates` beside a module, which escapes all that is put into it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(folder / "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_text,
    )
    environment.filters |= {"percent": percent, "points": _points, "share": "{:.2%}".format}
    return environment.get_template(name)


def data_url(picture: np.ndarray, size: int, kind: str = "png") -> str:
    """Encodes a picture `[H, W, 3]` as the URL of a PNG or JPEG, with at most `size` pixels a side."""
    image = Image.fromarray(picture)
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(value: Any) -> Any:
    """Replaces characters that HTML cannot hold, or that change the direction of text; what joins letters stays."""
    return "".join("\ufffd" if _is_control(char) else char for char in value) if type(value) is str else value


def _is_control(char: str) -> bool:
    if char in "\t\n":
        return False
    return unicodedata.category(char) in ("Cc", "Cs") or unicodedata.bidirectional(char) in _BIDI_CONTROLS


def _points(value: float) -> str:
    """Formats a change of a probability in percentage points, with a true minus sign."""
    points = round(100 * value)
    sign = "\N{MINUS SIGN}" if points < 0 else "+"
    return f"{sign}{abs(points)}" if points else "±0"
