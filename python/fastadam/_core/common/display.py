"""Text of objects: in a terminal the code that makes them, in a notebook a small table.

Nothing here raises, calls a user's hyperparameter functions, brings rows of a table up to date or waits for a GPU. Of
a long array only the corners are read.
"""

from __future__ import annotations

import functools
import html
import inspect
import itertools
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from fastadam._core.common.types import AnyArray
from fastadam._core.native.arrays import on_gpu

__all__ = [
    "adam_settings",
    "array_text",
    "call_text",
    "html_or_none",
    "html_table",
    "name_of",
    "never_raises",
    "polyline",
    "preformatted",
    "schedule_settings",
]

Settings = list[tuple[str, object]]
Shown = TypeVar("Shown")
_LONGEST_ARRAY = 1000  # elements; longer arrays are abbreviated, as NumPy does by default
_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = 8
_short.maxstring = _short.maxother = 80


def never_raises(method: Callable[[Shown], str]) -> Callable[[Shown], str]:
    """Decorate ``__repr__`` to fall back to the name of the class, for an object that is only partly made."""

    @functools.wraps(method)
    def shown(self: Shown) -> str:
        try:
            return method(self)
        except Exception:
            return f"<{name_of(type(self))} object>"

    return shown


def html_or_none(method: Callable[[Shown], str]) -> Callable[[Shown], str | None]:
    """Decorate ``_repr_html_`` to return None if it fails, so that notebooks show ``__repr__``."""

    @functools.wraps(method)
    def shown(self: Shown) -> str | None:
        try:
            return method(self)
        except Exception:
            return None

    return shown


def name_of(cls: type) -> str:
    """The name of a class as written after ``import fastadam``; a user's class has its own name."""
    parts = cls.__module__.split(".")
    if parts[0] != "fastadam":
        return cls.__name__
    return ".".join([*itertools.takewhile(lambda part: not part.startswith("_"), parts), cls.__name__])


def call_text(cls: type, settings: Iterable[tuple[str, object]]) -> str:
    """``Class(name=value, ...)``; a setting without a name is positional."""
    arguments = (f"{name}={_text(value)}" if name else _text(value) for name, value in settings)
    return f"{name_of(cls)}({', '.join(arguments)})"


def _text(value: AnyArray) -> str:
    """A short text of one setting, as code if possible."""
    value = value.item() if isinstance(value, np.generic) else value
    if on_gpu(value) or hasattr(value, "__array_interface__"):
        return array_text(value, longest=8)
    if isinstance(value, type):
        return name_of(value)
    if inspect.isroutine(value):
        return str(value.__name__)
    method: object = type(value).__repr__
    if method is object.__repr__:  # which shows only an address
        config = _config_of(value)
        return f"<{name_of(type(value))} object>" if config is None else call_text(type(value), config.items())
    text = _short.repr(value) if isinstance(value, (str, list, tuple, dict)) else repr(value)
    return text if len(text) <= 400 else f"{text[:397]}..."


def _config_of(value: AnyArray) -> Mapping[str, Any] | None:
    try:
        config = value.get_config()
    except Exception:
        return None
    return config if isinstance(config, Mapping) else None


def array_text(array: AnyArray, indent: int = 0, longest: int = _LONGEST_ARRAY) -> str:
    """``array([...], dtype=...)`` as NumPy writes it, with the shape if the elements do not show it.

    Args:
        array: A NumPy array. The values of other arrays are not read.
        indent: Columns by which the lines after the first are indented.
        longest: Arrays with more elements are abbreviated.
    """
    if not isinstance(array, np.ndarray):
        if isinstance(array, (list, tuple)):
            return _short.repr(array)
        shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
        return f"<{type(array).__name__} of shape {shape}, {dtype}{', on a GPU' if on_gpu(array) else ''}>"
    plain = array.view(np.ndarray)  # or the text would begin with "memmap"
    longest = min(longest, int(np.get_printoptions()["threshold"]))
    prefix = " " * indent + "array("
    values = np.array2string(plain, separator=", ", prefix=prefix, suffix=",", threshold=longest)
    shape_text = f"shape={plain.shape}, " if plain.size > longest or plain.size == 0 else ""
    end = f"{shape_text}dtype={plain.dtype.name})"
    last_line = (prefix + values).rpartition("\n")[2]
    fits = len(last_line) + len(end) + 2 <= np.get_printoptions()["linewidth"]
    return f"array({values},{' ' if fits else chr(10) + ' ' * len(prefix)}{end}"


