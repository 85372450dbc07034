"""Arrays on NVIDIA GPUs: whether they can be updated here, and a plain array for code without an array library."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.cuda_module import cuda_module, why_not
from fastadam._core.keywords import suggests_keywords

__all__ = ["array", "is_available"]


def __dir__() -> list[str]:
    return sorted(__all__)


def is_available() -> bool:
    """True if this build holds the CUDA kernels and a GPU can run them.

    >>> import fastadam
    >>> isinstance(fastadam.cuda.is_available(), bool)
    True
    """
    return why_not() is None


@suggests_keywords()
def array(values: npt.ArrayLike, device: int = 0) -> Any:
    """A copy of an array of the host in memory of a GPU, in C order, without any library.

    It has ``shape``, ``dtype``, ``device``, ``get()``, which copies it back to NumPy, and ``__cuda_array_interface__``,
    which CuPy (``cupy.asarray``), Numba and others read in place. With CuPy or PyTorch use their arrays.

    Args:
        values: float16, float32, float64, int32 or int64 numbers; other floats become float32.
        device: Number of the GPU.

    Raises:
        RuntimeError: There is no GPU, or no CUDA kernels in this build.

    >>> import fastadam
    >>> if fastadam.cuda.is_available():
    ...     assert fastadam.cuda.array([1.0, 2.0]).get().tolist() == [1.0, 2.0]
    """
    host = np.asarray(values)
    if host.dtype not in (np.float16, np.float32, np.float64, np.int32, np.int64):
        host = host.astype(np.int64 if host.dtype.kind in "iu" else np.float32)
    native = cuda_module()
    made = native.DeviceArray(list(host.shape), host.dtype.name, "C", device, 0)
    native.assign(made, np.ascontiguousarray(host).reshape(host.shape))
    return made
