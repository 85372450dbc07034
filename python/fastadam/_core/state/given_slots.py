"""Arrays of the user's as slots of new variables: ``build(variables, slots=...)``."""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastadam._core.common.checks import check_list
from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.arrays import beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, key_of
from fastadam._core.native.chunks import copy_over_zeros, is_zero, store
from fastadam._core.native.gradients import bfloat16_to_float32
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import MOMENTS, StateFormat, VariableFormat

__all__ = ["AVERAGE", "GivenSlots", "is_a_hole"]

AVERAGE = "average"
_GIVABLE = (*MOMENTS, AVERAGE, ACCUMULATOR)
_NEEDS = {
    AVERAGE: "; an average needs use_ema=True",
    ACCUMULATOR: "; an accumulator needs gradient_accumulation_steps",
}

_BLOCK = 2**16  # at least as large as a block of any file system


class _Format(NamedTuple):
    """The format of a variable some of whose slots are given."""

    chosen: VariableFormat
    given: Mapping[str, HostArray]

    @property
    def names(self) -> tuple[str, ...]:
        return self.chosen.names

    def begin(self, buffer: _cpu.Buffer, name: str, /) -> AnyArray:
        return self.given[name] if name in self.given else self.chosen.begin(buffer, name)


class _Place(NamedTuple):
    """Where an array lies: in memory, or in a file."""

    space: str  # "" for memory, or which file
    begin: int
    nbytes: int
    label: str
    address: int
    given: str | None = None  # the name of a slot that is given


class GivenSlots:
    """For each variable of a ``build`` the slots that the user gives.

    Args:
        slots: For each variable None or a mapping from names to arrays.
        buffers: The variables.
        state_format: What a step keeps for each of them.

    Raises:
        TypeError: Something else than that.
        ValueError: Another number of items; a variable is given slots twice.
    """

    def __init__(self, slots: Iterable[object], buffers: list[_cpu.Buffer], state_format: StateFormat) -> None:
        items = check_list("slots", slots, "None or a dict for each variable")
        if len(items) != len(buffers):
            raise ValueError(f"slots: {len(items)} items, expected one for each of {len(buffers)} variables, or None")
        self._state_format = state_format
        self.by_key: dict[Key, dict[str, HostArray]] = {}
        self._labels: dict[Key, str] = {}
        self._begun: list[HostArray] = []
        for i, (item, buffer) in enumerate(zip(items, buffers, strict=True)):
            if item is None:
                continue
            if not isinstance(item, Mapping):
                raise TypeError(f"slots[{i}]: {type(item).__name__}, expected a dict of arrays or None")
            if key_of(buffer) in self.by_key:
                raise ValueError(f"slots[{i}]: given for {buffer.label} before, expected its slots once")
            self.by_key[key_of(buffer)] = dict(item)
            self._labels[key_of(buffer)] = f"slots[{i}]"

    @classmethod
    def of_one(cls, slots: object, buffer: _cpu.Buffer, state_format: StateFormat) -> GivenSlots:
        """The slots of one variable, which are not in a list."""
        if not isinstance(slots, Mapping):
            raise TypeError(f"slots: {type(slots).__name__}, expected a dict of arrays or None")
        given = cls([slots], [buffer], state_format)
        given._labels = dict.fromkeys(given._labels, "slots")
        return given

    def format_of(self, buffer: _cpu.Buffer, slots: Mapping[str, AnyArray]) -> _Format:
        """The format of a variable that has these slots already.

        Raises:
            TypeError: A slot that is given is not a NumPy array, or has another dtype than the state.
            ValueError: It has another shape or layout, is read-only, or the variable cannot have it.
        """
        chosen = self._state_format.of(buffer, slots)
        given, label = self.by_key.get(key_of(buffer), {}), self._labels.get(key_of(buffer), "")
        for name, array in given.items():
            found = f"{label}[{name!r}]"
            if name not in _GIVABLE or name not in chosen.names:
                expected = ", ".join(repr(each) for each in chosen.names if each in _GIVABLE)
                expected += _NEEDS.get(name, "")
                raise ValueError(f"{found}: not a slot that can be given, expected {expected}")
            if name in slots:
                raise ValueError(f"{found}: {buffer.label} has this slot already, expected build() before that")
            _check(found, array, chosen.dtype_of(buffer, name), buffer)
        return _Format(chosen, given)

    def of_file(self, buffer: _cpu.Buffer, dtypes: Mapping[str, str]) -> Mapping[str, HostArray]:
        """The arrays for slots of a variable that a file has, with these dtypes; raises as ``format_of`` does."""
        given, label = self.by_key.get(key_of(buffer), {}), self._labels.get(key_of(buffer), "")
        for name, array in given.items():
            found = f"{label}[{name!r}]"
            if name not in _GIVABLE or name not in dtypes:
                expected = ", ".join(repr(each) for each in _GIVABLE if each in dtypes)
                raise ValueError(f"{found}: not a slot that the file has for {buffer.label}, expected {expected}")
            _check(found, array, dtypes[name], buffer)
        return given

    def require_apart(self, others: Iterable[tuple[str, int, int]], replaced: Mapping[str, int] | None = None) -> None:
        """Raise ValueError if a given array shares memory or a part of a file with another one, or with others.

        Args:
            others: Label, address and bytes of each.
            replaced: The addresses of slots, by name, whose parts of a file the given ones of these names may have:
                each element stays where it is.
        """
        lying = [_Place("", address, nbytes, label, address) for label, address, nbytes in others]
        for key, given in self.by_key.items():
            for name, array in given.items():
                address, label = array.ctypes.data, f"{self._labels[key]}[{name!r}]"
                lying.append(_Place("", address, array.nbytes, label, address, name))
        for mine, other in _overlaps(lying):
            raise ValueError(f"{mine.label}: shares memory with {other.label}, expected an array of its own")
        for mine, other in _overlaps(_in_files(lying)):
            stays = replaced is not None and replaced.get(mine.given or "") == other.address
            if not (stays and mine.begin == other.begin):
                raise ValueError(
                    f"{mine.label}: lies in the same part of a file as {other.label}, expected a file of its own"
                )

    def are_zeros(self, key: Key) -> bool:
        """Whether the moments that are given for a variable are known to be zero, without reading them."""
        given = self.by_key.get(key, {})
        return all(is_a_hole(array) for name, array in given.items() if name in MOMENTS)

    def require_no_sums(self) -> None:
        """Raise ValueError if an accumulator is not zero: nothing says which calls of which cycle it has the sum of."""
        for key, given in self.by_key.items():
            sums = given.get(ACCUMULATOR)
            if sums is not None and not is_a_hole(sums) and not is_zero(sums):
                raise ValueError(f"{self._labels[key]}[{ACCUMULATOR!r}]: has sums of earlier gradients, expected zeros")

    def begin_averages(self, buffers: Iterable[_cpu.Buffer]) -> None:
        """Averages of zeros begin at their variables, as those that the optimizer makes; others stay as they are."""
        for buffer in buffers:
            average = self.by_key.get(key_of(buffer), {}).get(AVERAGE)
            if average is not None and (is_a_hole(average) or is_zero(average)):
                is_bits = buffer.dtype == "bfloat16" and not isinstance(buffer.source, np.ndarray)
                values = buffer.source if isinstance(buffer.source, np.ndarray) else buffer.array()
                self._begun.append(average)
                copy_over_zeros(average, values, bfloat16_to_float32 if is_bits else lambda piece: piece)

    def empty_averages(self) -> None:
        """Set the averages that were begun to zero again."""
        for average in self._begun:
            store(average, lambda count: np.zeros(count, np.uint8), is_zero=False)