def adam_settings(optimizer: object, adam: type) -> Settings:
    """The learning rate of an Adam, its options that are not at the defaults of ``adam``, then those of a subclass.

    A subclass's options are the arguments of its constructor that it keeps in attributes of the same name, with or
    without a ``_``. Attributes are read, not computed: callables are shown, not called.
    """
    state = vars(optimizer)
    options = getattr(state.get("_parts"), "options", None)  # None while it is being made
    values = (
        {}
        if options is None
        else {**vars(options), **options.numbers, **options.clips, **vars(options.keras3), **vars(options.small)}
    )
    settings: Settings = [("learning_rate", values["learning_rate"])] if "learning_rate" in values else []
    defaults = {name: value for name, value in _parameters(adam).items() if name not in ("learning_rate", "lr", "name")}
    for name, default in defaults.items():
        value = values.get(name, default)
        if not _same(value, default):
            settings.append((name, value))
    own = [name for name in _parameters(type(optimizer)) if name not in _parameters(adam)]
    settings += _kept(state, own, _parameters(type(optimizer)))
    if (own_name := state.get("name")) not in (None, *(cls.__name__ for cls in type(optimizer).__mro__)):
        settings.append(("name", own_name))
    return settings


def schedule_settings(schedule: object) -> Settings:
    """The constructor's arguments that are not at their defaults, from ``get_config`` or attributes."""
    parameters, config = _parameters(type(schedule)), _config_of(schedule)
    if config is None:
        return _kept(vars(schedule), list(parameters), parameters)
    missing = inspect.Parameter.empty
    return [(name, value) for name, value in config.items() if not _same(value, parameters.get(name, missing))]


def _parameters(cls: type) -> dict[str, object]:
    """The arguments of the constructors of a class and its bases, with their defaults."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    defaults: dict[str, object] = {}
    for init in (vars(owner)["__init__"] for owner in cls.__mro__ if inspect.isfunction(vars(owner).get("__init__"))):
        for parameter in list(inspect.signature(init).parameters.values())[1:]:
            if parameter.kind not in kinds:
                defaults.setdefault(parameter.name, parameter.default)
    return defaults


def _kept(state: Mapping[str, object], names: Sequence[str], defaults: Mapping[str, object]) -> Settings:
    """The arguments of these names that an object keeps in attributes, if they are not at their defaults."""
    pairs = [(name, key) for name in names for key in (name, f"_{name}") if key in state]
    return [(name, state[key]) for name, key in pairs if not _same(state[key], defaults[name])]


def _same(value: object, default: object) -> bool:
    plain = (bool, int, float, str)
    return value is default or (isinstance(value, plain) and isinstance(default, plain) and value == default)


def html_table(title: str, rows: Iterable[tuple[str, object]], below: str = "") -> str:
    """A table of names and values under a title; ``below`` is HTML to add at the end."""
    left = ' style="text-align:left"'
    cells = (
        f"<tr><th{left}>{html.escape(name)}</th><td{left}>"
        f"{html.escape(value if isinstance(value, str) else _text(value))}</td></tr>"
        for name, value in rows
    )
    table = "".join(cells)
    return f"<div><strong>{html.escape(title)}</strong>{f'<table>{table}</table>' if table else ''}{below}</div>"


def preformatted(text: str) -> str:
    """HTML that keeps the line breaks of a text."""
    return f"<pre>{html.escape(text)}</pre>"


def polyline(values: Sequence[float], width: int = 180, height: int = 40) -> str:
    """A curve without axes, as SVG. The bottom is the least value or 0, the top the largest value or 0."""
    heights = np.asarray(values, np.float64)
    if len(heights) < 2 or not np.isfinite(heights).all():
        return ""
    low, high = min(0.0, float(heights.min())), max(0.0, float(heights.max()))
    x = np.linspace(1, width - 1, len(heights))
    y = height - 1 - (heights - low) / ((high - low) or 1) * (height - 2)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">{line}</svg>'
