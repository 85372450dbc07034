"""An optional named holder of one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._backend import _cpu

__all__ = ["Variable", "buffers_of", "label_of", "unwrap"]


class Variable:
    """A trainable array with a name; the optimizer updates ``value`` in place.

    A float array is held, not copied: the caller's array and ``value`` are one buffer. Anything else (numbers, nested
    lists) becomes a new float32 array, as in TensorFlow.

    Args:
        value: Writable contiguous float16, bfloat16, float32 or float64 array, or numbers.
        name: Used in messages and in saved files.

    Raises:
        TypeError: The array is not of a float dtype.
        ValueError: The array cannot be updated in place (read-only, strided, byte-swapped).

    >>> import fastadam
    >>> w = fastadam.Variable([1.0, 2.0], name="w")
    >>> step = fastadam.Adam(0.1).apply_gradients([([0.5, -0.5], w)])
    >>> w.value.round(5)
    array([0.9, 2.1], dtype=float32)
    """

    __slots__ = ("__weakref__", "_value", "name")

    def __init__(self, value: npt.ArrayLike, name: str | None = None) -> None:
        if not isinstance(name, (str, type(None))):
            raise TypeError(f"name: {name!r}, expected a string")
        array = value if isinstance(value, np.ndarray) else _new_array(value, name)
        self.name = name
        _cpu.Buffer(array, label_of(self, 0) if name else "value")
        self._value = array

    @property
    def value(self) -> npt.NDArray[Any]:
        """The array itself, not a copy."""
        return self._value

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``value``."""
        return self._value.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of ``value``."""
        return self._value.dtype

    def numpy(self) -> npt.NDArray[Any]:
        """A copy of ``value``."""
        return np.array(self._value)

    def assign(self, value: npt.ArrayLike) -> Variable:
        """Overwrite the elements; raises ValueError unless ``value`` has the variable's shape."""
        new = np.asarray(value)
        if new.shape != self._value.shape:
            raise ValueError(f"value: shape {new.shape}, expected {self._value.shape} like this variable")
        if new.dtype.kind == "c" or new.dtype == object:
            raise TypeError(f"value: dtype {new.dtype}, expected real numbers")
        self._value[...] = new
        return self

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy or (dtype is not None and np.dtype(dtype) != self._value.dtype):
            return np.array(self._value, dtype=dtype)
        return self._value

    def __repr__(self) -> str:
        return f"Variable(name={self.name!r}, shape={self.shape}, dtype={self.dtype})"


def _new_array(value: Any, name: str | None) -> npt.NDArray[np.float32]:
    label = f"variable '{name}'" if name else "value"
    if hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
        raise TypeError(f"{label}: {type(value).__name__}, expected a NumPy array; pass other arrays as they are")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{label}: {type(value).__name__} that is not an array of numbers ({error})") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{label}: dtype {array.dtype}, expected real numbers")
    return np.array(array, dtype=np.float32)


def unwrap(variable: Any) -> Any:
    """The array of a :class:`Variable`; anything else as it is."""
    return variable.value if isinstance(variable, Variable) else variable


def label_of(variable: Any, position: int) -> str:
    """How messages call a variable: by its name, or by its place in the list."""
    name = variable.name if isinstance(variable, Variable) else None
    return f"variable '{name}'" if name else f"vars[{position}]"


def buffers_of(variables: Sequence[Any], positions: Sequence[int]) -> list[_cpu.Buffer]:
    """Check each variable and view its memory; ``positions`` are their places in the caller's list."""
    return [
        _cpu.Buffer(unwrap(variable), label_of(variable, position))
        for variable, position in zip(variables, positions, strict=True)
    ]
