"""What a hyperparameter may be set to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastadam._core.checks import check_number
from fastadam._core.frameworks import refuse_parameters
from fastadam._core.placement import on_gpu
from fastadam.schedules import LearningRateSchedule

__all__ = ["CLIP_NAMES", "check_callable", "check_rate"]

CLIP_NAMES = ("clipnorm", "clipvalue", "global_clipnorm")


def check_rate(name: str, value: Any) -> Any:
    """A finite float; one that lies on a GPU, which only the GPU reads, as it is."""
    if on_gpu(value):
        return value
    if not isinstance(value, float):
        refuse_parameters(name, value)
    return check_number(name, value)


def check_callable(name: str, value: Any) -> Callable[..., float]:
    """A function without arguments or a schedule; what has no signature to read is taken as it is."""
    found: Callable[..., float] = value
    if isinstance(value, LearningRateSchedule):
        return found
    if isinstance(value, type):
        takes = ", a schedule" if name == "learning_rate" else ""
        raise TypeError(
            f"{name}: the class {value.__name__}, expected a number{takes} or a function without arguments; "
            f"an instance would be {value.__name__}(...)"
        )
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return found
    try:
        signature.bind()
    except TypeError:
        how = (
            "a function of the step is a schedule: subclass fastadam.schedules.LearningRateSchedule and define __call__"
            if name == "learning_rate"
            else "only learning_rate takes schedules"
        )
        raise TypeError(
            f"{name}: a callable with the arguments {signature}, expected one without, which reads what it needs; {how}"
        ) from None
    return found
