"""The page that one tries a model with: asks it, looks at its memory, teaches it."""

from timm_memwrap.demo.options import Page
from timm_memwrap.demo.page import build_page, launch

__all__ = ["Page", "build_page", "launch"]
