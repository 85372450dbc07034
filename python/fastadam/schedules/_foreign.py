"""Schedules of Keras, TensorFlow and PyTorch as learning rates. Recognised by their classes; nothing is imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastadam.schedules import _decays
from fastadam.schedules._decays import LearningRateSchedule

__all__ = ["KerasSchedule", "SchedulerRate", "adopt", "check_callable"]

_KERAS = ("keras", "tensorflow", "tf_keras")


def adopt(value: Any) -> Any:
    """A schedule of Keras, TensorFlow or PyTorch in the form that an optimizer uses; anything else as it is.

    Keras's own classes become their namesakes here; a subclass of a user is called with the step. A torch scheduler
    gives the rate that its optimizer has now: whoever made it steps it.

    Raises:
        ValueError: A scheduler of several groups; a schedule with an argument that its namesake refuses.
    """
    if isinstance(value, (float, int, LearningRateSchedule)):
        return value
    bases = [(base.__module__, base.__name__) for base in type(value).__mro__]
    if any(name == "LearningRateSchedule" and module.partition(".")[0] in _KERAS for module, name in bases):
        module, name = bases[0]
        if module.partition(".")[0] in _KERAS and name in _decays.__all__:
            config = {key: _decays._plain(given) for key, given in value.get_config().items()}  # TF's may hold tensors
            return getattr(_decays, name).from_config(config)
        return KerasSchedule(value)
    if any(name in ("LRScheduler", "_LRScheduler") and module == "torch.optim.lr_scheduler" for module, name in bases):
        return SchedulerRate(value)
    return value


class KerasSchedule(LearningRateSchedule):
    """A schedule class of a user with Keras's base class; saved by its own name and configuration."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def __call__(self, step: Any) -> float:
        return float(self.schedule(step))

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.schedule.get_config()
        return config

    def __repr__(self) -> str:
        return repr(self.schedule)


class SchedulerRate:
    """The present rate of a torch scheduler's optimizer, as a callable without arguments."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self()

    def __call__(self) -> float:
        groups = self.scheduler.optimizer.param_groups
        if len(groups) != 1:
            kind = type(self.scheduler).__name__
            raise ValueError(f"learning_rate: {kind} of {len(groups)} parameter groups, expected one group")
        return float(groups[0]["lr"])

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerRate:
        return self  # a copy of the scheduler would be stepped by nobody

    def __repr__(self) -> str:
        return f"<{type(self.scheduler).__name__}: {self():g}>"


def check_callable(name: str, value: Callable[..., float]) -> Callable[..., float]:
    """A function without arguments, or a schedule; a callable without a readable signature is taken as it is."""
    if isinstance(value, LearningRateSchedule):
        return value
    if isinstance(value, type):
        takes = ", a schedule" if name == "learning_rate" else ""
        raise TypeError(
            f"{name}: the class {value.__name__}, expected a number{takes} or a function without arguments; "
            f"an instance would be {value.__name__}(...)"
        )
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return value
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
    return value
