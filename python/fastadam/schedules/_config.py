"""Schedules as plain JSON and back, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadam._core.keywords import suggests_keywords
from fastadam.schedules import _decays
from fastadam.schedules._decays import LearningRateSchedule

__all__ = ["deserialize", "plot", "serialize"]


def serialize(learning_rate_schedule: LearningRateSchedule) -> dict[str, Any]:
    """``{"class_name": ..., "config": ...}``, TF 2.x's form, plain JSON.

    >>> import fastadam
    >>> fastadam.schedules.serialize(fastadam.schedules.CosineDecay(0.1, 100))["class_name"]
    'CosineDecay'
    """
    return {
        "class_name": type(learning_rate_schedule).__name__,
        "config": learning_rate_schedule.get_config(),
    }


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
def plot(schedule: LearningRateSchedule, steps: int, axes: Any = None) -> Any:
    """Draw the rates of the first ``steps`` steps with matplotlib; returns the axes.

    Args:
        schedule: Any schedule; one of your own is called step by step.
        steps: How many steps.
        axes: Matplotlib axes to draw on; None makes a figure.

    >>> import importlib.util, fastadam
    >>> if importlib.util.find_spec("matplotlib"):
    ...     axes = fastadam.schedules.plot(fastadam.schedules.CosineDecay(0.1, 100), 100)
    ...     assert axes.get_title() == "CosineDecay"
    """
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(6, 3), layout="constrained").subplots()
    axes.plot([float(schedule(step)) for step in range(steps)])
    axes.set(xlabel="step", ylabel="learning rate", title=type(schedule).__name__)
    return axes
