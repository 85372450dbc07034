"""What one process knows of an optimizer and a copy does not: the lock, native plans, the contexts of GPUs."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastadam._core.common.types import AnyArray, AnyGradient, Foreign
from fastadam._core.deferred.chain import Chain
from fastadam._core.deferred.history import History
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buckets import Guess, OpenStep
from fastadam._core.native.buffers import Key, key_of
from fastadam._core.native.gpu import cuda_module
from fastadam._core.native.plan import BoundedCache, Plan, StepHyper
from fastadam._core.native.variable import unwrap
from fastadam._core.replaced import Replacements

__all__ = ["PlanVersion", "Runtime", "StepPlan"]

_live: weakref.WeakSet[Runtime] = weakref.WeakSet()


class PlanVersion(NamedTuple):
    """What a plan was made of beside its variables."""

    slots: int
    options: int


@dataclass(eq=False)
class StepPlan:
    """A plan for one set of variables, and what the optimizer knows of these."""

    plan: Plan
    version: PlanVersion
    amsgrad: bool
    decays: list[bool]
    histories: list[History | None]  # of the variables that are deferred tables
    dense_only: list[str | None]  # for each variable why it takes no sparse gradients; None if it does
    has_copies: bool = False
    averages: bool = False
    places: list[tuple[int, ...]] | None = None  # of the variables in the store, once a bucket has needed them

    def __post_init__(self) -> None:
        """Compute once what every step asks."""
        self.has_tables = any(self.histories)
        self.needs_dense = any(self.dense_only)

    def takes(self, copies: list[AnyArray]) -> bool:
        """Whether the plan writes these copies of the variables in ``grads_and_vars``; empty for none."""
        if not copies:
            return not self.has_copies
        places = self.plan.positions
        if not self.has_copies or places[-1] >= len(copies):  # of a call with fewer variables
            return False
        return self.plan.has_copies(copies if len(places) == len(copies) else [copies[place] for place in places])


class Runtime:
    """Locks and caches of one optimizer; made anew for a copy, and never pickled."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held while state is read or changed
        self.step_lock = threading.Lock()  # held while a step is made, inside the other
        self.told: set[str] = set()  # warnings that are given once
        self.has_swapped_averages = np.zeros((), np.int64)  # 1: averages are in the place of the variables
        self.read_at_random: set[Key] = set()  # variables whose memory has had that advice (madvise)
        self.checks_exclusions = False  # exclude_from_weight_decay may name no variable
        self.replacements = Replacements()
        self.numbers: tuple[int, float, StepHyper] | None = None  # of the last step: version of the options, scale
        self.last: StepPlan | None = None  # the plan of the last step
        self.measured: StepPlan | None = None  # the plan of the last step with telemetry
        self.repeats = False  # the last step can be made again: Plan.step_again
        self.zeroes = False  # it set its gradients to zero
        self._plans: BoundedCache[tuple[int, int], StepPlan] = BoundedCache()
        self.open: OpenStep | None = None  # the step that begin_step() has begun
        self.chain: Chain | None = None  # of the files that the next delta follows
        self.guess = Guess()
        self.logs: dict[object, _cpu.StepLog] = {}
        self.contexts: dict[int, Foreign] = {}
        self._gatherers: dict[int, Foreign] = {}
        _live.add(self)

    # ---- plans -----------------------------------------------------------------------------------------------------

    def find_plan(self, pairs: list[object], version: PlanVersion) -> tuple[StepPlan, list[AnyGradient]] | None:
        """The plan of these (gradient, variable) pairs, and their gradients without those that are None."""
        if self.last is not None and self.last.version == version:
            gradients = self.last.plan.gradients_of(pairs)
            if gradients is not None:
                return self.last, gradients
        plan = self._plans.get(_start_of(pairs))
        if plan is None or plan is self.last or plan.version != version:
            return None
        gradients = plan.plan.gradients_of(pairs)
        return None if gradients is None else (plan, gradients)

    def add_plan(self, plan: StepPlan, pairs: list[object]) -> None:
        """Keep a plan for the next step with the same variables."""
        self._plans.put(_start_of(pairs), plan)

    def use_plan(self, plan: StepPlan) -> None:
        """The next step is likely to be for the same variables."""
        self.last = plan

    def clear_plans(self) -> None:
        """Forget all plans: the arrays that they were made of have changed."""
        self.last = None
        self.repeats = False
        self._plans.clear()

    def let_go(self, key: Key) -> None:
        """Forget everything made of a variable that the optimizer is to forget, and of the places of others."""
        self.clear_plans()
        self.forget_closed()
        self.logs.clear()
        self.replacements.forget(key)
        self.read_at_random.discard(key)
        if self.measured is not None and key in map(key_of, self.measured.plan.buffers):
            self.measured = None

    @property
    def plans(self) -> Iterator[StepPlan]:
        """Every plan that is kept."""
        return iter({id(plan): plan for plan in (self.last, *self._plans) if plan is not None}.values())

    # ---- a step in buckets -----------------------------------------------------------------------------------------

    def require_closed(self, what: str) -> None:
        """Raise if a step is open, when variables and state may be between two steps."""
        if self.open is not None and self.open.is_open:
            raise RuntimeError(f"{what}: a step is open, expected end_step() or abort_step() first")

    def require_between_steps(self, what: str) -> None:
        """The same, and raise in code that a step runs; to be called under ``lock``."""
        self.require_closed(what)
        if self.step_lock.locked():
            raise RuntimeError(f"{what}: used in code that a step runs, expected between steps")

    def forget_closed(self) -> None:
        """Let go of a step that is over, and of its gradients."""
        if self.open is not None and not self.open.is_open:
            self.open = None

    # ---- GPUs ------------------------------------------------------------------------------------------------------

    @property
    def has_gpus(self) -> bool:
        """Whether some step was made on a GPU."""
        return bool(self.contexts)

    def is_elsewhere(self, device: int) -> bool:
        """Whether a step on this device (-1: the host) follows one on another."""
        last = -1 if self.last is None else self.last.plan.device
        return len(self.contexts) > 1 or (device >= 0) != (last >= 0)

    def context_of(self, buffer: _cpu.Buffer) -> Foreign:
        """What the plans of this optimizer share on the device of a variable; None for the host."""
        if buffer.device < 0:
            return None
        if buffer.device not in self.contexts:
            self.contexts[buffer.device] = cuda_module().Context(buffer.device)
        return self.contexts[buffer.device]

    def gatherer_of(self, buffer: _cpu.Buffer) -> Foreign:
        """What reads rows of tables on the GPU of a variable."""
        if buffer.device not in self._gatherers:
            self._gatherers[buffer.device] = cuda_module().Gather(buffer.device)
        return self._gatherers[buffer.device]

    def late_failure(self, *, wait: bool) -> tuple[int, str] | None:
        """The first step that a GPU refused after the call had returned: the count before it, and why."""
        for context in self.contexts.values():
            if wait:
                context.wait()
            failure: tuple[int, str] | None = context.take_failure()
            if failure is not None:
                return failure
        return None


def _start_of(pairs: list[object]) -> tuple[int, int]:
    """Quick to compute, and seldom the same for two sets of variables: their number, and the first one's address."""
    first = pairs[0]
    variable = unwrap(first[1]) if isinstance(first, (tuple, list)) and len(first) == 2 else None
    return (len(pairs), variable.ctypes.data if isinstance(variable, np.ndarray) else id(variable))


def _renew_locks() -> None:
    """A thread that held a lock when the process forked does not exist in the child."""
    for runtime in _live:
        runtime.lock = threading.RLock()
        runtime.step_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
