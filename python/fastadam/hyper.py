"""Checks of the numbers a step is made with; every message names the argument."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["DEFAULT_EPSILON", "StepHyper", "check_beta", "check_epsilon", "check_non_negative", "check_number"]

# tf.keras.backend.epsilon(): what `epsilon=None` and `epsilon=0` mean in TF's Adam (`epsilon or backend.epsilon()`).
DEFAULT_EPSILON = 1e-7


def check_number(name: str, value: Any) -> float:
    """A finite float from any real scalar, 0-d array included; int means float."""
    if isinstance(value, (bool, np.bool_, str, bytes)) or value is None or np.ndim(value) != 0:
        raise TypeError(f"{name}: {value!r}, expected a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: {type(value).__name__}, expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: {number}, expected a finite number")
    return number


def check_non_negative(name: str, value: Any) -> float:
    """A finite float >= 0; the text is TF's."""
    number = check_number(name, value)
    if number < 0:
        raise ValueError(f"Expected {name} >= 0, received: {value}")
    return number


def check_beta(name: str, value: Any) -> float:
    """A decay rate in [0, 1): at 1 the bias correction divides by zero and every variable becomes NaN."""
    number = check_number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name}: {number}, expected 0 <= {name} < 1")
    return number


def check_epsilon(value: Any) -> float:
    """``epsilon >= 0``; None and 0 mean 1e-7, as in TF."""
    return (0.0 if value is None else check_non_negative("epsilon", value)) or DEFAULT_EPSILON


@dataclass(frozen=True)
class StepHyper:
    """The checked numbers of one step, in double; ``step`` is t and counts from 1."""

    step: int
    learning_rate: float
    beta_1: float
    beta_2: float
    epsilon: float
    decay: float = 0.0
    clipvalue: float | None = None

    def as_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the native ``Plan.step``."""
        return {
            "step": self.step,
            "learning_rate": self.learning_rate,
            "decay": self.decay,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "clip_value": math.inf if self.clipvalue is None else self.clipvalue,
        }
