"""Variables as the native code sees them: where their memory is, and what identifies them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from fastadam._core.common.frameworks import hint_for_variable
from fastadam._core.common.types import AnyArray
from fastadam._core.native.arrays import native_for, to_host
from fastadam._core.native.backend import _cpu
from fastadam._core.native.variable import label_of, name_in, unwrap

__all__ = ["Key", "buffer_of", "buffers_of", "fingerprint_of", "key_of"]

Key: TypeAlias = tuple[int, tuple[int, ...], str, str, int]  # see key_of


def buffers_of(
    variables: Sequence[AnyArray], positions: Sequence[int], argument: str | None = None
) -> list[_cpu.Buffer]:
    """Check each variable and view its memory.

    Args:
        variables: Arrays, or holders of them.
        positions: Their places in the caller's list.
        argument: What error messages call a variable without a name that did not come in a list.
    """
    native = native_for(map(unwrap, variables))
    buffers = []
    for variable, position in zip(variables, positions, strict=True):
        try:
            label = label_of(variable, position)
            is_named = argument is None or name_in(label)
            buffers.append(native.Buffer(unwrap(variable), label if is_named else argument))
        except (TypeError, ValueError) as error:
            hint = hint_for_variable(variable)
            if hint is None:
                raise
            raise type(error)(f"{error}; {hint}") from None
    for buffer in buffers:
        native.require_place(buffer, buffers[0])
    return buffers


def buffer_of(variable: AnyArray, position: int = 0, argument: str | None = None) -> _cpu.Buffer:
    """Check one variable and view its memory; ``argument``: as for :func:`buffers_of`."""
    return buffers_of([variable], [position], argument)[0]


def fingerprint_of(buffer: _cpu.Buffer) -> int:
    """A checksum of the values of a variable; waits for a GPU."""
    values = buffer.array() if buffer.device < 0 else to_host(buffer.source)
    return zlib.crc32(np.ascontiguousarray(values.reshape(-1, order="A")).view(np.uint8).data)


def key_of(buffer: _cpu.Buffer) -> Key:
    """What identifies a variable: two views of one memory have one key. Keep the buffer alive, or an address is reused.

    An empty array on a GPU has no address: there each object is a variable.
    """
    return (buffer.address or id(buffer.source), buffer.shape, buffer.dtype, buffer.order, buffer.device)
