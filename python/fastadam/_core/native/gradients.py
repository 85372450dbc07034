"""Conversion of gradients that the kernels cannot read: other dtypes and layouts, lists."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from fastadam._core.common.types import AnyArray, ArrayLike, HostArray
from fastadam._core.native.arrays import on_gpu, to_host
from fastadam._core.native.backend import _cpu

__all__ = [
    "as_float_array",
    "bfloat16_to_float32",
    "convert_gradient",
    "convert_values",
    "float32_to_bfloat16",
]


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bits; exact."""
    return np.asarray((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def float32_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even to bfloat16 bits; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.asarray(np.where(np.isnan(values), quiet_nan, rounded), np.uint16)


def as_float_array(values: ArrayLike, label: str, kinds: str = "fiu") -> HostArray:
    """Any array or nested list of real numbers as a NumPy array; bfloat16 without ml_dtypes becomes float32.

    Args:
        values: The numbers.
        label: How messages call them.
        kinds: Of dtypes that are numbers; "fiub" to take bools as well.

    Raises:
        TypeError: Not real numbers.
    """
    if on_gpu(values):
        values = to_host(values)
    read = _cpu.read_array(values, label)
    array, is_bfloat16 = read if read is not None else (_as_array(values, label), False)
    if is_bfloat16:
        return bfloat16_to_float32(array)
    if array.dtype.kind not in kinds and array.dtype.name != "bfloat16":
        raise TypeError(f"{label}: dtype {array.dtype}, expected real numbers")
    return array


def convert_gradient(gradient: ArrayLike, variable: _cpu.Buffer, dtype: str, label: str) -> AnyArray:
    """``gradient`` in the layout of ``variable``; unless it has the variable's dtype, in this one.

    Raises:
        TypeError: The gradient does not hold real numbers.
    """
    values = as_float_array(gradient, label)
    return convert_values(values, variable.dtype if values.dtype.name == variable.dtype else dtype, variable.order)


def convert_values(values: HostArray, dtype: str, order: str = "C") -> AnyArray:
    """Real numbers in one of the four dtypes: an array, or a buffer of bfloat16."""
    layout: Literal["C", "F"] = "C" if order == "C" else "F"
    with np.errstate(under="ignore"):  # the kernels flush denormals anyway
        if dtype == "bfloat16":
            return _cpu.bfloat16_bits(np.asarray(float32_to_bfloat16(values.astype(np.float32)), order=layout))
        return np.array(values, dtype=dtype, order=layout)


def _as_array(gradient: ArrayLike, label: str) -> HostArray:
    try:
        array = np.asarray(gradient)
    except (MemoryError, OverflowError, RecursionError, TypeError, ValueError) as error:
        why = str(error) or type(error).__name__
        raise TypeError(f"{label}: {type(gradient).__name__} that is not an array of numbers ({why})") from error
    if array.dtype == object and array.ndim == 0:
        raise TypeError(f"{label}: {type(gradient).__name__}, expected an array of numbers")
    return array
