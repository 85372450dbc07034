"""Native plans of an optimizer, found again by the variables that a step is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastadam._core.backend import _cpu
from fastadam._core.extras import Extras
from fastadam._core.staleness import Staleness
from fastadam._core.variable import Variable, unwrap

__all__ = ["PlanKey", "Plans", "StepPlan"]

_MOST = 256  # plans kept; an optimizer that is called layer by layer has one for each


class PlanKey(NamedTuple):
    """What a plan is made of beside its variables."""

    version: int  # of the slots
    amsgrad: bool
    sparse_update: str
    extras: Extras


@dataclass(eq=False)
class StepPlan:
    """A native plan and what it was made of."""

    native: Any
    key: PlanKey
    buffers: list[_cpu.Buffer]
    positions: list[int]  # of the variables in the caller's list
    decays: list[bool]
    tables: list[Staleness | None]  # histories of variables that are tables in a deferred mode

    def __post_init__(self) -> None:
        """What each step would ask of lists that do not change."""
        self.device = self.buffers[0].device
        self.has_tables = any(self.tables)


class Plans:
    """Of sets of variables that an optimizer has stepped: a set seen before costs a comparison."""

    def __init__(self) -> None:
        self.last: StepPlan | None = None
        self.device = -1  # number of the GPU of the last step
        self._by_start: dict[tuple[int, int], StepPlan] = {}

    def find(self, pairs: list[Any], key: PlanKey) -> tuple[StepPlan, list[Any]] | None:
        """The plan of these (gradient, variable) pairs, and their gradients without those that are None."""
        found = _match(self.last, pairs, key)
        return found or (_match(self._by_start.get(_start_of(pairs)), pairs, key) if self._by_start else None)

    def add(self, plan: StepPlan, pairs: list[Any]) -> None:
        """Keep a plan; when there are too many, all others are forgotten."""
        if len(self._by_start) >= _MOST:
            self._by_start.clear()
        self._by_start[_start_of(pairs)] = plan

    def use(self, plan: StepPlan) -> None:
        """The next step is likely to be for the same variables."""
        self.last, self.device = plan, plan.device

    def clear(self) -> None:
        """Forget all: what they were made of has changed."""
        self.last = None
        self._by_start.clear()


def _match(plan: StepPlan | None, pairs: list[Any], key: PlanKey) -> tuple[StepPlan, list[Any]] | None:
    if plan is None or plan.key != key:
        return None
    gradients = plan.native.gradients_of(pairs, Variable)
    return None if gradients is None else (plan, gradients)


def _start_of(pairs: list[Any]) -> tuple[int, int]:
    """Quick to compute, and seldom the same for two sets of variables: their number, and where the first one lies."""
    first = pairs[0]
    variable = unwrap(first[1]) if isinstance(first, (tuple, list)) and len(first) == 2 else None
    return (len(pairs), variable.ctypes.data if isinstance(variable, np.ndarray) else id(variable))
