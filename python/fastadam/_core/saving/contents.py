"""The tensors of a file: of each variable everything, or some rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._core.common.types import AnyArray, Config, HostArray
from fastadam._core.deferred.trail import Segment
from fastadam._core.native.arrays import to_host
from fastadam._core.native.backend import _cpu
from fastadam._core.native.chunks import CHUNK, Bytes, pieces_of
from fastadam._core.saving.file_format import ACCUMULATED, ALPHAS, DTYPES, HAD, ITERATIONS, KEEPS, ROWS, VALUE, Tensor
from fastadam._core.saving.tensor_file import TensorFile, write_tensors

__all__ = ["Part", "values_of", "write_parts"]


class Part(NamedTuple):
    """A variable in a file: all of it if ``rows`` is None; else these rows, and the steps that move the others."""

    buffer: _cpu.Buffer | None  # None if its values are not in the file
    slots: dict[int, tuple[str, AnyArray]]  # by their places in `weights`: names and arrays
    position: int = 0  # steps from the base to this file
    rows: npt.NDArray[np.int64] | None = None
    had: npt.NDArray[np.int64] | None = None  # which of these steps each of the rows has had
    segments: Sequence[Segment] = ()  # those since the last file
    is_exact: bool = True
    accumulated: npt.NDArray[np.int64] | None = None  # the rows with accumulated gradients; None if unknown

    @property
    def record(self) -> Config:
        """What the description says of its rows."""
        steps = [[list(segment.numbers), len(segment.alphas)] for segment in self.segments]
        return {"rows": 0 if self.rows is None else len(self.rows), "steps": steps, "exact": self.is_exact}


def values_of(buffer: _cpu.Buffer) -> HostArray:
    """The memory of a variable on the host; bfloat16 may come as its bits."""
    return buffer.source if isinstance(buffer.source, np.ndarray) else buffer.array()


def write_parts(
    path: str, parts: Sequence[Part], calls: HostArray, text_of: Callable[[Mapping[str, int]], str]
) -> None:
    """Replace a file by one with these variables and this count; see ``write_tensors``."""
    contents = _contents(parts, np.array(calls))

    def fill(file: TensorFile) -> None:
        for key, (_, pieces) in contents.items():
            for piece in pieces():
                file.append(key, piece)

    write_tensors(path, {key: tensor for key, (tensor, _) in contents.items()}, text_of, fill)


_Contents = dict[str, tuple[Tensor, Callable[[], Iterator[Bytes]]]]


def _contents(parts: Sequence[Part], calls: HostArray) -> _Contents:
    """For each tensor what it is, and a function that returns its bytes."""
    contents: _Contents = {ITERATIONS: (Tensor("I64", ()), partial(pieces_of, calls))}
    slots = sorted((at, i) for i, part in enumerate(parts) for at in part.slots)
    for at, i in slots:
        name, array = parts[i].slots[at]
        contents[f"{i}/{name}"] = _content(array, _dtype_of(array), parts[i].rows)
    for i, part in enumerate(parts):
        if part.buffer is not None:
            contents[f"{VALUE}{i}"] = _content(values_of(part.buffer), DTYPES[part.buffer.dtype], part.rows)
    for i, part in enumerate(parts):
        more = {ACCUMULATED: part.accumulated, ROWS: part.rows, HAD: part.had}
        if part.segments:
            more[ALPHAS] = np.concatenate([segment.alphas for segment in part.segments])
            more[KEEPS] = np.concatenate([segment.keeps for segment in part.segments])
        for begin, array in more.items():
            if array is not None:
                contents[f"{begin}{i}"] = _content(array, _dtype_of(array), None)
    return contents


def _dtype_of(array: AnyArray) -> str:
    """In the words of safetensors, of an array of any library."""
    return DTYPES[str(array.dtype).rpartition(".")[2]]


def _content(
    array: AnyArray, dtype: str, rows: npt.NDArray[np.int64] | None
) -> tuple[Tensor, Callable[[], Iterator[Bytes]]]:
    if rows is None:
        return Tensor(dtype, tuple(array.shape)), lambda: pieces_of(to_host(array))
    return Tensor(dtype, (len(rows), *array.shape[1:])), partial(_row_pieces, array, rows)


def _row_pieces(array: HostArray, rows: npt.NDArray[np.int64]) -> Iterator[Bytes]:
    if array[:1].nbytes == 0:
        return
    count = max(1, CHUNK // array[:1].nbytes)
    for begin in range(0, len(rows), count):
        yield np.take(array, rows[begin : begin + count], axis=0).reshape(-1).view(np.uint8)
