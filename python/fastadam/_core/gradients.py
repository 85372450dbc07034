"""Gradients that the kernels cannot read as they lie: other dtypes, layouts, lists. Converted; variables never are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.backend import _cpu
from fastadam._core.placement import on_gpu, to_host

__all__ = ["as_float_array", "bfloat16_to_float32", "convert_gradient", "convert_values", "float32_to_bfloat16"]


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bits; exact."""
    return np.asarray((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def float32_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even to bfloat16 bits; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.asarray(np.where(np.isnan(values), quiet_nan, rounded), np.uint16)


def as_float_array(values: Any, label: str) -> npt.NDArray[Any]:
    """Any array or nested list of real numbers as a NumPy array; bfloat16 without ml_dtypes becomes float32.

    Raises:
        TypeError: No real numbers.
    """
    if on_gpu(values):
        values = to_host(values)
    found = _cpu.read_array(values, label)
    array, is_bfloat16 = found if found is not None else (_as_array(values, label), False)
    if is_bfloat16:
        return bfloat16_to_float32(array)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{label}: dtype {array.dtype}, expected real numbers")
    return array


def convert_gradient(gradient: Any, variable: _cpu.Buffer, label: str) -> Any:
    """``gradient`` in the dtype and layout of ``variable``, as TF converts arrays and lists.

    Raises:
        TypeError: The gradient does not hold real numbers.
    """
    return convert_values(as_float_array(gradient, label), variable.dtype, variable.order)


def convert_values(values: npt.NDArray[Any], dtype: str, order: str = "C") -> Any:
    """Real numbers in one of the four dtypes: an array, or a buffer of bfloat16."""
    layout: Any = order
    with np.errstate(under="ignore"):  # what underflows is flushed in the kernels anyway
        if dtype == "bfloat16":
            return _cpu.bfloat16_bits(np.asarray(float32_to_bfloat16(values.astype(np.float32)), order=layout))
        return np.array(values, dtype=dtype, order=layout)


def _as_array(gradient: Any, label: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(gradient)
    except (ValueError, TypeError) as error:
        raise TypeError(f"{label}: {type(gradient).__name__} that is not an array of numbers ({error})") from None
    if array.dtype == object and array.ndim == 0:
        raise TypeError(f"{label}: {type(gradient).__name__}, expected an array of numbers")
    return array
