"""``fastadam.Adam``: the bookkeeping of tf.keras.optimizers.Adam. The arithmetic is in the kernels."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

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
from fastadam._core.display import adam_settings, call_text, html_or_none, html_table, name_of, never_raises
from fastadam._core.extras import Extra, Extras, excluded, overwrite
from fastadam._core.frameworks import NamedInKeras, refuse_parameters
from fastadam._core.hyper import CLIP_NAMES, Clip, Hyper, StepHyper, check_rate
from fastadam._core.keywords import ELSEWHERE, suggests_keywords
from fastadam._core.minimize import Minimizer
from fastadam._core.placement import on_gpu, to_host
from fastadam._core.slots import ACCUMULATOR
from fastadam._core.stepping import Stepper
from fastadam._core.strict import class_only
from fastadam._core.variable import buffers_of
from fastadam.schedules import LearningRateSchedule, deserialize, serialize
from fastadam.schedules._foreign import adopt

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.types import Hyperparameter, LearningRate, VariableLike

__all__ = ["Adam"]

_auto_names: dict[str, int] = {}


class Adam(Stepper, Minimizer, NamedInKeras):
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
        learning_rate: Step size; a number, a schedule of :mod:`fastadam.schedules`, Keras or TensorFlow, a scheduler of
            PyTorch with one parameter group, which you step, or a callable without arguments. Schedules and callables
            are evaluated once per step. For variables on a GPU also one float32 or float64 there, which every step
            reads.
        beta_1: Decay rate of the first moment, in [0, 1); number or callable.
        beta_2: Decay rate of the second moment, likewise.
        epsilon: Added to the square root; None and 0 mean 1e-7, as in TF.
        amsgrad: Use the maximum of the second moments.
        name: Name of the optimizer; None or "" makes a unique one.
        clipnorm: Scale each gradient down to this norm, after ``clipvalue``.
        clipvalue: Clip the elements of gradients to [-clipvalue, clipvalue].
        global_clipnorm: Scale all gradients down to this norm of all together, instead of ``clipnorm``.
        lr: Another name of ``learning_rate``, over which it wins.
        decay: The learning rate is divided by ``1 + decay * iterations``.
        weight_decay: Decoupled, multiplied by the learning rate; see :class:`AdamW`.
        use_ema: Keep a moving average of each variable.
        ema_momentum: Decay rate of the averages, in [0, 1].
        ema_overwrite_frequency: Overwrite the variables with their averages every so many steps.
        loss_scale_factor: Divide the gradients by this number, which :meth:`scale_loss` multiplies the loss by.
        gradient_accumulation_steps: Update the variables in every such call only, with the mean of the gradients.
        sparse_update: How :class:`fastadam.IndexedSlices` are applied: "dense" moves every row of the variable, as TF
            does. "deferred" gives the same bits at the cost of the rows touched: the others wait, in the variable too,
            until they are touched or read by :meth:`gather`, :meth:`sync` or :meth:`dense_view`, or have waited for
            ``max_staleness`` steps, if that is given. "deferred_fast" sums the steps that a row missed in closed form,
            with an error under 2^-26 of its displacement, where that is possible. "lazy" never moves the others,
            another algorithm (LazyAdam, torch.optim.SparseAdam).
        max_staleness: The most steps that a row of a deferred table waits; None for any number.
        clip_after_dedupe: Of IndexedSlices the three clips see each row once, with its repetitions summed, as of the
            dense gradient; by default the values as they come, as in TF.

    Gradients are unscaled, accumulated and clipped; then the variables decay, are updated and averaged.

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

    name: str
    learning_rate: Hyper[Any, LearningRate] = Hyper(check_rate)  # read: a float, a schedule, or an array on a GPU
    beta_1: Hyper[float, Hyperparameter] = Hyper(check_beta)
    beta_2: Hyper[float, Hyperparameter] = Hyper(check_beta)
    decay: Hyper[float, Hyperparameter] = Hyper(check_non_negative)
    epsilon: Hyper[float, Hyperparameter | None] = Hyper(lambda _, value: check_epsilon(value))
    clipvalue: Clip = Clip()
    clipnorm: Clip = Clip()
    global_clipnorm: Clip = Clip()
    weight_decay: Extra[float | None] = Extra()
    use_ema: Extra[bool] = Extra()
    ema_momentum: Extra[float] = Extra()
    ema_overwrite_frequency: Extra[int | None] = Extra()
    loss_scale_factor: Extra[float | None] = Extra()
    gradient_accumulation_steps: Extra[int | None] = Extra(fixed=True)  # `weights[0]` counts in its units
    clip_after_dedupe: Extra[bool] = Extra()

    @suggests_keywords("optimizer", ELSEWHERE)
    def __init__(
        self,
        learning_rate: LearningRate = 0.001,
        beta_1: Hyperparameter = 0.9,
        beta_2: Hyperparameter = 0.999,
        epsilon: Hyperparameter | None = 1e-7,
        amsgrad: bool = False,
        name: str | None = "Adam",
        *,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        lr: LearningRate | None = None,
        decay: Hyperparameter = 0.0,
        weight_decay: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        sparse_update: Literal["dense", "deferred", "deferred_fast", "lazy"] = "dense",
        max_staleness: int | None = None,
        clip_after_dedupe: bool = False,
    ) -> None:
        super().__init__()
        if lr is not None:
            refuse_parameters("learning_rate", learning_rate)  # Adam(parameters, lr=...), as torch has it
            if not callable(adopt(lr)):
                check_non_negative("lr", lr)
            learning_rate = lr
        if not callable(decay):
            check_non_negative("decay", decay)
        self.max_staleness = max_staleness
        self._hyper: dict[str, Any] = {}
        self._clip: dict[str, float | None] = dict.fromkeys(CLIP_NAMES)
        self.learning_rate = learning_rate
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.decay = decay
        self.clipnorm = clipnorm
        self.clipvalue = clipvalue
        self.global_clipnorm = global_clipnorm
        self.amsgrad = amsgrad
        self._extras = Extras(
            weight_decay=weight_decay,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            clip_after_dedupe=clip_after_dedupe,
        )
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
    def lr(self, value: LearningRate) -> None:
        self.learning_rate = value

    @property
    def current_learning_rate(self) -> float:
        """The rate of the next ``apply_gradients`` as a float, whatever ``learning_rate`` is set to.

        A schedule is evaluated at the count of calls so far, which with ``gradient_accumulation_steps`` are more than
        ``iterations``, as for Keras 3's ``optimizer.learning_rate``; a callable is called; ``decay`` is applied. A rate
        on a GPU is read, which waits for the GPU.

        Raises:
            TypeError: A schedule or callable that returns no number.
            ValueError: One that is not finite.

        >>> import fastadam
        >>> opt = fastadam.Adam(fastadam.schedules.CosineDecay(0.1, decay_steps=100))
        >>> opt.iterations = 50
        >>> round(opt.current_learning_rate, 6)
        0.05
        """
        iterations = int(self.iterations)  # which also brings the count of calls up to date
        rate = self._rate(int(self._iterations))
        decay: float = self.decay
        return float(to_host(rate) if on_gpu(rate) else rate) / (1 + decay * iterations)

    def _rate(self, calls: int) -> Any:
        """``learning_rate`` after so many calls: a number, or one that lies on a GPU."""
        rate = self.learning_rate
        return check_number("learning_rate", rate(calls)) if isinstance(rate, LearningRateSchedule) else rate

    @property
    def amsgrad(self) -> bool:
        """Use the maximum of the second moments; set later, the next step creates vhat."""
        return self._amsgrad

    @amsgrad.setter
    def amsgrad(self, value: bool) -> None:
        self._amsgrad = check_bool("amsgrad", value)

    def exclude_from_weight_decay(
        self, var_list: Iterable[VariableLike] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Name the variables that do not decay; replaces what was named before and works at any time.

        Args:
            var_list: Variables, found by their memory.
            var_names: Patterns searched in the names of :class:`fastadam.Variable` (``re.search``).

        If nothing of it names a variable, there is a warning once variables come that have come before.
        """
        self._extras = dataclasses.replace(self._extras, **excluded(var_list, var_names))
        self._now.checks_exclusions = self._extras.excludes

    @property
    def _loss_scale(self) -> float | None:
        return self._extras.loss_scale_factor

    def scale_loss(self, loss: Any) -> Any:
        """``loss * loss_scale_factor``, whose gradients ``apply_gradients`` divides by the factor again."""
        factor = self._extras.loss_scale_factor
        return loss if factor is None else loss * factor

    def finalize_variable_values(self, var_list: Iterable[VariableLike]) -> None:
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
        rate = self._rate(calls)
        if on_gpu(rate):
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

    # ---- how it shows itself ---------------------------------------------------------------------------------------

    @never_raises
    def __repr__(self) -> str:
        """The constructor's call, with the rate and what is not at its default; callables by name."""
        return call_text(type(self), adam_settings(self))

    @html_or_none
    def _repr_html_(self) -> str:
        count = int(self._iterations) // self._micro_steps
        return html_table(name_of(type(self)), [*adam_settings(self), ("iterations", count)])

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

    @class_only
    def from_config(cls, config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
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


def _unique_name(base: str) -> str:
    count = _auto_names.get(base, 0)
    _auto_names[base] = count + 1
    return f"{base}_{count}" if count else base
