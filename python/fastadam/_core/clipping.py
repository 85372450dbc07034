"""The norm of gradients, as ``global_clipnorm`` sees it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam._core.backend import _cpu
from fastadam._core.buffers import unwrap
from fastadam._core.checks import check_list
from fastadam._core.gradients import as_float_array
from fastadam._core.slices import IndexedSlices

if TYPE_CHECKING:
    from fastadam._core.types import Gradient

__all__ = ["global_norm"]


def global_norm(grads: Iterable[Gradient | None]) -> float:
    r"""Euclidean norm of all gradients together, in double: :math:`\sqrt{\sum_i \sum_j g_{ij}^2}`.

    The sums run over a tree of fixed shape: the result depends on no thread count, instruction set or alignment.
    None entries are left out, as in TF; a NaN or an infinity in any gradient shows in the result.

    Args:
        grads: Arrays of any real dtype and layout; of IndexedSlices the values as they are, as in TF,
            not summed as with ``clip_after_dedupe``.

    Raises:
        TypeError: A gradient does not hold real numbers.
        ValueError: An iterator that yields nothing.

    Source: https://www.tensorflow.org/api_docs/python/tf/linalg/global_norm.

    >>> import numpy as np, fastadam
    >>> fastadam.global_norm([np.array([3.0, 0.0]), None, np.array([[4.0]])])
    5.0
    """
    is_array = isinstance(grads, np.ndarray)  # whose rows have the same norm together
    given = list(grads) if is_array else check_list("grads", grads, "a list of arrays")
    arrays = [_readable(_values(unwrap(g)), f"grads[{i}]") for i, g in enumerate(given) if g is not None]
    return math.sqrt(sum(_cpu.sums_of_squares(arrays)))


def _values(gradient: Any) -> Any:
    return gradient.values if isinstance(gradient, IndexedSlices) else gradient


def _readable(gradient: Any, label: str) -> Any:
    """The gradient itself if the kernel reads it as it lies, else a converted copy."""
    if isinstance(gradient, np.ndarray) and gradient.dtype.name == "bfloat16" and gradient.flags.forc:
        return gradient
    array = as_float_array(gradient, label)
    kind_is_known = array.dtype in (np.float16, np.float32, np.float64) and array.dtype.isnative
    as_it_lies = kind_is_known and array.flags.forc and array.flags.aligned
    return array if as_it_lies else np.array(array, dtype=array.dtype if kind_is_known else np.float64)
