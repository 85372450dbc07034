"""Variables that are replaced by new arrays between steps, which then train without their moments."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastadam._core.backend import _cpu
from fastadam._core.types import AnyArray
from fastadam._core.variable import Key, key_of
from fastadam._core.warning import warn

__all__ = ["Replacements"]


@dataclass(frozen=True)
class _Met:
    """A variable when the optimizer first met it."""

    key: Key
    buffer: _cpu.Buffer
    given: weakref.ref[Any] | None  # the caller's object, which need not be what the buffer keeps alive
    meeting: int


class Replacements:
    """Warns once of ``w = w * 0.999`` between steps, in the step that meets the third array.

    A new array is a replacement if the optimizer keeps arrays of its shape and dtype that nobody else refers to: they
    cannot come back. Two of them, met in two different calls, are needed: the layers of one model that was dropped are
    none. Only calls with a new variable are looked at, and of each kind the last 64 variables.
    """

    def __init__(self) -> None:
        self._has_warned = False
        self._meetings = 0
        self._met: dict[tuple[Any, ...], deque[_Met]] = {}

    def look(
        self,
        given: Mapping[int, AnyArray],
        buffers: Sequence[_cpu.Buffer],
        new: set[Key],
        plans: Iterable[Sequence[_cpu.Buffer]],
    ) -> None:
        """Before a step with variables that no plan was found for.

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
    """By an array: the Buffers of plans that refer to it, and how many native plans have a copy of one."""
    found: dict[int, tuple[set[int], int]] = {}
    for buffers in plans:
        for buffer in buffers:
            known, count = found.get(id(buffer.source), (set(), 0))
            found[id(buffer.source)] = (known | {id(buffer)}, count + 1)
    return found


def _reference(variable: Any) -> weakref.ref[Any] | None:
    if isinstance(variable, np.ndarray):
        return None  # NumPy refuses to resize an array that has one
    try:
        return weakref.ref(variable)
    except TypeError:
        return None


def _is_abandoned(met: _Met, now: Any, references: Mapping[int, tuple[set[int], int]]) -> bool:
    """Whether the caller can no longer reach the memory of a variable."""
    source = met.buffer.source
    if not isinstance(source, np.ndarray):  # kept alive by other means than the caller's object
        owner = met.given and met.given()
        return met.given is not None and (owner is None or owner is now)  # `p.data = ...` in PyTorch
    # Each Buffer refers to its array, and each native plan has copies of its Buffers.
    buffers, copies = references.get(id(source), (set(), 0))
    probe = object()  # to which one name refers, as `source` does
    if sys.getrefcount(source) - sys.getrefcount(probe) > len(buffers | {id(met.buffer)}) + copies:
        return False
    base = source.base
    if base is None:
        return True
    return isinstance(base, np.ndarray) and base.base is None and sys.getrefcount(base) - sys.getrefcount(probe) <= 1
