"""Public names report the public module they belong to, not the private file that defines them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

__all__ = ["publish"]


def publish(namespace: Mapping[str, object]) -> None:
    """Set ``__module__`` of the classes and functions in ``__all__`` to the module that has these globals.

    Tracebacks, pickles, ``help()`` and documentation then say ``fastadam.Adam`` instead of the private module.
    doctest also looks for a class and its methods in the module that they name.
    """
    module, names = namespace["__name__"], namespace["__all__"]
    assert isinstance(module, str)
    assert isinstance(names, list)
    for name in names:
        value = namespace.get(name)  # None if the name is loaded later
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
    """Make errors about arguments name only the method, not the private base class that defines it."""
    for name, member in vars(base).items():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and name[0] != "_":
            function.__qualname__ = name
