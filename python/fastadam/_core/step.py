"""``apply_gradients``: from pairs of gradient and variable to one native call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastadam._core import accumulation
from fastadam._core.averages import refuse_while_swapped
from fastadam._core.common.checks import check_clip, check_iterations, check_number
from fastadam._core.common.telemetry import Telemetry
from fastadam._core.common.warning import warn
from fastadam._core.deferred.rates import Doubt
from fastadam._core.hyperparameters import Clip, Hyper
from fastadam._core.native.arrays import expect_random_rows, on_gpu
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, buffers_of, key_of
from fastadam._core.native.gpu import cuda_module
from fastadam._core.native.plan import Plan, StepHyper
from fastadam._core.native.slices import is_native_sparse, is_slices, is_sparse, native_gradient
from fastadam._core.native.variable import Variable, unwrap
from fastadam._core.options.options import CLIP_NAMES
from fastadam._core.options.state_format import LOW
from fastadam._core.pairs import check_pairs, first_variable
from fastadam._core.parts import Parts
from fastadam._core.repeated import sum_repeated
from fastadam._core.runtime import PlanVersion, StepPlan
from fastadam.schedules import LearningRateSchedule

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, AnyGradient, AnyPair
    from fastadam._core.deferred.chain import Chain
    from fastadam._core.state.entry import Entry
    from fastadam._core.state.slots import Prepared

__all__ = ["Stepper", "rate_after"]


_NONE: list[Any] = []


class Hyperparameters(Protocol):
    """What a step reads of an optimizer."""

    name: str

    @property
    def learning_rate(self) -> AnyArray: ...
    @property
    def beta_1(self) -> float: ...
    @property
    def beta_2(self) -> float: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def clipvalue(self) -> float | None: ...
    @property
    def clipnorm(self) -> float | None: ...
    @property
    def global_clipnorm(self) -> float | None: ...


class Stepper:
    """Steps an optimizer: finds or makes the plan for the variables, and the numbers of the step."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.options, self.state, self.runtime, self.tables = parts

    def apply(
        self,
        optimizer: Hyperparameters,
        pairs: list[AnyPair],
        loss_scale: float | None = None,
        copies: list[AnyArray] = _NONE,
        *,
        zero_grads: bool = False,
    ) -> bool:
        """Make a step with these pairs, at least one; call it under the lock of the runtime.

        Args:
            optimizer: Whose hyperparameters to read: a subclass may compute them.
            pairs: (gradient, variable).
            loss_scale: A dynamic scale that the gradients are divided by; then they must be finite.
            copies: For each pair None or an array that receives the rounded variable; empty for none.
            zero_grads: Set the gradients to zero after the step.

        Returns:
            Whether the step was made; False only if gradients under a ``loss_scale`` were not finite.
        """
        runtime = self.runtime
        refuse_while_swapped(self.parts, "apply_gradients")
        if runtime.open is not None:
            runtime.require_closed("apply_gradients")
        if runtime.step_lock.locked():  # a callable hyperparameter or the code of a gradient called it
            raise RuntimeError(f"apply_gradients of optimizer {optimizer.name} was called from within itself")
        with runtime.step_lock:
            if runtime.repeats and loss_scale is None and runtime.zeroes == zero_grads:
                last, stamp = runtime.last, self.options.version + self.state.slots.version
                if last is not None and last.takes(copies) and last.plan.step_again(pairs, stamp, self.state.calls):
                    return True
            with _cpu.DefaultArithmetic():  # for rates and scales; the native code sets it by itself
                return self._step(optimizer, pairs, loss_scale, copies, zero_grads)

    def _step(
        self,
        optimizer: Hyperparameters,
        pairs: list[AnyPair],
        loss_scale: float | None,
        copies: list[AnyArray],
        zero_grads: bool,
    ) -> bool:
        options, state, runtime, tables = self.options, self.state, self.runtime, self.tables
        first, rate = first_variable(pairs), options.numbers["learning_rate"]
        if runtime.has_gpus or on_gpu(first) or on_gpu(rate):
            rate = self._rate_on_gpu(first, rate)
        scale = 1.0 / (loss_scale or options.keras3.loss_scale_factor or 1.0)
        accumulates = options.accumulation is not None
        hyper = self.numbers(optimizer, 1.0 / options.calls_per_step if accumulates else scale)
        if accumulates:
            _refuse_with_accumulation(copies=bool(copies), zero_grads=zero_grads, telemetry=options.telemetry)
        pairs, match = self.match(pairs, copies, zeroes=zero_grads)
        plan, gradients = match or self.make_plan(pairs, copies, hyper, scale, zeroes=zero_grads)
        runtime.use_plan(plan)
        if plan.plan.device >= 0:
            plan.plan.set_device_numbers(rate)
        if runtime.chain is not None and options.sparse_update != "dense":
            gradients = self._note_rows(runtime.chain, plan, gradients, hyper)
        if accumulates:
            require_finite = loss_scale is not None
            return accumulation.accumulate(self.parts, plan, gradients, scale, hyper, require_finite=require_finite)
        if loss_scale is not None:
            hyper = hyper._replace(require_finite=True)
        if zero_grads:
            hyper = hyper._replace(zero_gradients=True)
        if plan.has_tables:
            tables.warn_of_unread(plan, gradients)
            numbers = tables.numbers_of(hyper, amsgrad=plan.amsgrad, averages=plan.averages)
            touches = [is_native_sparse(gradient) for gradient in gradients]
            if tables.must_catch_up(plan, touches, numbers):  # refused before rows are moved
                gradients = plan.plan.check(gradients)
                plan.plan.check_numbers(hyper)
            tables.before_step(plan, touches, numbers)
        is_finite = plan.plan.step(gradients, hyper, counter=state.calls)
        if options.telemetry:
            runtime.measured = plan
        if plan.has_tables:
            tables.after_step(plan)
        if runtime.has_gpus and loss_scale is not None:
            tables.raise_late()  # the step has been waited for
        self._remember(plan, hyper, len(pairs), loss_scale)
        return is_finite

    def _note_rows(
        self, chain: Chain, plan: StepPlan, gradients: list[AnyGradient], hyper: StepHyper
    ) -> list[AnyGradient]:
        """Note for the next delta which rows the step will change of variables without a history.

        Returns:
            The gradients; native ones where they had to be read.
        """
        if hyper.ema_overwrite:
            chain.note_all()
            return gradients
        gradients = gradients[:]
        for i, (place, buffer, history) in enumerate(
            zip(plan.plan.positions, plan.plan.buffers, plan.histories, strict=True)
        ):
            if history is None and buffer.device < 0:
                native = gradients[i] = native_gradient(gradients[i], buffer, f"grads[{place}]")
                indices = np.asarray(native.indices) if is_slices(native) and not plan.averages else None
                chain.note(self.state.slots.entry_of(buffer), indices)
        return gradients

    def telemetry(self) -> Telemetry:
        """What the last step measured; raises RuntimeError if it has not."""
        if not self.options.telemetry:
            raise RuntimeError("telemetry: the optimizer measures no steps, expected Adam(..., telemetry=True)")
        with self.runtime.lock:
            measured = self.runtime.measured
            if measured is None:
                raise RuntimeError("telemetry: no step was measured yet, expected a call of apply_gradients first")
            entries = [self.state.slots.entry_of(buffer) for buffer in measured.plan.buffers]
            places = zip(entries, measured.plan.positions, strict=True)
            names = [entry.spec.name or f"vars[{place}]" if entry else f"vars[{place}]" for entry, place in places]
            return Telemetry(names, measured.plan.telemetry())

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def numbers(self, optimizer: Hyperparameters, gradient_scale: float) -> StepHyper:
        """The numbers of the next step; callables and schedules are evaluated here, once."""
        options, runtime = self.options, self.runtime
        calls = int(self.state.calls)
        if not 0 <= calls < 2**63 - 1:
            check_iterations("iterations", calls)
        steps = calls // options.calls_per_step
        if runtime.numbers is not None:
            version, scale, numbers = runtime.numbers
            if version == options.version and scale == gradient_scale:
                return numbers._replace(step=steps + 1)
        version = options.version
        rate = rate_after(optimizer.learning_rate, calls)
        hyper = StepHyper(
            step=steps + 1,
            learning_rate=0.0 if on_gpu(rate) else rate,  # the kernels read a rate on a GPU themselves
            beta_1=optimizer.beta_1,
            beta_2=optimizer.beta_2,
            epsilon=optimizer.epsilon,
            decay=optimizer.decay,
            clip_value=check_clip("clipvalue", optimizer.clipvalue),
            clip_norm=check_clip("clipnorm", optimizer.clipnorm),
            global_clip_norm=check_clip("global_clipnorm", optimizer.global_clipnorm),
            gradient_scale=gradient_scale,
            clip_after_dedupe=options.clip_after_dedupe,
            **options.keras3.step_numbers(steps + 1),
            seed=options.small.seed,
        )
        runtime.numbers = (version, gradient_scale, hyper) if self._are_constant(optimizer) else None
        return hyper

    def _are_constant(self, optimizer: Hyperparameters) -> bool:
        """Whether the next step has the same numbers, as long as none is set."""
        numbers = self.options.numbers
        if self.options.keras3.use_ema or not all(isinstance(number, float) for number in numbers.values()):
            return False
        # a subclass may compute a hyperparameter whenever it is read
        return all(isinstance(getattr(type(optimizer), name), (Hyper, Clip)) for name in (*numbers, *CLIP_NAMES))

    def _remember(self, plan: StepPlan, hyper: StepHyper, pairs: int, loss_scale: float | None) -> None:
        """Let the plan repeat the step by itself where only gradients and t can differ."""
        options, runtime = self.options, self.runtime
        runtime.repeats = (
            runtime.numbers is not None
            and runtime.numbers[0] == options.version  # no code that the step ran has set anything
            and loss_scale is None
            and plan.plan.device < 0
            and not options.is_deferred
            and not options.exclusions.patterns  # a variable may come with another name
            and not runtime.checks_exclusions
            and not runtime.has_gpus
            and (runtime.chain is None or options.sparse_update == "dense")  # else rows are noted
            and len(plan.plan.buffers) == pairs
        )
        if runtime.repeats:
            runtime.zeroes = hyper.zero_gradients
            plan.plan.remember(hyper, options.version + self.state.slots.version)

    def _rate_on_gpu(self, first: AnyArray, rate: object) -> AnyArray | None:
        """Before a step of an optimizer that knows GPUs: the learning rate if it is on one, else None."""
        is_there = on_gpu(first)
        if is_there and cuda_module().is_capturing(first):
            raise RuntimeError(
                "apply_gradients: a CUDA graph is being captured, expected no capture "
                "(fastadam.torch.Adam(capturable=True) can be captured)"
            )
        self.tables.raise_late(wait=self.runtime.is_elsewhere(0 if is_there else -1))
        if not on_gpu(rate):
            return None
        if not is_there:
            raise ValueError("learning_rate: on a GPU, expected a number for variables in CPU memory")
        if self.options.is_deferred:
            mode = self.options.sparse_update
            raise ValueError(f"learning_rate: on the GPU with sparse_update={mode!r}, expected a number")
        return rate

    # ---- plans -----------------------------------------------------------------------------------------------------

    def _version(self) -> PlanVersion:
        return PlanVersion(self.state.slots.version, self.options.plan_version)

    def entry_of(self, buffer: _cpu.Buffer) -> Entry | None:
        """What is kept for a variable; None if it is not known."""
        return self.state.slots.entry_of(buffer)

    def match(
        self, pairs: list[AnyPair], copies: list[AnyArray], *, zeroes: bool
    ) -> tuple[list[AnyPair], tuple[StepPlan, list[AnyGradient]] | None]:
        """Check the pairs, with ``sum_repeated`` sum those of one variable, and find their plan."""
        match = self.find_plan(pairs, copies)
        if match is None or len(match[1]) < len(pairs):
            check_pairs(pairs)
        if match is not None or not self.options.sum_repeated:  # then a plan has each variable once
            return pairs, match
        summed = sum_repeated(pairs, copies, zeroes=zeroes)
        return summed, None if summed is pairs else self.find_plan(summed, copies)

    def find_plan(self, pairs: list[AnyPair], copies: list[AnyArray]) -> tuple[StepPlan, list[AnyGradient]] | None:
        """The plan that was made for these variables and copies, and the gradients; None if there is none."""
        match = self.runtime.find_plan(pairs, self._version())
        if match is None or not match[0].takes(copies):
            return None
        plan, gradients = match
        if plan.needs_dense:
            _refuse_sparse(plan.dense_only, gradients)
        if plan.plan.device >= 0:
            self._refuse_rows_on_gpu(plan.plan.buffers, gradients)
        if self.runtime.checks_exclusions and self.options.keras3.weight_decay:
            self._check_exclusions(pairs)
        if self.options.exclusions.patterns and plan.decays != self._decays(pairs, plan.plan.buffers):
            return None  # a variable comes with another name
        if not self.options.is_deferred:
            return match
        tables = zip(plan.histories, gradients, strict=True)
        fits = all(not history.is_full if history else not is_sparse(gradient) for history, gradient in tables)
        return match if fits else None

    def make_plan(
        self, pairs: list[AnyPair], copies: list[AnyArray], hyper: StepHyper, scale: float, *, zeroes: bool
    ) -> tuple[StepPlan, list[AnyGradient]]:
        """A plan for variables not seen before, and gradients as far as they had to be converted to check the step."""
        version = self._version()  # before any code of a gradient runs: what that sets asks for another plan
        options, state, runtime, tables = self.parts
        positions = [i for i, (gradient, _) in enumerate(pairs) if gradient is not None]
        gradients = [unwrap(pairs[i][0]) for i in positions]
        state_format, amsgrad = options.state_format, options.amsgrad
        buffers = buffers_of([pairs[i][1] for i in positions], positions)
        keys = [key_of(buffer) for buffer in buffers]
        sparse = {key for key, gradient in zip(keys, gradients, strict=True) if is_sparse(gradient)}
        prepared = state.slots.prepare(buffers, partial(state_format.of, tables=sparse))
        moments, lows = prepared.slots["m"], prepared.slots.get(LOW, [None] * len(buffers))
        if state_format.moves_rows_alone:
            _expect_random_rows(prepared, buffers, sparse)
        dense_only = [state_format.why_dense(*row) for row in zip(buffers, moments, lows, strict=True)]
        _refuse_sparse(dense_only, gradients)
        self._refuse_rows_on_gpu(buffers, gradients)
        decays = self._decays(pairs, buffers)
        averages = "average" in prepared.slots
        numbers = tables.numbers_of(hyper, amsgrad=amsgrad, averages=averages)
        entries = [prepared.entry_of(buffer) for buffer in buffers]
        histories = [tables.history_of(*row, numbers) for row in zip(buffers, entries, gradients, strict=True)]
        only_adds = options.accumulation is not None and len(set(keys)) < len(keys)  # the step has another plan
        plan = Plan(
            buffers,
            prepared.slots,
            decays=decays,
            positions=positions,
            lazy=options.sparse_update == "lazy" and not only_adds,
            histories=[None if history is None or only_adds else history.native for history in histories],
            copies=[unwrap(copies[i]) for i in positions] if copies else _NONE,
            context=runtime.context_of(buffers[0]),
            numbers=prepared.numbers,
            **options.small.rounding,
        )
        plan.set_telemetry(options.telemetry)
        gradients = plan.check(gradients, zeroes=zeroes)
        plan.check_numbers(hyper)
        plan.check_numbers(hyper._replace(gradient_scale=scale))  # of accumulated gradients, which have another scale
        given = {i: unwrap(pairs[i][1]) for i in positions}
        new = {slot_key for slot_key, _ in prepared.created if not state.slots.knows(slot_key)}
        kept = [entry.buffer for entry in state.entries if entry.buffer is not None]
        plans = [other.plan.buffers for other in runtime.plans]
        plans += [entry.history.planned for entry in state.entries if entry.history is not None]
        runtime.replacements.look(given, buffers, new, plans, [*kept, *options.exclusions.buffers])
        prepared.commit()  # slots are made once the whole step has been found good
        version = version._replace(slots=state.slots.version)
        made = StepPlan(plan, version, amsgrad, decays, histories, dense_only, bool(copies), averages)
        for buffer, history in zip(buffers, histories, strict=True):
            entry = state.slots.entry_of(buffer)
            if entry is not None and history is None:
                entry.raise_doubt(Doubt.ONCE)  # should it become a table later
            elif entry is not None and entry.history is not history:
                runtime.clear_plans()  # one of them may know the variable without a history
                entry.history = history
        runtime.add_plan(made, pairs)
        return made, gradients

    def _refuse_rows_on_gpu(self, buffers: list[_cpu.Buffer], gradients: list[AnyGradient]) -> None:
        """Raise for a sparse gradient on a GPU with options that its kernels have for dense steps only."""
        options, mode = self.options, self.options.sparse_update
        name = "use_ema" if options.keras3.use_ema else "gradient_accumulation_steps" if options.accumulation else None
        if name is None or mode == "dense" or buffers[0].device < 0:
            return
        for buffer, gradient in zip(buffers, gradients, strict=True):
            if is_sparse(gradient):
                raise ValueError(
                    f"{buffer.label}: a sparse gradient on a GPU with {name} and sparse_update={mode!r}, expected "
                    "sparse_update='dense' or CPU memory"
                )

    # ---- weight decay ----------------------------------------------------------------------------------------------

    def _decays(self, pairs: list[AnyPair], buffers: list[_cpu.Buffer]) -> list[bool]:
        """Whether each variable with a gradient decays."""
        variables = [variable for gradient, variable in pairs if gradient is not None]
        names = [self._name_of(variable, buffer) for variable, buffer in zip(variables, buffers, strict=True)]
        return self.options.decays(names, buffers)

    def _name_of(self, variable: object, buffer: _cpu.Buffer) -> str | None:
        """The name of a Variable, or the one that its array came with before."""
        if isinstance(variable, Variable) and variable.name:
            return variable.name
        entry = self.state.slots.entry_of(buffer)
        return None if entry is None else entry.spec.name

    def _check_exclusions(self, pairs: list[AnyPair]) -> None:
        """Warn once of everything given to ``exclude_from_weight_decay`` that names no variable."""
        self.runtime.checks_exclusions = False
        exclusions, entries = self.options.exclusions, self.state.entries
        variables = [variable for _, variable in pairs]  # those without gradient, too
        named = [variable.name for variable in variables if isinstance(variable, Variable)]
        names = {name for name in (*named, *(entry.spec.name for entry in entries)) if name}
        met = {key_of(entry.buffer) for entry in entries if entry.buffer}
        met.update(map(key_of, buffers_of(variables, range(len(variables)))))
        if missing := exclusions.missing(names, met if not self.state.slots.unclaimed() else None):
            hint = ""
            if any(text.startswith("var_names") for text in missing):
                unnamed = "without names: wrap them, fastadam.Variable(w, name=...)"
                hint = ", which are " + (f"named {sorted(names)!s:.200}" if names else unnamed)
            warn(f"exclude_from_weight_decay: {', '.join(missing)} excludes none of the variables so far{hint}")


