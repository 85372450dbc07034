"""The schedule classes."""

from __future__ import annotations

import abc
import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.common.checks import as_array, check_number, shown
from fastadam._core.common.display import (
    call_text,
    html_or_none,
    html_table,
    name_of,
    never_raises,
    polyline,
    schedule_settings,
)
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import AnyArray, Config
from fastadam._core.native.backend import _cpu

__all__ = [
    "CosineDecay",
    "CosineDecayRestarts",
    "ExponentialDecay",
    "InverseTimeDecay",
    "LearningRateSchedule",
    "LinearCosineDecay",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
]

Steps = npt.NDArray[np.float64]
Rates = npt.NDArray[np.float64]


class LearningRateSchedule:
    """The base of all schedules. Override ``__call__(step)``, and ``get_config`` if you save the optimizer.

    >>> import fastadam
    >>> class Warmup(fastadam.schedules.LearningRateSchedule):
    ...     def __call__(self, step):
    ...         return 0.1 * min(1.0, (step + 1) / 100)
    >>> fastadam.Adam(Warmup()).learning_rate(49)
    0.05
    """

    def __call__(self, step: AnyArray) -> AnyArray:
        """The learning rate at ``step``, the number of steps made before this one."""
        raise NotImplementedError("Learning rate schedule must override __call__")

    def get_config(self) -> Config:
        """The constructor's arguments as plain JSON values."""
        raise NotImplementedError(
            f"{type(self).__name__}: Learning rate schedule must override get_config, which is called to save it or to "
            "copy its configuration: return the arguments of its constructor in a dict"
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LearningRateSchedule:
        """Make a schedule from the result of ``get_config``."""
        if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
            raise TypeError(f"config: {type(config).__name__}, expected a dict as get_config gives it")
        return cls(**config)

    @never_raises
    def __repr__(self) -> str:
        """The constructor's call with all arguments that are not at their defaults."""
        return call_text(type(self), schedule_settings(self))

    @html_or_none
    def _repr_html_(self) -> str:
        return html_table(name_of(type(self)), schedule_settings(self))


class _Schedule(LearningRateSchedule, abc.ABC):
    """The base of the schedules in this module: dataclasses with a vectorised ``_rates``."""

    def __call__(self, step: npt.ArrayLike) -> AnyArray:
        steps = _steps(step)
        with _cpu.DefaultArithmetic():  # whatever the caller's rounding mode
            rates = np.asarray(self._rates(steps), dtype=np.float64)
        return float(rates) if steps.ndim == 0 else np.broadcast_to(rates, steps.shape).copy()

    @abc.abstractmethod
    def _rates(self, steps: Steps) -> Rates: ...

    def get_config(self) -> Config:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        return {field.name: plain(getattr(self, field.name)) for field in fields}

    @html_or_none
    def _repr_html_(self) -> str:
        """A table with a curve of the rates that extends a little beyond the last step."""
        config = self.get_config()
        lengths = [value for name, value in config.items() if name.endswith("steps") and value]
        end = 1.25 * (sum(lengths) or max(config.get("boundaries") or [1]))
        return html_table(name_of(type(self)), schedule_settings(self), polyline(self(np.linspace(0, end, 120))))

    def _require(self, *names: str, least: float | None = None, above: float | None = None) -> None:
        for name in names:
            number = check_number(name, getattr(self, name))
            if least is not None and number < least:
                raise ValueError(f"{name}: {number}, expected {name} >= {least:g}")
            if above is not None and number <= above:
                raise ValueError(f"{name}: {number}, expected {name} > {above:g}")


@dataclass(frozen=True, repr=False)
class _DecayOfQuotient(_Schedule):
    """The base of rates that decay with ``step / decay_steps``, rounded down if ``staircase``."""

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        self._require("initial_learning_rate")
        self._require("decay_steps", above=0)
        self._require("decay_rate", least=0)

    def _quotient(self, steps: Steps) -> Steps:
        quotient = steps / self.decay_steps
        return np.asarray(np.floor(quotient) if self.staircase else quotient)


@suggests_keywords()
@dataclass(frozen=True, repr=False)
class ExponentialDecay(_DecayOfQuotient):
    r"""Exponential decay.

    .. math:: \eta_0 \, r^{s / d}

    r is ``decay_rate``. With ``staircase`` the quotient s / d is rounded down.

    Raises:
        ValueError: ``decay_steps`` is not positive or ``decay_rate`` is negative.

    >>> import fastadam
    >>> schedule = fastadam.schedules.ExponentialDecay(0.1, decay_steps=10, decay_rate=0.5)
    >>> schedule([0, 10, 20]).tolist()
    [0.1, 0.05, 0.025]
    """

    def _rates(self, steps: Steps) -> Rates:
        return self.initial_learning_rate * self.decay_rate ** self._quotient(steps)


@suggests_keywords()
@dataclass(frozen=True, repr=False)
class InverseTimeDecay(_DecayOfQuotient):
    r"""Decay with the inverse of the step.

    .. math:: \frac{\eta_0}{1 + r s / d}

    r is ``decay_rate``. With ``staircase`` the quotient s / d is rounded down.

    Raises:
        ValueError: ``decay_steps`` is not positive or ``decay_rate`` is negative.

    >>> import fastadam
    >>> fastadam.schedules.InverseTimeDecay(0.1, decay_steps=10, decay_rate=1.0)(10)
    0.05
    """

    def _rates(self, steps: Steps) -> Rates:
        return self.initial_learning_rate / (1 + self.decay_rate * self._quotient(steps))


@suggests_keywords()
@dataclass(frozen=True, repr=False)
class PiecewiseConstantDecay(_Schedule):
    """A constant rate between boundaries: ``values[i]`` for ``boundaries[i-1] < step <= boundaries[i]``.

    Raises:
        TypeError: ``boundaries`` or ``values`` is not a list of numbers.
        ValueError: ``values`` does not have one number more than ``boundaries``, or the boundaries decrease.

    >>> import fastadam
    >>> fastadam.schedules.PiecewiseConstantDecay([100, 200], [0.1, 0.01, 0.001])([0, 100, 101, 201]).tolist()
    [0.1, 0.1, 0.01, 0.001]
    """

    boundaries: Sequence[float]
    values: Sequence[float]
    name: str | None = None

    def __post_init__(self) -> None:
        boundaries, values = (_numbers(self, name) for name in ("boundaries", "values"))
        if len(boundaries) + 1 != len(values):
            raise ValueError(
                "The length of boundaries should be 1 less than the length of values, "
                f"received {len(boundaries)} boundaries and {len(values)} values"
            )
        if any(later < earlier for earlier, later in pairwise(boundaries)):
            raise ValueError(f"boundaries: {boundaries}, expected numbers that do not decrease")

    def _rates(self, steps: Steps) -> Rates:
        boundaries, values = np.asarray(self.boundaries, np.float64), np.asarray(self.values, np.float64)
        return values[np.searchsorted(boundaries, steps, side="left")]


@suggests_keywords()
@dataclass(frozen=True, repr=False)
class PolynomialDecay(_Schedule):
    r"""Polynomial decay from ``initial_learning_rate`` to ``end_learning_rate`` in ``decay_steps``.

    .. math:: (\eta_0 - \eta_{end}) (1 - \min(s, d) / d)^{power} + \eta_{end}

    After ``decay_steps`` the rate is constant. With ``cycle`` d is instead the smallest multiple of ``decay_steps``
    that is at least s (and at least ``decay_steps``).

    Raises:
        ValueError: ``decay_steps`` is not positive or ``power`` is negative.

    >>> import fastadam
    >>> schedule = fastadam.schedules.PolynomialDecay(0.1, decay_steps=100, end_learning_rate=0.0)
    >>> schedule([0, 50, 100, 500]).tolist()
    [0.1, 0.05, 0.0, 0.0]
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        self._require("initial_learning_rate", "end_learning_rate")
        self._require("decay_steps", above=0)
        self._require("power", least=0)

    def _rates(self, steps: Steps) -> Rates:
        decay_steps = np.asarray(self.decay_steps, np.float64)
        if self.cycle:
            decay_steps = decay_steps * np.maximum(1, np.ceil(steps / decay_steps))
        remaining = 1 - np.minimum(steps, decay_steps) / decay_steps
        return (self.initial_learning_rate - self.end_learning_rate) * remaining**self.power + self.end_learning_rate


@suggests_keywords()
@dataclass(frozen=True, repr=False)
class CosineDecay(_Schedule):
    r"""Cosine decay from ``initial_learning_rate`` to ``alpha`` times it, with an optional linear warm-up.

    .. math:: \eta_0 ((1 - \alpha) (1 + \cos(\pi \min(s, d) / d)) / 2 + \alpha)

    With ``warmup_target`` the rate first rises from ``initial_learning_rate`` to the target in ``warmup_steps``. The
    cosine follows, with s counted from its start and the target as :math:`\eta_0`.

    Raises:
        ValueError: ``decay_steps`` is not positive or ``warmup_steps`` is negative.

    >>> import fastadam
    >>> schedule = fastadam.schedules.CosineDecay(0.0, decay_steps=100, warmup_target=0.1, warmup_steps=10)
    >>> schedule([0, 5, 10, 60, 110]).round(6).tolist()
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """

    initial_learning_rate: float
    decay_steps: float
    alpha: float = 0.0
    name: str | None = None
    warmup_target: float | None = None
    warmup_steps: float = 0

    def __post_init__(self) -> None:
        self._require("initial_learning_rate", "alpha")
        self._require("decay_steps", above=0)
        self._require("warmup_steps", least=0)
        if self.warmup_target is not None:
            self._require("warmup_target")

    def _rates(self, steps: Steps) -> Rates:
        if self.warmup_target is None:
            return self.initial_learning_rate * self._cosine(steps)
        after = self.warmup_target * self._cosine(np.maximum(steps - self.warmup_steps, 0))
        rise = (self.warmup_target - self.initial_learning_rate) * steps / (self.warmup_steps or 1)
        return np.where(steps < self.warmup_steps, self.initial_learning_rate + rise, after)

    def _cosine(self, steps: Steps) -> Rates:
        completed = np.minimum(steps, self.decay_steps) / self.decay_steps
        return (1 - self.alpha) * 0.5 * (1 + np.cos(np.pi * completed)) + self.alpha


@suggests_keywords()
@dataclass(frozen=True, repr=False)
class CosineDecayRestarts(_Schedule):
    r"""Cosine decay with warm restarts (Loshchilov and Hutter, arXiv:1608.03983).

    .. math:: \eta_0 ((1 - \alpha) m^i (1 + \cos(\pi q)) / 2 + \alpha)

    Period i lasts ``first_decay_steps * t_mul**i`` steps, q is the completed fraction of it, and m is ``m_mul``. Every
    restart has the full rate; TensorFlow's float32 logarithm misses some restarts and gives 0 there.

    Raises:
        ValueError: ``first_decay_steps`` is not positive, ``t_mul`` is under 1 or ``m_mul`` is negative.

    >>> import fastadam
    >>> fastadam.schedules.CosineDecayRestarts(0.1, first_decay_steps=10)([0, 5, 10, 20, 30]).round(6).tolist()
    [0.1, 0.05, 0.1, 0.05, 0.1]
    """

    initial_learning_rate: float
    first_decay_steps: float
    t_mul: float = 2.0
    m_mul: float = 1.0
    alpha: float = 0.0
    name: str | None = None

    def __post_init__(self) -> None:
        self._require("initial_learning_rate", "alpha")
        self._require("first_decay_steps", above=0)
        self._require("t_mul", least=1)
        self._require("m_mul", least=0)

    def _rates(self, steps: Steps) -> Rates:
        periods = steps / self.first_decay_steps
        restart = self._restart(periods)
        completed = (periods - self._start(restart)) / self.t_mul**restart
        cosine = 0.5 * self.m_mul**restart * (1 + np.cos(np.pi * completed))
        return np.asarray(self.initial_learning_rate * ((1 - self.alpha) * cosine + self.alpha))

    def _start(self, restart: Steps) -> Steps:
        """The start of a period, in units of the first period: the sum of the lengths before it."""
        return restart if self.t_mul == 1 else np.asarray((self.t_mul**restart - 1) / (self.t_mul - 1))

    def _restart(self, periods: Steps) -> Steps:
        """The number of restarts before a step, which is in units of the first period."""
        if self.t_mul == 1:
            return np.floor(periods)
        guess: Steps = np.floor(np.log1p(periods * (self.t_mul - 1)) / np.log(self.t_mul))
        guess = np.where(self._start(guess) > periods, guess - 1, guess)
        return np.where(self._start(guess + 1) <= periods, guess + 1, guess)


@suggests_keywords()
@dataclass(frozen=True, repr=False)
class LinearCosineDecay(_Schedule):
    r"""Linear decay times a cosine (Bello et al., arXiv:1709.07417), from TF 2.x's ``experimental`` module.

    .. math:: \eta_0 ((\alpha + 1 - q) (1 + \cos(2 \pi n q)) / 2 + \beta), \quad q = \min(s, d) / d

    The cosine has n = ``num_periods`` periods.

    Raises:
        ValueError: ``decay_steps`` is not positive.

    >>> import fastadam
    >>> schedule = fastadam.schedules.LinearCosineDecay(0.1, decay_steps=100, beta=0.0)
    >>> schedule([0, 50, 100, 500]).round(6).tolist()
    [0.1, 0.025, 0.0, 0.0]
    """

    initial_learning_rate: float
    decay_steps: float
    num_periods: float = 0.5
    alpha: float = 0.0
    beta: float = 0.001
    name: str | None = None

    def __post_init__(self) -> None:
        self._require("initial_learning_rate", "num_periods", "alpha", "beta")
        self._require("decay_steps", above=0)

    def _rates(self, steps: Steps) -> Rates:
        completed = np.minimum(steps, self.decay_steps) / self.decay_steps
        cosine = 0.5 * (1 + np.cos(2 * np.pi * self.num_periods * completed))
        return self.initial_learning_rate * ((self.alpha + 1 - completed) * cosine + self.beta)


def _steps(step: npt.ArrayLike) -> Steps:
    """One step or an array of them in float64."""
    expected = "a number or an array of numbers"
    array = as_array("step", step, expected)  # which refuses lists of different lengths
    is_big = array.dtype.kind == "O" and all(isinstance(item, numbers.Real) for item in array.flat)  # beyond 64 bits
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16" and not is_big:
        raise TypeError(f"step: {shown(step)}, expected {expected}")
    try:
        return array.astype(np.float64)
    except OverflowError as error:  # an int of more than 1024 bits
        raise ValueError(f"step: {shown(step)} ({error}), expected {expected}") from error


def _numbers(schedule: object, name: str) -> list[float]:
    values = getattr(schedule, name)
    if isinstance(values, str) or not isinstance(values, (Sequence, np.ndarray)) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name}: {type(values).__name__}, expected a list of numbers")
    return [check_number(f"{name}[{i}]", value) for i, value in enumerate(values)]


def plain(value: Any) -> Any:
    """A setting as plain JSON: numbers for scalars of NumPy and TensorFlow, lists for tuples and arrays."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return np.asarray(value).tolist() if hasattr(value, "shape") else value
