"""Arrays on NVIDIA GPUs: whether they can be updated here, and a plain array for code without an array library."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["array", "is_available"]


def is_available() -> bool:
    """True if this build holds the CUDA kernels and a GPU can run them.

    >>> import fastadam
    >>> isinstance(fastadam.cuda.is_available(), bool)
    True
    """
    return _reason() is None


def array(values: npt.ArrayLike, device: int = 0) -> Any:
    """A copy of an array of the host in memory of a GPU, in C order, without any library.

    It has ``shape``, ``dtype``, ``device``, ``get()``, which copies it back to NumPy, and ``__cuda_array_interface__``,
    which CuPy (``cupy.asarray``), Numba and others read in place. With CuPy or PyTorch use their arrays.

    Args:
        values: float16, float32, float64, int32 or int64 numbers; other floats become float32.
        device: Number of the GPU.

    Raises:
        RuntimeError: There is no GPU, or no CUDA kernels in this build.
    """
    host = np.asarray(values)
    if host.dtype not in (np.float16, np.float32, np.float64, np.int32, np.int64):
        host = host.astype(np.int64 if host.dtype.kind in "iu" else np.float32)
    native_module = native()
    made = native_module.DeviceArray(list(host.shape), host.dtype.name, "C", device, 0)
    native_module.assign(made, np.ascontiguousarray(host).reshape(host.shape))
    return made


def native() -> ModuleType:
    """The extension module, once it is known that a GPU can be used; imported when the first array on one comes.

    Raises:
        RuntimeError: One sentence that says what is missing.
    """
    reason = _reason()
    if reason is not None:
        raise RuntimeError(f"fastadam: no array on a GPU can be updated here: {reason}")
    from fastadam import _cuda

    return _cuda


def describe() -> str:
    """One line for :func:`fastadam.show_config`."""
    reason = _reason()
    return "available" if reason is None else reason


def _reason() -> str | None:
    """Why CUDA cannot be used; None if it can."""
    try:
        from fastadam import _cuda
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error)
        if not missing:
            return f"the CUDA kernels do not load ({error})"
        return "this build has no CUDA kernels (it was installed where no CUDA compiler, nvcc, was found)"
    count, reason = _cuda.device_count()
    return None if count else f"{reason} (is an NVIDIA driver installed, and a GPU visible?)"
