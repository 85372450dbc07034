"""Tables in a deferred mode: which steps each row has had, and the rates of the steps that some of them wait for."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._core.backend import _cpu
from fastadam._core.placement import assign, native_of, to_host, zeros_beside

__all__ = ["Numbers", "Staleness", "crossover"]

_PEAK_STEPS = 64  # kPeakSteps in csrc/core/step_args.h
_FIRST_ROOM = 1024
_CACHE_BYTES = 2**25
_DEVICE_CROSSOVER = 2.0  # of `crossover`; not measured on a GPU
Arrays = tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


class Numbers(NamedTuple):
    """What the steps of one history have in common; the rows are brought up to date before one of them changes."""

    beta_1: float
    beta_2: float
    epsilon: float
    amsgrad: bool


class Staleness:
    """The history of one table, in arrays that the native plan reads and appends to.

    ``arrays`` are replaced all at once: whatever is interrupted leaves one whole history. In the order of
    StaleTable::Arrays in csrc/bind/stale.h they are:

    - last: steps of the history that each row has had, int32
    - alphas: the rate of each step, in the dtype of the moments
    - keeps: its factor of weight decay
    - peaks: the largest |alpha| of every 64 steps
    - counts: steps in the history; those of them with weight decay; on a GPU, those that all rows have had

    Of a table on a GPU ``last`` lies there. It is never cleared, and ``calls`` has the count of calls before each step:
    steps that turn out to have done nothing can be taken back.
    """

    def __init__(
        self, arrays: Arrays, numbers: Numbers, shape: tuple[int, ...], exact: bool, fingerprint: int | None = None
    ) -> None:
        self.arrays = arrays
        self.numbers = numbers
        self.shape = shape
        self.exact = exact  # rows get the bits of dense steps; else missed steps may be summed in closed form
        self._crossover: float | None = None
        self._forms: _cpu.ClosedForms | None = None  # can be made again of the arrays
        self.device = -1  # number of the GPU that the table lies on
        self.calls: npt.NDArray[np.int64] | None = None
        self.catching_up: Any = None  # the plan that brings rows up to date
        self._history: Any = None  # the rates, as a GPU has them
        self._table: _cpu.Buffer | None = None  # where it lies
        self.is_asked_for = False  # since its last step some or all rows were brought up to date to be read
        self.swept = 0  # the row that a sweep comes to next
        self.fingerprint = fingerprint  # of the table, when this copy of its history was made

    @classmethod
    def of(cls, buffer: _cpu.Buffer, numbers: Numbers, exact: bool) -> Staleness:
        """That of a table all of whose rows are up to date; a table of float64 is always exact."""
        rooms = (_FIRST_ROOM, _FIRST_ROOM, _FIRST_ROOM // _PEAK_STEPS)
        alphas, keeps, peaks = (np.zeros(room, buffer.state_dtype) for room in rooms)
        last, counts = np.zeros(buffer.shape[0], np.int32), np.zeros(3, np.int64)
        exact = exact or buffer.state_dtype == "float64"
        table = cls((last, alphas, keeps, peaks, counts), numbers, buffer.shape, exact)
        return table.placed(buffer)

    def placed(self, buffer: _cpu.Buffer) -> Staleness:
        """The same where its table lies: another one, if that is a GPU and this is of the host."""
        if buffer.device < 0 or self._table is not None:
            return self
        on_host, *rates, counts = (array.copy() for array in self.arrays)
        last = zeros_beside(buffer, "int32", (self.shape[0],))
        assign(last, on_host)
        counts.resize(3)
        twin = Staleness((last, *rates, counts), self.numbers, self.shape, self.exact)
        twin.device, twin._table = buffer.device, buffer
        twin.calls = np.zeros(self.room, np.int64)
        return twin

    def is_behind(self, gradient: Any) -> bool:
        """Whether a step on the host touches a row that waits; the ids have not been checked."""
        ids = getattr(gradient, "indices", None)
        if not self.waits or not isinstance(ids, np.ndarray) or not isinstance(self.last, np.ndarray):
            return False
        return bool(ids.size and (np.take(self.last, ids, mode="clip") < self.steps).any())

    def confirm(self) -> None:
        """The steps so far are good: they are not taken back, whatever calls are counted from here on."""
        if self.calls is not None:
            self.calls[: self.steps] = -1

    def forget_from(self, calls: int) -> None:
        """Take back the steps made when so many calls had been, or more: they have changed nothing."""
        if self.calls is None:
            return
        steps = int(np.searchsorted(self.calls[: self.steps], calls))
        self.arrays[4][:] = (steps, np.count_nonzero(self.arrays[2][:steps] != 1), 0)
        self._forms = self.catching_up = None

    def change_numbers(self, numbers: Numbers) -> None:
        """Of a history whose rows are all up to date."""
        self.numbers = numbers
        self._crossover = self.catching_up = None

    @property
    def native(self) -> tuple[Any, ...]:
        """As a native plan takes it."""
        if self._forms is None and not self.exact:
            self._forms = (_cpu if self._table is None else native_of(self._table)).ClosedForms()
        if self._crossover is None:
            beta_1, beta_2, _, amsgrad = self.numbers
            replays = self.exact or not _cpu.ClosedForms.exist(beta_1, beta_2, amsgrad)
            self._crossover = crossover(self.shape, self.arrays[1].itemsize, replays)
        if self._table is None:
            return (*self.arrays, self._forms, self._crossover)
        rows = _DEVICE_CROSSOVER if self.exact else self._crossover  # a pass changes last bits of closed forms
        return (*self.arrays, self._forms, rows, self.calls, self._history_on(self._table))

    def _history_on(self, table: _cpu.Buffer) -> Any:
        if self._history is None:
            native, rates = native_of(table), self.arrays[1:4]
            self._history = native.History(*rates, self.steps, self.device, native.stream_of(table.source) or 0)
        return self._history

    @property
    def last(self) -> Any:
        """Steps of the history that each row has had."""
        return self.arrays[0]

    @property
    def steps(self) -> int:
        """Steps in the history."""
        return int(self.arrays[4][0])

    @property
    def waits(self) -> bool:
        """Whether some row may lag behind."""
        return self.steps != (0 if self.calls is None else int(self.arrays[4][2]))

    @property
    def room(self) -> int:
        """Steps for which there is room."""
        return len(self.arrays[1])

    def make_room(self) -> None:
        """In new arrays: without the steps that all rows have had, if these are half of them, else twice as long."""
        last, *rates, counts = self.arrays
        on_host = to_host(last)
        first = int(on_host.min(initial=self.steps)) // _PEAK_STEPS * _PEAK_STEPS
        self._history = self.catching_up = None
        if first < self.steps // 2:
            alphas, keeps, peaks = (np.concatenate([old, np.zeros_like(old)]) for old in rates)
            self.arrays = (last, alphas, keeps, peaks, counts)
            if self.calls is not None:
                self.calls = np.concatenate([self.calls, np.zeros_like(self.calls)])
            return
        self._forms = None
        places = (first, first, first // _PEAK_STEPS)
        alphas, keeps, peaks = (np.roll(old, -place) for old, place in zip(rates, places, strict=True))
        steps = self.steps - first
        synced = max(0, int(counts[2]) - first)
        counts = np.array([steps, np.count_nonzero(keeps[:steps] != 1), synced], np.int64)
        shifted = on_host - np.int32(first)
        if self._table is not None:
            shifted = zeros_beside(self._table, "int32", shifted.shape)
            assign(shifted, on_host - np.int32(first))
        if self.calls is not None:
            self.calls = np.roll(self.calls, -first)
        self.arrays = (shifted, alphas, keeps, peaks, counts)

    def next_rows(self, max_staleness: int) -> npt.NDArray[np.int64]:
        """As many rows as a step must sweep so that all have come within ``max_staleness`` steps."""
        rows = self.shape[0]
        chosen = (self.swept + np.arange(-(-rows // max_staleness))) % max(rows, 1)
        self.swept = int(chosen[-1] + 1) % rows if rows else 0
        return chosen

    def copy(self, buffer: _cpu.Buffer | None) -> Staleness:
        """With arrays of its own, for a copy of the table as it is now; one on a GPU has been brought up to date."""
        if self._table is not None:
            last, counts = np.zeros(self.shape[0], np.int32), np.zeros(3, np.int64)
            return Staleness((last, *self.arrays[1:4], counts), self.numbers, self.shape, self.exact)
        last, alphas, keeps, peaks, counts = (array.copy() for array in self.arrays)
        fingerprint = self.fingerprint if buffer is None else fingerprint_of(buffer)
        return Staleness((last, alphas, keeps, peaks, counts), self.numbers, self.shape, self.exact, fingerprint)

    def fits(self, buffer: _cpu.Buffer) -> bool:
        """Whether this is the table, as it was, that the copied history belongs to."""
        return not self.waits or self.fingerprint is None or self.fingerprint == fingerprint_of(buffer)


def crossover(shape: tuple[int, ...], item_size: int, replays: bool) -> float:
    """Rows of a table for each row touched at which a step on these costs what a pass over the whole table does.

    ``replays``: a row replays the steps that it missed; else it has a closed form of them.
    A fit to times of both on uniformly drawn rows (bench/README.md); a pass vectorises narrow rows better, and in DRAM
    it is slower than the replay of what it does. It decides the time of a step and no bit of its result.
    """
    width = max(1, math.prod(shape[1:]))
    in_cache = 3 * item_size * shape[0] * width <= _CACHE_BYTES
    rows, narrow = (100, 32) if replays and in_cache else (8, 60) if replays else (3, 45)
    return rows * (1 + narrow / width)


def fingerprint_of(buffer: _cpu.Buffer) -> int:
    """Of the values of a table."""
    return zlib.crc32(buffer.array().reshape(-1).view(np.uint8).data)
