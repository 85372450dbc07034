"""Arrays read and written a piece at a time: pages of memory maps do not stay in memory because a file was saved."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastadam._core.common.types import HostArray

__all__ = ["CHUNK", "Bytes", "bytes_of", "copy_over_zeros", "is_zero", "pieces_of", "runs", "store"]

Bytes = npt.NDArray[np.uint8]

CHUNK = 2**20  # bytes: what is copied, added up, looked through and written stays in a cache
_PAGE = mmap.PAGESIZE
_PRESENT = np.uint64(1 << 63)  # of an entry in /proc/self/pagemap


def pieces_of(array: HostArray) -> Iterator[Bytes]:
    """Copies of the bytes of an array in C order, at most ``CHUNK`` at a time."""
    for block in _blocks(array):
        with _pages_as_before(block):
            piece = np.array(block, order="C")  # a checksum is of what is written, whatever another thread does
        yield piece.reshape(-1).view(np.uint8)


def bytes_of(array: HostArray) -> Callable[[int], Bytes]:
    """A function that returns the next bytes of an array in C order, so many of them."""
    data, place = array.reshape(-1).view(np.uint8), 0

    def read(count: int) -> Bytes:
        nonlocal place
        place += count
        return data[place - count : place]

    return read


def store(array: HostArray, read: Callable[[int], Bytes], *, is_zero: bool) -> None:
    """Overwrite an array with bytes in C order; pages that have these values already are not written to.

    Args:
        array: What is overwritten, in C or F order.
        read: Returns the next bytes, so many of them.
        is_zero: The array is all zero, and is not read to find out.
    """
    for block in _blocks(array):
        with _pages_as_before(block):
            _store_block(block, read(block.nbytes), is_zero=is_zero)


def is_zero(array: HostArray) -> bool:
    """Whether a contiguous array has no element other than zero; it is read up to the first."""
    return not any(piece.any() for piece in pieces_of(array.ravel("K")))


def copy_over_zeros(
    array: HostArray, values: HostArray, convert: Callable[[HostArray], HostArray] = lambda piece: piece
) -> None:
    """Copy values into an array of zeros; where they are zero, its pages are not written to.

    Args:
        array: Contiguous in C or F order.
        values: Of the same shape and order.
        convert: Makes what is stored of a piece of the values.
    """
    flat, given = array.ravel("K"), values.ravel("K")
    size = max(CHUNK // array.itemsize, 1)
    for begin in range(0, len(flat), size):
        block, source = flat[begin : begin + size], given[begin : begin + size]
        with _pages_as_before(block), _pages_as_before(source):
            data = np.ascontiguousarray(convert(source), array.dtype)
            _store_block(block, data.view(np.uint8), is_zero=True)


def _store_block(block: HostArray, data: Bytes, *, is_zero: bool) -> None:
    if not block.flags.c_contiguous:
        if not is_zero or data.any():
            block[...] = data.view(block.dtype).reshape(block.shape)
        return
    memory = block.reshape(-1).view(np.uint8)
    for begin, end in runs(data, block.ctypes.data, None if is_zero else memory):
        memory[begin:end] = data[begin:end]


def runs(data: Bytes, address: int, other: Bytes | None = None) -> Iterator[tuple[int, int]]:
    """Where bytes that go to an address differ from zero, or from others: beginnings and ends, as whole pages there."""
    head = min(-address % _PAGE, len(data))
    pages = (len(data) - head) // _PAGE
    end = head + pages * _PAGE
    data = data if other is None else data ^ other
    words = data[head:end].view(np.uint64).reshape(pages, _PAGE // 8)
    marks = np.zeros(pages + 2, bool)  # the part before the first whole page, the pages, and the rest
    marks[0], marks[-1] = data[:head].any(), data[end:].any()
    marks[1:-1] = np.bitwise_or.reduce(words, axis=1) != 0
    edges = np.flatnonzero(np.diff(marks, prepend=False, append=False)).reshape(-1, 2)
    for first, last in edges.tolist():
        yield max(0, head + (first - 1) * _PAGE), min(len(data), head + (last - 1) * _PAGE)


def _blocks(array: HostArray) -> Iterator[HostArray]:
    """Parts of an array that follow each other in C order, each of at most ``CHUNK`` bytes."""
    if array.flags.c_contiguous:
        flat, size = array.reshape(-1), array.itemsize
        begin, end = 0, (-array.ctypes.data % CHUNK) // size  # the first ends where the others are aligned
        while begin < len(flat):
            end = end or CHUNK // size
            yield flat[begin:end]
            begin, end = end, end + CHUNK // size
    elif array.nbytes <= CHUNK:
        yield array
    elif (rows := CHUNK // (array.nbytes // len(array))) > 0:
        for begin in range(0, len(array), rows):
            yield array[begin : begin + rows]
    else:
        for row in array:
            yield from _blocks(row)


# ---- memory maps ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pages_as_before(block: HostArray) -> Iterator[None]:
    """Drop the pages of a shared memory map of a file that this block made resident: the file has what they hold.

    They are asked for at once, which is fast even where steps expect random rows. Pages that the kernel reads ahead by
    itself may hang together: a row that is written to one of them later would take room for all in a file with holes.
    """
    mapping = _shared_mapping_of(block)
    absent = [] if mapping is None else [run for span in _extents(block) for run in _absent_runs(*span)]
    for begin, end in absent:
        _advise(mapping, "MADV_WILLNEED", begin, end)
    try:
        yield
    finally:
        for begin, end in absent:
            _advise(mapping, "MADV_DONTNEED", begin, end)


def _advise(mapping: mmap.mmap | None, advice: str, begin: int, end: int) -> None:
    if mapping is None or not hasattr(mmap, advice):
        return
    start = np.frombuffer(mapping, np.uint8).ctypes.data
    with contextlib.suppress(OSError):  # locked into memory
        mapping.madvise(getattr(mmap, advice), begin - start, end - begin)


def _shared_mapping_of(array: HostArray) -> mmap.mmap | None:
    """The memory map of a file that an array lies in, if what is written to it goes to the file.

    Never one of mode "c" or of no file: what was written to its pages is nowhere else.
    """
    owner: object = array
    mode = None
    while isinstance(owner, np.ndarray):
        mode = owner.mode if isinstance(owner, np.memmap) else mode
        owner = owner.base
    return owner if isinstance(owner, mmap.mmap) and mode in ("r", "r+", "w+") else None


def _extents(block: HostArray) -> list[tuple[int, int]]:
    """Addresses of the pages of a block: in F order, of each of its columns that has as much as a page."""
    if block.flags.c_contiguous:
        return [_pages_of(block)]
    columns = [block.T[at] for at in np.ndindex(block.T.shape[:-1])] if len(block) * block.itemsize >= _PAGE else []
    return [_pages_of(column) for column in columns]


def _pages_of(array: HostArray) -> tuple[int, int]:
    begin = array.ctypes.data
    return begin // _PAGE * _PAGE, -(-(begin + array.nbytes) // _PAGE) * _PAGE


def _absent_runs(begin: int, end: int) -> list[tuple[int, int]]:
    """Which pages between two addresses this process has not mapped; all, where the system does not tell."""
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(begin // _PAGE * 8)
            entries = np.frombuffer(file.read((end - begin) // _PAGE * 8), np.uint64)
    except OSError:
        return [(begin, end)]
    absent = (entries & _PRESENT) == 0
    edges = np.flatnonzero(np.diff(absent, prepend=False, append=False)).reshape(-1, 2)
    return [(begin + first * _PAGE, begin + last * _PAGE) for first, last in edges.tolist()]
