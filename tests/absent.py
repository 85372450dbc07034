"""Packages that are not there: processes without them, and objects that look like theirs."""

from __future__ import annotations

import importlib.util

import pytest
from helpers import run_python

# A process in which packages are not installed, whether they are or not.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def need(*packages):
    """Keras cannot be imported here to find out: it would choose the backend of this process."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def printed(code, absent=(), **environment):
    result = run_python(WITHOUT.format(absent=tuple(absent)) + code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def stand_in(module, name, **attributes):
    """An object of a class of that name: what is not installed here is recognised by its module."""
    return type(name, (), {"__module__": module, **attributes})()
