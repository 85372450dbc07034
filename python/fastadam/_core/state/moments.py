"""Moments in one format read, and written in another: bfloat16 and 8-bit codes are rounded at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.arrays import beside, copy_beside, to_host, zeros_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.options.state_format import MOMENTS, SCALES, VariableFormat, kind_of

__all__ = ["RandomKey", "check_scales", "decoded", "laid_out", "readable", "stored"]

_DAMAGED = np.array([*range(1, 35), 254], np.uint8)  # scale bytes that no step writes


class RandomKey(NamedTuple):
    """What random numbers depend on, beside the element."""

    seed: int
    step: int
    number: int  # of the variable


def decoded(slots: Mapping[str, AnyArray], name: str) -> HostArray:
    """A moment in the dtype that TensorFlow gives it, in the layout of its variable; a copy only if it is small."""
    moment = to_host(slots[name])
    kind = kind_of(moment)
    if kind == "8bit":
        values = np.empty_like(moment, np.float32)
        _cpu.decode_moment(_flat(moment), _flat(to_host(slots[f"{name}_scale"])), _flat(values), name == "m")
        return values
    return moment.astype(np.float32, order="K") if kind == "bfloat16" else moment


def readable(slots: Mapping[str, AnyArray], name: str) -> AnyArray:
    """The live slot, but the values of 8-bit codes: read-only, for a write to them would be lost."""
    if f"{name}_scale" not in slots:
        return slots[name]
    values = decoded(slots, name)
    values.flags.writeable = False
    return values


def stored(
    variable_format: VariableFormat, buffer: _cpu.Buffer, name: str, values: HostArray, key: RandomKey
) -> dict[str, AnyArray]:
    """The slots that hold a moment of this variable in this format: its own, and its scales if it has any."""
    dtype = variable_format.dtype_of(buffer, name)
    if dtype not in ("uint8", "bfloat16"):
        return {name: copy_beside(values.astype(dtype, copy=False), buffer)}
    ordered = np.empty(buffer.shape, np.float32, order="F" if buffer.order == "F" else "C")
    ordered[...] = values
    moment = zeros_beside(buffer, dtype)
    if dtype == "bfloat16":
        _cpu.round_moment(_flat(ordered), _flat(moment).view(np.uint16), *key)
        return {name: moment}
    scales = variable_format.begin(buffer, f"{name}_scale")
    _cpu.encode_moment(_flat(ordered), _flat(moment), scales, name == "m", *key)
    return {name: moment, f"{name}_scale": scales}


def laid_out(slots: Mapping[str, AnyArray], buffer: _cpu.Buffer, number: int) -> dict[str, AnyArray]:
    """The slots on the device of a variable and in its layout: copies where they are not.

    Blocks of codes follow the order of memory, so codes of another layout are written anew.
    """
    placed = {name: array if beside(array, buffer) else copy_beside(array, buffer) for name, array in slots.items()}
    for name in MOMENTS:
        if f"{name}_scale" in slots and placed[name] is not slots[name]:
            coded = VariableFormat((name, *SCALES), "8bit")
            placed.update(stored(coded, buffer, name, decoded(slots, name), RandomKey(0, 0, number)))
    return placed


def check_scales(name: str, scales: AnyArray, label: str) -> None:
    """Raise if a slot has scale bytes that no step writes; ``name``: of the slot."""
    if name not in SCALES:
        return
    damaged = np.isin(scales, _DAMAGED)
    if damaged.any():
        raise ValueError(f"{label}: scale byte {int(scales[damaged][0])}, expected 0, 35 to 253, or 255: it is damaged")


def _flat(array: AnyArray) -> AnyArray:
    """A view of all elements in the order of memory."""
    return array.reshape(-1, order="A")
