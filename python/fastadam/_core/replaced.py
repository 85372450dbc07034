"""Detects variables that are replaced by new arrays between steps, which loses their moments."""

from __future__ import annotations

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

__all__ = ["Replacements"]


@dataclass(frozen=True)
class _Met:
    """A variable as it was in its first step."""

    key: Key
    buffer: _cpu.Buffer
    given: weakref.ref[AnyArray] | None  # the caller's object; the buffer may keep another one alive
    meeting: int


class Replacements:
    """Warns once of ``w = w * 0.999`` between steps, in the step that meets the third array.

    A new array is a replacement if the optimizer keeps arrays of its shape and dtype that nobody else refers to, since
    they cannot come back. It takes two of them, from two different calls: the layers of one model that was dropped are
    not replacements. Only calls with a new variable are examined, and only the last 64 variables of each kind.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._meetings = 0
        self._met: dict[tuple[tuple[int, ...], str, int], deque[_Met]] = {}

    def look(
        self,
        given: Mapping[int, AnyArray],
        buffers: Sequence[_cpu.Buffer],
        new: set[Key],
        plans: Iterable[Sequence[_cpu.Buffer]],
    ) -> None:
        """Call it before a step with variables that have no plan.

        Args:
            given: The caller's variables by their places.
            buffers: The same variables as buffers.
            new: Keys of the variables that the optimizer has not met.
            plans: The buffers of each plan that is kept.
        """
        if self._has_warned or not new:
            return
        self._meetings += 1
        references = _references_of(plans)
        for (place, variable), buffer in zip(given.items(), buffers, strict=True):
            key = key_of(buffer)
            if key not in new:
                continue
            alike = self._met.setdefault((buffer.shape, buffer.dtype, buffer.device), deque(maxlen=64))
            gone = {met.meeting for met in alike if met.key != key and _is_abandoned(met, variable, references)}
            if len(gone - {self._meetings}) > 1:
                self._warn(buffer, place)
                return
            alike.append(_Met(key, buffer, _reference(variable), self._meetings))

    def _warn(self, buffer: _cpu.Buffer, place: int) -> None:
        self._has_warned = True
        self._met = {}
        label = f"grads_and_vars[{place}]" if buffer.label.startswith("vars[") else buffer.label
        warn(
            f"{label}: a new array, like others that the optimizer has updated and that are gone. Each new array "
            "starts with moments of zero, and the optimizer keeps those of the old ones. Change a variable in place "
            "between steps: `w *= 0.999` instead of `w = w * 0.999`, `np.clip(w, low, high, out=w)`, `w[...] = new`, "
            "and make a new optimizer for a new model. (Or the pair is swapped, expected (gradient, variable).)"
        )


def _references_of(plans: Iterable[Sequence[_cpu.Buffer]]) -> dict[int, tuple[set[int], int]]:
    """For the id of each array: the Buffers of plans that refer to it, and how many native plans have a copy of one."""
    references: dict[int, tuple[set[int], int]] = {}
    for buffers in plans:
        for buffer in buffers:
            ids, count = references.get(id(buffer.source), (set(), 0))
            references[id(buffer.source)] = (ids | {id(buffer)}, count + 1)
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
