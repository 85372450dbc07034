"""Keras 3 optimizers whose update is one native call: ``model.compile(optimizer=fastadam.keras.Adam(1e-3))``.

Not imported by ``import fastadam``. Clipping, decoupled weight decay, averages (``use_ema``), accumulated gradients,
loss scale, constraints, schedules and saving are Keras's own. Only the update of variables and moments is replaced.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np

from fastadam._core.common.checks import check_beta, check_list, check_non_negative, check_number, shown
from fastadam._core.common.display import call_text, never_raises, schedule_settings
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.native.plan import StepHyper
from fastadam.keras._backend import outside_of_graphs, require_backend
from fastadam.keras._plans import KerasPlans, plan_of_nothing
from fastadam.keras._schedules import as_keras_rate

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.common.types import AnyArray, Foreign, LearningRate

__all__ = ["Adam", "AdamW"]

_DTYPES = ("float16", "bfloat16", "float32", "float64")


@keras.saving.register_keras_serializable(package="fastadam")
class Adam(keras.optimizers.Adam):  # type: ignore[misc]
    r"""``keras.optimizers.Adam`` with one native call per step for all variables, AMSGrad included.

    .. math::
        \alpha_t = \eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t), \quad
        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \mathrel{-}= m \alpha_t / (\sqrt{v} + \hat\epsilon)

    The arguments, the optimizer's variables and their order are those of ``keras.optimizers.Adam``, so states can be
    exchanged in both directions (``load_own_variables``, ``.weights.h5`` and ``.keras`` files). On the torch and NumPy
    backends variables change in place (on NumPy ``variable.value`` stays the same array; Keras makes a new one); on
    JAX the update is an operation that ``jit`` compiles, and ``self.assign`` stores its results. A subclass that
    overrides ``assign`` gets every new value on every backend; one that overrides ``assign_add`` or ``assign_sub``,
    which no step calls, is refused. On TensorFlow use ``keras.optimizers.Adam``.

    Float32 variables have TensorFlow's arithmetic: :math:`1 - \beta` is computed in float32, while Keras 3 computes it
    in double and rounds. With ``beta_2 = 0.999`` that changes an update by 0.7e-5 of itself. Half variables have
    moments of their own dtype, as in Keras, and float32 arithmetic with one rounding at the end.

    Raises:
        RuntimeError: A backend without this update.
        TypeError: A hyperparameter that is not a number; a complex gradient; variables of a dtype other than float16,
            bfloat16, float32 and float64.
        ValueError: A beta outside [0, 1); an ``epsilon`` that is 0 in the dtype of the variables; a gradient whose
            shape differs from its variable's.

    Source: ``keras/src/optimizers/adam.py``; Kingma and Ba, "Adam" (arXiv:1412.6980), before section 2.1.

    >>> import keras, numpy as np, fastadam.keras
    >>> w = keras.Variable(np.array([1.0, 2.0], np.float32))
    >>> fastadam.keras.Adam(0.1).apply([np.array([0.5, -0.5], np.float32)], [w])
    >>> [round(float(x), 4) for x in w.value]
    [0.9, 2.1]
    """

    @suggests_keywords("optimizer")
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        require_backend(type(self).__name__)
        for method in ("assign_add", "assign_sub"):
            if getattr(type(self), method) is not getattr(keras.optimizers.Optimizer, method):
                raise TypeError(
                    f"{method}: overridden by {type(self).__name__}, expected an override of assign: a step stores "
                    "whole values and adds nothing"
                )
        super().__init__(
            learning_rate=as_keras_rate(learning_rate),
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            amsgrad=amsgrad,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
        )
        self._plans = KerasPlans()
        self._check_numbers([], None)

    @never_raises
    def __repr__(self) -> str:
        rate = self._learning_rate  # a schedule of Keras, or a variable of float32
        rate = float(str(np.float32(float(rate)))) if isinstance(rate, keras.Variable) else rate
        automatic = re.fullmatch(rf"{type(self).__name__}\d*", self.name.replace("_", ""), re.IGNORECASE)
        unshown = ("learning_rate", "name") if automatic else ("learning_rate",)
        others = [(name, value) for name, value in schedule_settings(self) if name not in unshown]
        return call_text(type(self), [("learning_rate", rate), *others])

    @classmethod
    def from_optimizer(cls, optimizer: Foreign) -> Self:
        """An optimizer with the settings and the state of a ``keras.optimizers.Adam``, which stays as it is.

        Raises:
            TypeError: Another kind of optimizer; for a LossScaleOptimizer pass its ``inner_optimizer``.

        >>> import keras, numpy as np, fastadam.keras
        >>> w = keras.Variable(np.array([1.0, 2.0], np.float32))
        >>> theirs = keras.optimizers.Adam(0.1)
        >>> theirs.apply([np.array([0.5, -0.5], np.float32)], [w])
        >>> int(fastadam.keras.Adam.from_optimizer(theirs).iterations.value)
        1
        """
        if not isinstance(optimizer, keras.optimizers.Adam):
            inner = hasattr(optimizer, "inner_optimizer")
            hint = "; a fastadam.keras.Adam of its inner_optimizer can be scaled again" if inner else ""
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer: {kind}, expected a keras.optimizers.Adam or AdamW{hint}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a lambda is hard to save, but nothing is saved here
            config = optimizer.get_config()
        if issubclass(cls, AdamW) and config.get("weight_decay") is None:
            raise ValueError("optimizer: has no weight_decay, expected fastadam.keras.Adam.from_optimizer(optimizer)")
        if not isinstance(optimizer._learning_rate, keras.Variable):
            config["learning_rate"] = optimizer._learning_rate  # as it is: a class of the user's need not be registered
        own: Self = cls(**config)
        for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
            if hasattr(optimizer, name):
                setattr(own, name, getattr(optimizer, name))
        if optimizer.built:
            own.build(optimizer._trainable_variables)
            for variable, theirs in zip(own.variables, optimizer.variables, strict=True):
                variable.assign(theirs)
        return own

    @property
    def learning_rate(self) -> AnyArray:
        """The current rate. Set it to a number, a schedule of Keras or fastadam, or a function without arguments."""
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, value: AnyArray) -> None:
        keras.optimizers.Adam.learning_rate.fset(self, as_keras_rate(value))

    def build(self, var_list: Sequence[Foreign]) -> None:
        """Create the moments; raises TypeError for a variable whose dtype has no kernel."""
        var_list = check_list("var_list", var_list, "a list of variables")
        _require_variables("var_list", var_list)
        for variable in var_list:
            if variable.dtype not in _DTYPES and not self._overwrite_variable_with_gradient(variable):
                raise TypeError(f"variable '{variable.path}': dtype {variable.dtype}, expected one of {_DTYPES}")
        self._check_numbers(var_list, None)
        super().build(var_list)

    def apply(self, grads: Sequence[AnyArray], trainable_variables: Sequence[Foreign] | None = None) -> None:
        """Update the variables. A call that raises has changed nothing."""
        grads = [_as_tensor(gradient, f"grads[{i}]") for i, gradient in enumerate(check_list("grads", grads))]
        given = None if trainable_variables is None else check_list("trainable_variables", trainable_variables)
        _require_variables("trainable_variables", given or [])
        variables = given if given is not None else self._trainable_variables if self.built else None
        if variables is not None:
            _check_gradients(grads, variables)
        self._check_numbers(variables or [], self._get_current_learning_rate())
        super().apply(grads, given)

    def _numbers(self) -> tuple[float, float, float]:
        """The betas and epsilon, which may have been set since the last step."""
        betas = check_beta("beta_1", self.beta_1), check_beta("beta_2", self.beta_2)
        return (*betas, check_non_negative("epsilon", self.epsilon))

    @outside_of_graphs
    def _check_numbers(self, variables: Sequence[Foreign], learning_rate: AnyArray) -> None:
        """Check before Keras decays weights; a rate that JAX does not know yet is left to the step."""
        rate = _value_of(learning_rate)
        is_known = rate is not None and not (keras.backend.backend() == "jax" and _is_traced(rate))
        rate = check_number("learning_rate", rate) if is_known else 0.0
        hyper = StepHyper(1, rate, *self._numbers())
        in_single = any(variable.dtype != "float64" for variable in variables)  # which represents fewer numbers
        plan_of_nothing("float32" if in_single else "float64").check_numbers(hyper)

    def update_step(self, gradient: AnyArray, variable: Foreign, learning_rate: AnyArray) -> None:
        """Update one variable; called for each variable only if a subclass overrides it."""
        self._update([gradient], [variable], learning_rate)

    def _backend_update_step(
        self, grads: list[AnyArray], trainable_variables: list[Foreign], learning_rate: AnyArray
    ) -> None:
        if type(self).update_step is Adam.update_step:
            self._update(grads, trainable_variables, learning_rate)
            return
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            self.update_step(gradient, variable, learning_rate)

    def _update(self, grads: list[AnyArray], trainable_variables: list[Foreign], learning_rate: AnyArray) -> None:
        slots = {"m": self._momentums, "v": self._velocities}
        if self.amsgrad:
            slots["vhat"] = self._velocity_hats
        places = [self._get_variable_index(variable) for variable in trainable_variables]
        held = [trainable_variables, *([slot[i] for i in places] for slot in slots.values())]
        if keras.backend.backend() == "jax":
            self._update_by_jax(grads, held, learning_rate)
        else:
            self._update_in_place(grads, held, list(slots), learning_rate)

    def _update_by_jax(self, grads: list[AnyArray], held: list[list[Foreign]], learning_rate: AnyArray) -> None:
        """An operation that returns new arrays; XLA reuses the memory of the old ones, which Keras donates."""
        from fastadam import jax

        gradients = [
            keras.ops.cast(keras.ops.convert_to_tensor(gradient, sparse=False), variable.dtype)
            for gradient, variable in zip(grads, held[0], strict=True)
        ]
        params, *slots = ([variable.value for variable in variables] for variables in held)
        beta_1, beta_2, epsilon = self._numbers()
        results = jax.step_arrays(
            params,
            gradients,
            *slots,
            step=_value_of(self.iterations) + 1,
            learning_rate=_value_of(learning_rate),
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
        )
        for variables, values in zip(held, results, strict=False):  # without AMSGrad there is no vhat
            for variable, value in zip(variables, values or (), strict=True):
                self.assign(variable, value)

    @outside_of_graphs
    def _update_in_place(
        self, grads: list[AnyArray], held: list[list[Foreign]], names: list[str], learning_rate: AnyArray
    ) -> None:
        step = int(_value_of(self.iterations)) + 1
        hyper = StepHyper(step, check_number("learning_rate", _value_of(learning_rate)), *self._numbers())
        in_place = getattr(self.assign, "__func__", None) is keras.optimizers.Optimizer.assign
        self._plans.of(held, names, in_place=in_place).step(grads, hyper, self.assign)


@keras.saving.register_keras_serializable(package="fastadam")
class AdamW(Adam, keras.optimizers.AdamW):  # type: ignore[misc]
    r"""``keras.optimizers.AdamW`` with the update of :class:`Adam`.

    .. math:: \theta \mathrel{-}= \eta \lambda \theta, \quad \text{then Adam's step}

    Keras decays the variables that ``exclude_from_weight_decay`` does not name. The arguments are those of
    ``keras.optimizers.AdamW``: ``weight_decay`` is the second one.

    Source: ``keras/src/optimizers/adamw.py``; Loshchilov and Hutter (arXiv:1711.05101).

    >>> import keras, numpy as np, fastadam.keras
    >>> w = keras.Variable(np.array([1.0], np.float32))
    >>> fastadam.keras.AdamW(0.1, weight_decay=0.5).apply([np.zeros(1, np.float32)], [w])
    >>> round(float(w.value[0]), 4)
    0.95
    """

    @suggests_keywords("optimizer")
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            amsgrad=amsgrad,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
        )


def _is_traced(value: AnyArray) -> bool:
    import jax

    return isinstance(value, jax.core.Tracer)


def _as_tensor(gradient: AnyArray | None, label: str) -> AnyArray | None:
    if gradient is None or keras.ops.is_tensor(gradient):
        return gradient
    if isinstance(gradient, (str, bytes)):
        raise TypeError(f"{label}: {shown(gradient, 60)}, expected a tensor")
    return keras.ops.convert_to_tensor(gradient)


def _check_gradients(grads: list[AnyArray], variables: Sequence[Foreign]) -> None:
    if len(grads) != len(variables):
        raise ValueError(f"grads: {len(grads)} gradients, expected {len(variables)}, one for each variable")
    met: set[int] = set()
    for i, (gradient, variable) in enumerate(zip(grads, variables, strict=True)):
        if id(variable) in met:
            raise ValueError(f"trainable_variables[{i}]: '{variable.path}' is given twice, expected each once")
        met.add(id(variable))
        if gradient is not None and tuple(gradient.shape) != tuple(variable.shape):
            shapes = f"shape {tuple(gradient.shape)}, expected {tuple(variable.shape)}"
            raise ValueError(f"grads[{i}]: {shapes} like variable '{variable.path}'")
        if gradient is not None and _is_complex(gradient.dtype):
            raise TypeError(f"grads[{i}]: {gradient.dtype}, expected {variable.dtype} like variable '{variable.path}'")


def _is_complex(dtype: Foreign) -> bool:
    return bool(getattr(dtype, "is_complex", False)) or getattr(dtype, "kind", "") == "c"  # torch; NumPy and JAX


def _value_of(number: AnyArray) -> AnyArray:
    return number.value if isinstance(number, keras.Variable) else number


def _require_variables(name: str, variables: list[Foreign]) -> None:
    for i, variable in enumerate(variables):
        if not isinstance(variable, keras.Variable):
            raise TypeError(f"{name}[{i}]: {type(variable).__name__}, expected a keras.Variable")
