"""What a history consists of: the rates of steps, and what these steps have in common."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._core.common.types import AnyArray

__all__ = ["PEAK_STEPS", "Doubt", "Numbers", "Rates", "crossover"]

PEAK_STEPS = 64  # kPeakSteps in csrc/core/step_args.h
_CACHE_BYTES = 2**25


class Doubt(enum.IntEnum):
    """Whether rows may have moments that no step gave them."""

    NONE = 0
    ONCE = 1  # they were restored or set: before the next pass the moments are looked through
    ALWAYS = 2  # a user has the arrays


class Numbers(NamedTuple):
    """What the steps of one history have in common; rows are brought up to date before one of them changes."""

    beta_1: float
    beta_2: float
    epsilon: float
    amsgrad: bool
    ema_momentum: float | None = None  # of the averages, which move in every step; None without
    accumulates: bool = False  # gradients are accumulated, and steps follow the rule for dense ones


class Rates(NamedTuple):
    """The arrays of a history, which native plans read and append to: StaleTable::Arrays in csrc/bind/stale.h."""

    last: AnyArray  # for each row the number of steps that it has had, int32; on the table's device
    alphas: npt.NDArray[np.floating]  # for each step its rate, in the dtype of the moments
    keeps: npt.NDArray[np.floating]  # for each step its factor of weight decay
    peaks: npt.NDArray[np.floating]  # for every 64 steps the largest |alpha|
    counts: npt.NDArray[np.int64]
    """Steps; those since the last pass that move even rows without moments (on a GPU: of all); steps that every row has
    had; a :class:`Doubt`; steps dropped before the first."""

    @classmethod
    def zeros(cls, last: AnyArray, dtype: str, room: int) -> Rates:
        """Room for this many steps."""
        alphas, keeps, peaks = (np.zeros(size, dtype) for size in (room, room, room // PEAK_STEPS))
        return cls(last, alphas, keeps, peaks, np.zeros(5, np.int64))

    def copy(self, last: AnyArray) -> Rates:
        """The same steps in arrays of their own, with these counts of the rows."""
        alphas, keeps, peaks, counts = (array.copy() for array in self[1:])
        return Rates(last, alphas, keeps, peaks, counts)


def crossover(shape: tuple[int, ...], item_size: int, replays: bool) -> float:
    """The table's rows per touched row at which a step on the touched rows costs as much as a pass over the table.

    ``replays``: a row replays the steps that it missed; else there is a closed form of them. A fit to times of both on
    uniformly drawn rows (bench/README.md): a pass vectorises narrow rows better, and in DRAM it is slower than the
    replay of what it does. It decides the time of a step and no bit of its result.
    """
    width = max(1, math.prod(shape[1:]))
    in_cache = 3 * item_size * shape[0] * width <= _CACHE_BYTES
    rows, narrow = (100, 32) if replays and in_cache else (8, 60) if replays else (3, 45)
    return rows * (1 + narrow / width)
