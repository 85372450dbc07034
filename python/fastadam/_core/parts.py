"""The parts that an optimizer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fastadam._core.deferred.tables import Tables
from fastadam._core.options.options import Options
from fastadam._core.runtime import Runtime
from fastadam._core.state.state import State

if TYPE_CHECKING:
    from fastadam._core.common.types import Foreign

__all__ = ["Parts", "parts_of"]


class Parts(NamedTuple):
    """``options`` and ``state`` are copied and pickled; ``runtime`` and ``tables`` are made anew."""

    options: Options
    state: State
    runtime: Runtime
    tables: Tables

    @classmethod
    def around(cls, options: Options, state: State) -> Parts:
        """The parts of an optimizer with these options and this state."""
        runtime = Runtime()
        runtime.checks_exclusions = bool(options.exclusions)
        return cls(options, state, runtime, Tables(options, state, runtime))


def parts_of(optimizer: Foreign) -> Parts:
    """The parts of an :class:`fastadam.Adam`, for the modules of this package."""
    parts: Parts = optimizer._parts
    return parts
