"""The rates of the steps since a file was saved, which a delta needs to move the rows that it does not have."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._core.deferred.rates import Numbers

__all__ = ["Segment", "Trail"]

_MOST_STEPS = 2**20
_Rates = npt.NDArray[np.floating]


class Segment(NamedTuple):
    """Steps that follow each other and have their numbers in common."""

    numbers: Numbers
    alphas: _Rates
    keeps: _Rates


class Trail:
    """Keeps what a history drops, and when its numbers changed.

    Steps are counted from the first that the history ever had. No more than 2^20 are kept: then ``is_lost``.
    """

    def __init__(self, begin: int, numbers: Numbers) -> None:
        self.is_lost = False
        self._begin = begin  # the first step that is kept, here or in the history
        self._pieces: list[tuple[int, _Rates, _Rates]] = []  # each with its first step
        self._changes = [(begin, numbers)]  # from which step on there are these numbers

    def keep(self, first: int, alphas: _Rates, keeps: _Rates) -> None:
        """Copy the rates of steps that are about to be dropped; those that are kept already count once."""
        kept = max(self._begin, max((at + len(a) for at, a, _ in self._pieces), default=0)) - first
        if kept < len(alphas):
            self._pieces.append((first + max(kept, 0), alphas[max(kept, 0) :].copy(), keeps[max(kept, 0) :].copy()))
        if first + len(alphas) - self._begin > _MOST_STEPS:
            self.is_lost, self._pieces = True, []

    def change_numbers(self, step: int, numbers: Numbers) -> None:
        """From this step on there are other numbers."""
        self._changes = [*(change for change in self._changes if change[0] < step), (step, numbers)]

    def segments(self, begin: int, first: int, alphas: _Rates, keeps: _Rates) -> list[Segment]:
        """All steps from ``begin`` on; the history has ``first`` and those after it."""
        pieces = [*self._pieces, (first, alphas, keeps)]
        parts = [(a[max(begin - at, 0) :], k[max(begin - at, 0) :]) for at, a, k in pieces]
        all_alphas, all_keeps = (np.concatenate(column) for column in zip(*parts, strict=True))
        end = begin + len(all_alphas)
        segments = []
        ends = [step for step, _ in self._changes[1:]] + [end]
        for (start, numbers), stop in zip(self._changes, ends, strict=True):
            part = slice(max(start - begin, 0), max(stop - begin, 0))
            if len(all_alphas[part]):
                segments.append(Segment(numbers, all_alphas[part], all_keeps[part]))
        return segments
