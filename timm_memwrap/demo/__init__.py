"""The page that one tries a model with: asks it, looks at its memory, teaches it."""

from timm_memwrap.demo.page import Page, build_page, launch

__all__ = ["Page", "build_page", "launch"]
