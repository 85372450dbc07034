"""How objects show themselves: in a terminal as the code that makes them, in a notebook as a small table.

Nothing here raises, calls what a user gave as a hyperparameter, brings rows of a table up to date, waits for a GPU, or
reads more of a long array than its corners.
"""

from __future__ import annotations

import functools
import html
import inspect
import itertools
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastadam._core.placement import on_gpu

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

Settings = list[tuple[str, Any]]
_LONGEST_ARRAY = 1000  # elements that are all shown, as NumPy does by default
# Adam's arguments in the order in which they are shown, where they are not at these defaults.
_ADAM_DEFAULTS: dict[str, Any] = {
    "weight_decay": None,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-7,
    "amsgrad": False,
    "decay": 0.0,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "sparse_update": "dense",
    "max_staleness": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
    "clip_after_dedupe": False,
}

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = 8
_short.maxstring = _short.maxother = 80


def never_raises(method: Callable[[Any], str]) -> Callable[[Any], str]:
    """A ``__repr__`` that falls back to the name of the class, for an object that is not whole."""

    @functools.wraps(method)
    def shown(self: Any) -> str:
        try:
            return method(self)
        except Exception:
            return f"<{name_of(type(self))} object>"

    return shown


def html_or_none(method: Callable[[Any], str]) -> Callable[[Any], str | None]:
    """A ``_repr_html_`` that leaves it to ``__repr__`` where it fails."""

    @functools.wraps(method)
    def shown(self: Any) -> str | None:
        try:
            return method(self)
        except Exception:
            return None

    return shown


def name_of(cls: type) -> str:
    """How a class is written after ``import fastadam``; one of a user by its own name."""
    parts = cls.__module__.split(".")
    if parts[0] != "fastadam":
        return cls.__name__
    return ".".join([*itertools.takewhile(lambda part: not part.startswith("_"), parts), cls.__name__])


def call_text(cls: type, settings: Iterable[tuple[str, Any]]) -> str:
    """``Class(name=value, ...)``; a setting without a name is positional."""
    arguments = (f"{name}={_text(value)}" if name else _text(value) for name, value in settings)
    return f"{name_of(cls)}({', '.join(arguments)})"


def _text(value: Any) -> str:
    """One setting, short, and as code where there is any."""
    value = value.item() if isinstance(value, np.generic) else value
    if on_gpu(value) or hasattr(value, "__array_interface__"):
        return array_text(value, longest=8)
    if isinstance(value, type):
        return name_of(value)
    if inspect.isroutine(value):
        return str(value.__name__)
    method: Any = type(value).__repr__
    if method is object.__repr__:  # with nothing but an address to show
        config = _config_of(value)
        return f"<{name_of(type(value))} object>" if config is None else call_text(type(value), config.items())
    text = _short.repr(value) if isinstance(value, (str, list, tuple, dict)) else repr(value)
    return text if len(text) <= 400 else f"{text[:397]}..."


def _config_of(value: Any) -> Mapping[str, Any] | None:
    try:
        config = value.get_config()
    except Exception:
        return None
    return config if isinstance(config, Mapping) else None


def array_text(array: Any, indent: int = 0, longest: int = _LONGEST_ARRAY) -> str:
    """``array([...], dtype=...)`` as NumPy has it, with its shape where that cannot be seen.

    Args:
        array: Of NumPy, or anything else, whose values are not read.
        indent: Of the line that it starts in, for the lines after.
        longest: The most elements that are all shown.
    """
    if not isinstance(array, np.ndarray):
        if isinstance(array, (list, tuple)):
            return _short.repr(array)
        shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
        return f"<{type(array).__name__} of shape {shape}, {dtype}{', on a GPU' if on_gpu(array) else ''}>"
    plain = array.view(np.ndarray)  # a memmap would be called so
    longest = min(longest, int(np.get_printoptions()["threshold"]))
    prefix = " " * indent + "array("
    values = np.array2string(plain, separator=", ", prefix=prefix, suffix=",", threshold=longest)
    shape_text = f"shape={plain.shape}, " if plain.size > longest or plain.size == 0 else ""
    end = f"{shape_text}dtype={plain.dtype.name})"
    last_line = (prefix + values).rpartition("\n")[2]
    fits = len(last_line) + len(end) + 2 <= np.get_printoptions()["linewidth"]
    return f"array({values},{' ' if fits else chr(10) + ' ' * len(prefix)}{end}"


