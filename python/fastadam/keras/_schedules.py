"""Schedules of fastadam as those of Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from fastadam import schedules
from fastadam._core.frameworks import refuse_parameters
from fastadam._core.hyperparameters import check_callable
from fastadam.keras._backend import outside_of_graphs

__all__ = ["Schedule", "as_keras_rate"]

# So that files can hold them; the others have namesakes in Keras.
keras.saving.register_keras_serializable(package="fastadam")(schedules.LinearCosineDecay)


def as_keras_rate(rate: Any) -> Any:
    """A learning rate as Keras takes it: for a schedule of fastadam its namesake in Keras, or one that calls it.

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
    if config.get("name", "") is None:  # where Keras has a name
        del config["name"]
    return namesake(**config)


@keras.saving.register_keras_serializable(package="fastadam")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A schedule of fastadam that has no namesake in Keras, called with the step on the host.

    To be loaded from a file, a class of your own needs ``get_config`` and ``register_keras_serializable``.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def __call__(self, step: Any) -> Any:
        step = step.value if isinstance(step, keras.Variable) else step
        if keras.backend.backend() != "jax":
            return self._rate(step)
        import jax

        return jax.pure_callback(self._rate, jax.ShapeDtypeStruct((), np.float32), step)

    @outside_of_graphs
    def _rate(self, step: Any) -> Any:
        return np.float32(self.schedule(int(step)))

    def get_config(self) -> dict[str, Any]:
        """The schedule in Keras's form."""
        return {"schedule": keras.saving.serialize_keras_object(self.schedule)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """From ``get_config``."""
        return cls(keras.saving.deserialize_keras_object(config["schedule"]))
