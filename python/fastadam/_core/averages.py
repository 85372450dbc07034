"""Moving averages in the place of the variables: for good, or for the time of a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.native.arrays import assign, to_host
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gradients import float32_to_bfloat16

if TYPE_CHECKING:
    from typing import TypeAlias

    from fastadam._core.common.types import AnyArray, Array, HostArray
    from fastadam._core.parts import Parts

    _Copies: TypeAlias = list[tuple[HostArray, HostArray]]  # what is copied to, and from
    _Writes: TypeAlias = list[tuple[_cpu.Buffer, HostArray]]

__all__ = ["overwrite", "refuse_while_swapped", "swapped"]


def overwrite(parts: Parts, variables: Sequence[_cpu.Buffer], averages: Sequence[Array]) -> None:
    """Round averages into their variables: into all, or into none if one cannot be rounded."""
    with parts.runtime.lock:
        refuse_while_swapped(parts, "finalize_variable_values")
        copies, elsewhere = _planned(variables, averages)
        parts.tables.note_all_changed()
        if elsewhere is not None:
            try:
                _write(elsewhere[1])
            except BaseException:
                _write(elsewhere[0])
                raise
        _cpu.copy_all(copies, np.zeros((), np.int64))


def swapped(
    parts: Parts, find: Callable[[], tuple[Sequence[_cpu.Buffer], Sequence[Array]]]
) -> AbstractContextManager[None]:
    """Round the averages that ``find`` returns into their variables, and put back what was there at the end.

    It is native: Ctrl-C can come before the first line of an ``__exit__`` that is written in Python.
    """

    def prepare() -> tuple[_Copies, tuple[_Writes, _Writes] | None]:
        if parts.runtime.has_swapped_averages:
            raise RuntimeError("averages: they are in the variables already, expected one block with all variables")
        parts.runtime.require_between_steps("averages")
        return _planned(*find())

    return _cpu.SwappedValues(parts.runtime, prepare, _write, parts.runtime.has_swapped_averages)


def refuse_while_swapped(parts: Parts, call: str) -> None:
    """Raise RuntimeError for a call whose writes the end of the block would undo, or that belong to other values."""
    if parts.runtime.has_swapped_averages:
        raise RuntimeError(
            f"{call}: inside of `with averages(...)`, expected after it: its end puts the variables back as they were"
        )


def _planned(
    variables: Sequence[_cpu.Buffer], averages: Sequence[Array]
) -> tuple[_Copies, tuple[_Writes, _Writes] | None]:
    """The averages to be copied over variables on the host; what is on GPUs, and the averages for there."""
    pairs = [(variable, _rounded(variable, average)) for variable, average in zip(variables, averages, strict=True)]
    copies = [(variable.array(), average) for variable, average in pairs if variable.device < 0]
    after = [(variable, average) for variable, average in pairs if variable.device >= 0]
    before = [(variable, np.array(to_host(variable.source))) for variable, _ in after]
    return copies, (before, after) if after else None


def _rounded(variable: _cpu.Buffer, average: Array) -> HostArray:
    """In the dtype and layout of the variable; bfloat16 as its bits."""
    values: AnyArray = to_host(average)
    if variable.dtype == "bfloat16":
        values = float32_to_bfloat16(values)
    if variable.device >= 0:
        return np.asarray(values if variable.dtype == "bfloat16" else values.astype(variable.dtype))
    rounded: HostArray = np.empty_like(variable.array())
    rounded[...] = values
    return rounded


def _write(pairs: _Writes) -> None:
    """Overwrite variables on GPUs."""
    for variable, values in pairs:
        assign(variable.source, values)
