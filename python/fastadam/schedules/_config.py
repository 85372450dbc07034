"""Schedules as plain JSON and back, and as a picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastadam._core.checks import check_count
from fastadam._core.keywords import suggests_keywords
from fastadam.schedules import _decays
from fastadam.schedules._decays import LearningRateSchedule
from fastadam.schedules._foreign import KerasSchedule

__all__ = ["deserialize", "plot", "serialize"]


def serialize(learning_rate_schedule: LearningRateSchedule) -> dict[str, Any]:
    """``{"class_name": ..., "config": ...}``, TF 2.x's form, plain JSON.

    >>> import fastadam
    >>> fastadam.schedules.serialize(fastadam.schedules.CosineDecay(0.1, 100))["class_name"]
    'CosineDecay'
    """
    own: Any = learning_rate_schedule
    if isinstance(own, KerasSchedule):
        own = own.schedule
    return {"class_name": type(own).__name__, "config": own.get_config()}


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """A schedule from ``serialize`` of TF 2.x, Keras 3 or this module; ``config`` is not modified.

    Args:
        config: ``{"class_name", "config"}``; other keys, which Keras 3 adds, are left aside.
        custom_objects: Classes of your own by name.

    Raises:
        ValueError: Not such a dict, or a class that is not known.

    >>> import fastadam
    >>> config = {"initial_learning_rate": 0.1, "decay_steps": 100}
    >>> fastadam.schedules.deserialize({"class_name": "CosineDecay", "config": config})(50)
    0.05
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("config"), Mapping) or "class_name" not in config:
        raise ValueError(f"Improper config format: {config!r}, expected a dict with 'class_name' and 'config'")
    name = config["class_name"]
    known = {key: getattr(_decays, key) for key in _decays.__all__ if key.endswith(("Decay", "Restarts"))}
    classes = {**known, **(custom_objects or {})}
    if name not in classes:
        raise ValueError(f"Unknown decay: {name}, expected one of {sorted(classes)} or a name in custom_objects")
    return classes[name].from_config(dict(config["config"]))


@suggests_keywords()
def plot(schedule: Callable[[Any], Any], steps: int, axes: Any = None) -> Any:
    """Draw the learning rates of the first ``steps`` steps with matplotlib; returns the axes.

    Args:
        schedule: A schedule, of Keras too, or any function of the step; it is called step by step.
        steps: How many steps.
        axes: Matplotlib axes to draw on. None: the current ones of pyplot, so that ``plt.show()`` and notebooks show
            them; a second call draws beside the first.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``schedule`` cannot be called, or is a class; ``steps`` is not an integer.
        ValueError: ``steps`` is under 1.

    >>> import fastadam
    >>> from matplotlib.figure import Figure
    >>> axes = fastadam.schedules.plot(fastadam.schedules.CosineDecay(0.1, 80), steps=100, axes=Figure().subplots())
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('step', 'learning rate')
    """
    if not callable(schedule) or isinstance(schedule, type):
        found = f"the class {schedule.__name__}" if isinstance(schedule, type) else repr(schedule)
        raise TypeError(f"schedule: {found}, expected a schedule or a function of the step")
    count = check_count("steps", steps)
    rates = [float(schedule(step)) for step in range(count)]
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.gca()
    label = schedule.__name__ if inspect.isroutine(schedule) else type(schedule).__name__
    axes.plot(rates, label=label)
    axes.set(xlabel="step", ylabel="learning rate")
    axes.legend()
    return axes
