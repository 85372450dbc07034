"""What the state of a variable consists of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fastadam._core.native.arrays import assign, zeros_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, key_of
from fastadam._core.native.gradients import bfloat16_to_float32
from fastadam._core.native.variable import name_in
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.small_states import SmallStates

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray

__all__ = ["BLOCK", "LOW", "MOMENTS", "NAMES", "SCALES", "StateFormat", "VariableFormat", "kind_of"]

BLOCK = 128  # elements with one scale, in the order of memory
MOMENTS = ("m", "v", "vhat")
SCALES = ("m_scale", "v_scale")  # of 8-bit moments
LOW = "low"  # the low halves of float32 masters whose high halves are the variable
NAMES = (*MOMENTS, "average", ACCUMULATOR, *SCALES, LOW)  # of all slots, in the order in which they are made


class _HasStateDtype(Protocol):
    @property
    def state_dtype(self) -> str: ...


class VariableFormat(NamedTuple):
    """The arrays that a step keeps for one variable, their dtypes and shapes."""

    names: tuple[str, ...]  # of the slots, in TensorFlow's order
    moments: str = "float32"  # float64 for float64 variables; "bfloat16" or "8bit"
    moves_rows_alone: bool = False  # a table whose gradients move only rows: no others need memory

    def dtype_of(self, buffer: _HasStateDtype, name: str) -> str:
        """The dtype of a slot of a variable."""
        if name == LOW:
            return "int16"
        if name in SCALES or (name in ("m", "v") and self.moments == "8bit"):
            return "uint8"
        return "bfloat16" if name in MOMENTS and self.moments == "bfloat16" else buffer.state_dtype

    def shape_of(self, shape: tuple[int, ...], size: int, name: str) -> tuple[int, ...]:
        """The shape of a slot of a variable."""
        return (-(-size // BLOCK),) if name in SCALES else shape

    def begin(self, buffer: _cpu.Buffer, name: str) -> AnyArray:
        """A slot before the first step: zeros, but a moving average starts at its variable."""
        shape = self.shape_of(buffer.shape, buffer.size, name)
        slot = zeros_beside(buffer, self.dtype_of(buffer, name), shape, untouched=self.moves_rows_alone)
        if name == "average":
            values = buffer.array()
            assign(slot, bfloat16_to_float32(values) if buffer.dtype == "bfloat16" else values)
        return slot


class StateFormat(NamedTuple):
    """The arrays that a step keeps, as far as options decide it."""

    names: tuple[str, ...]  # of the slots that every variable has, in TensorFlow's order
    small: SmallStates
    moves_rows_alone: bool  # sparse gradients move only the rows that they name, at once or in the end

    def of(
        self, buffer: _cpu.Buffer, slots: Mapping[str, AnyArray], tables: Collection[Key] = frozenset()
    ) -> VariableFormat:
        """The format of one variable.

        Args:
            buffer: The variable.
            slots: What it has already, which stays as it is.
            tables: Keys of variables with a sparse gradient, which keep float32 moments.

        Raises:
            ValueError: The options ask for what the variable cannot have.
        """
        small = self.small
        is_table = key_of(buffer) in tables
        moves_rows_alone = is_table and self.moves_rows_alone
        if small.asked is None:
            return VariableFormat(self.names, moves_rows_alone=moves_rows_alone)
        if buffer.device >= 0:
            raise ValueError(f"{buffer.label}: on a GPU with {small.asked}, expected CPU memory")
        moments = kind_of(slots["m"]) if "m" in slots else self._moments_of(buffer, is_table=is_table)
        scales = SCALES if moments == "8bit" else ()
        low = (LOW,) if self._is_split(buffer) else ()
        return VariableFormat((*self.names, *scales, *low), moments, moves_rows_alone)

    def _moments_of(self, buffer: _cpu.Buffer, *, is_table: bool) -> str:
        small = self.small
        name = name_in(buffer.label) or ""
        if not small.has_small_moments or is_table or small.keeps_float32(name, buffer.shape, buffer.size):
            return "float32"
        if buffer.dtype == "float64":
            raise ValueError(
                f"{buffer.label}: float64 with {small.asked}, expected float32, bfloat16 or float16; float32_for= "
                "names variables whose moments keep their dtype"
            )
        return str(small.moments)

    def _is_split(self, buffer: _cpu.Buffer) -> bool:
        if self.small.master != "split" or buffer.dtype in ("float32", "float64"):
            return False
        if buffer.dtype == "float16":
            raise ValueError(f"{buffer.label}: float16 with master='split', expected bfloat16, float32 or float64")
        return True

    def why_dense(self, buffer: _cpu.Buffer, moment: AnyArray, low: AnyArray | None) -> str | None:
        """Why a variable with this m and these low halves cannot be stepped by a sparse gradient; None if it can."""
        if self.small.asked is None:
            return None
        if kind_of(moment) != "float32":
            return (
                f"{buffer.label}: a sparse gradient with moments={kind_of(moment)!r}, expected a dense one; name "
                "tables with float32_for= in the constructor (or let their first gradient be sparse, before build())"
            )
        if low is not None:
            return f"{buffer.label}: a sparse gradient with master='split', expected a dense one"
        if self.small.stochastic_rounding and buffer.dtype == "bfloat16":
            return f"{buffer.label}: a sparse gradient with stochastic_rounding=True, expected a dense one"
        return None


def kind_of(moment: AnyArray) -> str:
    """How a moment is stored: "8bit", "bfloat16", or "float32" for the dtype that TensorFlow gives it."""
    return {"uint8": "8bit", "bfloat16": "bfloat16"}.get(str(moment.dtype), "float32")
