"""Arrays of any library, in host memory or on a GPU: where they are, and copies of them in other places."""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fastadam._core.native.backend import _cpu
from fastadam._core.native.gpu import cuda_module

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray

__all__ = [
    "assign",
    "beside",
    "copy_beside",
    "expect_random_rows",
    "native_for",
    "native_of",
    "on_gpu",
    "to_host",
    "untouched_zeros",
    "zeros_beside",
    "zeros_like_variable",
]

_GPU_TYPES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_CACHE_LINE = 64
_PAGE = 4096
_MANY_BYTES = 2**20  # of an array whose pages are worth a thought


def on_gpu(array: AnyArray) -> bool:
    """Whether an object is an array on a CUDA device; imports nothing to find out."""
    if isinstance(array, (np.ndarray, float, int, list)):
        return False
    if hasattr(array, "__dlpack_device__"):
        try:
            return array.__dlpack_device__()[0] in _GPU_TYPES
        except Exception:  # an array that cannot be exported is refused when it is read
            return False
    return hasattr(array, "__cuda_array_interface__")


def native_for(arrays: Iterable[AnyArray]) -> ModuleType:
    """``_cuda`` if any array is on a GPU, else ``_cpu``."""
    return cuda_module() if any(map(on_gpu, arrays)) else _cpu


def native_of(buffer: _cpu.Buffer) -> ModuleType:
    """The native module that a buffer comes from."""
    return _cpu if isinstance(buffer, _cpu.Buffer) else cuda_module()


def to_host(array: AnyArray) -> npt.NDArray[np.generic]:
    """A NumPy array as it is; a copy of an array on a GPU, which it waits for."""
    if isinstance(array, np.ndarray):
        return array
    host: npt.NDArray[np.generic] = cuda_module().to_host(array)
    return host


def assign(array: AnyArray, values: npt.ArrayLike) -> None:
    """Overwrite an array on any device with values in host memory or one number; all of it, or nothing if it raises."""
    if isinstance(array, np.ndarray):
        array[...] = np.asarray(values, array.dtype)  # a conversion that raises has written nothing
        return
    present = to_host(array)
    present[...] = values
    cuda_module().assign(array, present)


def beside(array: AnyArray, buffer: _cpu.Buffer) -> bool:
    """Whether an array is on the device of a variable and in its layout, as a slot must be."""
    if isinstance(array, np.ndarray):
        is_contiguous = array.flags.c_contiguous if buffer.order == "C" else array.flags.f_contiguous
        return buffer.device < 0 and is_contiguous
    if buffer.device < 0:
        return False
    slot = cuda_module().Buffer(array, "slot")
    return slot.device in (-1, buffer.device) and slot.order == buffer.order


def copy_beside(array: AnyArray, buffer: _cpu.Buffer) -> AnyArray:
    """A copy on the device of a variable, in its layout if it has its shape."""
    host = to_host(array)
    placed = zeros_beside(buffer, host.dtype.name, host.shape)
    assign(placed, host)
    return placed


def zeros_beside(
    buffer: _cpu.Buffer, dtype: str | None = None, shape: tuple[int, ...] | None = None, *, untouched: bool = False
) -> AnyArray:
    """Zeros on the device of a variable and in its layout, made by its library; by default of its state's dtype.

    ``untouched``: in host memory, as :func:`untouched_zeros` makes them.

    For arrays on a GPU of a library other than CuPy and PyTorch they are objects with nothing but
    ``__cuda_array_interface__`` and ``get()``.
    """
    if buffer.device < 0:
        return zeros_like_variable(buffer, dtype, shape, untouched=untouched)
    dtype, shape = dtype or buffer.state_dtype, buffer.shape if shape is None else shape
    library = type(buffer.source).__module__.partition(".")[0]
    if library == "cupy" and dtype != "bfloat16":
        cupy: AnyArray = sys.modules["cupy"]
        with cupy.cuda.Device(buffer.device):
            return cupy.zeros(shape, dtype, order=buffer.order)
    if library == "torch":
        torch: AnyArray = sys.modules["torch"]
        zeros = torch.zeros(shape, dtype=getattr(torch, dtype), device=buffer.source.device)
        in_c_order = buffer.order == "C" or len(shape) < 2
        return (
            zeros
            if in_c_order
            else torch.zeros(shape[::-1], dtype=zeros.dtype, device=zeros.device).permute(*reversed(range(len(shape))))
        )
    native = cuda_module()
    return native.DeviceArray(list(shape), dtype, buffer.order, buffer.device, native.stream_of(buffer.source) or 0)


def untouched_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike, *, near: object = None) -> npt.NDArray[Any]:
    """Zeros whose pages come to be when they are written to, 4 KiB at a time.

    ``np.zeros`` asks for huge pages, and may be given memory that was used before and must be cleared.

    ``near``: an array. If what is written to it goes to a file, these zeros are in a temporary file beside that, as far
    as one can be made there: their pages can leave memory, too.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < _MANY_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.zeros(shape, dtype)
    memory = _file_of_zeros(near, nbytes) or mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array: npt.NDArray[Any] = np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)
    expect_random_rows(array, small_pages=True)
    return array


def _file_of_zeros(near: object, nbytes: int) -> mmap.mmap | None:
    while isinstance(near, np.ndarray) and not isinstance(near, np.memmap):
        near = near.base
    if not isinstance(near, np.memmap) or not near.filename or near.mode not in ("r+", "w+"):
        return None
    if not hasattr(os, "posix_fallocate"):
        return None
    try:
        with tempfile.TemporaryFile(dir=Path(near.filename).parent) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is an error here, and a fatal signal later
            return mmap.mmap(file.fileno(), nbytes)
    except OSError:  # the folder has been renamed or is read-only, or its disk is full
        return None


def expect_random_rows(array: npt.NDArray[Any], *, small_pages: bool) -> None:
    """Tell the operating system that rows of an array are read and written in no order.

    Of a file it then reads no more than is asked for; with ``small_pages`` a row of anonymous memory makes 4 KiB
    resident, not 2 MiB.
    """
    if array.nbytes >= _MANY_BYTES:
        _cpu.expect_random_rows(array, small_pages)


def zeros_like_variable(
    buffer: _cpu.Buffer, dtype: str | None = None, shape: tuple[int, ...] | None = None, *, untouched: bool = False
) -> npt.NDArray[np.generic]:
    """Zeros in the layout of a variable in host memory, by default of its state's dtype: float32 for half variables.

    ``untouched``: as :func:`untouched_zeros` makes them.

    Its address agrees with the variable's modulo a cache line, or a page where the array is long: a load does not wait
    for a store to the same offset of another page, and one shift aligns all streams. Long arrays also start 64 KiB
    further: arrays of 2^k bytes end to end hit the same DRAM banks, which costs a third of the bandwidth.
    """
    kind, shape = np.dtype(dtype or buffer.state_dtype), buffer.shape if shape is None else shape
    nbytes = math.prod(shape) * kind.itemsize
    period = _PAGE if nbytes >= 4 * _PAGE else _CACHE_LINE
    skew = 16 * _PAGE if nbytes >= 256 * _PAGE else 0
    raw = (untouched_zeros if untouched else np.zeros)((nbytes + period + skew,), np.uint8)
    start = skew + (buffer.address - raw.ctypes.data - skew) % period // kind.itemsize * kind.itemsize
    layout: Literal["C", "F"] = "C" if buffer.order == "C" else "F"
    return raw[start : start + nbytes].view(kind).reshape(shape, order=layout)
