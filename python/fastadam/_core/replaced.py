"""Variables that are replaced by new arrays between steps, which then train without their moments."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastadam._core.backend import _cpu
from fastadam._core.plans import Plans, StepPlan
from fastadam._core.slots import Key, key_of
from fastadam._core.warning import warn

__all__ = ["Replacements"]


@dataclass(frozen=True)
class _Met:
    """A variable of one step, and the ones in whose place it came."""

    buffer: _cpu.Buffer
    given: weakref.ref[Any] | None  # the caller's object, which need not be what the buffer keeps alive
    before: tuple[_Met, ...] = ()


class Replacements:
    """Warns once of ``w = w * 0.999`` between steps, in the step that meets the third array.

    A new array replaces a variable if it comes at the same place of the list, in the same shape and dtype, in the very
    next step, which does not contain that variable. This alone would also describe layers that are stepped one by one,
    or models that take turns. So two replacements in a row are needed, and the first of the three arrays must be one
    that nobody but the optimizer refers to: it cannot come back. Only steps with a new variable are looked at.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._calls = -1
        self._last: dict[int, _Met] = {}

    def look(
        self, calls: int, given: Mapping[int, Any], buffers: Sequence[_cpu.Buffer], new: set[Key], plans: Plans
    ) -> None:
        """Before a step that no plan was found for.

        Args:
            calls: Count of steps before this one.
            given: The caller's variables by their places.
            buffers: The same as buffers.
            new: Those that the optimizer has not met.
            plans: Those of the steps before.
        """
        if self._has_warned or not new:
            return
        # A step that a dynamic loss scale left out is not counted.
        before = self._last if self._calls in (calls - 1, calls) else _of_plan(plans.last)
        present = set(map(key_of, buffers))
        met: dict[int, _Met] = {}
        for (place, variable), buffer in zip(given.items(), buffers, strict=True):
            old = before.get(place) if key_of(buffer) in new else None
            is_replaced = old is not None and _is_like(old.buffer, buffer) and key_of(old.buffer) not in present
            chain = (*old.before[-1:], replace(old, before=())) if old is not None and is_replaced else ()
            met[place] = _Met(buffer, _reference(variable), chain)
            if len(chain) == 2 and _is_abandoned(chain[0], variable, plans):
                self._warn(buffer, place)
                return
        self._calls, self._last = calls, met

    def _warn(self, buffer: _cpu.Buffer, place: int) -> None:
        self._has_warned = True
        self._last = {}
        label = f"grads_and_vars[{place}]" if buffer.label.startswith("vars[") else buffer.label
        warn(
            f"{label}: a new array in each of the last steps. Each new array starts with moments of zero, and the "
            "optimizer keeps those of the old ones. Change a variable in place between steps: `w *= 0.999` instead of "
            "`w = w * 0.999`, `np.clip(w, low, high, out=w)`, `w[...] = new`. (Or the pair is swapped, expected "
            "(gradient, variable).)"
        )


def _of_plan(plan: StepPlan | None) -> dict[int, _Met]:
    """The variables of a step that has been made before."""
    pairs = () if plan is None else zip(plan.positions, plan.buffers, strict=True)
    return {place: _Met(buffer, None) for place, buffer in pairs}


def _is_like(old: _cpu.Buffer, new: _cpu.Buffer) -> bool:
    return (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)


def _reference(variable: Any) -> weakref.ref[Any] | None:
    if isinstance(variable, np.ndarray):
        return None  # NumPy refuses to resize an array that has one
    try:
        return weakref.ref(variable)
    except TypeError:
        return None


def _is_abandoned(met: _Met, now: Any, plans: Plans) -> bool:
    """Whether the caller can no longer reach the memory of a variable that ``now`` has replaced."""
    source = met.buffer.source
    if not isinstance(source, np.ndarray):  # kept alive by other means than the caller's object
        owner = met.given and met.given()
        return met.given is not None and (owner is None or owner is now)  # `p.data = ...` in PyTorch
    # Each Buffer refers to its array, and each native plan has copies of its Buffers.
    known = [b for plan in plans for b in plan.buffers if b.source is source]
    own = len({id(b) for b in [met.buffer, *known]}) + len(known)
    probe = object()  # to which one name refers, as `source` does
    if sys.getrefcount(source) - sys.getrefcount(probe) > own:
        return False
    base = source.base
    if base is None:
        return True
    return isinstance(base, np.ndarray) and base.base is None and sys.getrefcount(base) - sys.getrefcount(probe) <= 1
