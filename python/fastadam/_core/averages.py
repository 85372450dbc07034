"""Moving averages in the place of the variables: for good, or for the time of a ``with`` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.native.arrays import assign, to_host
from fastadam._core.native.gradients import float32_to_bfloat16

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, Array, HostArray
    from fastadam._core.native.backend import _cpu
    from fastadam._core.parts import Parts

__all__ = ["overwrite", "refuse_while_swapped", "swapped"]


def overwrite(variables: Sequence[_cpu.Buffer], averages: Sequence[Array]) -> None:
    """Round averages into their variables: into all, or into none if one cannot be rounded."""
    rounded = [_rounded(*pair) for pair in zip(variables, averages, strict=True)]
    before = [_contents(variable) for variable in variables]
    try:
        _write(variables, rounded)
    except BaseException:
        _write(variables, before)
        raise


@contextlib.contextmanager
def swapped(parts: Parts, variables: Sequence[_cpu.Buffer], averages: Sequence[Array]) -> Iterator[None]:
    """Round averages into their variables, and put back what was there at the end."""
    runtime, lock = parts.runtime, parts.runtime.lock
    with lock:
        if runtime.has_swapped_averages:
            raise RuntimeError("averages: they are in the variables already, expected one block with all variables")
        before = [_contents(variable) for variable in variables]
    try:
        with lock:
            runtime.has_swapped_averages = True
            overwrite(variables, averages)
        yield
    finally:
        with lock:
            try:
                _write(variables, before)
            except BaseException:  # Ctrl-C between two variables
                _write(variables, before)
                raise
            finally:
                runtime.has_swapped_averages = False


def refuse_while_swapped(parts: Parts) -> None:
    """Raise RuntimeError for a step that the end of the block would undo."""
    if parts.runtime.has_swapped_averages:
        raise RuntimeError("apply_gradients: inside of `with averages(...)`, expected after it: its end undoes a step")


def _rounded(variable: _cpu.Buffer, average: Array) -> AnyArray:
    values: AnyArray = to_host(average)
    return float32_to_bfloat16(values) if variable.dtype == "bfloat16" else values.astype(variable.dtype)


def _contents(variable: _cpu.Buffer) -> HostArray:
    """A copy; of bfloat16 the bits."""
    return np.array(variable.array() if variable.device < 0 else to_host(variable.source))


def _write(variables: Sequence[_cpu.Buffer], arrays: Sequence[AnyArray]) -> None:
    for variable, array in zip(variables, arrays, strict=True):
        if variable.device < 0:
            variable.array()[...] = array
        else:
            assign(variable.source, array)
