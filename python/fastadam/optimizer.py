"""``fastadam.Adam``: the bookkeeping of tf.keras.optimizers.Adam. The arithmetic is in the kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fastadam._backend import _cpu
from fastadam.checks import (
    check_beta,
    check_bool,
    check_clip,
    check_epsilon,
    check_iterations,
    check_list,
    check_non_negative,
    check_number,
)
from fastadam.extras import EXTRA_NAMES, Extra, Extras, excluded, overwrite
from fastadam.hyper import CLIP_NAMES, Clip, Hyper, HyperValue, StepHyper
from fastadam.minimize import Minimizer
from fastadam.ops import fit_gradients, run_step
from fastadam.schedules import LearningRateSchedule, deserialize, serialize
from fastadam.state import OptimizerState
from fastadam.variable import Variable, buffers_of, unwrap

__all__ = ["Adam", "AdamW"]

_auto_names: dict[str, int] = {}


class Adam(Minimizer, OptimizerState):
    r"""Adam and AMSGrad with the interface and, in float32, the bits of ``tf.keras.optimizers.Adam`` (TF 2.x).

    .. math::
        t = iterations + 1, \quad \alpha_t = \eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)

        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \mathrel{-}= m \alpha_t / (\sqrt{v} + \hat\epsilon)

    With ``amsgrad`` the square root is of :math:`\hat v = \max(\hat v, v)`. The epsilon is "epsilon hat" of the paper,
    added before the bias correction: PyTorch's means something else.

    Variables are updated in place: writable contiguous NumPy arrays, :class:`fastadam.Variable`, and whatever exports
    writable CPU memory (DLPack, ``__array_interface__``), of dtype float16, bfloat16, float32 or float64. Slots are
    found by the memory of the variable, which the optimizer keeps alive: a new view of a buffer is the same variable.

    Args:
        learning_rate: Step size; a number, a schedule of :mod:`fastadam.schedules`, or a callable without arguments.
            Schedules and callables are evaluated once per step.
        beta_1: Decay rate of the first moment, in [0, 1); number or callable.
        beta_2: Decay rate of the second moment, likewise.
        epsilon: Added to the square root; None and 0 mean 1e-7, as in TF.
        amsgrad: Use the maximum of the second moments.
        name: Name of the optimizer; None or "" makes a unique one.
        sparse_update: How IndexedSlices are applied; only "dense", TF's rule.
        **kwargs: ``clipvalue`` (clip the elements of gradients), then ``clipnorm`` (scale each gradient down to this
            norm) or ``global_clipnorm`` (all together), ``lr`` (wins over ``learning_rate``), ``decay`` (the rate is
            divided by ``1 + decay * iterations``), each >= 0. Keras 3's ``weight_decay``, ``use_ema``,
            ``ema_momentum``, ``ema_overwrite_frequency`` and ``loss_scale_factor``: in a step the gradients are
            unscaled and clipped, the variables decay, are updated and averaged.

    Raises:
        TypeError: An unknown keyword, or a hyperparameter that is no number.
        ValueError: A hyperparameter that is not finite, negative where it must not be, or a beta outside [0, 1).

    Source: Kingma and Ba, "Adam" (arXiv:1412.6980); Reddi et al., "On the Convergence of Adam and Beyond" (AMSGrad);
    https://www.tensorflow.org/api_docs/python/tf/keras/optimizers/Adam.

    >>> import numpy as np, fastadam
    >>> w = np.array([1.0, 2.0], dtype=np.float32)
    >>> opt = fastadam.Adam(learning_rate=0.1)
    >>> step = opt.apply_gradients([(np.array([0.5, -0.5], np.float32), w)])
    >>> w.round(5)
    array([0.9, 2.1], dtype=float32)
    >>> int(opt.iterations), opt.get_slot(w, "m").round(5)
    (1, array([ 0.05, -0.05], dtype=float32))
    """

    learning_rate = Hyper(check_number)
    beta_1 = Hyper(check_beta)
    beta_2 = Hyper(check_beta)
    decay = Hyper(check_non_negative)
    epsilon = Hyper(lambda _, value: check_epsilon(value))
    clipvalue = Clip()
    clipnorm = Clip()
    global_clipnorm = Clip()
    weight_decay = Extra()
    use_ema = Extra()
    ema_momentum = Extra()
    ema_overwrite_frequency = Extra()
    loss_scale_factor = Extra()

    def __init__(
        self,
        learning_rate: HyperValue = 0.001,
        beta_1: HyperValue = 0.9,
        beta_2: HyperValue = 0.999,
        epsilon: HyperValue | None = 1e-7,
        amsgrad: bool = False,
        name: str | None = "Adam",
        *,
        sparse_update: str = "dense",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if sparse_update != "dense":
            raise ValueError(f"sparse_update: {sparse_update!r}, expected 'dense'")
        extras = {key: kwargs.pop(key) for key in EXTRA_NAMES if key in kwargs}
        for key, value in kwargs.items():
            if key not in ("lr", "decay", *CLIP_NAMES):
                raise TypeError(f"Unexpected keyword argument passed to optimizer: {key}")
            if not callable(value) and (value is not None or key == "decay"):
                check_non_negative(key, value)
        self._hyper: dict[str, HyperValue] = {}
        self._clip: dict[str, float | None] = dict.fromkeys(CLIP_NAMES)
        self.learning_rate = kwargs["lr"] if kwargs.get("lr") is not None else learning_rate
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.decay = kwargs.get("decay", 0.0)
        for key in CLIP_NAMES:
            setattr(self, key, kwargs.get(key))
        self.amsgrad = amsgrad
        self._extras = Extras(**extras)
        if not isinstance(name, (str, type(None))):
            raise TypeError(f"name: {name!r}, expected a string")
        self.name = name or _unique_name(type(self).__name__.lower())

    # ---- hyperparameters -------------------------------------------------------------------------------------------

    @property
    def lr(self) -> Any:
        """Another name of ``learning_rate``. Never the decayed rate, as in TF."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: HyperValue) -> None:
        self.learning_rate = value

    @property
    def amsgrad(self) -> bool:
        """Use the maximum of the second moments; set later, the next step creates vhat."""
        return self._amsgrad

    @amsgrad.setter
    def amsgrad(self, value: bool) -> None:
        self._amsgrad = check_bool("amsgrad", value)

    def _step_hyper(self) -> StepHyper:
        """The numbers of the next step; callables and schedules are evaluated here, once."""
        iterations = int(self._iterations)  # which users may write to, as `weights[0]`
        if not 0 <= iterations < 2**63 - 1:
            check_iterations("iterations", iterations)
        rate = self.learning_rate
        if isinstance(rate, LearningRateSchedule):
            rate = check_number("learning_rate", rate(iterations))
        return StepHyper(
            step=iterations + 1,
            learning_rate=rate,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            decay=self.decay,
            clip_value=check_clip("clipvalue", self.clipvalue),
            clip_norm=check_clip("clipnorm", self.clipnorm),
            global_clip_norm=check_clip("global_clipnorm", self.global_clipnorm),
            **self._extras.step_numbers(iterations),
        )

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Name the variables that do not decay; replaces what was named before and works at any time.

        Args:
            var_list: Variables, found by their memory.
            var_names: Patterns searched in the names of :class:`fastadam.Variable` (``re.search``).
        """
        self._extras = dataclasses.replace(self._extras, **excluded(var_list, var_names))

    def scale_loss(self, loss: Any) -> Any:
        """``loss * loss_scale_factor``, whose gradients ``apply_gradients`` divides by the factor again."""
        factor = self._extras.loss_scale_factor
        return loss if factor is None else loss * factor

    def finalize_variable_values(self, var_list: Iterable[Any]) -> None:
        """Overwrite the variables with their moving averages (``use_ema``), at the end of training.

        Raises:
            KeyError: A variable has no average.
        """
        variables = check_list("var_list", var_list)
        buffers = buffers_of(variables, range(len(variables)))
        averages = [self.get_slot(variable, "average") for variable in variables]
        for buffer, average in zip(buffers, averages, strict=True):
            overwrite(buffer, average)

    # ---- the step --------------------------------------------------------------------------------------------------

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Any]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> np.int64 | None:
        """Update every variable in place with its gradient, then count the step.

        All pairs are checked before anything is written: a call that raises leaves variables, slots and
        ``iterations`` as they were. A variable that comes twice is updated twice, in order, with the same t. Pairs
        whose gradient is None are left out with a warning. An empty list does nothing.

        Args:
            grads_and_vars: Iterable of (gradient, variable). A gradient of another float dtype or layout is
                converted; gradients are not modified.
            name: Accepted for TF's signature; it names nothing here.
            experimental_aggregate_gradients: Likewise; a single process has no replicas to sum over.

        Returns:
            ``iterations`` after the step; None for an empty list.

        Raises:
            TypeError: Not pairs, a list as variable, a dtype that is not float.
            ValueError: All gradients None; a wrong shape; a variable that cannot be updated in place; variables that
                overlap partly; a gradient that shares memory with a variable.
        """
        gradients, variables, positions = _filter_none(_as_pairs(grads_and_vars))
        if not variables:
            return None
        with self._lock, self._no_step_inside_a_step():
            hyper = self._step_hyper()
            if self._plan is None or not self._plan_fits(variables, positions):
                plan, gradients = self._make_plan(variables, gradients, positions, hyper)
            else:
                plan = self._plan
            run_step(plan, gradients, self._buffers, positions, hyper, [], self._iterations)
            return self.iterations

    @contextlib.contextmanager
    def _no_step_inside_a_step(self) -> Iterator[None]:
        """A callable hyperparameter or a gradient's ``__array__`` may run any code but a step of this optimizer."""
        if self._stepping:
            raise RuntimeError(f"apply_gradients of optimizer {self.name} was called from within itself")
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _plan_fits(self, variables: Sequence[Any], positions: list[int]) -> bool:
        if self._plan is None or self._plan_key != self._current_plan_key():
            return False
        return self._plan.matches([unwrap(variable) for variable in variables], positions)

    def _current_plan_key(self) -> tuple[bool, int, Extras]:
        return (self.amsgrad, self._slots.version, self._extras)

    def _plan_of(
        self, variables: Sequence[Any], buffers: list[_cpu.Buffer], slots: list[list[Any]], positions: list[int]
    ) -> _cpu.Plan:
        named = dict(zip(self._slot_names(), slots, strict=True))
        names = [self._name_of(variable, buffer) for variable, buffer in zip(variables, buffers, strict=True)]
        decays = self._extras.decays(names, buffers)
        return _cpu.Plan(buffers, named["m"], named["v"], named.get("vhat"), named.get("average"), decays, positions)

    def _name_of(self, variable: Any, buffer: _cpu.Buffer) -> str | None:
        """Of a Variable, or the name that its array once came with."""
        if isinstance(variable, Variable) and variable.name:
            return variable.name
        entry = self._slots.entry_of(buffer)
        return None if entry is None else entry.spec.name

    def _make_plan(
        self, variables: Sequence[Any], gradients: Sequence[Any], positions: list[int], hyper: StepHyper
    ) -> tuple[_cpu.Plan, list[Any]]:
        """A plan and the gradients fit for it; missing slots are created once the whole step has been found good."""
        buffers = buffers_of(variables, positions)
        prepared = self._slots.prepare(buffers, self._slot_names())
        plan = self._plan_of(variables, buffers, prepared.slots, positions)
        fitting = fit_gradients(plan, gradients, buffers, positions)
        plan.check_numbers(hyper, [])
        prepared.commit()
        self._plan, self._plan_key, self._buffers = plan, self._current_plan_key(), buffers
        return plan, fitting

    def _slot_names(self) -> list[str]:
        return ["m", "v", *(["vhat"] if self.amsgrad else []), *(["average"] if self._extras.use_ema else [])]

    # ---- configuration ---------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values; callables by their present value."""
        config: dict[str, Any] = {"name": self.name}
        config.update({name: bound for name, bound in self._clip.items() if bound is not None})
        for name in ("learning_rate", "decay", "beta_1", "beta_2", "epsilon"):
            value = getattr(self, name)
            config[name] = serialize(value) if isinstance(value, LearningRateSchedule) else value
        config["amsgrad"] = self.amsgrad
        config.update(self._extras.config())
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Adam:
        """An optimizer from ``get_config``; ``config`` is not modified.

        Args:
            config: Arguments of the constructor by name; ``lr`` is read as ``learning_rate``, which may be a schedule
                in the form of TF 2.x or Keras 3.
            custom_objects: Schedule classes of your own by name.
        """
        if not isinstance(config, dict):
            raise TypeError(f"config: {type(config).__name__}, expected a dict as get_config gives it")
        arguments = dict(config)
        if "lr" in arguments:
            arguments["learning_rate"] = arguments.pop("lr")
        if isinstance(arguments.get("learning_rate"), dict):
            arguments["learning_rate"] = deserialize(arguments["learning_rate"], custom_objects)
        return cls(**arguments)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), with Keras 3's arguments.

    The decay is multiplied by the learning rate, as in Keras and PyTorch and unlike the paper.

    Args:
        learning_rate: As in :class:`Adam`.
        weight_decay: A variable with a gradient shrinks by ``weight_decay * learning_rate`` before the update.
        beta_1: As in :class:`Adam`.
        beta_2: As in :class:`Adam`.
        epsilon: As in :class:`Adam`.
        amsgrad: As in :class:`Adam`.
        name: As in :class:`Adam`.
        **kwargs: As in :class:`Adam`.

    >>> import numpy as np, fastadam
    >>> w = np.array([2.0])
    >>> step = fastadam.AdamW(learning_rate=0.1, weight_decay=0.5).apply_gradients([(np.zeros(1), w)])
    >>> w
    array([1.9])
    """

    def __init__(
        self,
        learning_rate: HyperValue = 0.001,
        weight_decay: float = 0.004,
        beta_1: HyperValue = 0.9,
        beta_2: HyperValue = 0.999,
        epsilon: HyperValue | None = 1e-7,
        amsgrad: bool = False,
        name: str | None = "AdamW",
        **kwargs: Any,
    ) -> None:
        if weight_decay is None:
            raise ValueError("Argument `weight_decay` must be a float. Received: weight_decay=None")
        super().__init__(learning_rate, beta_1, beta_2, epsilon, amsgrad, name, weight_decay=weight_decay, **kwargs)


def _as_pairs(grads_and_vars: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    try:
        items = list(grads_and_vars)
    except TypeError:
        raise TypeError(
            f"grads_and_vars: {type(grads_and_vars).__name__}, expected an iterable of (gradient, variable) pairs"
        ) from None
    for i, item in enumerate(items):
        if not isinstance(item, (tuple, list)):
            raise TypeError(f"grads_and_vars[{i}]: {type(item).__name__}, expected a (gradient, variable) pair")
        if len(item) != 2:
            raise ValueError(f"grads_and_vars[{i}]: {len(item)} items, expected a (gradient, variable) pair")
    return items


def _filter_none(pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any], list[int]]:
    """Gradients, variables and their places in the list, without the pairs whose gradient is None."""
    positions = [i for i, (gradient, _) in enumerate(pairs) if gradient is not None]
    if len(positions) < len(pairs):
        absent = [getattr(v, "name", None) or f"vars[{i}]" for i, (g, v) in enumerate(pairs) if g is None]
        if not positions:
            raise ValueError(f"No gradients provided for any variable: {absent}.")
        warnings.warn(f"Gradients do not exist for variables {absent} when minimizing the loss.", stacklevel=3)
    return [pairs[i][0] for i in positions], [pairs[i][1] for i in positions], positions


def _unique_name(base: str) -> str:
    count = _auto_names.get(base, 0)
    _auto_names[base] = count + 1
    return f"{base}_{count}" if count else base
