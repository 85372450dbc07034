"""``fastadam.Adam``: the interface of tf.keras.optimizers.Adam. The arithmetic is in the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastadam._core import bucketed
from fastadam._core.averages import overwrite, swapped
from fastadam._core.bucketed import check_begin
from fastadam._core.common.checks import (
    check_beta,
    check_bool,
    check_count,
    check_custom_objects,
    check_epsilon,
    check_list,
    check_non_negative,
    shown,
)
from fastadam._core.common.configs import adam_arguments
from fastadam._core.common.display import adam_settings, call_text, html_or_none, html_table, name_of, never_raises
from fastadam._core.common.frameworks import named_in_keras, refuse_parameters
from fastadam._core.common.keywords import ELSEWHERE, suggests_keywords
from fastadam._core.common.strict import class_only, strict
from fastadam._core.hyperparameters import Clip, Hyper, Keras3Option, SmallState, check_rate
from fastadam._core.minimize import scaled
from fastadam._core.native.arrays import on_gpu, to_host
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import buffers_of
from fastadam._core.native.slices import check_sparse_update
from fastadam._core.optimizer import Optimizer
from fastadam._core.options.exclusions import Exclusions
from fastadam._core.options.keras3 import Keras3Options
from fastadam._core.options.options import refuse_lazy_overwrites
from fastadam._core.options.small_states import Float32For, SmallStates
from fastadam._core.pairs import check_copies, check_pairs_list
from fastadam._core.parts import parts_of
from fastadam._core.step import rate_after
from fastadam.schedules import LearningRateSchedule, deserialize, serialize
from fastadam.schedules._foreign import adopt

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.common.telemetry import Telemetry
    from fastadam._core.common.types import (
        Array,
        Config,
        Gradient,
        Hyperparameter,
        LearningRate,
        SparseUpdate,
        VariableLike,
    )
    from fastadam._core.native.worker import Handle

__all__ = ["Adam"]

_auto_names: dict[str, int] = {}


@strict
@named_in_keras
class Adam(Optimizer):
    r"""Adam and AMSGrad with the interface and, in float32, the bits of ``tf.keras.optimizers.Adam`` (TF 2.x).

    .. math::
        t = iterations + 1, \quad \alpha_t = \eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)

        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \mathrel{-}= m \alpha_t / (\sqrt{v} + \hat\epsilon)

    With ``amsgrad`` the square root is taken of :math:`\hat v = \max(\hat v, v)`. Epsilon is the paper's "epsilon
    hat", added before the bias correction: PyTorch's epsilon means something else.

    Variables are updated in place: writable contiguous NumPy arrays, :class:`fastadam.Variable`, and any object that
    exports writable CPU memory (DLPack, ``__array_interface__``), of dtype float16, bfloat16, float32 or float64. A
    variable is identified by its memory, which the optimizer keeps alive: a new view of a buffer is the same variable.

    Args:
        learning_rate: Step size; a number, a schedule of :mod:`fastadam.schedules`, Keras or TensorFlow, a scheduler of
            PyTorch with one parameter group, which you step, or a callable without arguments. Schedules and callables
            are evaluated once per step. For variables on a GPU it may also be one float32 or float64 on that GPU, read
            in every step.
        beta_1: Decay rate of the first moment, in [0, 1); number or callable.
        beta_2: Decay rate of the second moment, likewise.
        epsilon: Added to the square root; None and 0 mean 1e-7, as in TF.
        amsgrad: Use the maximum of the second moments.
        name: Name of the optimizer; None or "" makes a unique one.
        clipnorm: Scale each gradient down to this norm, after ``clipvalue``.
        clipvalue: Clip the elements of gradients to [-clipvalue, clipvalue].
        global_clipnorm: Scale all gradients down so that their joint norm is at most this, instead of ``clipnorm``.
        lr: Another name for ``learning_rate``; it takes precedence.
        decay: The learning rate is divided by ``1 + decay * iterations``.
        weight_decay: Decoupled, multiplied by the learning rate; see :class:`AdamW`.
        use_ema: Keep a moving average of each variable.
        ema_momentum: Decay rate of the averages, in [0, 1].
        ema_overwrite_frequency: Overwrite the variables with their averages every so many steps.
        loss_scale_factor: Divide the gradients by this number, which :meth:`scale_loss` multiplies the loss by.
        gradient_accumulation_steps: Update the variables only in every k-th call, with the mean of k gradients.
        sparse_update: How :class:`fastadam.IndexedSlices` are applied. "dense" moves every row of the variable, as TF
            does. "deferred" gives the same bits at the cost of the touched rows: other rows of the variable stay stale
            until they are touched, or read by :meth:`gather`, :meth:`sync` or :meth:`dense_view`, or have waited for
            ``max_staleness`` steps. "deferred_fast" sums the steps that a row missed in closed form where there is one,
            with an error under 2^-26 of the row's displacement. "lazy" never moves other rows, which is another
            algorithm (LazyAdam, torch.optim.SparseAdam): with ``gradient_accumulation_steps`` a step moves the rows
            that had a gradient in one of the k calls, and with ``use_ema`` an average moves with its row.
        max_staleness: The largest number of steps that a row of a deferred table waits; None for no limit.
        clip_after_dedupe: Clip IndexedSlices after repeated rows have been summed, like the dense gradient; by default
            the values are clipped as they come, as in TF.
        sum_repeated: Sum the gradients of a variable that is given more than once in a call, as tied weights need, and
            make one update. Sparse ones are joined and stay sparse; together with a dense one they become dense. By
            default the variable is updated once for each of its gradients, as in TF.
        telemetry: Measure in every step what it does to each variable, for :meth:`telemetry`. Gradients must be dense.
        moments: How m and v are stored: None or "float32" (float64 for float64 variables), "bfloat16", or "8bit": codes
            with a scale for each 128 elements. The small ones are rounded at random so that their mean is right; the
            arithmetic stays float32. They need dense gradients and CPU memory; "8bit" refuses ``amsgrad``.
        master: "split" keeps beside each bfloat16 variable the low 16 bits of its exact float32 value (slot "low",
            int16), so that it learns as a float32 variable does. Other variables stay as they are.
        stochastic_rounding: Round bfloat16 variables at random, so that small updates move them in the mean.
        float32_for: Which variables keep float32 moments although ``moments`` is small: those with fewer elements than
            this number (None: 4096), with a name in which one of these patterns is found, or for which
            ``float32_for(name, shape)`` is true; the name is "" for arrays without one. Variables whose first gradient
            is sparse do so always.
        seed: Of the random rounding, which depends on it, the step, the variable's number and the element, and on
            nothing else.

    Gradients are unscaled, accumulated and clipped; then the variables decay, are updated and averaged. Norms are
    computed in float64 and are right up to its largest number. Above it, and for a gradient that is not finite,
    ``clipnorm`` makes finite elements 0 and ``global_clipnorm`` makes all variables NaN, as in TF.

    Raises:
        TypeError: An unknown keyword, or a hyperparameter that is not a number.
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

    The state of a million float32 parameters, 8 megabytes by default:

    >>> opt = fastadam.Adam(moments="8bit")
    >>> opt.build([np.zeros((1000, 1000), np.float32)])
    >>> sum(array.nbytes for array in opt.weights[1:])
    2015626
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
    weight_decay: Keras3Option[float | None] = Keras3Option()
    use_ema: Keras3Option[bool] = Keras3Option()
    ema_momentum: Keras3Option[float] = Keras3Option()
    ema_overwrite_frequency: Keras3Option[int | None] = Keras3Option()
    loss_scale_factor: Keras3Option[float | None] = Keras3Option()
    gradient_accumulation_steps: Keras3Option[int | None] = Keras3Option(fixed=True)  # `weights[0]` counts in its units
    moments: SmallState[str | None] = SmallState()
    master: SmallState[str | None] = SmallState()
    stochastic_rounding: SmallState[bool] = SmallState()
    float32_for: SmallState[Float32For] = SmallState()
    seed: SmallState[int] = SmallState()

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
        sum_repeated: bool = False,
        telemetry: bool = False,
        moments: Literal["float32", "bfloat16", "8bit"] | None = None,
        master: Literal["split"] | None = None,
        stochastic_rounding: bool = False,
        float32_for: int | Sequence[str] | Callable[[str, tuple[int, ...]], bool] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if lr is not None:
            refuse_parameters("learning_rate", learning_rate)  # Adam(parameters, lr=...), as torch has it
            if not callable(adopt(lr)):
                check_non_negative("lr", lr)
            learning_rate = lr
        if not callable(decay):
            check_non_negative("decay", decay)
        parts_of(self).options.small = SmallStates(moments, master, stochastic_rounding, float32_for, seed)
        self.max_staleness = max_staleness
        self.learning_rate = learning_rate
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.decay = decay
        self.clipnorm = clipnorm
        self.clipvalue = clipvalue
        self.global_clipnorm = global_clipnorm
        self.amsgrad = amsgrad
        parts_of(self).options.keras3 = Keras3Options(
            weight_decay=weight_decay,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        parts_of(self).options.refuse_with_small_states(use_ema=self.use_ema)
        self.clip_after_dedupe = clip_after_dedupe
        self.sum_repeated = sum_repeated
        self.sparse_update = sparse_update
        parts_of(self).options.telemetry = check_bool("telemetry", telemetry)
        if not isinstance(name, (str, type(None))):
            raise TypeError(f"name: {shown(name)}, expected a string")
        self.name = name or _unique_name(type(self).__name__.lower())

    # ---- hyperparameters -------------------------------------------------------------------------------------------

    @property
    def lr(self) -> Any:
        """Another name for ``learning_rate``. Never the decayed rate, as in TF."""
        return self.learning_rate

    @lr.setter
    def lr(self, value: LearningRate) -> None:
        self.learning_rate = value

    @property
    def current_learning_rate(self) -> float:
        """The rate of the next ``apply_gradients`` as a float, whatever ``learning_rate`` is set to.

        A schedule is evaluated at the number of calls so far, as for Keras 3's ``optimizer.learning_rate``; with
        ``gradient_accumulation_steps`` that is more than ``iterations``. A callable is called, and ``decay`` is
        applied. A rate on a GPU is read, which waits for the GPU.

        Raises:
            TypeError: The schedule or callable does not return a number.
            ValueError: The rate is not finite.

        >>> import fastadam
        >>> opt = fastadam.Adam(fastadam.schedules.CosineDecay(0.1, decay_steps=100))
        >>> opt.iterations = 50
        >>> round(opt.current_learning_rate, 6)
        0.05
        """
        options, state, _, _ = parts_of(self)
        with _cpu.DefaultArithmetic():  # as in a step
            rate = rate_after(self.learning_rate, int(state.calls))
            decay: float = self.decay
            steps = int(state.calls) // options.calls_per_step
            return float(to_host(rate) if on_gpu(rate) else rate) / (1 + decay * steps)

    @property
    def amsgrad(self) -> bool:
        """Use the maximum of the second moments; set later, the next step creates vhat."""
        return parts_of(self).options.amsgrad

    @amsgrad.setter
    def amsgrad(self, value: bool) -> None:
        options, _, runtime, _ = parts_of(self)
        is_on = check_bool("amsgrad", value)
        options.refuse_with_small_states(amsgrad=is_on)
        with runtime.lock:
            options.amsgrad = is_on

    @property
    def sparse_update(self) -> SparseUpdate:
        """How IndexedSlices are applied; see the class. Set later, every row is brought up to date first."""
        return parts_of(self).options.sparse_update

    @sparse_update.setter
    def sparse_update(self, value: SparseUpdate) -> None:
        check_sparse_update(value)
        options, _, runtime, tables = parts_of(self)
        refuse_lazy_overwrites(value, options.keras3)
        with runtime.lock:
            runtime.require_between_steps("sparse_update")
            tables.settle()
            tables.forget_histories()
            options.sparse_update = value

    @property
    def max_staleness(self) -> int | None:
        """Steps that a row of a deferred table may wait; None for any number."""
        return parts_of(self).options.max_staleness

    @max_staleness.setter
    def max_staleness(self, value: int | None) -> None:
        count = None if value is None else check_count("max_staleness", value)
        with parts_of(self).runtime.lock:
            parts_of(self).options.max_staleness = count

    @property
    def clip_after_dedupe(self) -> bool:
        """Whether IndexedSlices are clipped after repeated rows have been summed."""
        return parts_of(self).options.clip_after_dedupe

    @clip_after_dedupe.setter
    def clip_after_dedupe(self, value: bool) -> None:
        is_on = check_bool("clip_after_dedupe", value)
        with parts_of(self).runtime.lock:
            parts_of(self).options.clip_after_dedupe = is_on

    @property
    def sum_repeated(self) -> bool:
        """Whether the gradients of a variable that is given more than once in a call are summed."""
        return parts_of(self).options.sum_repeated

    @sum_repeated.setter
    def sum_repeated(self, value: bool) -> None:
        is_on = check_bool("sum_repeated", value)
        with parts_of(self).runtime.lock:
            parts_of(self).options.sum_repeated = is_on

    def exclude_from_weight_decay(
        self, var_list: Iterable[VariableLike] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Name the variables that do not decay; replaces earlier exclusions and works at any time.

        Args:
            var_list: Variables, found by their memory.
            var_names: Patterns searched in the names of :class:`fastadam.Variable` (``re.search``).

        Warns once of the items that name none of the variables seen so far.
        """
        options, _, runtime, _ = parts_of(self)
        exclusions = Exclusions.of(var_list, var_names)
        with runtime.lock:
            options.exclusions = exclusions
            runtime.checks_exclusions = bool(exclusions)

    @property
    def _loss_scale(self) -> float | None:
        return self.loss_scale_factor

    def scale_loss(self, loss: Any) -> Any:
        """``loss * loss_scale_factor``, whose gradients ``apply_gradients`` divides by the factor again."""
        factor = self.loss_scale_factor
        return loss if factor is None else scaled(loss, factor)

    def finalize_variable_values(self, var_list: Iterable[VariableLike]) -> None:
        """Overwrite the variables with their moving averages (``use_ema``), at the end of training.

        Raises:
            KeyError: A variable without an average.
            RuntimeError: Inside of ``with averages(...)``, whose end would undo it.
        """
        self._parts.runtime.require_closed("finalize_variable_values")
        overwrite(self._parts, *self._averages_of(var_list))

    def averages(self, var_list: Iterable[VariableLike]) -> AbstractContextManager[None]:
        """``with opt.averages([w, b]):`` evaluate the moving averages (``use_ema``) in the place of the variables.

        At the end of the block, also after an exception, the variables get their own values back, to the bit: what the
        block wrote into them is lost. Needs memory for a copy of the variables.

        Args:
            var_list: Variables of any dtype; averages are rounded to it.

        Raises:
            KeyError: A variable without an average. No variable has changed.
            RuntimeError: A second block inside of this one. Inside of the block ``apply_gradients``, ``begin_step``,
                ``finalize_variable_values`` and ``set_weights`` raise it.

        >>> import numpy as np, fastadam
        >>> w = np.array([2.0])
        >>> opt = fastadam.Adam(0.5, use_ema=True, ema_momentum=0.5)
        >>> for _ in range(2):
        ...     step = opt.apply_gradients([(np.array([1.0]), w)])
        >>> with opt.averages([w]):
        ...     print(w.round(4))
        [1.25]
        >>> w.round(4)
        array([1.])
        """
        self._parts.runtime.require_closed("averages")
        return swapped(self._parts, lambda: self._averages_of(var_list))

    def _averages_of(self, var_list: Iterable[VariableLike]) -> tuple[list[_cpu.Buffer], list[Array]]:
        variables = check_list("var_list", var_list)
        buffers = buffers_of(variables, range(len(variables)))
        with self._parts.runtime.lock:
            known = [self._parts.state.slots.find(buffer) for buffer in buffers]
        for buffer, slots in zip(buffers, known, strict=True):
            if slots is None or "average" not in slots:
                why = "yet, expected it in a step or build() first"
                if not self.use_ema:
                    why = f"with use_ema=False, expected an optimizer {type(self).__name__}(..., use_ema=True)"
                raise KeyError(f"{buffer.label}: no moving average {why}")
        return buffers, [self.get_slot(variable, "average") for variable in variables]

    # ---- the step --------------------------------------------------------------------------------------------------

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Gradient | None, VariableLike]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        *,
        copies: Iterable[Array | None] | None = None,
        zero_grads: bool = False,
    ) -> np.int64 | None:
        """Update every variable in place with its gradient, then count the step.

        All pairs are checked before anything is written: a call that raises leaves variables, slots and
        ``iterations`` as they were. A variable given twice is updated twice, in order, with the same t, or once with
        the sum of its gradients if ``sum_repeated`` is set. Pairs whose gradient is None are skipped with a warning. An
        empty list does nothing.

        With ``gradient_accumulation_steps`` k, k - 1 calls only add up gradients, and the k-th updates every variable
        that had a gradient in any of the k calls with the sum divided by k.

        Args:
            grads_and_vars: Iterable of (gradient, variable). A gradient of another float dtype or layout is
                converted; gradients are not modified.
            name: Ignored; part of TF's signature.
            experimental_aggregate_gradients: Ignored; a single process has no replicas to sum over.
            copies: For each pair None or an array of bfloat16, float16 or float32, like the variable, which must be
                float32. In the same pass it receives the new values, rounded to nearest even: the weights that a model
                computes with, beside float32 masters.
            zero_grads: Set the gradients to zero, in the same pass. They must be dense and writable, and need no
                conversion.

        Returns:
            ``iterations`` after the step; None for an empty list.

        Raises:
            TypeError: Items that are not pairs, or swapped pairs; a list as variable; a dtype that is not float.
            ValueError: An iterator that yields nothing; all gradients None; a wrong shape; a variable that cannot be
                updated in place; variables that partly overlap; a gradient that shares memory with a variable.
        """
        pairs = check_pairs_list(grads_and_vars)
        if not pairs:
            return None
        with self._stepper.runtime.lock:  # until the count is read: another thread may step as well
            if copies is None and zero_grads is False:
                self._stepper.apply(self, pairs)
            else:
                zeroes = check_bool("zero_grads", zero_grads)
                self._stepper.apply(self, pairs, copies=check_copies(copies, pairs), zero_grads=zeroes)
            return self.iterations

    # ---- a step in buckets -----------------------------------------------------------------------------------------

    def begin_step(self, *, early: bool = False, threads: int | None = None) -> None:
        """Begin a step whose variables are given in buckets by :meth:`step_bucket`, until :meth:`end_step`.

        The result has the bits of one ``apply_gradients`` with the same variables in the order of :meth:`build`,
        whatever the buckets, their order and the threads that give them. Nothing is written before ``end_step`` unless
        ``early``: then each bucket is stepped at once on a background thread, as if ``global_clipnorm`` did not clip,
        and a log of about 1.1 bytes for each element (17 in the first steps) undoes that if it was wrong. While most
        steps are clipped, none is made early. Only float32 variables with dense gradients and without an average are
        stepped early.

        Variables, gradients and copies must be left alone from ``step_bucket`` until the step ends. Hyperparameters are
        read, and schedules and callables evaluated, when it begins. Until it ends, other methods that read or write the
        state raise RuntimeError. After a fork both processes have the open step, and each can end it. An optimizer that
        is dropped with an open step leaves its variables as they are; at the exit of the interpreter it is undone.

        Args:
            early: Step buckets as they come.
            threads: The most threads of the step; None for all.

        Raises:
            RuntimeError: A step is open.
            ValueError: ``gradient_accumulation_steps``, a deferred mode or ``telemetry`` is on, which need all
                gradients in one call; variables on a GPU.

        >>> import numpy as np, fastadam
        >>> w, b = np.ones(4, np.float32), np.ones(2, np.float32)
        >>> opt = fastadam.Adam(0.1, global_clipnorm=1.0)
        >>> opt.build([w, b])
        >>> opt.begin_step(early=True)
        >>> handles = [opt.step_bucket([(np.ones_like(v), v)]) for v in (b, w)]
        >>> int(opt.end_step()), b.round(3).tolist()
        (1, [0.8999999761581421, 0.8999999761581421])
        """
        early, threads = check_begin(early, threads)
        bucketed.begin(self._stepper, self, early=early, threads=threads)

    def step_bucket(
        self,
        grads_and_vars: Iterable[tuple[Gradient | None, VariableLike]],
        copies: Iterable[Array | None] | None = None,
    ) -> Handle[None]:
        """Give variables whose gradients are complete to the open step, from any thread.

        The arguments are those of :meth:`apply_gradients`. A variable that is never given is not stepped.

        Returns:
            A handle: ``result()`` waits until the bucket needs no more work before the end of the step, ``done()`` says
            whether it does.

        Raises:
            RuntimeError: No step is open, or an option that changes the state was set since it began.
            ValueError: A variable that was given before, or that has no slots yet: call :meth:`build` with all
                variables before the first step. And all that ``apply_gradients`` raises. The bucket is not taken then,
                and the step stays open.
        """
        pairs = check_pairs_list(grads_and_vars)
        return bucketed.add(self._stepper, pairs, check_copies(copies, pairs))

    def end_step(self) -> np.int64:
        """Make the step of all variables that were given, and count it: all of it, or nothing if it raises.

        Ctrl-C leaves a step that was made, or one that is still open.

        Returns:
            ``iterations`` after the step.

        Raises:
            RuntimeError: No step is open. Or a gradient has changed since ``step_bucket``, which is noticed when a step
                must be undone: the variables are then as before the step, but some of their moments may have taken it.
        """
        with self._stepper.runtime.lock:
            bucketed.end(self._stepper)
            return self.iterations

    def abort_step(self) -> None:
        """Undo what the open step has made, to the bit, and close it; without an open step nothing happens.

        Copies receive the rounded old values.

        Raises:
            RuntimeError: A gradient has changed, as for :meth:`end_step`.
        """
        bucketed.abort(self._stepper)

    def telemetry(self) -> Telemetry:
        """What the last step did to each variable: ``telemetry=True`` in the constructor.

        Raises:
            RuntimeError: No step was measured.

        See :class:`fastadam.Telemetry` for an example.
        """
        return self._stepper.telemetry()

    # ---- how it shows itself ---------------------------------------------------------------------------------------

    @never_raises
    def __repr__(self) -> str:
        """The constructor's call, with the rate and the options that are not at their defaults; callables by name."""
        return call_text(type(self), adam_settings(self, Adam))

    @html_or_none
    def _repr_html_(self) -> str:
        return html_table(name_of(type(self)), [*adam_settings(self, Adam), ("iterations", int(self.iterations))])

    # ---- configuration ---------------------------------------------------------------------------------------------

    def get_config(self) -> Config:
        """The constructor's arguments as plain JSON values; callables by their present value.

        Rows of deferred tables stay as they are: call :meth:`sync` before another optimizer goes on with such a table.
        """
        with parts_of(self).runtime.lock:
            return self._config()

    def _config(self) -> Config:
        options, _, runtime, _ = parts_of(self)
        runtime.require_closed("get_config")
        config: Config = {"name": self.name}
        config.update({name: bound for name, bound in options.clips.items() if bound is not None})
        for name in ("learning_rate", "decay", "beta_1", "beta_2", "epsilon"):
            value = getattr(self, name)
            value = float(to_host(value)) if on_gpu(value) else value
            config[name] = serialize(value) if isinstance(value, LearningRateSchedule) else value
        config["amsgrad"] = self.amsgrad
        if self.sparse_update != "dense":
            config["sparse_update"] = self.sparse_update
        if self.max_staleness is not None:
            config["max_staleness"] = self.max_staleness
        config.update(options.keras3.config())
        for name in ("clip_after_dedupe", "sum_repeated", "telemetry"):
            if getattr(options, name):
                config[name] = True
        config.update(options.small.config())
        return config

    @class_only
    def from_config(cls, config: Config, custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer from ``get_config``; ``config`` is not modified.

        Args:
            config: What ``get_config`` or ``keras.optimizers.serialize`` of TF 2.x, Keras 3 or this class gave for an
                Adam or AdamW. ``lr`` means ``learning_rate``. Keys of Keras that change no number (``jit_compile``,
                ``is_legacy_optimizer``) are dropped.
            custom_objects: Schedule classes of your own by name.

        Raises:
            TypeError: ``config`` is not a dict, or has a key that is not an argument.
            ValueError: The dict of another class, or an argument that the constructor refuses.

        >>> import fastadam
        >>> of_keras = {"class_name": "Adam", "config": {"learning_rate": 0.5, "jit_compile": True}}
        >>> fastadam.Adam.from_config(of_keras)
        fastadam.Adam(learning_rate=0.5)
        """
        custom_objects = check_custom_objects(custom_objects)
        arguments = adam_arguments(config, ("Adam", "AdamW", cls.__name__))
        if isinstance(arguments.get("learning_rate"), dict):
            arguments["learning_rate"] = deserialize(arguments["learning_rate"], custom_objects)
        return cls(**arguments)


def _unique_name(base: str) -> str:
    count = _auto_names.get(base, 0)
    _auto_names[base] = count + 1
    return f"{base}_{count}" if count else base
