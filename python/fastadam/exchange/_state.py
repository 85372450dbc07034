"""What all exchanges share: slots taken from an optimizer, and state given to one, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastadam._core import placement
from fastadam._core.backend import _cpu
from fastadam._core.buffers import buffers_of, key_of
from fastadam._core.checks import check_list, check_non_negative
from fastadam._core.gradients import as_float_array
from fastadam._core.optimizer import Optimizer
from fastadam._core.parts import parts_of

if TYPE_CHECKING:
    from fastadam._core.adam import Adam

__all__ = [
    "Array",
    "assign",
    "check_adam",
    "check_epsilon_here",
    "copies_of_slots",
    "moment_names",
    "require_no_average",
]

Array = npt.NDArray[Any]


def check_adam(optimizer: Any) -> None:
    """Refuse a wrapper, whose inner optimizer has the state."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: {type(optimizer).__name__}, expected a fastadam.Adam (of a wrapper the inner one)")


def moment_names(amsgrad: bool) -> list[str]:
    """The slots of Adam or of AMSGrad."""
    return ["m", "v", *(["vhat"] if amsgrad else [])]


def check_epsilon_here(epsilon: Any) -> float:
    """A value that this optimizer adds as it is; it cannot be 0."""
    eps = check_non_negative("epsilon", epsilon)
    if eps == 0:
        raise ValueError("epsilon: 0, expected epsilon > 0: here, as in TF, 0 means 1e-7")
    return eps


def require_no_average(optimizer: Adam, place: str) -> None:
    """Refuse an optimizer whose moving averages would be lost."""
    if "average" in parts_of(optimizer).options.slot_names:
        raise ValueError(f"optimizer: use_ema=True, expected False: {place} has no place for moving averages")


def copies_of_slots(optimizer: Adam, variables: Iterable[Any], names: Sequence[str]) -> dict[str, list[Array]]:
    """Copies in C order, by slot name.

    Raises:
        ValueError: A variable without one of these slots.
    """
    given = check_list("variables", variables)
    _, state, runtime, tables = parts_of(optimizer)
    with runtime.lock:
        tables.catch_up_all()
        found = [state.slots.find(buffer) or {} for buffer in buffers_of(given, range(len(given)))]
        for i, slots in enumerate(found):
            if not set(names) <= set(slots):
                raise ValueError(f"variables[{i}]: slots {list(slots)}, expected {list(names)}")
        return {name: [np.array(placement.to_host(slots[name]), order="C") for slots in found] for name in names}


def assign(
    optimizer: Adam,
    variables: Sequence[Any],
    iterations: int,
    slots: Mapping[str, Sequence[Any]],
    hyper: Mapping[str, Any],
) -> None:
    """Set iterations, hyperparameters that were checked before, and the slots of these variables.

    Raises:
        TypeError: A variable that is none, or a slot without numbers.
        ValueError: A slot of another shape, kind or range; a variable given twice. Nothing is changed.
    """
    buffers = buffers_of(variables, range(len(variables)))
    _require_distinct(buffers)
    new = {
        name: [_fitted(f"{name}[{i}]", array, buffers[i]) for i, array in enumerate(arrays)]
        for name, arrays in slots.items()
    }
    _, state, runtime, tables = parts_of(optimizer)
    with runtime.lock:
        tables.catch_up_all()
        prepared = state.slots.prepare(buffers, list(slots))
        for name, targets in zip(slots, prepared.slots, strict=True):
            for i, target in enumerate(targets):
                if isinstance(target, np.ndarray) and not target.flags.writeable:
                    raise ValueError(f"slot {name} of variables[{i}]: was made read-only, expected a writable array")
        prepared.commit()
        for targets, arrays in zip(prepared.slots, new.values(), strict=True):
            for target, array in zip(targets, arrays, strict=True):
                placement.assign(target, array)
        optimizer.iterations = iterations
        for name, value in hyper.items():
            setattr(optimizer, name, value)


def _require_distinct(buffers: Sequence[_cpu.Buffer]) -> None:
    first: dict[Any, int] = {}
    for i, buffer in enumerate(buffers):
        if buffer.size and first.setdefault(key_of(buffer), i) != i:
            raise ValueError(f"variables[{i}]: the same as variables[{first[key_of(buffer)]}], expected it once")


def _fitted(label: str, value: Any, buffer: _cpu.Buffer) -> Array:
    """A copy that can be assigned to a slot of this variable; a copy, for it may be one of the slots."""
    array = as_float_array(value, label)
    is_float = array.dtype.kind == "f"
    if array.shape != buffer.shape or not is_float:
        raise ValueError(f"{label}: {array.dtype} {array.shape}, expected floats {buffer.shape}")
    with np.errstate(over="ignore", under="ignore"):
        copy = np.array(array, dtype=buffer.state_dtype)
    if not np.array_equal(np.isinf(copy), np.isinf(array)):
        raise ValueError(f"{label}: numbers that {buffer.state_dtype} cannot hold, expected those of {buffer.label}")
    return copy
