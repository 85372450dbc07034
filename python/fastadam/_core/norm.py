"""The norm of gradients, as ``global_clipnorm`` sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.common.checks import check_list
from fastadam._core.common.types import AnyArray
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gradients import as_float_array
from fastadam._core.native.slices import IndexedSlices
from fastadam._core.native.variable import unwrap

if TYPE_CHECKING:
    from fastadam._core.common.types import Gradient

__all__ = ["global_norm"]


def global_norm(grads: Iterable[Gradient | None]) -> float:
    r"""The Euclidean norm of all elements of all gradients, computed in float64.

    .. math:: \sqrt{\sum_i \sum_j g_{ij}^2}

    The sums run over a tree of fixed shape, so the result does not depend on the number of threads, the instruction
    set or alignment. None entries are skipped, as in TensorFlow. The result is right up to the largest float64, even if
    squares of the elements overflow or underflow. Denormal elements count as 0, as they do in a step. If any gradient
    contains a NaN or an infinity, the result is not finite.

    Args:
        grads: Arrays of any real dtype and layout. For IndexedSlices the values are used as they are, as in
            TensorFlow; repeated rows are not summed first, in contrast to ``clip_after_dedupe``.

    Raises:
        TypeError: A gradient does not hold real numbers.
        ValueError: ``grads`` is an iterator that yields nothing.

    Source: https://www.tensorflow.org/api_docs/python/tf/linalg/global_norm.

    >>> import numpy as np, fastadam
    >>> fastadam.global_norm([np.array([3.0, 0.0]), None, np.array([[4.0]])])
    5.0
    """
    if isinstance(grads, np.ndarray):
        items = list(grads) if grads.ndim else [grads]  # the norm of its rows is the norm of the array
    else:
        items = check_list("grads", grads, "a list of arrays")
    with _cpu.DefaultArithmetic():
        arrays = [_readable(_values(unwrap(g)), f"grads[{i}]") for i, g in enumerate(items) if g is not None]
    return _cpu.norm(arrays)


def _values(gradient: AnyArray) -> AnyArray:
    return gradient.values if isinstance(gradient, IndexedSlices) else gradient


def _readable(gradient: AnyArray, label: str) -> AnyArray:
    """The gradient itself if the kernel can read it in place, else a converted copy."""
    if isinstance(gradient, np.ndarray) and gradient.dtype.name == "bfloat16" and gradient.flags.forc:
        return gradient
    array = as_float_array(gradient, label)
    is_supported = array.dtype in (np.float16, np.float32, np.float64) and array.dtype.isnative
    in_place = is_supported and array.flags.forc and array.flags.aligned
    return array if in_place else np.array(array, dtype=array.dtype if is_supported else np.float64)
