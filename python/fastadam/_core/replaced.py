"""Detects variables that are replaced by new arrays between steps, which loses their moments."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastadam._core.common.types import AnyArray
from fastadam._core.common.warning import warn
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, key_of
from fastadam._core.native.rows import bits_of
from fastadam._core.native.variable import name_in

__all__ = ["Replacements"]

_MANY_ROWS = 1024  # compared at a time


@dataclass(frozen=True)
class _Met:
    """A variable as it was in its first step."""

    key: Key
    buffer: _cpu.Buffer
    given: weakref.ref[AnyArray] | None  # the caller's object; the buffer may keep another one alive


class Replacements:
    """Warns once of ``w = w * 0.999`` and of ``table = np.concatenate([table, rows])`` between steps.

    A new array takes the place of a variable that gets no gradient in its first step, if it has the variable's dtype
    and shape but for the first axis, not another name, and either

    - nobody but the optimizer refers to the variable, which therefore cannot come back; or
    - its first rows are those of the variable as they are now, to the bit, and not all the same number.

    Networks that are stepped by turns, and layers that are trained one after another, are neither. Only calls with a
    new variable are examined, and only the last 64 variables of each kind.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._met: dict[tuple[object, ...], deque[_Met]] = {}
        self._resized: dict[Key, weakref.ref[AnyArray]] = {}  # arrays that `resize` has let go of

    def look(
        self,
        given: Mapping[int, AnyArray],
        buffers: Sequence[_cpu.Buffer],
        new: set[Key],
        plans: Iterable[Sequence[_cpu.Buffer]],
        kept: Iterable[_cpu.Buffer],
    ) -> None:
        """Call it before a step with variables that have no plan.

        Args:
            given: The caller's variables by their places.
            buffers: The same variables as buffers.
            new: Keys of the variables that the optimizer has not met.
            plans: The buffers of each plan that is kept.
            kept: Other buffers that the optimizer keeps.
        """
        self._look_for_resized(given, buffers, new)
        if self._has_warned:
            return
        references = _references_of(plans, kept) if new else {}
        here = {key_of(buffer) for buffer in buffers}
        for (place, variable), buffer in zip(given.items(), buffers, strict=True):
            key = key_of(buffer)
            alike = self._met.setdefault(_kind_of(buffer), deque(maxlen=64))
            if key in new:
                for met in alike:
                    if met.key in here or not _may_replace(buffer, met.buffer):
                        continue
                    is_gone = _is_abandoned(met, variable, references)
                    if is_gone or _continues(buffer, met.buffer):
                        which = "that is gone" if is_gone else "with these values, which gets no gradient now"
                        self._warn(buffer, place, f"{met.buffer.shape} {which}")
                        return
            if key not in [met.key for met in alike]:
                alike.append(_Met(key, buffer, _reference(variable)))

    def note_resized(self, old: _cpu.Buffer) -> None:
        """Another array has taken the place of this one."""
        with contextlib.suppress(TypeError):  # an object of another library without weak references
            self._resized = {key: ref for key, ref in self._resized.items() if ref() is not None}
            self._resized[key_of(old)] = weakref.ref(old.source)

    def _look_for_resized(self, given: Mapping[int, AnyArray], buffers: Sequence[_cpu.Buffer], new: set[Key]) -> None:
        for place, buffer in zip(given, buffers, strict=True):
            key = key_of(buffer)
            ref = self._resized.pop(key, None) if key in new else None
            if ref is not None and ref() is not None:
                label = f"grads_and_vars[{place}]" if buffer.label.startswith("vars[") else buffer.label
                warn(
                    f"{label}: resize() gave its moments to another array, which is stepped no more; it starts with "
                    "moments of zero. Go on with the new array"
                )

    def forget(self, key: Key) -> None:
        """Let go of a variable that the optimizer does not know any more."""
        for kind, alike in self._met.items():
            self._met[kind] = deque([met for met in alike if met.key != key], maxlen=alike.maxlen)

    def _warn(self, buffer: _cpu.Buffer, place: int, old: str) -> None:
        self._has_warned = True
        self._met = {}
        label = f"grads_and_vars[{place}]" if buffer.label.startswith("vars[") else buffer.label
        warn(
            f"{label}: a new array of shape {buffer.shape}, while the optimizer has updated one of shape {old}. It "
            "starts with moments of zero, and the optimizer keeps those of the old one. opt.resize(old, new) before "
            "the step gives them to the new array. Change a variable in place between steps: `w *= 0.999` instead of "
            "`w = w * 0.999`, `np.clip(w, low, high, out=w)`, `w[...] = new`, and make a new optimizer for a new "
            "model. (Or the pair is swapped, expected (gradient, variable).)"
        )


