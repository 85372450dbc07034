"""The step of all parameter groups: which sets are stepped, with which numbers, natively."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fastadam._core.deferred.rates import Numbers
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buckets import Guess
from fastadam._core.native.plan import StepHyper
from fastadam._core.native.worker import is_worker
from fastadam.torch._attached import inside
from fastadam.torch._checks import Group, States, check_capturable, check_group, firsts_of
from fastadam.torch._clipping import clip_jointly, is_sharded
from fastadam.torch._compiled import CompiledSteps
from fastadam.torch._deferred import Tables
from fastadam.torch._grad_scaler import Number, ScaledStep
from fastadam.torch._native_calls import Call, NativeCalls
from fastadam.torch._no_memory import Simulated, hide_gradients, is_simulation, refuse_simulation
from fastadam.torch._options import Options
from fastadam.torch._parameter_set import ParameterSet
from fastadam.torch._partition import Partitions, refuse_new_in_capture
from fastadam.torch._repeated import RepeatedStep
from fastadam.torch._telemetry import joined, require_dense

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fastadam._core.common.telemetry import Telemetry
    from fastadam._core.common.types import AnyArray
    from fastadam._core.native.worker import Handle

__all__ = ["GroupStepper"]


class OnGpu(NamedTuple):
    """What the GPU of a set reads by itself in a step."""

    grad_scale: Tensor | None
    found_inf: Tensor | None  # it skips the step unless this is 0
    counts: bool  # the number of the step


class OpenStep(Protocol):
    """A step in buckets: :class:`fastadam.torch._buckets.BucketedStep`."""

    @property
    def is_open(self) -> bool: ...
    def add(self, params: Iterable[Tensor]) -> Handle[None]: ...
    def finish(self) -> bool: ...
    def abort(self) -> None: ...


class Overlapped(Protocol):
    """What begins and ends such steps: :class:`fastadam.torch._overlap.Overlap`."""

    @property
    def is_open(self) -> bool: ...
    def step(self, grad_scale: object, found_inf: object) -> None: ...


_UNSCALED = ScaledStep(None, None)
_ON_HOST = OnGpu(None, None, counts=False)


class Ready(NamedTuple):
    """A set that takes part in a step, and its step count."""

    chosen: ParameterSet
    there: OnGpu
    counts: list[float]  # one for each parameter; empty if the GPU counts


class GroupStepper:
    """Steps the groups of an optimizer. What it keeps belongs to one process and is made anew for a copy.

    Whoever calls it holds the lock.
    """

    def __init__(self, options: Options, previous: GroupStepper | None = None) -> None:
        if previous is None:
            self.compiled = CompiledSteps()
            self.tables = Tables(options.sparse_update)
        else:
            self.compiled = previous.compiled
            self.tables = previous.tables.renewed()
        self._options, self.clipping = options, options.clipping
        self.partitions = Partitions(options, self.tables)
        self.calls = NativeCalls(self.partitions, self.tables)
        self.open: OpenStep | None = None  # the step that begin_step() has begun
        self.overlap: Overlapped | None = None  # what has begun it and ends it in step()
        self._last: Sequence[tuple[int, ParameterSet]] = ()  # the sets of the last step, and their groups
        self._measured: list[tuple[int, ParameterSet]] | None = None  # with telemetry, also of a step that was skipped
        self._repeated: RepeatedStep | None = None

    @property
    def lock(self) -> threading.RLock:
        """Of all steps, compiled or not; another one after a fork."""
        return self.compiled.lock

    @property
    def is_busy(self) -> bool:
        """Whether this thread holds the lock, or works for one that does."""
        return is_worker() or bool(self.lock._is_owned())  # type: ignore[attr-defined]

    def inside(self) -> AbstractContextManager[object]:
        """In which the optimizer reads parameters without being called by the attached ones."""
        return inside() if self._options.attached else nullcontext()

    def step(self, groups: list[Group], state: States, grad_scale: Number, found_inf: Number) -> None:
        """Step every parameter that has a gradient, or raise what is wrong and change nothing.

        Gradients that were scaled are unscaled then, unless the step was skipped.
        """
        self.calls.finish(state)
        if grad_scale is None and found_inf is None:
            if not self._repeat(groups, state, 1.0):
                self._step_anew(groups, state, _UNSCALED)
            return
        scaled = ScaledStep(grad_scale, found_inf)
        if scaled.host_skips:
            self.compiled.skipped = True
            return
        self.step_scaled(groups, state, scaled)
        if self.compiled.skipped is True:
            return
        with torch.no_grad():
            scaled.unscale(p.grad for group in groups for p in group["params"] if p.grad is not None)

    @cached_property
    def guess(self) -> Guess:
        """Whether steps in buckets are made early."""
        return Guess()

    @cached_property
    def logs(self) -> dict[object, _cpu.StepLog]:
        """Of steps in buckets that were made early."""
        return {}

    # ---- any step --------------------------------------------------------------------------------------------------

    def step_scaled(self, groups: list[Group], state: States, scaled: ScaledStep) -> None:
        """Like :meth:`step`, but gradients that were scaled stay scaled."""
        if self._repeated is not None and not is_simulation():
            # On the host, which therefore waits for the scaler.
            if scaled.skips:
                self.compiled.skipped = True
                return
            if scaled.is_extreme:
                self._repeated = None
            elif self._repeat(groups, state, scaled.gradient_scale):
                return
        self._step_anew(groups, state, scaled)

    def _repeat(self, groups: list[Group], state: States, gradient_scale: float) -> bool:
        """Make a step like the last one, or skip it as the options say; False, with nothing changed, if it differs."""
        if self._repeated is None or is_simulation():
            return False
        made = self._repeated.make(groups, state, gradient_scale)
        if made is None:
            self._repeated = None
            return False
        self.compiled.skipped = not made
        return True

    def _step_anew(self, groups: list[Group], state: States, scaled: ScaledStep) -> None:
        with torch.no_grad(), self.inside():
            is_finite = self._make_anew(groups, state, scaled)
        self.compiled.skipped = scaled if is_finite else True

    def forget_numbers(self) -> None:
        """Before other options: no step is like the last one."""
        self._repeated = None

    def _make_anew(self, groups: list[Group], state: States, scaled: ScaledStep) -> bool:
        """Returns False, with nothing changed, if gradients had to be finite and are not."""
        self.tables.forget_removed(groups, state)
        self.partitions.note_state(state, len(groups))
        calls: list[Call] = []
        raised: dict[int, int] = {}  # how often earlier groups raise the step counts at some addresses
        simulated = Simulated()
        for index, (group, first) in enumerate(zip(groups, firsts_of(groups), strict=False)):
            gradients = [param.grad for param in group["params"]]
            hidden = hide_gradients(group["params"], gradients)
            refuse_simulation(gradients)
            self.require_options(index, group, gradients)
            if hidden:
                simulated.add(index, group, hidden, state, self._options)
            of_group = [
                self.call_of(index, ready, group, gradients, scaled, raised)
                for ready in self.ready(index, group, first, state, gradients, scaled)
            ]
            calls += of_group
            if len(groups) > 1:
                for address in chain.from_iterable(call.chosen.counts.addresses for call in of_group):
                    raised[address] = raised.get(address, 0) + 1
        are_joined = self._are_joined(calls)
        if len(calls) > 1 or are_joined:
            for i, call in enumerate(calls):
                checked = call.chosen.check(call.gradients, call.hyper, call.factors, call.steps)
                calls[i] = call._replace(gradients=checked)
        clipped = self._clipped(calls) if are_joined else calls
        was_made = clipped is not None and self.calls.make_all(clipped, state)  # one alone can be refused
        self.note_measured(calls, was_made=was_made or clipped is not None)  # a native step reports it by itself
        if not was_made:
            return False
        simulated.finish(state)
        before, self._last = self._last, [(call.group, call.chosen) for call in calls]
        if not before or self._last == before:
            self._repeated = RepeatedStep.after(self._last, groups, state, self.clipping)
        return True

    def require_options(self, index: int, group: Group, gradients: list[Tensor | None]) -> None:
        """Raise what is wrong with options, whether or not there are gradients, and if one is not supported."""
        check_group(group, index)
        check_capturable(group, index, gradients)
        self.clipping.require_host(index, group, gradients)
        if self._options.telemetry:
            require_dense(index, group, gradients)

    def note_measured(self, calls: list[Call], *, was_made: bool) -> None:
        """After a step of these calls, checked: what telemetry is read from."""
        if not self._options.telemetry:
            return
        self._measured = [(call.group, call.chosen) for call in calls]
        if not was_made:
            for call in calls:
                call.chosen.plan.report_skip(call.gradients, call.hyper)

    def _are_joined(self, calls: list[Call]) -> bool:
        """Whether the norms must be known before the native steps, each of which can read only its own."""
        if not calls or not self.clipping.reads_norms:
            return False
        # A step that may be skipped must not bring rows up to date first.
        first = calls[0]
        is_alone = len(calls) == 1 and first.steps is None and not first.chosen.tables
        return not is_alone or is_sharded(first.chosen.params)

    def _clipped(self, calls: list[Call]) -> list[Call] | None:
        """The calls, which are checked, with the factors of clipping; None if the step is to be skipped."""
        factors = clip_jointly(
            [call.chosen.plan.norms(call.gradients, call.hyper) for call in calls],
            [call.factors for call in calls],
            [(call.group, place) for call in calls for place in call.chosen.positions],
            [param for call in calls for param in call.chosen.params],
            calls[0].hyper,
        )
        if factors is None:
            return None
        return [
            call._replace(hyper=call.hyper._replace(require_finite=False), clip_factors=mine)
            for call, mine in zip(calls, factors, strict=True)
        ]

    def ready(
        self, index: int, group: Group, first: int, state: States, gradients: list[Tensor | None], scaled: ScaledStep
    ) -> list[Ready]:
        """The sets of a group that are to be stepped, those whose counts may not differ with one step count."""
        ready = self._read_counts(self.partitions.of(index, group, first, state, gradients, renew=False), group, scaled)
        if _are_apart(ready):
            return ready
        return self._read_counts(self.partitions.of(index, group, first, state, gradients, renew=True), group, scaled)

    def _read_counts(self, sets: list[ParameterSet], group: Group, scaled: ScaledStep) -> list[Ready]:
        ready = []
        for chosen in sets:
            there = _ON_HOST if chosen.context is None else self._numbers_on_gpu(chosen, group, scaled)
            if there.found_inf is not None or not scaled.skips:
                ready.append(Ready(chosen, there, [] if there.counts else chosen.counts.read()))
        return ready

    def _numbers_on_gpu(self, chosen: ParameterSet, group: Group, scaled: ScaledStep) -> OnGpu:
        """The numbers of the next step that the GPU of a set knows, so that the host need not wait for them."""
        chosen.raise_late()
        if self.calls.are_captured:
            chosen.counts.forget()  # graphs may have raised them
        is_captured = chosen.is_capturing
        if is_captured and (chosen.is_new or not group.get("capturable")):
            refuse_new_in_capture(chosen.params[0])
        if is_captured and not chosen.turn.is_alone:
            raise RuntimeError(
                f"{chosen.labels[0]}: shares memory or its step count with another parameter, which no CUDA graph may "
                "step"
            )
        grad_scale, found_inf = scaled.on(chosen.device) if chosen.counts_on_gpu else (None, None)
        is_followed = found_inf is not None and chosen.counts.are_followed()  # the GPU's last step is the last one
        is_followed = is_followed and chosen.turn.is_alone
        counts = is_captured or (is_followed and chosen.can_count(chosen.numbers_of(group, 1, 1.0)))
        return OnGpu(grad_scale, found_inf, counts)

    def call_of(
        self,
        index: int,
        ready: Ready,
        group: Group,
        gradients: list[Tensor | None],
        scaled: ScaledStep,
        raised: dict[int, int],
    ) -> Call:
        """What the set does natively; rows of its tables that cannot wait are brought up to date."""
        chosen, there, counts = ready
        steps = chosen.next_steps(counts) if counts else [1]
        if raised and counts:
            steps = [
                step + raised.get(address, 0) for step, address in zip(steps, chosen.counts.addresses, strict=True)
            ]
        hyper = chosen.numbers_of(group, steps[0], scaled.gradient_scale if there.grad_scale is None else 1.0)
        mine = [gradient for place in chosen.positions if (gradient := gradients[place]) is not None]
        if there.grad_scale is None:
            mine = scaled.divided(mine)
        if chosen.tables:
            self._settle_before(chosen, mine, hyper)
        if chosen.context is not None:
            rate = chosen.rate_on_gpu(group["lr"], hyper)
            if rate is None:
                hyper = hyper._replace(learning_rate=float(group["lr"]))
            chosen.set_device_numbers(rate, there.grad_scale, there.found_inf, counts=there.counts)
        mine = chosen.read_gradients(mine, densify=hyper.l2 != 0)
        apart = steps if steps.count(steps[0]) != len(steps) else None
        hyper = self.clipping.bound(hyper)
        return Call(index, chosen, mine, hyper, chosen.factors_of(group), apart, there.found_inf)

    def _settle_before(self, chosen: ParameterSet, gradients: list[Tensor], hyper: StepHyper) -> None:
        """Bring rows up to date that cannot wait for this step."""
        self.tables.warn_of_unread(chosen.tables)
        numbers = Numbers(hyper.beta_1, hyper.beta_2, hyper.epsilon, chosen.kind.amsgrad)
        changed = [
            table.before_step(numbers, touches_rows=gradient.is_sparse)
            for table, gradient in zip(chosen.tables, gradients, strict=True)
        ]
        if any(changed):
            chosen.make_plan()

    # ---- between steps ---------------------------------------------------------------------------------------------

    def catch_up(self, state: States, param: Tensor | None, rows: AnyArray = None) -> None:
        """Bring rows of a table up to date, or all rows; for None of all tables."""
        with self.inside():
            self.calls.finish(state)
            self.tables.note_states(state)
            for table in self.tables.of(param):
                table.catch_up(rows)

    def catch_up_state(self, state: States, param: Tensor | None) -> None:
        """The same before the state of a parameter is read, or for None those of all."""
        with self.inside():
            self.calls.finish(state)
            self.tables.note_states(state)
            for table in self.tables.of(param):
                table.catch_up_state()

    def let_go(self) -> None:
        """Forget everything made of parameters and states, some of which have been replaced or have left."""
        self.partitions.clear()
        self.compiled.sets.clear()
        self.logs.clear()
        self._last, self._measured, self._repeated, self.open = [], None, None, None

    def telemetry(self, groups: list[Group], state: States) -> Telemetry:
        """What the last step measured; raises RuntimeError if there is nothing."""
        if not self._options.telemetry:
            raise RuntimeError("telemetry: the optimizer measures no steps, expected telemetry=True when it is made")
        self.calls.finish(state)
        if self._measured is None:
            raise RuntimeError("telemetry: no step was measured yet, expected a call of step first")
        return joined(self._measured, groups)

    def require_open(self, what: str) -> OpenStep:
        """The open step; raises if there is none."""
        if self.open is None or not self.open.is_open:
            raise RuntimeError(f"{what}: no step is open, expected begin_step() first")
        return self.open

    def require_closed(self, what: str) -> None:
        """Raise if a step is open, when parameters may be between two steps."""
        if self.open is not None and self.open.is_open:
            raise RuntimeError(f"{what}: a step is open, expected end_step() or abort_step() first")


def _are_apart(ready: list[Ready]) -> bool:
    """Whether each set that needs it has one step count, and such sets of one kind on the host have different ones."""
    if len(ready) == 1 and ready[0].chosen.counts_may_differ:
        return True
    alike = [each for each in ready if each.counts and not each.chosen.counts_may_differ]
    if any(each.counts.count(each.counts[0]) != len(each.counts) for each in alike):
        return False
    on_host = [(each.chosen.kind, each.chosen.turn, each.counts[0]) for each in alike if each.chosen.context is None]
    return len(set(on_host)) == len(on_host)
