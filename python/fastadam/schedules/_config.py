"""Convert schedules to plain JSON and back; plot them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastadam._core.common.checks import check_count, check_custom_objects, shown
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import AnyArray, Config
from fastadam.schedules import _decays
from fastadam.schedules._decays import LearningRateSchedule
from fastadam.schedules._foreign import KerasSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["deserialize", "plot", "serialize"]

_MOST_POINTS = 10_000  # of a curve: more than a picture has columns


def serialize(learning_rate_schedule: LearningRateSchedule) -> Config:
    """Convert a schedule to ``{"class_name": ..., "config": ...}``: plain JSON in the form of TF 2.x.

    Raises:
        TypeError: ``learning_rate_schedule`` is not a schedule.

    >>> import fastadam
    >>> fastadam.schedules.serialize(fastadam.schedules.CosineDecay(0.1, 100))["class_name"]
    'CosineDecay'
    """
    schedule = learning_rate_schedule
    if isinstance(schedule, type) or not callable(getattr(schedule, "get_config", None)):
        raise TypeError(f"learning_rate_schedule: {shown(schedule)}, expected a schedule")
    if isinstance(schedule, KerasSchedule):
        schedule = schedule.schedule
    return {"class_name": type(schedule).__name__, "config": schedule.get_config()}


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Make a schedule from the result of ``serialize`` of TF 2.x, Keras 3 or this module.

    Args:
        config: ``{"class_name": ..., "config": ...}``, which is not modified. Other keys, which Keras 3 adds, are
            ignored.
        custom_objects: Your own classes by name.

    Raises:
        TypeError: ``custom_objects`` is not a dict.
        ValueError: ``config`` is not such a dict, or the class is unknown.

    >>> import fastadam
    >>> config = {"initial_learning_rate": 0.1, "decay_steps": 100}
    >>> fastadam.schedules.deserialize({"class_name": "CosineDecay", "config": config})(50)
    0.05
    """
    objects = check_custom_objects(custom_objects)
    if not isinstance(config, Mapping) or not isinstance(config.get("config"), Mapping) or "class_name" not in config:
        raise ValueError(f"Improper config format: {shown(config)}, expected a dict with 'class_name' and 'config'")
    name = config["class_name"]
    own = {key: getattr(_decays, key) for key in _decays.__all__ if key.endswith(("Decay", "Restarts"))}
    classes = {**own, **objects}
    if not isinstance(name, str) or name not in classes:
        label = name if isinstance(name, str) else shown(name)
        raise ValueError(f"Unknown decay: {label}, expected one of {sorted(classes)} or a name in custom_objects")
    return classes[name].from_config(dict(config["config"]))


def _rate(value: object, step: int) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        pass
    raise TypeError(f"schedule({step}): {shown(value)}, expected a number")


@suggests_keywords()
def plot(schedule: Callable[[Any], AnyArray], steps: int, axes: Axes | None = None) -> Axes:
    """Plot the learning rates of the first ``steps`` steps with matplotlib.

    Args:
        schedule: A schedule of fastadam or Keras, or any function of the step. It is called for each step, or for
            10,000 of them from the first to the last if there are more. Schedulers of PyTorch are not functions of the
            step, and are refused.
        steps: Number of steps.
        axes: Matplotlib axes to draw on. None means pyplot's current axes, so that ``plt.show()`` and notebooks show
            them; a second call adds a curve to the same axes.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``schedule`` is not callable, or is a class, or returns something else than a number; ``steps`` is
            not an integer; ``axes`` cannot plot.
        ValueError: ``steps`` is under 1.

    >>> import fastadam
    >>> from matplotlib.figure import Figure
    >>> axes = fastadam.schedules.plot(fastadam.schedules.CosineDecay(0.1, 80), steps=100, axes=Figure().subplots())
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('step', 'learning rate')
    """
    if not callable(schedule) or isinstance(schedule, type):
        actual = f"the class {schedule.__name__}" if isinstance(schedule, type) else shown(schedule)
        raise TypeError(f"schedule: {actual}, expected a schedule or a function of the step")
    if axes is not None and not hasattr(axes, "plot"):
        raise TypeError(f"axes: {type(axes).__name__}, expected Axes of Matplotlib or None")
    count = check_count("steps", steps)
    last = min(count, _MOST_POINTS) - 1
    drawn = [place * (count - 1) // last for place in range(last + 1)] if last else [0]
    rates = [_rate(schedule(step), step) for step in drawn]
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.gca()
    label = schedule.__name__ if inspect.isroutine(schedule) else type(schedule).__name__
    axes.plot(drawn, rates, label=label)
    axes.set(xlabel="step", ylabel="learning rate")
    axes.legend()
    return axes