def rate_after(rate: object, calls: int) -> AnyArray:
    """A learning rate after so many calls: a number, or one that is on a GPU."""
    return check_number("learning_rate", rate(calls)) if isinstance(rate, LearningRateSchedule) else rate


def _expect_random_rows(prepared: Prepared, buffers: list[_cpu.Buffer], tables: set[Key]) -> None:
    """Have steps make no memory resident but that of the rows of tables, whoever made their arrays."""
    for i, buffer in enumerate(buffers):
        if buffer.device < 0 and key_of(buffer) in tables:
            expect_random_rows(buffer.array(), small_pages=False)
            for column in prepared.slots.values():
                if (array := column[i]) is not None:
                    expect_random_rows(array, small_pages=True)


def _refuse_sparse(dense_only: list[str | None], gradients: list[AnyGradient]) -> None:
    """Raise for a sparse gradient of a variable that takes only dense ones; the error says why."""
    for why, gradient in zip(dense_only, gradients, strict=True):
        if why is not None and is_sparse(gradient):
            raise ValueError(why)


def _refuse_with_accumulation(**given: bool) -> None:
    """Raise if an option is given that needs the gradients of one step in one call."""
    for name, is_given in given.items():
        if is_given:
            expected = "None" if name == "copies" else "False"
            raise ValueError(f"{name}: with gradient_accumulation_steps, expected {expected}")
