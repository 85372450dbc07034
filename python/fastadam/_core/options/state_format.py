"""What the state of a variable consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fastadam._core.native.arrays import assign, zeros_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gradients import bfloat16_to_float32

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray

__all__ = ["StateFormat"]


class StateFormat(NamedTuple):
    """The arrays that a step keeps for a variable, and their dtype."""

    names: tuple[str, ...]  # of the slots, in TensorFlow's order

    def dtype_of(self, buffer: _cpu.Buffer) -> str:
        """The dtype of the slots of a variable."""
        return buffer.state_dtype

    def begin(self, buffer: _cpu.Buffer, name: str) -> AnyArray:
        """A slot before the first step: zeros, but a moving average starts at its variable."""
        slot = zeros_beside(buffer, self.dtype_of(buffer))
        if name == "average":
            values = buffer.array()
            assign(slot, bfloat16_to_float32(values) if buffer.dtype == "bfloat16" else values)
        return slot
