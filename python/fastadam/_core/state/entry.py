"""What is kept for one variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastadam._core.deferred.history import History
from fastadam._core.deferred.rates import Doubt
from fastadam._core.native.backend import _cpu
from fastadam._core.native.variable import name_in, present_name

__all__ = ["Entry", "Spec"]


class Spec(NamedTuple):
    """What is known of a variable that is not at hand."""

    shape: tuple[int, ...]
    dtype: str
    order: str
    name: str | None

    @classmethod
    def of(cls, buffer: _cpu.Buffer) -> Spec:
        """Only a :class:`fastadam.Variable` has a name."""
        return cls(buffer.shape, buffer.dtype, buffer.order, name_in(buffer.label))

    @property
    def state_dtype(self) -> str:
        """The dtype of its slots, unless an option makes them smaller."""
        return "float64" if self.dtype == "float64" else "float32"

    def admits(self, other: Spec) -> bool:
        """Whether the state of this variable may go to that one."""
        return self[:2] == other[:2] and (None in (self.name, other.name) or self.name == other.name)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}" + (f" named '{self.name}'" if self.name else "")


@dataclass(eq=False)
class Entry:
    """The slots of one variable, as places in ``SlotStore.arrays``. A commit makes a new entry to change one."""

    recorded: Spec  # when the variable was first met
    slots: dict[str, int]
    buffer: _cpu.Buffer | None = None  # None: restored, waits for its variable
    history: History | None = None  # of a table in a deferred mode
    origin: _cpu.Buffer | None = None  # in a deep copy, until a variable comes: the original's variable
    fingerprint: int | None = None  # of the values that this had when the copy was made
    place: int = -1  # in the store
    number: int = -1  # its own part of the random numbers: the place, unless a file or a copy says otherwise
    doubt: Doubt = Doubt.ONCE  # of its moments, as long as it has no history, which has its own

    def raise_doubt(self, doubt: Doubt) -> None:
        """Moments were set, or will be by a user who has the arrays."""
        self.doubt = max(self.doubt, doubt)
        if self.history is not None:
            self.history.raise_doubt(doubt)

    @property
    def spec(self) -> Spec:
        """With the present name of the variable."""
        if self.buffer is None:
            return self.recorded
        return self.recorded._replace(name=present_name(self.buffer.source, self.recorded.name))
