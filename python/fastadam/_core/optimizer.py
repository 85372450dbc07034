"""``fastadam.Adam``: the bookkeeping of tf.keras.optimizers.Adam. The arithmetic is in the kernels."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from typing import Any

from fastadam._core.checks import (
    check_beta,
    check_bool,
    check_clip,
    check_epsilon,
    check_iterations,
    check_list,
    check_non_negative,
    check_number,
)
from fastadam._core.extras import EXTRA_NAMES, Extra, Extras, excluded, overwrite
from fastadam._core.hyper import CLIP_NAMES, Clip, Hyper, HyperValue, StepHyper, check_rate
from fastadam._core.minimize import Minimizer
from fastadam._core.placement import on_gpu, to_host
from fastadam._core.slots import ACCUMULATOR
from fastadam._core.stepping import Stepper
from fastadam._core.variable import buffers_of
from fastadam.schedules import LearningRateSchedule, deserialize, serialize

__all__ = ["Adam", "AdamW"]

_auto_names: dict[str, int] = {}


class Adam(Stepper, Minimizer):
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
            Schedules and callables are evaluated once per step. For variables on a GPU also one float32 or float64
            there, which every step reads.
        beta_1: Decay rate of the first moment, in [0, 1); number or callable.
        beta_2: Decay rate of the second moment, likewise.
        epsilon: Added to the square root; None and 0 mean 1e-7, as in TF.
        amsgrad: Use the maximum of the second moments.
        name: Name of the optimizer; None or "" makes a unique one.
        sparse_update: How :class:`fastadam.IndexedSlices` are applied: "dense" moves every row of the variable, as TF
            does. "deferred" gives the same bits at the cost of the rows touched: the others wait, in the variable too,
            until they are touched or read by :meth:`gather`, :meth:`sync` or :meth:`dense_view`, or have waited for
            ``max_staleness`` steps, if that is given. "deferred_fast" sums the steps that a row missed in closed form,
            with an error under 2^-26 of its displacement, where that is possible. "lazy" never moves the others,
            another algorithm (LazyAdam, torch.optim.SparseAdam).
        **kwargs: ``clipvalue`` (clip the elements of gradients), then ``clipnorm`` (scale each gradient down to this
            norm) or ``global_clipnorm`` (all together), ``lr`` (wins over ``learning_rate``), ``decay`` (the rate is
            divided by ``1 + decay * iterations``), each >= 0. Keras 3's ``weight_decay``, ``use_ema``,
            ``ema_momentum``, ``ema_overwrite_frequency``, ``loss_scale_factor`` and ``gradient_accumulation_steps``:
            the gradients are unscaled, accumulated and clipped, the variables decay, are updated and averaged.
            ``clip_after_dedupe``: of IndexedSlices the three clips see each row once, with its repetitions summed, as
            of the dense gradient; by default the values as they come, as in TF.

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

    learning_rate = Hyper(check_rate)
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
    gradient_accumulation_steps = Extra(fixed=True)  # `weights[0]` counts in its units
    clip_after_dedupe = Extra()

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
        extras = {key: kwargs.pop(key) for key in EXTRA_NAMES if key in kwargs}
        self.max_staleness = kwargs.pop("max_staleness", None)
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
        self.sparse_update = sparse_update
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

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Name the variables that do not decay; replaces what was named before and works at any time.

        Args:
            var_list: Variables, found by their memory.
            var_names: Patterns searched in the names of :class:`fastadam.Variable` (``re.search``).
        """
        self._extras = dataclasses.replace(self._extras, **excluded(var_list, var_names))

    @property
    def _loss_scale(self) -> float | None:
        return self._extras.loss_scale_factor

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

    def _step_hyper(self, gradient_scale: float) -> StepHyper:
        """The numbers of the next step; callables and schedules are evaluated here, once."""
        calls = int(self._iterations)  # which users may write to, as `weights[0]`
        if not 0 <= calls < 2**63 - 1:
            check_iterations("iterations", calls)
        iterations = calls // self._micro_steps
        chosen: tuple[Any, ...] = (*self._hyper.values(), self._clip, self._extras)
        if self._last_numbers is not None:
            before, scale, numbers = self._last_numbers
            if scale == gradient_scale and all(map(operator.is_, before, chosen)):
                return StepHyper._make((iterations + 1, *numbers))
        rate = self.learning_rate
        if isinstance(rate, LearningRateSchedule):
            rate = check_number("learning_rate", rate(calls))
        elif on_gpu(rate):
            rate = 0.0  # the kernels read it
        hyper = StepHyper(
            step=iterations + 1,
            learning_rate=rate,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
            decay=self.decay,
            clip_value=check_clip("clipvalue", self.clipvalue),
            clip_norm=check_clip("clipnorm", self.clipnorm),
            global_clip_norm=check_clip("global_clipnorm", self.global_clipnorm),
            gradient_scale=gradient_scale,
            **self._extras.step_numbers(iterations),
        )
        if all(isinstance(value, float) for value in chosen[:-2]) and not chosen[-1].use_ema and self._reads_as_set():
            self._last_numbers = (chosen, gradient_scale, hyper[1:])  # good as long as it is these objects that are set
        return hyper

    def _reads_as_set(self) -> bool:
        """Whether no subclass has hyperparameters that are computed when they are read."""
        names = (*self._hyper, *CLIP_NAMES)
        return all(getattr(type(self), name, None) is getattr(Adam, name) for name in names)

    def _slot_names(self) -> list[str]:
        extras = self._extras
        chosen = {"vhat": self.amsgrad, "average": extras.use_ema, ACCUMULATOR: extras.gradient_accumulation_steps}
        return ["m", "v", *(name for name, used in chosen.items() if used)]

    @property
    def _micro_steps(self) -> int:
        return self._extras.gradient_accumulation_steps or 1

    # ---- configuration ---------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values; callables by their present value.

        Rows of deferred tables are brought up to date first, as whoever makes a second optimizer of it expects.
        """
        self._settle_known()
        config: dict[str, Any] = {"name": self.name}
        config.update({name: bound for name, bound in self._clip.items() if bound is not None})
        for name in ("learning_rate", "decay", "beta_1", "beta_2", "epsilon"):
            value = getattr(self, name)
            value = float(to_host(value)) if on_gpu(value) else value
            config[name] = serialize(value) if isinstance(value, LearningRateSchedule) else value
        config["amsgrad"] = self.amsgrad
        if self.sparse_update != "dense":
            config["sparse_update"] = self.sparse_update
        if self.max_staleness is not None:
            config["max_staleness"] = self.max_staleness
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


def _unique_name(base: str) -> str:
    count = _auto_names.get(base, 0)
    _auto_names[base] = count + 1
    return f"{base}_{count}" if count else base
