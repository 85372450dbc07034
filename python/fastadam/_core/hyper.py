"""Hyperparameters: attributes of an optimizer, and the numbers that one step is made with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, overload

from fastadam._core.checks import check_non_negative, check_number, check_one_norm
from fastadam._core.frameworks import refuse_parameters
from fastadam._core.placement import on_gpu
from fastadam.schedules import LearningRateSchedule
from fastadam.schedules._foreign import adopt

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CLIP_NAMES", "Clip", "Hyper", "StepHyper", "check_callable", "check_rate"]

Read = TypeVar("Read")
Written = TypeVar("Written")
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


class Hyper(Generic[Read, Written]):
    """Attribute of an optimizer: a number checked when it is set, or a callable checked when it is evaluated.

    A callable without arguments is evaluated whenever it is read. A schedule, which takes the step, is read as it is.
    """

    def __init__(self, check: Callable[[str, Any], float]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, optimizer: object, owner: type | None = None) -> Read: ...
    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        value = optimizer._hyper[self._name]
        if not callable(value) or isinstance(value, LearningRateSchedule):
            return value
        return self._check(self._name, value())

    def __set__(self, optimizer: Any, value: Written) -> None:
        number: Any = adopt(value)  # of a schedule what the step calls, whatever library it is of
        if self._name != "learning_rate" and (number is not value or isinstance(value, LearningRateSchedule)):
            raise TypeError(f"{self._name}: {type(value).__name__}, expected a number (learning_rate takes schedules)")
        if callable(number):
            refuse_parameters(self._name, number)  # models can be called
        check = check_callable if callable(number) else self._check
        optimizer._hyper[self._name] = check(self._name, number)


class Clip:
    """Attribute of an optimizer: a bound >= 0, or None for none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, optimizer: object, owner: type | None = None) -> float | None: ...
    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else optimizer._clip[self._name]

    def __set__(self, optimizer: Any, value: float | None) -> None:
        bound = None if value is None else check_non_negative(self._name, value)
        bounds = {**optimizer._clip, self._name: bound}
        check_one_norm(bounds["clipnorm"], bounds["global_clipnorm"])
        optimizer._clip = bounds


class StepHyper(NamedTuple):
    """The checked numbers of one step, in double; the native ``Plan.step`` reads them in this order."""

    step: int  # t, from 1
    learning_rate: float
    beta_1: float
    beta_2: float
    epsilon: float
    decay: float = 0.0
    clip_value: float = math.inf
    clip_norm: float = math.inf
    global_clip_norm: float = math.inf
    gradient_scale: float = 1.0
    weight_decay: float = 0.0
    ema_momentum: float = 0.0
    ema_overwrite: bool = False
    require_finite: bool = False
    clip_after_dedupe: bool = False
    l2: float = 0.0  # coupled weight decay
    epsilon_corrected: bool = False  # PyTorch's: added to the bias-corrected root
