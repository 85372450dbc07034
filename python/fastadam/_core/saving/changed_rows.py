"""A table of a chain: rows of the last whole file, those of each delta, and the steps that move the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._core.common.frameworks import require
from fastadam._core.common.types import Config, HostArray
from fastadam._core.deferred.history import History
from fastadam._core.deferred.rates import Numbers
from fastadam._core.deferred.trail import Segment
from fastadam._core.native.backend import _cpu
from fastadam._core.native.chunks import CHUNK
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import LOW
from fastadam._core.saving.file_format import ALPHAS, DTYPES, HAD, ITEM_SIZES, KEEPS, ROWS, VALUE, Tensor
from fastadam._core.saving.saved_file import SavedFile

__all__ = ["ChangedRows"]

_MANY_ROWS = 2**16  # whose indices are read at a time


class _Steps(NamedTuple):
    """Steps with the same numbers, and how many there were from the base to the first of them."""

    begin: int
    segment: Segment
    is_exact: bool

    @property
    def end(self) -> int:
        return self.begin + len(self.segment.alphas)


class ChangedRows:
    """Every row brought up to date, a block at a time.

    Args:
        index: Of the variable.
        whole: The last file that has all rows.
        deltas: Those that follow it.
    """

    def __init__(self, index: int, whole: SavedFile, deltas: Sequence[SavedFile]) -> None:
        self._index, self._whole, self._deltas = index, whole, deltas
        last = deltas[-1]
        self._value = f"{VALUE}{index}"
        self.keys = [f"{index}/{name}" for name in last.header["slots"][index]] + [self._value]
        self._shape = tuple(last.header["variables"][index]["shape"])
        self._steps: list[_Steps] = []
        at = whole.header["positions"][index]
        known = set(whole.header["slots"][index])
        for file in deltas:
            slots = set(file.header["slots"][index])
            for name in sorted(known - slots - {LOW}):  # load() can drop the low halves
                file.fail(f"no tensor '{index}/{name}'", "every slot that the files before it have")
            known |= slots
            for steps in self._steps_of(file, at):
                self._add(steps)
                at = steps.end
            position = file.header["positions"][index]
            file.require(position == at, f"{position} steps of variable {index}", f"{at} since the base")

    def _steps_of(self, file: SavedFile, begin: int) -> list[_Steps]:
        record: Config = file.header["tables"][str(self._index)]
        if not record["steps"]:
            return []
        rates = [file.tensor(f"{name}{self._index}") for name in (ALPHAS, KEEPS)]
        found = []
        at = 0
        for numbers, steps in record["steps"]:
            alphas, keeps = (array[at : at + steps] for array in rates)
            found.append(_Steps(begin + at, Segment(Numbers(*numbers), alphas, keeps), record["exact"]))
            at += steps
        return found

    def _add(self, steps: _Steps) -> None:
        """Join steps that go on with the same numbers."""
        before = self._steps[-1] if self._steps else None
        if before is None or before.segment.numbers != steps.segment.numbers or before.is_exact != steps.is_exact:
            self._steps.append(steps)
            return
        alphas = np.concatenate([before.segment.alphas, steps.segment.alphas])
        keeps = np.concatenate([before.segment.keeps, steps.segment.keeps])
        self._steps[-1] = before._replace(segment=Segment(before.segment.numbers, alphas, keeps))

    # ---- checks ----------------------------------------------------------------------------------------------------

    def check_tensor(self, key: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise unless a slot or the values have this shape and dtype, in each file for the rows that it has."""
        if self._whole.holds(key):
            self._whole.check_tensor(key, shape, dtype)
        for file in self._deltas:
            if file.holds(key):
                file.check_tensor(key, (self._count_of(file), *shape[1:]), dtype)

    def tensor_of(self, key: str) -> Tensor:
        """What a slot or the values consist of when every row is there."""
        tensor = Tensor(self._deltas[-1].tensor_of(key).dtype, self._shape)
        self.check_tensor(key, tensor.shape, tensor.dtype)
        return tensor

    def check(self) -> None:
        """Raise if the rows of a delta are not rows of the table, in order, or have had steps that nobody has made."""
        for file in self._deltas:
            position, before = file.header["positions"][self._index], -1
            for rows, had in self._indices_of(file):
                good = rows[0] > before and rows[-1] < self._shape[0] and bool((rows[1:] > rows[:-1]).all())
                file.require(good, f"rows of variable {self._index}", f"rows of {self._shape[0]}, in order")
                good = had.min() >= 0 and had.max() <= position
                file.require(bool(good), f"steps of rows of variable {self._index}", f"0 to {position}")
                before = int(rows[-1])

    def _count_of(self, file: SavedFile) -> int:
        count: int = file.header["tables"][str(self._index)]["rows"]
        return count

    def _indices_of(self, file: SavedFile) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """The rows that a delta has, and the steps that each has had, not many at a time."""
        read = file.reader_of(f"{ROWS}{self._index}")
        steps = file.reader_of(f"{HAD}{self._index}") if file.holds(f"{HAD}{self._index}") else None
        position, left = file.header["positions"][self._index], self._count_of(file)
        while left:
            count = min(left, _MANY_ROWS)
            rows = read(8 * count).view(np.int64)
            yield rows, np.full(count, position, np.int64) if steps is None else steps(8 * count).view(np.int64)
            left -= count

    # ---- reading ---------------------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[tuple[int, dict[str, HostArray]]]:
        """Consecutive rows: the number of the first, and for each key an array of them in C order."""
        tensors = {key: self._deltas[-1].tensor_of(key) for key in self.keys}
        sizes = {key: ITEM_SIZES[t.dtype] * int(np.prod(self._shape[1:])) for key, t in tensors.items()}
        types = {key: _numpy_type(t.dtype) for key, t in tensors.items()}
        last, earlier = self._deltas[-1], [key for key in self.keys if key != f"{self._index}/{ACCUMULATOR}"]
        readers = {key: self._whole.reader_of(key) for key in earlier if self._whole.holds(key)}
        changes = [_Cursor(file, self._indices_of(file), sizes, earlier) for file in self._deltas[:-1]]
        # Gradients that wait are in rows of the last file; what a step has left in an accumulator is of no use.
        waits = self._index in last.header["accumulating"]
        changes.append(_Cursor(last, self._indices_of(last), sizes, self.keys if waits else earlier))
        count = max(1, CHUNK // max(1, *sizes.values()))
        for begin in range(0, self._shape[0], count):
            rows = min(count, self._shape[0] - begin)
            data = {
                key: readers[key](rows * size) if key in readers else np.zeros(rows * size, np.uint8)
                for key, size in sizes.items()
            }
            had = np.full(rows, self._whole.header["positions"][self._index], np.int64)
            for change in changes:
                for ids, steps, parts in change.below(begin + rows):
                    had[ids - begin] = steps
                    for key, part in parts.items():
                        data[key].reshape(rows, sizes[key])[ids - begin] = part
            arrays = {key: data[key].view(types[key]).reshape(rows, *self._shape[1:]) for key in self.keys}
            self._catch_up(arrays, had)
            yield begin, arrays

    def _catch_up(self, arrays: dict[str, HostArray], had: npt.NDArray[np.int64]) -> None:
        """Make the steps that rows have not had."""
        slots = {key.partition("/")[2]: array for key, array in arrays.items() if key != self._value}
        table = _cpu.Buffer(arrays[self._value], "vars[0]")
        for steps in self._steps:
            if (had >= steps.end).all():
                continue
            missed = np.clip(had - steps.begin, 0, steps.end - steps.begin)
            history = History.of_segment(steps.segment, table.shape, exact=steps.is_exact, had=missed)
            for name in ("m", "v", "vhat"):
                if name in slots:
                    _cpu.flag_moving_rows(history.flags, slots[name])
            history.catch_up(table, slots)
            np.maximum(had, steps.end, out=had)


class _Cursor:
    """Reads the rows of a delta from the first to the last."""

    def __init__(
        self,
        file: SavedFile,
        indices: Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
        sizes: dict[str, int],
        keys: Sequence[str],
    ) -> None:
        self._indices, self._sizes = indices, sizes
        self._readers = {key: file.reader_of(key) for key in keys if file.holds(key)}
        self._ids = self._had = np.zeros(0, np.int64)

    def below(self, end: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], dict[str, HostArray]]]:
        """The next rows before this one, the steps that they have had, and the bytes of each by key."""
        while True:
            count = int(np.searchsorted(self._ids, end))
            if count:
                parts = {
                    key: read(count * self._sizes[key]).reshape(count, self._sizes[key])
                    for key, read in self._readers.items()
                }
                yield self._ids[:count], self._had[:count], parts
                self._ids, self._had = self._ids[count:], self._had[count:]
            if len(self._ids):
                return
            self._ids, self._had = next(self._indices, (self._ids, self._had))
            if not len(self._ids):
                return


def _numpy_type(dtype: str) -> np.dtype[Any]:
    if dtype == "BF16":
        require("ml_dtypes", "loading rows of a bfloat16 table")
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(next(name for name, code in DTYPES.items() if code == dtype))
