"""Hyperparameters: attributes of an optimizer that check what they are set to, between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from fastadam._core.common.checks import check_bool, check_non_negative, check_number
from fastadam._core.common.frameworks import refuse_parameters
from fastadam._core.native.arrays import on_gpu
from fastadam._core.parts import parts_of
from fastadam.schedules import LearningRateSchedule
from fastadam.schedules._foreign import adopt, check_callable

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.common.types import AnyArray, Foreign

__all__ = ["Clip", "Hyper", "Keras3Option", "SmallState", "check_rate"]

Read = TypeVar("Read")
Written = TypeVar("Written")
Value = TypeVar("Value")


def check_rate(name: str, value: AnyArray) -> AnyArray:
    """A finite float; a number on a GPU as it is, which only the GPU reads."""
    if on_gpu(value):
        return value
    if not isinstance(value, float):
        refuse_parameters(name, value)
    return check_number(name, value)


class Hyper(Generic[Read, Written]):
    """Attribute of an optimizer: a number checked when it is set, or a callable checked when it is evaluated.

    A callable without arguments is evaluated whenever it is read. A schedule, which takes the step, is read as it is.
    """

    def __init__(self, check: Callable[[str, AnyArray], float]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, optimizer: object, owner: type | None = None) -> Read: ...
    def __get__(self, optimizer: Foreign, owner: type | None = None) -> object:
        if optimizer is None:
            return self
        value = parts_of(optimizer).options.numbers[self._name]
        if not callable(value) or isinstance(value, LearningRateSchedule):
            return value
        return self._check(self._name, value())

    def __set__(self, optimizer: Foreign, value: Written) -> None:
        number: AnyArray = adopt(value)  # a schedule of another library becomes what a step can call
        if self._name != "learning_rate" and (number is not value or isinstance(value, LearningRateSchedule)):
            raise TypeError(f"{self._name}: {type(value).__name__}, expected a number (learning_rate takes schedules)")
        if callable(number):
            refuse_parameters(self._name, number)  # models can be called
        check = check_callable if callable(number) else self._check
        checked, parts = check(self._name, number), parts_of(optimizer)
        with parts.runtime.lock:
            parts.options.set_number(self._name, checked)


class Clip:
    """Attribute of an optimizer: a bound >= 0, or None for none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, optimizer: object, owner: type | None = None) -> float | None: ...
    def __get__(self, optimizer: Foreign, owner: type | None = None) -> object:
        return self if optimizer is None else parts_of(optimizer).options.clips[self._name]

    def __set__(self, optimizer: Foreign, value: float | None) -> None:
        bound, parts = None if value is None else check_non_negative(self._name, value), parts_of(optimizer)
        with parts.runtime.lock:
            parts.options.set_clip(self._name, bound)


class Keras3Option(Generic[Value]):
    """Attribute of an optimizer: an option that is checked when it is set and used from the next step on."""

    def __init__(self, *, fixed: bool = False) -> None:
        self._fixed = fixed

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, optimizer: object, owner: type | None = None) -> Value: ...
    def __get__(self, optimizer: Foreign, owner: type | None = None) -> object:
        return self if optimizer is None else getattr(parts_of(optimizer).options.keras3, self._name)

    def __set__(self, optimizer: Foreign, value: Value) -> None:
        if self._fixed:
            raise AttributeError(f"{self._name}: chosen when the optimizer is made, expected no other value later")
        options, _, runtime, tables = parts_of(optimizer)
        with runtime.lock:
            if self._name == "use_ema" and check_bool("use_ema", value) and not options.keras3.use_ema:
                tables.settle()  # averages begin at the values of all steps
            options.set_keras3(self._name, value)


class SmallState(Generic[Value]):
    """Attribute of an optimizer: an option of :class:`SmallStates`, which is chosen when the optimizer is made."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, optimizer: object, owner: type | None = None) -> Value: ...
    def __get__(self, optimizer: Foreign, owner: type | None = None) -> object:
        return self if optimizer is None else getattr(parts_of(optimizer).options.small, self._name)

    def __set__(self, optimizer: Foreign, value: Value) -> None:
        raise AttributeError(
            f"{self._name}: chosen when the optimizer is made, expected no other value later (load() can change it)"
        )
