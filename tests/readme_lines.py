"""The lines of README.md's table "You use | Write this line", which tests run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import fastadam
import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "python" / "README.md").read_text()
TABLE = (ROOT / "README.md").read_text().split("| You use | Write this line |\n|---|---|\n")[1].split("\n\n")[0]
LINES = dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", TABLE, re.MULTILINE))
slow = pytest.mark.slow  # of packages that take seconds to import


def line(row):
    return LINES[row]


def written(row, **names):
    """What the line of a row makes of these names: its value, or what it assigns."""
    names |= {"fastadam": fastadam}
    exec(f"made = {line(row).removeprefix('return ')}", names)
    return names["made"]