def is_a_hole(array: HostArray) -> bool:
    """Whether an array is a memmap of a file of holes, as ``np.memmap`` makes them: it is all zeros.

    Only the end of the file is read, where ``np.memmap`` writes a zero to make it as long as it is.
    """
    if not isinstance(array, np.memmap) or not array.filename or not hasattr(os, "SEEK_DATA"):
        return False
    if array.mode not in ("r+", "w+"):  # its own pages may have been written to
        return False
    try:
        with Path(array.filename).open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            begin = os.lseek(file.fileno(), 0, os.SEEK_DATA)
            data = file.read(_BLOCK + 1)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno == errno.ENXIO  # there is no data
    return len(data) <= _BLOCK and begin + len(data) == end and not any(data)


def _overlaps(places: list[_Place]) -> Iterator[tuple[_Place, _Place]]:
    """Pairs of places that overlap, a given one before another; not all, but some of each group."""
    furthest = None
    for place in sorted((each for each in places if each.nbytes), key=lambda each: each[:2]):
        if furthest is None or furthest.space != place.space or place.begin >= furthest.begin + furthest.nbytes:
            furthest = place
            continue
        if place.given or furthest.given:
            yield (place, furthest) if place.given else (furthest, place)
        if place.begin + place.nbytes > furthest.begin + furthest.nbytes:
            furthest = place


def _in_files(places: list[_Place]) -> list[_Place]:
    """Those that lie in memory maps of files, there; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    begins, maps = [], []
    for line in lines:
        span, mode, offset, device, inode, *_ = line.split()
        if mode[3] == "s":  # what is written to it goes to the file
            begins.append(int(span.split("-")[0], 16))
            maps.append((int(span.split("-")[1], 16), int(offset, 16), f"{device} {inode}"))
    found = []
    for place in places:
        at = bisect.bisect_right(begins, place.address) - 1
        if at >= 0 and place.address < maps[at][0]:
            _, start, file = maps[at]
            found.append(place._replace(space=file, begin=start + place.address - begins[at]))
    return found


def _check(label: str, array: object, dtype: str, buffer: _cpu.Buffer) -> None:
    if buffer.device >= 0:
        raise ValueError(f"{label}: for {buffer.label} on a GPU, expected None")
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{label}: {type(array).__name__}, expected a NumPy array")
    if array.dtype.name != dtype or not array.dtype.isnative:
        raise TypeError(f"{label}: {array.dtype}, expected {dtype}, the dtype of the state of {buffer.label}")
    if dtype == "uint8":
        raise ValueError(f"{label}: with moments='8bit', expected None")
    if array.shape != buffer.shape:
        raise ValueError(f"{label}: shape {array.shape}, expected {buffer.shape} like {buffer.label}")
    if not beside(array, buffer) or not array.flags.aligned:
        raise ValueError(f"{label}: strides {array.strides}, expected a contiguous array in order {buffer.order}")
    if not array.flags.writeable:
        raise ValueError(f"{label}: read-only, expected a writable array")
