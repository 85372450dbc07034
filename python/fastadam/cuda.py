"""Whether CUDA arrays can be updated here."""

from __future__ import annotations

import importlib.util

__all__ = ["is_available"]


def is_available() -> bool:
    """True if this build holds the CUDA kernels and a GPU can run them.

    >>> import fastadam
    >>> isinstance(fastadam.cuda.is_available(), bool)
    True
    """
    return importlib.util.find_spec("fastadam._cuda") is not None


def describe() -> str:
    """One line for :func:`fastadam.show_config`."""
    return "available" if is_available() else "not in this build"
