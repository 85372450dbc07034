"""Checks of numbers that users give; every message names the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fastadam._core.common.types import AnyArray, HostArray

__all__ = [
    "as_array",
    "check_beta",
    "check_bool",
    "check_choice",
    "check_clip",
    "check_count",
    "check_custom_objects",
    "check_epsilon",
    "check_integer",
    "check_iterations",
    "check_list",
    "check_non_negative",
    "check_number",
    "check_one_norm",
    "is_real",
    "shown",
]

# tf.keras.backend.epsilon(): what `epsilon=None` and `epsilon=0` mean in TF's Adam (`epsilon or backend.epsilon()`).
DEFAULT_EPSILON = 1e-7


def shown(value: object, most: int = 200) -> str:
    """The start of a value's repr for a message; its type where that fails, as of a deep list."""
    try:
        return repr(value)[:most]
    except Exception:
        return type(value).__name__


def as_array(name: str, value: object, expected: str) -> HostArray:
    """What NumPy makes of any object, whose own reason for a refusal names no argument."""
    try:
        return np.asarray(value)
    except (MemoryError, OverflowError, RecursionError, TypeError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name}: {shown(value)} ({error or type(error).__name__}), expected {expected}") from error


def check_custom_objects(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Classes by name; None for none."""
    if not isinstance(value, (Mapping, type(None))):
        raise TypeError(f"custom_objects: {type(value).__name__}, expected a dict of classes by name")
    return dict(value or {})


def check_number(name: str, value: AnyArray) -> float:
    """A finite float from any real scalar or 0-d array; an int becomes a float."""
    if type(value) is not float:
        value = _real_scalar(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value}, expected a finite number")
    return float(value)


def _real_scalar(name: str, value: AnyArray) -> float:
    """Refuses what ``float`` would convert with a loss, such as the real part of a complex number, or parse."""
    if isinstance(value, _NOT_SCALARS) or _dimensions(name, value) != 0:
        raise TypeError(f"{name}: {shown(value)}, expected a number")
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not is_real(dtype):
        raise TypeError(f"{name}: {shown(value)} of dtype {dtype}, expected a real number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: {type(value).__name__}, expected a number") from None
    except OverflowError:
        raise ValueError(f"{name}: {type(value).__name__} too large for a float, expected a finite number") from None


def _dimensions(name: str, value: AnyArray) -> object:
    return value.ndim if hasattr(value, "ndim") else as_array(name, value, "a number").ndim


_NOT_SCALARS = (bool, np.bool_, str, bytes, bytearray, list, tuple, dict, set, type(None))


def is_real(dtype: object) -> bool:
    """Whether a dtype of any library holds integers or floats: no bool, complex number, string, date or object."""
    # PyTorch's have no name: "torch.float32". The kind would not do, for it is "V" for bfloat16.
    name = str(getattr(dtype, "name", dtype)).rpartition(".")[2]
    return name.startswith(("float", "bfloat", "int", "uint", "longdouble"))


def check_non_negative(name: str, value: AnyArray) -> float:
    """A finite float >= 0. The error text is TensorFlow's."""
    number = check_number(name, value)
    if number < 0:
        raise ValueError(f"Expected {name} >= 0, received: {value}")
    return number


def check_beta(name: str, value: AnyArray) -> float:
    """A decay rate in [0, 1). At 1 the bias correction would divide by zero and make every variable NaN."""
    number = check_number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name}: {number}, expected 0 <= {name} < 1")
    return number


def check_epsilon(value: AnyArray) -> float:
    """``epsilon >= 0``; None and 0 mean 1e-7, as in TensorFlow."""
    return (0.0 if value is None else check_non_negative("epsilon", value)) or DEFAULT_EPSILON


def check_bool(name: str, value: object) -> bool:
    """True or False, of Python or NumPy."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: {shown(value)}, expected True or False")
    return bool(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise TypeError or ValueError for anything but None and one of these strings."""
    if value is None or (isinstance(value, str) and value in choices):
        return
    listed = ", ".join(map(repr, choices))
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(f"{name}: {shown(value, 60)}, expected {listed} or None")


def check_iterations(name: str, value: AnyArray) -> int:
    """A whole number of steps, at least 0, to which one more can be added."""
    number = check_non_negative(name, value)
    if number != int(number) or int(value) >= 2**63 - 1:
        raise ValueError(f"{name}: {value}, expected a whole number of steps below 2**63 - 1")
    return int(value)


def check_count(name: str, value: object) -> int:
    """An integer from 1 to 2**63 - 2; True and 2.0 are refused."""
    count = check_integer(name, value, "an integer of at least 1")
    if not 1 <= count < 2**63 - 1:
        expected = "an integer of at least 1" if count < 1 else "an integer below 2**63 - 1"
        raise ValueError(f"{name}: {shown(count)}, expected {expected}")
    return count


def check_integer(name: str, value: object, expected: str = "an integer") -> int:
    """An int from an integer of any library; True, 2.0 and arrays of several are refused."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: {shown(value)}, expected {expected}")
    try:
        return operator.index(value)
    except TypeError:  # arrays have the method, whatever they hold
        raise TypeError(f"{name}: {shown(value)}, expected {expected}") from None


def check_list(name: str, values: object, expected: str = "a list") -> list[Any]:
    """The items of an iterable. An iterator must yield one, since an exhausted one looks like an empty list.

    An exception of the caller's own iterator passes through.
    """
    if isinstance(values, (list, tuple)):  # quickly, for every step comes here
        return list(values)
    if isinstance(values, np.ndarray) and values.dtype.kind != "O":  # whose rows would become the items
        raise TypeError(f"{name}: one {type(values).__name__}, expected {expected}")
    if isinstance(values, (str, bytes, bytearray, Mapping)):  # whose characters or keys would become the items
        raise TypeError(f"{name}: {type(values).__name__}, expected {expected}")
    try:
        iterator = iter(values)  # type: ignore[call-overload]  # raises if it is not iterable
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None and not hasattr(values, "shape"):
            raise  # of an __iter__ in Python; that of an array without dimensions says no more than the text below
        raise TypeError(f"{name}: {type(values).__name__}, expected {expected}") from None
    try:
        items: list[Any] = list(iterator)
    except MemoryError as error:  # or a __len__ that is wrong
        raise MemoryError(
            f"{name}: {type(values).__name__} with more items than memory holds, expected {expected}"
        ) from error
    if not items and isinstance(values, Iterator):
        raise ValueError(
            f"{name}: {type(values).__name__}, an iterator that yielded nothing (was it used before?), expected "
            f"{expected}; pass an empty list to mean nothing"
        )
    return items


def check_clip(name: str, value: AnyArray) -> float:
    """A bound >= 0; None means infinity."""
    return math.inf if value is None else check_non_negative(name, value)


def check_one_norm(clipnorm: float | None, global_clipnorm: float | None) -> None:
    """Refuse both norms at once. The error text is TensorFlow's."""
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError(
            "Cannot accept both `clipnorm` and `global_clipnorm`, "
            f"passed `clipnorm` {clipnorm}, `global_clipnorm` {global_clipnorm}"
        )
