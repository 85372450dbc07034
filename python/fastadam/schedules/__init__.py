r"""Learning rate schedules: functions of the step, computed in float64, for one step or an array of steps.

Each schedule is a frozen dataclass whose fields are the arguments of the Keras schedule of the same name. Pass one as
``learning_rate`` to :class:`fastadam.Adam`, which calls it with ``iterations`` and rounds the result once to the
variable's dtype.

In the equations s is the step, d ``decay_steps`` and :math:`\eta_0` ``initial_learning_rate``.

Source: https://www.tensorflow.org/api_docs/python/tf/keras/optimizers/schedules.
"""

from __future__ import annotations

from fastadam._core.common.public import publish
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
