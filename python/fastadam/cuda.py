"""NVIDIA GPUs: whether arrays on one can be updated, and a simple array type for code without an array library."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import AnyArray
from fastadam._core.native.gpu import cuda_module, why_not
from fastadam._core.native.gradients import as_float_array

__all__ = ["array", "is_available"]


def __dir__() -> list[str]:
    return sorted(__all__)


def is_available() -> bool:
    """True if this build has the CUDA kernels and a GPU can run them.

    :func:`fastadam.show_config` prints what is missing.

    >>> import fastadam
    >>> isinstance(fastadam.cuda.is_available(), bool)
    True
    """
    return why_not() is None


@suggests_keywords()
def array(values: npt.ArrayLike, device: int = 0) -> AnyArray:
    """Copy a host array to a GPU, in C order, without an array library.

    The result has ``shape``, ``dtype``, ``device``, ``get()``, which copies it to NumPy, and
    ``__cuda_array_interface__``, through which CuPy (``cupy.asarray``), Numba and others use it in place. If you have
    CuPy or PyTorch, use their arrays instead.

    Args:
        values: float16, float32, float64, int32 or int64 numbers. Other integers become int64, other types float32.
        device: Number of the GPU.

    Raises:
        RuntimeError: There is no GPU, or this build has no CUDA kernels.

    >>> import fastadam
    >>> if fastadam.cuda.is_available():
    ...     assert fastadam.cuda.array([1.0, 2.0]).get().tolist() == [1.0, 2.0]
    """
    host = as_float_array(values, "values", "fiub")
    if host.dtype not in (np.float16, np.float32, np.float64, np.int32, np.int64):
        host = host.astype(np.int64 if host.dtype.kind in "iu" else np.float32)
    native = cuda_module()
    copy = native.DeviceArray(list(host.shape), host.dtype.name, "C", device, 0)
    native.assign(copy, np.ascontiguousarray(host).reshape(host.shape))
    return copy
