"""Copy slots out of an optimizer, and set its state, completely or not at all. All of `exchange` uses this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.common.checks import check_list, check_non_negative
from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.arrays import assign as assign_array
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import buffers_of, key_of
from fastadam._core.native.gradients import as_float_array
from fastadam._core.optimizer import Optimizer
from fastadam._core.options.state_format import SCALES, StateFormat, VariableFormat
from fastadam._core.parts import parts_of
from fastadam._core.state.moments import RandomKey, decoded, stored

if TYPE_CHECKING:
    from fastadam._core.adam import Adam

__all__ = [
    "assign",
    "check_adam",
    "check_epsilon_here",
    "copies_of_slots",
    "moment_names",
    "require_no_average",
]


def check_adam(optimizer: object) -> None:
    """Refuse anything but an Adam, such as a wrapper."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: {type(optimizer).__name__}, expected a fastadam.Adam (not a wrapper of one)")


def moment_names(amsgrad: bool) -> list[str]:
    """The slots of Adam or of AMSGrad."""
    return ["m", "v", *(["vhat"] if amsgrad else [])]


def check_epsilon_here(epsilon: AnyArray) -> float:
    """A positive epsilon, which the optimizer uses unchanged."""
    eps = check_non_negative("epsilon", epsilon)
    if eps == 0:
        raise ValueError("epsilon: 0, expected epsilon > 0: 0 would mean 1e-7, as in TensorFlow")
    return eps


def require_no_average(optimizer: Adam, place: str) -> None:
    """Refuse an optimizer with moving averages, which would be lost."""
    if "average" in parts_of(optimizer).options.state_format.names:
        raise ValueError(f"optimizer: use_ema=True, expected False: {place} cannot hold moving averages")


def copies_of_slots(optimizer: Adam, variables: Iterable[AnyArray], names: Sequence[str]) -> dict[str, list[HostArray]]:
    """Copies in C order, by slot name; small moments in float32.

    Raises:
        ValueError: A variable does not have one of these slots.
    """
    variables = check_list("variables", variables)
    _, state, runtime, tables = parts_of(optimizer)
    with runtime.lock:
        tables.catch_up_all()
        existing = [state.slots.find(buffer) or {} for buffer in buffers_of(variables, range(len(variables)))]
        for i, slots in enumerate(existing):
            if not set(names) <= set(slots):
                raise ValueError(f"variables[{i}]: slots {list(slots)}, expected {list(names)}")
        return {name: [np.array(decoded(slots, name), order="C") for slots in existing] for name in names}


def assign(
    optimizer: Adam,
    variables: Sequence[AnyArray],
    iterations: int,
    slots: Mapping[str, Sequence[AnyArray]],
    hyper: Mapping[str, object],
) -> None:
    """Set iterations, hyperparameters and the slots of these variables; small moments are rounded at random.

    The caller has checked iterations and hyperparameters. If an error is raised, nothing has changed.

    Raises:
        TypeError: A variable cannot be one, or a slot does not hold numbers.
        ValueError: A slot has the wrong shape, dtype or range; a variable is given twice.
    """
    buffers = buffers_of(variables, range(len(variables)))
    _require_distinct(buffers)
    options, state, runtime, tables = parts_of(optimizer)
    new = {
        name: [_fitted(f"{name}[{i}]", array, buffers[i], buffers[i].state_dtype) for i, array in enumerate(arrays)]
        for name, arrays in slots.items()
    }
    with runtime.lock:
        tables.catch_up_all()
        options.refuse_with_small_states(amsgrad="vhat" in slots)
        prepared = state.slots.prepare(buffers, partial(_format_with, options.state_format, tuple(slots)))
        for name, targets in prepared.slots.items():
            for i, target in enumerate(targets):
                if isinstance(target, np.ndarray) and not target.flags.writeable:
                    raise ValueError(f"slot {name} of variables[{i}]: was made read-only, expected a writable array")
        prepared.commit()
        for i, buffer in enumerate(buffers):
            chosen = options.state_format.of(buffer, state.slots.find(buffer) or {})
            key = RandomKey(options.small.seed, iterations, prepared.numbers[i])
            for name, arrays in new.items():
                for part, array in stored(chosen, buffer, name, arrays[i], key).items():
                    assign_array(prepared.slots[part][i], array)
        optimizer.iterations = iterations
        for name, value in hyper.items():
            setattr(optimizer, name, value)


def _format_with(
    state_format: StateFormat, names: tuple[str, ...], buffer: _cpu.Buffer, slots: Mapping[str, AnyArray]
) -> VariableFormat:
    """The format of a variable with these slots alone, and the scales of its codes."""
    chosen = state_format.of(buffer, slots)
    return chosen._replace(names=(*names, *(name for name in chosen.names if name in SCALES)))


def _require_distinct(buffers: Sequence[_cpu.Buffer]) -> None:
    first: dict[object, int] = {}
    for i, buffer in enumerate(buffers):
        if buffer.size and first.setdefault(key_of(buffer), i) != i:
            raise ValueError(f"variables[{i}]: the same as variables[{first[key_of(buffer)]}], expected it once")


def _fitted(label: str, value: AnyArray, buffer: _cpu.Buffer, dtype: str) -> HostArray:
    """A copy of the dtype that can be assigned to a slot of this variable: the value itself may be one of the slots."""
    array = as_float_array(value, label)
    is_float = array.dtype.kind == "f"
    if array.shape != buffer.shape or not is_float:
        raise ValueError(f"{label}: {array.dtype} {array.shape}, expected floats {buffer.shape}")
    with np.errstate(over="ignore", under="ignore"):
        copy = np.array(array, dtype=dtype)
    if not np.array_equal(np.isinf(copy), np.isinf(array)):
        raise ValueError(f"{label}: numbers too large for {dtype}, the dtype of the slots of {buffer.label}")
    return copy