def _kind_of(buffer: _cpu.Buffer) -> tuple[object, ...]:
    """What a variable has in common with an array that it is copied to or grows into."""
    return buffer.dtype, buffer.device, len(buffer.shape), buffer.shape[1:]


def _may_replace(new: _cpu.Buffer, old: _cpu.Buffer) -> bool:
    """Whether their names allow it."""
    return len({name for name in (name_in(new.label), name_in(old.label)) if name}) < 2


def _continues(new: _cpu.Buffer, old: _cpu.Buffer) -> bool:
    """Whether one begins with the rows of the other, apart in memory; for variables with axes on the host."""
    if new.device >= 0 or not new.shape or not new.size or not old.size:
        return False
    rows = min(new.shape[0], old.shape[0])
    one, other = new.array()[:rows], old.array()[:rows]
    if one.flat[0] != other.flat[0] or np.may_share_memory(one, other):
        return False
    varies = False
    for begin in range(0, rows, _MANY_ROWS):
        bits = bits_of(one[begin : begin + _MANY_ROWS])
        if (bits != bits_of(other[begin : begin + _MANY_ROWS])).any():
            return False
        varies = varies or bool((bits != bits.flat[0]).any() or one[begin].flat[0] != one.flat[0])
    return varies


def _references_of(
    plans: Iterable[Sequence[_cpu.Buffer]], kept: Iterable[_cpu.Buffer]
) -> dict[int, tuple[set[int], int]]:
    """For the id of each array: the Buffers that refer to it, and how many native plans have a copy of one."""
    references: dict[int, tuple[set[int], int]] = {}
    for buffers in plans:
        for buffer in buffers:
            ids, count = references.get(id(buffer.source), (set(), 0))
            references[id(buffer.source)] = (ids | {id(buffer)}, count + 1)
    for buffer in kept:
        ids, count = references.get(id(buffer.source), (set(), 0))
        references[id(buffer.source)] = (ids | {id(buffer)}, count)
    return references


def _reference(variable: AnyArray) -> weakref.ref[AnyArray] | None:
    if isinstance(variable, np.ndarray):
        return None  # NumPy refuses to resize an array that has a weak reference
    try:
        return weakref.ref(variable)
    except TypeError:
        return None


def _is_abandoned(met: _Met, now: AnyArray, references: Mapping[int, tuple[set[int], int]]) -> bool:
    """Whether the caller can no longer reach the memory of a variable."""
    source = met.buffer.source
    if not isinstance(source, np.ndarray):  # the buffer keeps something else alive than the caller's object
        owner = met.given and met.given()
        return met.given is not None and (owner is None or owner is now)  # `p.data = ...` in PyTorch
    # Each Buffer holds a reference to its array, and each native plan holds copies of its Buffers.
    buffers, copies = references.get(id(source), (set(), 0))
    probe = object()  # has one reference, as `source` would if nobody else referred to it
    if sys.getrefcount(source) - sys.getrefcount(probe) > len(buffers | {id(met.buffer)}) + copies:
        return False
    base = source.base
    if base is None:
        return True
    return isinstance(base, np.ndarray) and base.base is None and sys.getrefcount(base) - sys.getrefcount(probe) <= 1
