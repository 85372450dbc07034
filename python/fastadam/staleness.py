"""Tables in a deferred mode: which steps each row has had, and the rates of the steps that some of them wait for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._backend import _cpu

__all__ = ["Numbers", "Staleness"]

_PEAK_STEPS = 64  # kPeakSteps in csrc/core/step_args.h
_FIRST_ROOM = 1024


class Numbers(NamedTuple):
    """What the steps of one history have in common; the rows are brought up to date before one of them changes."""

    beta_1: float
    beta_2: float
    epsilon: float
    amsgrad: bool


@dataclass(eq=False)
class Staleness:
    """The history of one table, in arrays that the native plan reads and appends to.

    There is always room for one step more.
    """

    last: npt.NDArray[np.int32]  # steps of the history that each row has had
    alphas: npt.NDArray[Any]  # the rate of each step, in the dtype of the moments
    keeps: npt.NDArray[Any]  # its factor of weight decay
    peaks: npt.NDArray[Any]  # the largest |alpha| of every 64 steps
    numbers: Numbers
    swept: int = 0  # the row that a sweep comes to next
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))  # steps; those with decay

    @classmethod
    def of(cls, buffer: _cpu.Buffer, numbers: Numbers) -> Staleness:
        """That of a table all of whose rows are up to date."""
        rooms = (_FIRST_ROOM, _FIRST_ROOM, _FIRST_ROOM // _PEAK_STEPS)
        alphas, keeps, peaks = (np.zeros(room, buffer.state_dtype) for room in rooms)
        return cls(np.zeros(buffer.shape[0], np.int32), alphas, keeps, peaks, numbers)

    @property
    def steps(self) -> int:
        """Steps in the history."""
        return int(self.counts[0])

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """In the order of StaleTable::Arrays in csrc/bind/stale.h."""
        return (self.last, self.alphas, self.keeps, self.peaks, self.counts)

    def clear(self) -> None:
        """All rows have had all steps."""
        self.last.fill(0)
        self.counts.fill(0)

    def make_room(self) -> bool:
        """Forget what all rows have had, or grow, if the next step would not fit; True if the arrays are new ones."""
        if self.steps < len(self.alphas):
            return False
        if self._forget():
            return False
        self.alphas, self.keeps, self.peaks = (
            np.concatenate([old, np.zeros_like(old)]) for old in (self.alphas, self.keeps, self.peaks)
        )
        return True

    def _forget(self) -> bool:
        """Drop the steps that every row has had, if they are half of the history."""
        first = int(self.last.min(initial=self.steps)) // _PEAK_STEPS * _PEAK_STEPS
        if first < self.steps // 2:
            return False
        rest = self.steps - first
        for rates, scale in ((self.alphas, 1), (self.keeps, 1), (self.peaks, _PEAK_STEPS)):
            kept = rates[first // scale :].copy()
            rates[: len(kept)] = kept
        self.last -= np.int32(first)
        self.counts[:] = rest, np.count_nonzero(self.keeps[:rest] != 1)
        return True

    def next_rows(self, max_staleness: int) -> npt.NDArray[np.int64]:
        """As many rows as a step must sweep so that all have come within ``max_staleness`` steps."""
        rows = len(self.last)
        chosen = (self.swept + np.arange(-(-rows // max_staleness))) % max(rows, 1)
        self.swept = int(chosen[-1] + 1) % rows if rows else 0
        return chosen

    def copy(self) -> Staleness:
        """With arrays of its own."""
        last, alphas, keeps, peaks, counts = (array.copy() for array in self.arrays())
        return Staleness(last, alphas, keeps, peaks, self.numbers, self.swept, counts)
