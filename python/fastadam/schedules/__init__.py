"""Learning rate schedules: functions of the step, in double, for one step or an array of steps.

Each is a frozen record whose fields are the arguments of its Keras namesake. A schedule serves as ``learning_rate`` of
:class:`fastadam.Adam`, which calls it with ``iterations`` and rounds the result once to the variable's dtype.

Source: https://www.tensorflow.org/api_docs/python/tf/keras/optimizers/schedules.
"""

from __future__ import annotations

from fastadam._core.public import publish
from fastadam.schedules._config import deserialize, plot, serialize
from fastadam.schedules._decays import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    LinearCosineDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)

__all__ = [
    "CosineDecay",
    "CosineDecayRestarts",
    "ExponentialDecay",
    "InverseTimeDecay",
    "LearningRateSchedule",
    "LinearCosineDecay",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "deserialize",
    "plot",
    "serialize",
]

publish(globals())


def __dir__() -> list[str]:
    return sorted(__all__)
