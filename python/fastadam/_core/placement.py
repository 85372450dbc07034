"""Where arrays lie, in memory of the host or on a GPU, and what the state of an optimizer does with them there."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.backend import _cpu
from fastadam._core.cuda_module import cuda_module

__all__ = [
    "assign",
    "beside",
    "copy_beside",
    "native_for",
    "native_of",
    "on_gpu",
    "to_host",
    "zeros_beside",
    "zeros_like_variable",
]

_GPU_TYPES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_CACHE_LINE = 64
_PAGE = 4096


def on_gpu(array: Any) -> bool:
    """Whether an object is an array in memory of a CUDA device; nothing is imported for it."""
    if isinstance(array, (np.ndarray, float, int, list)):
        return False
    if hasattr(array, "__dlpack_device__"):
        try:
            return array.__dlpack_device__()[0] in _GPU_TYPES
        except Exception:  # what cannot be exported is refused where it is read
            return False
    return hasattr(array, "__cuda_array_interface__")


def native_for(arrays: Iterable[Any]) -> ModuleType:
    """The native module that updates variables of which one of these is: ``_cuda`` if any lies on a GPU."""
    return cuda_module() if any(map(on_gpu, arrays)) else _cpu


def native_of(buffer: _cpu.Buffer) -> ModuleType:
    """The native module that a buffer comes from."""
    return _cpu if isinstance(buffer, _cpu.Buffer) else cuda_module()


def to_host(array: Any) -> npt.NDArray[Any]:
    """The array itself if it is NumPy's, else a copy of an array on a GPU, for which it waits."""
    if isinstance(array, np.ndarray):
        return array
    host: npt.NDArray[Any] = cuda_module().to_host(array)
    return host


def assign(array: Any, values: npt.ArrayLike) -> None:
    """Overwrite an array, wherever it lies, with values of the host or one number."""
    if isinstance(array, np.ndarray):
        array[...] = values
        return
    present = to_host(array)
    present[...] = values
    cuda_module().assign(array, present)


def beside(array: Any, buffer: _cpu.Buffer) -> bool:
    """Whether a slot can serve this variable as it lies: on its device and in its layout."""
    if isinstance(array, np.ndarray):
        flag: Any = f"{buffer.order}_CONTIGUOUS"
        return buffer.device < 0 and bool(array.flags[flag])
    if buffer.device < 0:
        return False
    found = cuda_module().Buffer(array, "slot")
    return found.device in (-1, buffer.device) and found.order == buffer.order


def copy_beside(array: Any, buffer: _cpu.Buffer) -> Any:
    """A slot laid out for its variable, with these values."""
    placed = zeros_beside(buffer)
    assign(placed, to_host(array))
    return placed


def zeros_beside(buffer: _cpu.Buffer, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Any:
    """Zeros in the layout of a variable, where it lies, made by the library that it comes from.

    ``dtype`` is that of its state unless it is given. Arrays on a GPU that are neither CuPy's nor PyTorch's have slots
    with nothing but ``__cuda_array_interface__`` and ``get()``.
    """
    if buffer.device < 0:
        return zeros_like_variable(buffer)
    dtype, shape = dtype or buffer.state_dtype, buffer.shape if shape is None else shape
    library = type(buffer.source).__module__.partition(".")[0]
    if library == "cupy" and dtype != "bfloat16":
        cupy: Any = sys.modules["cupy"]
        with cupy.cuda.Device(buffer.device):
            return cupy.zeros(shape, dtype, order=buffer.order)
    if library == "torch":
        torch: Any = sys.modules["torch"]
        zeros = torch.zeros(shape, dtype=getattr(torch, dtype), device=buffer.source.device)
        in_c_order = buffer.order == "C" or len(shape) < 2
        return (
            zeros
            if in_c_order
            else torch.zeros(shape[::-1], dtype=zeros.dtype, device=zeros.device).permute(*reversed(range(len(shape))))
        )
    native = cuda_module()
    return native.DeviceArray(list(shape), dtype, buffer.order, buffer.device, native.stream_of(buffer.source) or 0)


def zeros_like_variable(buffer: _cpu.Buffer) -> npt.NDArray[Any]:
    """A slot of zeros in the layout of a variable of the host; float32 for half variables.

    Its address agrees with the variable's modulo a cache line, or a page where the array is long: a load does not wait
    for a store to the same offset of another page, and one shift aligns all streams. Long arrays also start 64 KiB
    further: arrays of 2^k bytes end to end hit the same DRAM banks, which costs a third of the bandwidth.
    """
    dtype = np.dtype(buffer.state_dtype)
    nbytes = buffer.size * dtype.itemsize
    period = _PAGE if nbytes >= 4 * _PAGE else _CACHE_LINE
    skew = 16 * _PAGE if nbytes >= 256 * _PAGE else 0
    raw = np.zeros(nbytes + period + skew, np.uint8)
    start = skew + (buffer.address - raw.ctypes.data - skew) % period // dtype.itemsize * dtype.itemsize
    layout: Any = buffer.order
    return raw[start : start + nbytes].view(dtype).reshape(buffer.shape, order=layout)
