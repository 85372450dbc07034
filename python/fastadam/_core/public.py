"""What makes a public module the home of its public names, wherever they are defined."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["publish"]


def publish(namespace: Mapping[str, Any]) -> None:
    """Have the classes and functions of ``__all__`` say that they are of the module with these globals.

    Tracebacks, pickles, ``help()`` and documentation then say ``fastadam.Adam``, not where the class is written.
    doctest, too, takes a class and its methods to be of the module that they name.
    """
    module = namespace["__name__"]
    for name in namespace["__all__"]:
        value = namespace.get(name)  # a name may be loaded later
        if inspect.ismodule(value) or not hasattr(value, "__module__"):
            continue
        value.__module__ = module
        for member in vars(value).values() if isinstance(value, type) else ():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function):
                function.__module__ = module
        for base in value.__mro__[1:] if isinstance(value, type) else ():
            if base.__module__.startswith("fastadam._core."):
                _forget_class(base)


def _forget_class(base: type) -> None:
    """Have errors about arguments name a method alone, not the private class that defines it for several."""
    for name, member in vars(base).items():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and name[0] != "_":
            function.__qualname__ = name
