"""The state arrays of an optimizer: found by the memory of their variable, listed in the order of their creation."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._backend import _cpu

__all__ = ["Initializer", "SlotStore", "initial_value"]

Key = tuple[int, tuple[int, ...], str, str]
Array = npt.NDArray[Any]
NewSlot = tuple[_cpu.Buffer, str, Array]
Initializer = str | Callable[..., npt.ArrayLike] | npt.ArrayLike


def key_of(buffer: _cpu.Buffer) -> Key:
    """Two views of one buffer have one key; the store keeps the buffer alive, so an address is never reused."""
    return (buffer.address, buffer.shape, buffer.dtype, buffer.order)


def initial_value(
    initializer: Initializer, shape: tuple[int, ...], dtype: npt.DTypeLike, order: str = "C"
) -> npt.NDArray[Any]:
    """A new array: "zeros", "ones", the result of ``initializer(shape, dtype)``, or a value of that shape."""
    layout: Any = order
    if isinstance(initializer, str):
        makers = {"zeros": np.zeros, "ones": np.ones}
        if initializer not in makers:
            raise ValueError(f"initializer: {initializer!r}, expected 'zeros', 'ones', a callable or an array")
        return makers[initializer](shape, dtype, order=layout)
    value = initializer(shape, dtype=dtype) if callable(initializer) else initializer
    array = np.array(value, dtype=dtype, order=layout)
    if array.shape != shape:
        raise ValueError(f"initializer: shape {array.shape}, expected {shape}")
    return array


@dataclass
class _Entry:
    buffer: _cpu.Buffer
    slots: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


class SlotStore:
    """Slots of all variables, and the flat list of them that ``weights`` shows."""

    def __init__(self) -> None:
        self.arrays: list[npt.NDArray[Any]] = []
        self.names: list[str] = []
        self._entries: dict[Key, _Entry] = {}
        self._intervals: list[tuple[int, int, _cpu.Buffer]] = []

    def find(self, buffer: _cpu.Buffer) -> dict[str, npt.NDArray[Any]] | None:
        """The slots of this variable by name, or None for a variable never seen."""
        entry = self._entries.get(key_of(buffer))
        if entry is not None and not entry.buffer.is_current():
            raise ValueError(
                f"{buffer.label}: lies where a variable of this optimizer was before its memory was freed "
                "(ndarray.resize with refcheck=False?); its state belongs to that one"
            )
        return None if entry is None else entry.slots

    def require_new_memory(self, buffer: _cpu.Buffer) -> None:
        """Refuse a variable that overlaps a known one under another shape: its moments would start at zero unseen."""
        at = bisect.bisect_left(self._intervals, (buffer.address, 0), key=lambda interval: interval[:2])
        for begin, end, known in self._intervals[max(at - 1, 0) : at + 1]:
            if begin < buffer.address + buffer.nbytes and buffer.address < end:
                raise ValueError(
                    f"{buffer.label}: overlaps a variable of this optimizer known as {known.dtype} {known.shape} in "
                    f"order {known.order}, expected that view or separate memory, got {buffer.dtype} {buffer.shape} in "
                    f"order {buffer.order}"
                )

    def prepare(self, buffers: Sequence[_cpu.Buffer], names: Sequence[str]) -> tuple[list[list[Array]], list[NewSlot]]:
        """For each name the slots of these variables, and the new ones among them, which are not registered yet.

        The new ones come in TF's order: all m, then all v, then all vhat.
        """
        new: dict[tuple[Key, str], NewSlot] = {}
        for name in names:
            for buffer in buffers:
                known = self.find(buffer)
                if known is None:
                    self.require_new_memory(buffer)
                key = (key_of(buffer), name)
                if (known is None or name not in known) and key not in new:
                    new[key] = (buffer, name, zeros_like_variable(buffer))
        slots = [
            [new[key][2] if (key := (key_of(b), name)) in new else self._entries[key[0]].slots[name] for b in buffers]
            for name in names
        ]
        return slots, list(new.values())

    def add(self, buffer: _cpu.Buffer, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Register a new slot."""
        key = key_of(buffer)
        if key not in self._entries:
            self._entries[key] = _Entry(buffer)
            if buffer.nbytes:
                bisect.insort(
                    self._intervals, (buffer.address, buffer.address + buffer.nbytes, buffer), key=lambda i: i[:2]
                )
        self._entries[key].slots[name] = array
        self.arrays.append(array)
        if name not in self.names:
            self.names.append(name)
        return array


def zeros_like_variable(buffer: _cpu.Buffer) -> npt.NDArray[Any]:
    """A slot of zeros in the layout of the variable; float32 for half variables.

    Its address agrees with the variable's modulo a cache line, or a page where the array is long: a load does not wait
    for a store to the same offset of another page, and one shift aligns all streams. Long arrays also start 64 KiB
    further: arrays of 2^k bytes end to end hit the same DRAM banks, which costs a third of the bandwidth.
    """
    dtype = np.dtype(buffer.state_dtype)
    nbytes = buffer.size * dtype.itemsize
    period = _PAGE if nbytes >= 4 * _PAGE else _CACHE_LINE
    skew = 16 * _PAGE if nbytes >= 256 * _PAGE else 0
    raw = np.zeros(nbytes + period + skew, np.uint8)
    start = skew + (buffer.address - raw.ctypes.data - skew) % period
    layout: Any = buffer.order
    return raw[start : start + nbytes].view(dtype).reshape(buffer.shape, order=layout)


_CACHE_LINE = 64
_PAGE = 4096
