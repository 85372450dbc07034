"""The only way into the native code: variables and slots that are checked once, then stepped again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from fastadam._core.common.types import AnyArray, AnyGradient, Config, Foreign, NativeHistory
from fastadam._core.native.arrays import native_of
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gradients import convert_gradient
from fastadam._core.native.slices import convert_slices, is_slices, is_sparse, native_gradient
from fastadam._core.native.variable import Variable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BoundedCache", "Factors", "Norms", "Plan", "RepeatedSteps", "StepHyper", "clip"]

Convert: TypeAlias = Callable[[AnyGradient, int], AnyGradient]
Key = TypeVar("Key")
Value = TypeVar("Value")


class StepHyper(NamedTuple):
    """The checked numbers of one step, in double; the native code reads them in this order."""

    step: int  # t, from 1
    learning_rate: float
    beta_1: float
    beta_2: float
    epsilon: float
    decay: float = 0.0
    clip_value: float = math.inf
    clip_norm: float = math.inf
    global_clip_norm: float = math.inf
    gradient_scale: float = 1.0
    weight_decay: float = 0.0
    ema_momentum: float = 0.0
    ema_overwrite: bool = False
    require_finite: bool = False
    clip_after_dedupe: bool = False
    l2: float = 0.0  # coupled weight decay
    epsilon_corrected: bool = False  # PyTorch's: added to the bias-corrected root
    zero_gradients: bool = False  # after the step
    seed: int = 0  # of stochastic rounding, below 2**64


# A row for each gradient: the sum of its squares, with ``require_finite`` NaN where it is not finite, and the sums of
# its elements times 2**-600 and 2**600, for sums that are out of range. Rows of several plans can be joined, and those
# of shards added.
Norms: TypeAlias = npt.NDArray[np.float64]
Factors: TypeAlias = npt.NDArray[np.float64]  # rows of a number and the exponent of the power of two that multiplies it


def clip(norms: Norms, hyper: StepHyper, factors: npt.NDArray[np.float64]) -> tuple[Factors, bool]:
    """The factors of gradients that are clipped together, with the bits of one plan that has all of them in this order.

    Args:
        norms: Of all gradients.
        hyper: The bounds, and the scale of the gradients.
        factors: What each gradient is multiplied by besides.

    Returns:
        What each gradient is to be multiplied by altogether; and whether all norms that are clipped and, if
        ``hyper.require_finite``, all gradients are finite.
    """
    return _cpu.clip(norms, hyper, factors)


class Plan:
    """A native plan, and the gradients it is given converted where it cannot read them as they are.

    It keeps the memory of variables and slots alive, but holds no state: whoever replaces an array makes a new plan.

    Args:
        buffers: The variables, all on one device.
        slots: For each name ("m", "v", ...) one array per variable. The dtype of m says how moments are stored: float32
            or float64; the dtype of a half variable; bfloat16 with ``stochastic_moments``; or uint8 codes, with scales
            in "m_scale" and "v_scale". "low": int16, the low halves of bfloat16 variables. These three have None for
            variables without.
        decays: Whether weight decay applies, for each variable; None for none.
        positions: Their places in the caller's list, for error texts; None for 0, 1, ...
        lazy: Sparse gradients move only the rows that they name.
        histories: For each variable its history if it is a deferred table; None for none.
        copies: For each variable None or the array that receives a rounded copy of it after every step.
        context: What the plans of one optimizer share on a GPU; None on the host.
        stochastic_moments: bfloat16 moments are rounded stochastically.
        stochastic_variables: bfloat16 variables without low halves are.
        numbers: Of the variables, among those of one seed; None for 0, 1, ...
        names: What error texts call the slots. They then name the variable that a gradient or a slot belongs to; for
            None they give its place.

    Raises:
        TypeError: A slot of another dtype than its variable needs.
        ValueError: A slot of another shape, on another device, or overlapping memory.
    """

    __slots__ = ("__weakref__", "_native", "buffers", "device", "positions")

    def __init__(
        self,
        buffers: list[_cpu.Buffer],
        slots: Mapping[str, Sequence[AnyArray | None]],
        *,
        decays: list[bool] | None = None,
        positions: list[int] | None = None,
        lazy: bool = False,
        histories: Sequence[NativeHistory | None] | None = None,
        copies: Sequence[AnyArray | None] = (),
        context: object = None,
        stochastic_moments: bool = False,
        stochastic_variables: bool = False,
        numbers: list[int] | None = None,
        names: dict[str, str] | None = None,
    ) -> None:
        count = len(buffers)
        self.buffers = buffers
        self.positions = list(range(count)) if positions is None else positions
        self.device = buffers[0].device if buffers else -1  # the GPU's number; -1 for the host
        self._native: _cpu.Plan = (native_of(buffers[0]) if buffers else _cpu).Plan(
            buffers,
            dict(slots),
            [False] * count if decays is None else decays,
            self.positions,
            lazy,
            [None] * count if histories is None else histories,
            context,
            list(copies),
            stochastic_moments,
            stochastic_variables,
            numbers or [],
            names or {},
        )

    # ---- whether it still fits -------------------------------------------------------------------------------------

    def gradients_of(self, pairs: list[object]) -> list[AnyGradient] | None:
        """The gradients of these (gradient, variable) pairs if the variables are the plan's, else None."""
        return self._native.gradients_of(pairs, Variable)

    def holds(
        self,
        variables: Sequence[AnyArray],
        slots: Mapping[str, Sequence[AnyArray]],
        copies: Sequence[AnyArray | None] = (),
    ) -> bool:
        """Whether these are the variables, slots and copies of the plan, at the same addresses."""
        return self._native.holds(variables, slots, list(copies))

    def has_copies(self, copies: list[AnyArray]) -> bool:
        """Whether these, arrays or None, are the copies of the plan, at the same addresses; empty for none."""
        return self._native.has_copies(copies)

    # ---- what a step reports ---------------------------------------------------------------------------------------

    def set_telemetry(self, wanted: bool) -> None:
        """Have later steps measure what they do to each variable; raises if one of them comes twice."""
        self._native.set_telemetry(wanted)

    def telemetry(self) -> npt.NDArray[np.float64]:
        """A row for each variable: gradient_norm, update_rms, parameter_rms, unchanged, not_finite, size."""
        return self._native.telemetry()

    def report_skip(self, gradients: list[AnyGradient], hyper: StepHyper) -> None:
        """Have :meth:`telemetry` report that a step with these gradients, checked, was skipped. Only in CPU memory."""
        self._native.report_skip(gradients, hyper)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def check(
        self, gradients: list[AnyGradient], convert: Convert | None = None, *, zeroes: bool = False
    ) -> list[AnyGradient]:
        """Raise what is wrong with the gradients; return them, converted as far as they have to be.

        ``zeroes``: the step sets them to zero, so that none can be converted.
        """
        while unfit := self._native.check(gradients):
            if zeroes:
                self._refuse_conversion(gradients, unfit)
            gradients = self._converted(gradients, unfit, convert)
        return gradients

    def check_numbers(self, hyper: StepHyper, factors: Sequence[float] = ()) -> None:
        """Raise what is wrong with the numbers of a step."""
        self._native.check_numbers(hyper, factors)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def step(
        self,
        gradients: list[AnyGradient],
        hyper: StepHyper,
        factors: Sequence[float] = (),
        counter: npt.NDArray[np.int64] | None = None,
        convert: Convert | None = None,
        clip_factors: Factors | None = None,
    ) -> bool:
        """Make a step, or raise what is wrong and change nothing.

        Args:
            gradients: One for each variable.
            hyper: The numbers of the step.
            factors: For each variable what its gradient is multiplied by; empty for 1.
            counter: Goes up by one with the update, where no signal can come between.
            convert: Makes a gradient readable, given its place; None for what TensorFlow would do.
            clip_factors: Of :func:`clip`, if the norms have been joined with others, on the host; they are not read
                again then, and nothing is required of the gradients.

        Returns:
            Whether the gradients were finite, if ``hyper.require_finite``; else nothing has changed.
        """
        if clip_factors is not None:
            while unfit := self._native.step_clipped(gradients, hyper, factors, counter, clip_factors):
                gradients = self._converted(gradients, unfit, convert)
            return True
        while unfit := self._native.step(gradients, hyper, factors, counter):
            if hyper.zero_gradients:
                self._refuse_conversion(gradients, unfit)
            gradients = self._converted(gradients, unfit, convert)
        return self._native.all_finite

    def step_apart(
        self,
        gradients: list[AnyGradient],
        hyper: StepHyper,
        factors: Sequence[float],
        counter: npt.NDArray[np.int64],
        convert: Convert,
        steps: list[int],
        clip_factors: Factors | None = None,
    ) -> None:
        """Like :meth:`step`, but each variable has its own t. Only in CPU memory, and not for deferred tables.

        Norms are not read: they are clipped by ``clip_factors``, and nothing is required of the gradients.
        """
        clipped = np.empty((0, 2)) if clip_factors is None else clip_factors
        while unfit := self._native.step_apart(gradients, hyper, factors, counter, steps, clipped):
            gradients = self._converted(gradients, unfit, convert)

    def can_undo(self, gradients: list[AnyGradient]) -> bool:
        """Whether a step with these gradients can be undone: dense ones of float32 variables on the host."""
        return self._native.can_undo(gradients)

    def step_logged(
        self,
        gradients: list[AnyGradient],
        hyper: StepHyper,
        factors: Sequence[float],
        clip_factors: Factors,
        log: _cpu.StepLog,
    ) -> None:
        """Like :meth:`step` with ``clip_factors``, or without if they are empty, but :meth:`undo` can undo it."""
        self._native.step_logged(gradients, hyper, factors, clip_factors, log)

    def changed_since(
        self, gradients: list[AnyGradient], hyper: StepHyper, factors: Sequence[float], log: _cpu.StepLog
    ) -> list[int]:
        """Places of the variables whose gradients have changed since the last :meth:`step_logged` with this log."""
        return self._native.changed_since(gradients, hyper, factors, log)

    def undo(
        self,
        gradients: list[AnyGradient],
        hyper: StepHyper,
        factors: Sequence[float],
        clip_factors: Factors,
        log: _cpu.StepLog,
        instead: Factors | None = None,
    ) -> list[int]:
        """Undo the last :meth:`step_logged` with this log and these arguments, to the bit.

        Args:
            gradients: As they were then.
            hyper: The numbers of that step.
            factors: Of that step.
            clip_factors: Of that step.
            log: Filled by that step.
            instead: Make the step with these ``clip_factors``, or with none if they are empty, in its place.

        Returns:
            Places of the variables whose gradients have changed since. Of these the moments are not undone where the
            gradient has changed; the variables themselves are.
        """
        return self._native.undo(gradients, hyper, factors, clip_factors, log, instead)

    def norms(self, gradients: list[AnyGradient], hyper: StepHyper) -> Norms:
        """The norms, one for each variable, of gradients that :meth:`check` has returned. Only in CPU memory.

        Args:
            gradients: As for a step.
            hyper: The numbers of the step: values are clipped first, and repeated rows summed if it says so.
        """
        return self._native.norms(gradients, hyper)

    def remember(self, hyper: StepHyper, stamp: int = 0, factors: Sequence[float] = ()) -> None:
        """Keep the numbers of the last step for ``step_again``; they are good as long as the stamp is the same."""
        self._native.remember(hyper, stamp, factors)

    def step_again(self, pairs: list[object], stamp: int, counter: npt.NDArray[np.int64]) -> bool:
        """Make the remembered step again with these gradients and the next t.

        Returns:
            False, with nothing changed, if the stamp or a variable differs, or if a gradient is missing or has to be
            converted.
        """
        return self._native.step_again(pairs, Variable, stamp, counter)

    def follow(self, states: list[Config], keys: tuple[str, ...], masters: Sequence[AnyArray | None] = ()) -> bool:
        """Whether steps can be repeated by :class:`RepeatedSteps`; for a plan of PyTorch's parameters on the host.

        Args:
            states: For each parameter the dict that has its step count, ``step``, and its slots.
            keys: The keys of the slots there, in the order of the plan.
            masters: For each parameter None, or what is stepped in place of the parameter, which receives the rounded
                copy; empty for none.
        """
        return self._native.follow(states, keys, list(masters))

    def accumulate(
        self,
        gradients: list[AnyGradient],
        scale: float,
        hyper: StepHyper,
        counter: npt.NDArray[np.int64],
        *,
        require_finite: bool,
        restart: bool,
        update: Plan | None,
        rows: Sequence[npt.NDArray[np.int64] | None] | None = None,
    ) -> bool:
        """Add gradients times ``scale`` to their accumulators; then ``update`` makes a step with its own.

        Args:
            gradients: One for each variable.
            scale: Factor of the gradients.
            hyper: The numbers of the step.
            counter: Goes up by one.
            require_finite: Change nothing unless all gradients are finite.
            restart: The accumulators count as zero.
            update: The plan of all variables that have an accumulated gradient, or None.
            rows: For each variable of ``update`` the rows outside of which its accumulator is zero, in any order, with
                repeats, so that other rows of a table may wait; None for all rows, or for all variables.

        Returns:
            Whether the gradients were finite, if that is required.
        """
        native = None if update is None else update._native
        count = len(update.buffers if update else ())
        listed: list[npt.NDArray[np.int64] | None] = [None] * count if rows is None else list(rows)
        while unfit := self._native.accumulate(
            gradients, scale, require_finite, restart, native, listed, hyper, counter
        ):
            gradients = self._converted(gradients, unfit, None)
        return self._native.all_finite

    def catch_up(self, ids: AnyArray | None, hyper: StepHyper, counter: npt.NDArray[np.int64] | None) -> None:
        """Bring rows of the only variable, a deferred table, up to date: ``ids``, flat, or all for None."""
        self._native.catch_up(ids, hyper, counter)

    def _refuse_conversion(self, gradients: list[AnyGradient], which: list[int]) -> None:
        i = which[0]
        if is_sparse(gradients[i]):
            raise ValueError(f"zero_grads: with IndexedSlices for {self.buffers[i].label}, expected dense gradients")
        raise ValueError(
            f"grads[{self.positions[i]}]: {type(gradients[i]).__name__} that has to be converted, expected an array "
            f"like {self.buffers[i].label}, which can be set to zero"
        )

    def _converted(self, gradients: list[AnyGradient], which: list[int], convert: Convert | None) -> list[AnyGradient]:
        gradients = gradients[:]
        with _cpu.DefaultArithmetic():
            for i in which:
                gradients[i] = self._convert(gradients[i], i) if convert is None else convert(gradients[i], i)
        return gradients

    def _convert(self, gradient: AnyGradient, i: int) -> AnyGradient:
        label, variable = f"grads[{self.positions[i]}]", self.buffers[i]
        if is_slices(gradient):
            return convert_slices(gradient, variable, label)
        readable = native_gradient(gradient, variable, label)
        if is_slices(readable):
            return readable
        return convert_gradient(readable, variable, self._native.gradient_dtype(i), label)

    # ---- numbers that are on a GPU ---------------------------------------------------------------------------------

    def set_device_numbers(
        self, rate: AnyArray | None, grad_scale: AnyArray = None, found_inf: AnyArray = None, counts: bool = False
    ) -> None:
        """Numbers of the steps from here on that the GPU reads: csrc/bind/_cuda.pyi."""
        native: Foreign = self._native
        native.set_device_numbers(rate, grad_scale, found_inf, counts)

    def can_count(self, hyper: StepHyper) -> bool:
        """Whether the GPU can count steps, or read a rate, with these betas; not to be asked in a capture."""
        native: Foreign = self._native
        return bool(native.can_count(hyper))


