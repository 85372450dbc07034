"""Warnings that point at the line of the user's program that caused them."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

_INNER = ("fastadam", "torch")  # PyTorch wraps the steps of its optimizers


def warn(message: str) -> None:
    """Issue a UserWarning at the innermost call from outside fastadam and PyTorch."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=depth)
