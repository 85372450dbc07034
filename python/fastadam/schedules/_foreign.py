"""Accept schedules of Keras, TensorFlow and PyTorch, recognised by their classes without importing anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from fastadam._core.common.types import AnyArray, Config, Foreign
from fastadam.schedules import _decays
from fastadam.schedules._decays import LearningRateSchedule

__all__ = ["KerasSchedule", "SchedulerRate", "adopt", "check_callable"]

_KERAS = ("keras", "tensorflow", "tf_keras")


def adopt(value: Foreign) -> Foreign:
    """Convert a schedule of Keras, TensorFlow or PyTorch to what an optimizer uses; return other values unchanged.

    A schedule class of Keras becomes fastadam's class of the same name; a user's subclass is called with the step. A
    PyTorch scheduler gives its optimizer's current rate; the user steps the scheduler.

    Raises:
        ValueError: A scheduler has several parameter groups, or a schedule has an argument that fastadam's class of
            the same name refuses.
    """
    if isinstance(value, (float, int, LearningRateSchedule)):
        return value
    bases = [(base.__module__, base.__name__) for base in type(value).__mro__]
    if any(name == "LearningRateSchedule" and module.partition(".")[0] in _KERAS for module, name in bases):
        module, name = bases[0]
        if module.partition(".")[0] in _KERAS and name in _decays.__all__:
            config = {key: _decays.plain(setting) for key, setting in value.get_config().items()}  # of TF also tensors
            return getattr(_decays, name).from_config(config)
        return KerasSchedule(value)
    if any(name in ("LRScheduler", "_LRScheduler") and module == "torch.optim.lr_scheduler" for module, name in bases):
        return SchedulerRate(value)
    return value


class KerasSchedule(LearningRateSchedule):
    """Wraps an instance of a user's subclass of Keras's base class; saved with its own name and configuration."""

    def __init__(self, schedule: Foreign) -> None:
        self.schedule = schedule

    def __call__(self, step: AnyArray) -> float:
        return float(self.schedule(step))

    def get_config(self) -> Config:
        config: Config = self.schedule.get_config()
        return config

    def __repr__(self) -> str:
        return repr(self.schedule)


class SchedulerRate:
    """A callable without arguments that returns the current rate of a PyTorch scheduler's optimizer."""

    def __init__(self, scheduler: Foreign) -> None:
        self.scheduler = scheduler
        self()

    def __call__(self) -> float:
        groups = self.scheduler.optimizer.param_groups
        if len(groups) != 1:
            kind = type(self.scheduler).__name__
            raise ValueError(f"learning_rate: {kind} with {len(groups)} parameter groups, expected one group")
        return float(groups[0]["lr"])

    def __deepcopy__(self, memo: dict[int, object]) -> SchedulerRate:
        return self  # nobody would step a copy of the scheduler

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
