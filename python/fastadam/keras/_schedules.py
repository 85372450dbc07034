"""fastadam's schedules as schedules of Keras."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np

from fastadam import schedules
from fastadam._core.common.frameworks import refuse_parameters
from fastadam._core.native.backend import _cpu
from fastadam.keras._backend import outside_of_graphs
from fastadam.schedules._foreign import check_callable

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, Config

__all__ = ["Schedule", "as_keras_rate"]

# Keras has all other schedules under the same names; registered, this one can be loaded from files.
keras.saving.register_keras_serializable(package="fastadam")(schedules.LinearCosineDecay)


def as_keras_rate(rate: AnyArray) -> AnyArray:
    """A learning rate as Keras takes it: a schedule of fastadam becomes Keras's of the same name, or one that calls it.

    Raises:
        TypeError: A model or its parameters, a class, a function with arguments.
    """
    if not isinstance(rate, schedules.LearningRateSchedule):
        if not isinstance(rate, (float, keras.optimizers.schedules.LearningRateSchedule)):
            refuse_parameters("learning_rate", rate)
            if callable(rate):
                check_callable("learning_rate", rate)
        return rate
    name = type(rate).__name__
    namesake = getattr(keras.optimizers.schedules, name, None)
    if namesake is None or type(rate) is not getattr(schedules, name, None):
        return Schedule(rate)
    config = rate.get_config()
    if config.get("name", "") is None:  # Keras wants a string
        del config["name"]
    return namesake(**config)


@keras.saving.register_keras_serializable(package="fastadam")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A schedule of fastadam that Keras does not have, called on the host with the step.

    A class of your own needs ``get_config`` and ``register_keras_serializable`` to be loaded from a file.
    """

    def __init__(self, schedule: AnyArray) -> None:
        self.schedule = schedule

    def __call__(self, step: AnyArray) -> AnyArray:
        step = step.value if isinstance(step, keras.Variable) else step
        if keras.backend.backend() != "jax":
            return self._rate(step)
        import jax

        return jax.pure_callback(self._rate, jax.ShapeDtypeStruct((), np.float32), step)

    @outside_of_graphs
    def _rate(self, step: AnyArray) -> AnyArray:
        with _cpu.DefaultArithmetic():  # for the rounding to float32
            return np.float32(self.schedule(int(step)))

    def get_config(self) -> Config:
        """The serialized schedule."""
        return {"schedule": keras.saving.serialize_keras_object(self.schedule)}

    @classmethod
    def from_config(cls, config: Config) -> Schedule:
        """From ``get_config``."""
        return cls(keras.saving.deserialize_keras_object(config["schedule"]))
