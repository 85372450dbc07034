"""Rows of an array that is replaced by a longer, a shorter or a permuted one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastadam._core.native.slices import as_integers

if TYPE_CHECKING:
    from fastadam._core.common.types import ArrayLike, HostArray

__all__ = ["CHUNK_BYTES", "RowMap", "bits_of", "chunks_of", "has_few_rows", "with_rows"]

CHUNK_BYTES = 2**22


class RowMap:
    """For each row of the new array, which row of the old one it was.

    Attributes:
        sources: For each row of the new array the row of the old one; -1 for a fresh one.
        kept: The rows of the new array that are not fresh.
    """

    def __init__(self, sources: npt.NDArray[np.int64]) -> None:
        self.sources = sources
        self.kept = np.flatnonzero(sources >= 0)

    @classmethod
    def of(cls, rows: ArrayLike | None, old: int, new: int, label: str) -> RowMap:
        """The map that the argument ``rows`` of ``resize`` describes.

        Args:
            rows: As it was given; None if the first rows stay where they are.
            old: Rows of the old array.
            new: Rows of the new array.
            label: What error messages call the old array.

        Raises:
            TypeError: ``rows`` are not integers.
            ValueError: Not one for each row of the new array; not a row of the old one and not -1.
        """
        if rows is None:
            sources = np.arange(new)
            sources[old:] = -1
            return cls(sources)
        if isinstance(rows, np.ndarray) and rows.dtype.kind == "b":
            raise TypeError("rows: dtype bool, expected integers: np.flatnonzero(rows) of a mask")
        given = as_integers("rows", rows)
        if given.shape != (new,):
            raise ValueError(f"rows: shape {given.shape}, expected ({new},), a number for each row of the new array")
        bad = given[(given < -1) | (given >= old)]
        if bad.size:
            raise ValueError(f"rows: {bad[0]} is not a row of {label}, expected 0 <= row < {old}, or -1 for fresh ones")
        return cls(given.astype(np.int64))

    @property
    def keeps_places(self) -> bool:
        """Whether every row that is not fresh was at the same place."""
        return bool((self.sources[self.kept] == self.kept).all())

    def move(self, old: HostArray, new: HostArray) -> None:
        """Copy the rows that are kept into an array of zeros; rows of zeros are not written."""
        for places in chunks_of(self.kept, old.nbytes // max(len(old), 1)):
            values = old[self.sources[places]]
            is_set = bits_of(values).any(1)
            new[places[is_set]] = values[is_set]

    def overwrite(self, old: HostArray, new: HostArray) -> None:
        """The same for an array of any values: its other rows become zero, and rows that are right are not written."""
        for places in chunks_of(np.arange(len(new)), new.nbytes // max(len(new), 1)):
            values = np.zeros_like(new[places])
            is_kept = self.sources[places] >= 0
            values[is_kept] = old[self.sources[places[is_kept]]]
            differs = (bits_of(values) != bits_of(new[places])).any(1)
            new[places[differs]] = values[differs]

    def differing(self, old: HostArray, new: HostArray, waiting: npt.NDArray[np.bool_]) -> int | None:
        """The first row of the new array that does not have the bits of the ``waiting`` one that it was; else None."""
        for places in chunks_of(self.waiting(waiting), old.nbytes // max(len(old), 1)):
            differ = (bits_of(old[self.sources[places]]) != bits_of(new[places])).any(1)
            if differ.any():
                return int(places[differ][0])
        return None

    def waiting(self, waiting: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """The rows of the new array that were ``waiting`` ones of the old."""
        places: npt.NDArray[np.int64] = self.kept[waiting[self.sources[self.kept]]]
        return places


def chunks_of(places: npt.NDArray[np.int64], row_bytes: int) -> Iterator[npt.NDArray[np.int64]]:
    """The places of rows of this size, so many at a time that copies of the rows are small; none if rows are empty."""
    size = max(1, CHUNK_BYTES // row_bytes) if row_bytes else len(places) + 1
    for start in range(0, len(places) if row_bytes else 0, size):
        yield places[start : start + size]


def has_few_rows(array: HostArray) -> bool:
    """Whether a long array in C order has rows of zeros for the most part, as moments of a table have."""
    if not (array.ndim and array.flags.c_contiguous and array.nbytes > CHUNK_BYTES and array.itemsize <= 8):
        return False
    count, size = 0, max(1, CHUNK_BYTES // (array.nbytes // len(array)))
    for start in range(0, len(array), size):
        count += np.count_nonzero(bits_of(array[start : start + size]).any(1))
        if 2 * count > len(array):
            return False
    return True


def bits_of(rows: HostArray) -> HostArray:
    """The bits of elements, a line for each row; the rows are not empty."""
    return np.ascontiguousarray(rows).view(f"u{rows.itemsize}").reshape(len(rows), -1)


def with_rows(array: HostArray) -> HostArray:
    """The array itself; a view with one row of an array without axes."""
    return array if array.ndim else array.reshape(1)
