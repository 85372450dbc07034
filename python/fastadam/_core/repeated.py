"""``sum_repeated``: the gradients of a variable that is given more than once in a call become one gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.native.arrays import zeros_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, buffers_of, key_of
from fastadam._core.native.gradients import as_float_array
from fastadam._core.native.plan import Plan, StepHyper
from fastadam._core.native.slices import IndexedSlices, is_slices, native_gradient
from fastadam._core.native.variable import unwrap
from fastadam._core.options.keras3 import ACCUMULATOR

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, AnyGradient, AnyPair, HostArray

__all__ = ["sum_repeated"]

_HYPER = StepHyper(1, 0.0, 0.0, 0.0, 1.0)  # sums need no numbers


def sum_repeated(pairs: list[AnyPair], copies: list[AnyArray], *, zeroes: bool) -> list[AnyPair]:
    """The pairs with one gradient for each variable: the sum, where the variable comes first; None at the other places.

    Args:
        pairs: (gradient, variable), checked.
        copies: For each pair None or an array that receives a copy of the variable; empty for none.
        zeroes: Whether the gradients are to be set to zero.

    Returns:
        The list itself if no variable is repeated.

    Raises:
        TypeError: A gradient that does not hold real numbers.
        ValueError: A gradient of a wrong shape, an invalid index, or what a repeated variable cannot have.
    """
    positions = [i for i, (gradient, _) in enumerate(pairs) if gradient is not None]
    buffers = dict(zip(positions, buffers_of([pairs[i][1] for i in positions], positions), strict=True))
    places: dict[Key, list[int]] = {}
    for i, buffer in buffers.items():
        places.setdefault(key_of(buffer), []).append(i)
    repeated = [group for group in places.values() if len(group) > 1]
    if not repeated:
        return pairs
    summed = list(pairs)
    for first, *later in repeated:
        buffer = buffers[first]
        if zeroes:
            raise ValueError(
                f"zero_grads: with sum_repeated=True for {buffer.label}, which comes twice, expected False"
            )
        for i in later:
            if copies and copies[i] is not None:
                raise ValueError(
                    f"copies[{i}]: of {buffer.label}, which comes twice, expected a copy only where it comes first"
                )
            summed[i] = (None, pairs[i][1])
        summed[first] = (_sum([unwrap(pairs[i][0]) for i in (first, *later)], [first, *later], buffer), pairs[first][1])
    return summed


def _sum(gradients: list[AnyGradient], positions: list[int], buffer: _cpu.Buffer) -> AnyGradient:
    """Sparse gradients joined in their order; with a dense one a sum in the dtype of the state, one after the other."""
    labels = [f"grads[{i}]" for i in positions]
    natives = [native_gradient(*row) for row in zip(gradients, [buffer] * len(labels), labels, strict=True)]
    if all(map(is_slices, natives)):
        return _joined(natives, labels, buffer)
    total = zeros_beside(buffer)
    plan = Plan([buffer] * len(natives), {ACCUMULATOR: [total] * len(natives)}, positions=positions)
    calls = np.zeros((), np.int64)
    plan.accumulate(natives, 1.0, _HYPER, calls, require_finite=False, restart=True, update=None)
    return total


def _joined(slices: list[_cpu.Slices], labels: list[str], buffer: _cpu.Buffer) -> IndexedSlices:
    if buffer.device >= 0:
        raise ValueError(
            f"{labels[1]}: sparse, for {buffer.label} on a GPU, which comes twice with sum_repeated=True, expected a "
            "dense gradient"
        )
    if not buffer.shape:
        raise ValueError(f"{labels[0]}: IndexedSlices for {buffer.label} of shape (), expected at least one axis")
    for part, label in zip(slices, labels, strict=True):
        bad = np.flatnonzero((part.indices < 0) | (part.indices >= buffer.shape[0]))
        if bad.size:
            raise ValueError(
                f"{label}.indices[{bad[0]}]: {part.indices[bad[0]]} is not a row of {buffer.label}, expected "
                f"0 <= index < {buffer.shape[0]}"
            )
    values = [_values(part, label, buffer) for part, label in zip(slices, labels, strict=True)]
    return IndexedSlices(np.concatenate(values), np.concatenate([part.indices for part in slices]))


def _values(slices: _cpu.Slices, label: str, buffer: _cpu.Buffer) -> HostArray:
    """In the dtype of the state."""
    values = as_float_array(slices.values, f"{label}.values")
    shape = (len(slices.indices), *buffer.shape[1:])
    if values.size == 0 and len(slices.indices) == 0:
        return np.zeros(shape, buffer.state_dtype)  # an empty list does not show the shape of rows
    if values.shape != shape:
        raise ValueError(
            f"{label}.values: shape {values.shape}, expected {shape}, a row of {buffer.label} for each index"
        )
    return values.astype(buffer.state_dtype)
