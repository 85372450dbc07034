"""Refuse attributes that an optimizer does not have, and class methods called on an instance."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from fastadam._core.common.keywords import synonyms

__all__ = ["class_only", "is_own", "settable", "strict", "suggestion", "unknown_attribute"]

Cls = TypeVar("Cls")

if TYPE_CHECKING:
    from builtins import classmethod as class_only
else:

    class class_only(classmethod):  # noqa: N801  a decorator
        """A classmethod that makes a new object. It raises on an instance, which a caller may expect to change."""

        def __get__(self, instance: object, owner: type | None = None) -> object:
            if instance is None:
                return super().__get__(None, owner)
            function = self.__func__

            @functools.wraps(function)
            def refuse(*_: object, **__: object) -> object:
                first = list(inspect.signature(function).parameters)[1:]
                required = [name for name in first if name in ("path", "variables", "config")]
                cls = type(instance)
                name = f"{cls.__module__}.{cls.__name__}" if is_own(instance) else cls.__name__
                raise TypeError(
                    f"{function.__name__}: called on an optimizer, which it does not change: it makes a new one; "
                    f"expected opt = {name}.{function.__name__}({', '.join(required)})"
                )

            return refuse


def strict(cls: type[Cls]) -> type[Cls]:
    """Let instances of a class accept only the attributes that the class defines.

    Otherwise a mistyped hyperparameter would become an attribute that nothing reads. Names that begin with an
    underscore may be set, and so may any name on an instance of a user's subclass. For names that are read, Python
    itself suggests the right one; `__getattr__` would make a step 15 % slower.
    """

    def __setattr__(self: Cls, name: str, value: object) -> None:  # noqa: N807
        if name[0] != "_" and name != "name" and not hasattr(type(self), name) and is_own(self):
            raise AttributeError(unknown_attribute(self, name, settable(self)))
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # or type checkers would assume that every attribute exists
        cls.__setattr__ = __setattr__
    return cls


def is_own(instance: object) -> bool:
    """Whether the class of an object is defined in fastadam."""
    return type(instance).__module__.partition(".")[0] == "fastadam"


def settable(instance: object) -> list[str]:
    """Names of the public attributes that can be set."""
    cls = type(instance)
    return ["name", *(name for name in dir(cls) if name[0] != "_" and _has_setter(inspect.getattr_static(cls, name)))]


def _has_setter(value: object) -> bool:
    return value.fset is not None if isinstance(value, property) else hasattr(type(value), "__set__")


def unknown_attribute(instance: object, name: str, names: Iterable[str]) -> str:
    """The error text for an attribute that does not exist."""
    return f"{type(instance).__name__!r} object has no attribute {name!r}{suggestion(name, names)}"


def suggestion(name: str, names: Iterable[str]) -> str:
    """``; did you mean ...?``, if one of the names is similar to this one."""
    public = [other for other in names if other[0] != "_"]
    similar = synonyms(name, public) or difflib.get_close_matches(name, public, n=1)
    return f"; did you mean {' and '.join(map(repr, similar))}?" if similar else ""
