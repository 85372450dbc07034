"""Gradients that the kernels cannot read as they lie: other dtypes, layouts, lists. Converted; variables never are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._backend import _cpu

__all__ = ["bfloat16_to_float32", "convert_gradient", "float32_to_bfloat16"]


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bits; exact."""
    return np.asarray((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def float32_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even to bfloat16 bits; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.asarray(np.where(np.isnan(values), quiet_nan, rounded), np.uint16)


def convert_gradient(gradient: Any, variable: _cpu.Buffer, label: str) -> Any:
    """``gradient`` in the dtype and layout of ``variable``, as TF converts arrays and lists.

    Raises:
        TypeError: The gradient does not hold real numbers.
    """
    found = _cpu.read_array(gradient, label)
    values, is_bfloat16 = found if found is not None else (_as_array(gradient, label), False)
    if is_bfloat16:
        values = bfloat16_to_float32(values)
    if values.dtype.kind not in "fiu":
        raise TypeError(f"{label}: dtype {values.dtype}, expected real numbers for {variable.dtype} {variable.label}")
    order: Any = variable.order
    if variable.dtype == "bfloat16":
        return _cpu.bfloat16_bits(np.asarray(float32_to_bfloat16(values.astype(np.float32)), order=order))
    return np.array(values, dtype=variable.dtype, order=order)


def _as_array(gradient: Any, label: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(gradient)
    except (ValueError, TypeError) as error:
        raise TypeError(f"{label}: {type(gradient).__name__} that is not an array of numbers ({error})") from None
