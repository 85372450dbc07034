"""The first values of a slot or a weight that a user asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from fastadam._core.common.checks import shown
from fastadam._core.native.gradients import as_float_array

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray

__all__ = ["Initializer", "initial_value"]

Initializer = str | Callable[..., npt.ArrayLike] | npt.ArrayLike


def initial_value(
    initializer: Initializer, shape: tuple[int, ...], dtype: npt.DTypeLike, order: str = "C"
) -> npt.NDArray[np.generic]:
    """A new array: "zeros", "ones", the result of ``initializer(shape, dtype)``, or a value of that shape."""
    try:
        dtype = np.dtype(dtype)
    except Exception as error:  # of whatever the caller's object does
        raise TypeError(f"dtype: {shown(dtype)}, expected a dtype of NumPy ({error})") from error
    layout: Literal["C", "F"] = "C" if order == "C" else "F"
    if isinstance(initializer, str):
        makers = {"zeros": np.zeros, "ones": np.ones}
        if initializer not in makers:
            raise ValueError(f"initializer: {initializer!r}, expected 'zeros', 'ones', a callable or an array")
        return makers[initializer](shape, dtype, order=layout)
    value: AnyArray = initializer(shape, dtype=dtype) if callable(initializer) else initializer
    if dtype.kind in "fiu":  # a conversion from text, dates or complex numbers would lose something
        value = as_float_array(value, "initializer", "fiub")
    array = np.array(value, dtype=dtype, order=layout)
    if array.shape != shape:
        raise ValueError(f"initializer: shape {array.shape}, expected {shape}")
    return array
