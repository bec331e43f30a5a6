"""Prints the lowest versions that pyproject.toml allows, as pip's constraints."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
    for requirement in requirements:
        lowest = re.match(r"([\w-]+)(?:\[.*?\])?>=([\d.]+)$", requirement)
        if lowest:
            print(f"{lowest[1]}=={lowest[2]}")