class RepeatedSteps:
    """Steps of all groups of an optimizer of PyTorch, with one plan for each, like the steps before.

    Args:
        plans: Plans that follow their states, and remember the numbers of a step.
        groups: The groups as they are now; a plan has the parameters at its positions, and their ``compute_params``.
        state: ``optimizer.state`` as it is now.
    """

    def __init__(self, plans: list[Plan], groups: list[Config], state: dict[Tensor, Config]) -> None:
        self._natives = [plan._native for plan in plans]
        self._params = [tuple(group["params"]) for group in groups]
        self._state = {**state}

    def make(self, groups: list[Config], state: dict[Tensor, Config]) -> bool | None:
        """Make the next step and count it. Norms are those of all groups.

        Returns:
            None, with nothing changed, if parameters, states or their memory have been replaced, if other parameters
            than before have a gradient, if a step count is not a whole number, or if a gradient has to be converted.
            Otherwise whether the step was made: False, with nothing changed, if gradients had to be finite and are not.
        """
        return _cpu.step_groups_again(self._natives, groups, self._params, state, self._state)


class BoundedCache(Generic[Key, Value]):
    """What was made for the sets of variables used last; the least recently used go first.

    Args:
        most: How many values are kept; or, with ``size_of``, up to which sum of their sizes.
        size_of: The size of a value, about in proportion to its memory.
        least: So many values are kept whatever their sizes are.
    """

    def __init__(self, most: int = 256, size_of: Callable[[Value], int] = lambda _: 1, least: int = 1) -> None:
        self._most, self._size_of, self._least = most, size_of, least
        self._values: dict[Key, Value] = {}

    def get(self, key: Key) -> Value | None:
        """The value, which becomes the most recently used one; None if there is none."""
        value = self._values.pop(key, None)
        if value is not None:
            self._values[key] = value
        return value

    def put(self, key: Key, value: Value) -> None:
        """Add or replace a value."""
        self._values.pop(key, None)
        self._values[key] = value
        size = sum(map(self._size_of, self._values.values()))
        while size > self._most and len(self._values) > self._least:
            size -= self._size_of(self._values.pop(next(iter(self._values))))

    def remove(self, value: Value) -> None:
        """Forget a value, under whatever key."""
        self._values = {key: other for key, other in self._values.items() if other is not value}

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()

    def __iter__(self) -> Iterator[Value]:
        return iter(self._values.values())

    def __len__(self) -> int:
        return len(self._values)
