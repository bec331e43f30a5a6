"""The `timm-memwrap` command: a file per group of commands, each of which parses, calls and prints.

Torch and timm are imported inside the functions, so that they are not needed to print help.
"""

from timm_memwrap.cli.command import main as main

__all__ = ["main"]