def adam_settings(optimizer: Any) -> Settings:
    """The rate, and what is not at Adam's defaults, of an Adam; then what a subclass has of its own.

    The latter are arguments of its constructor that it keeps as attributes of the same name, with a ``_`` or without.
    Read from where they are kept: callables are shown, not called.
    """
    state = vars(optimizer)
    options = getattr(state.get("_parts"), "options", None)  # None while it is being made
    values = {} if options is None else {**vars(options), **options.numbers, **options.clips, **vars(options.extras)}
    settings: Settings = [("learning_rate", values["learning_rate"])] if "learning_rate" in values else []
    for name, default in _ADAM_DEFAULTS.items():
        value = values.get(name, default)
        if not _same(value, default):
            settings.append((name, value))
    own = [name for name in _parameters(type(optimizer)) if name not in (*_ADAM_DEFAULTS, "learning_rate", "name")]
    settings += _kept(state, own, _parameters(type(optimizer)))
    if (name := state.get("name")) not in (None, *(cls.__name__ for cls in type(optimizer).__mro__)):
        settings.append(("name", name))
    return settings


def schedule_settings(schedule: Any) -> Settings:
    """The constructor's arguments of a schedule that are not at their defaults, from ``get_config`` or attributes."""
    parameters, config = _parameters(type(schedule)), _config_of(schedule)
    if config is None:
        return _kept(vars(schedule), list(parameters), parameters)
    missing = inspect.Parameter.empty
    return [(name, value) for name, value in config.items() if not _same(value, parameters.get(name, missing))]


def _parameters(cls: type) -> dict[str, Any]:
    """The arguments of the constructors of a class and its bases, and their defaults."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    defaults: dict[str, Any] = {}
    for init in (vars(owner)["__init__"] for owner in cls.__mro__ if inspect.isfunction(vars(owner).get("__init__"))):
        for found in list(inspect.signature(init).parameters.values())[1:]:
            if found.kind not in kinds:
                defaults.setdefault(found.name, found.default)
    return defaults


def _kept(state: Mapping[str, Any], names: Sequence[str], defaults: Mapping[str, Any]) -> Settings:
    found = [(name, key) for name in names for key in (name, f"_{name}") if key in state]
    return [(name, state[key]) for name, key in found if not _same(state[key], defaults[name])]


def _same(value: Any, default: Any) -> bool:
    plain = (bool, int, float, str)
    return value is default or (isinstance(value, plain) and isinstance(default, plain) and value == default)


def html_table(title: str, rows: Iterable[tuple[str, Any]], below: str = "") -> str:
    """A title, names and values as text; ``below`` is HTML already."""
    left = ' style="text-align:left"'
    cells = (
        f"<tr><th{left}>{html.escape(name)}</th><td{left}>"
        f"{html.escape(value if isinstance(value, str) else _text(value))}</td></tr>"
        for name, value in rows
    )
    table = "".join(cells)
    return f"<div><strong>{html.escape(title)}</strong>{f'<table>{table}</table>' if table else ''}{below}</div>"


def preformatted(text: str) -> str:
    """HTML of a text whose lines stay as they are."""
    return f"<pre>{html.escape(text)}</pre>"


def polyline(values: Sequence[float], width: int = 180, height: int = 40) -> str:
    """A curve without axes, as SVG; from the least value at the bottom, or 0, to the largest at the top."""
    heights = np.asarray(values, np.float64)
    if len(heights) < 2 or not np.isfinite(heights).all():
        return ""
    low, high = min(0.0, float(heights.min())), max(0.0, float(heights.max()))
    x = np.linspace(1, width - 1, len(heights))
    y = height - 1 - (heights - low) / ((high - low) or 1) * (height - 2)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">{line}</svg>'
