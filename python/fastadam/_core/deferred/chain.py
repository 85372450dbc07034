"""What changed since the last file of a chain: a base and the deltas that follow it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._core.deferred.history import History
from fastadam._core.native.arrays import untouched_zeros
from fastadam._core.native.buffers import Key, key_of
from fastadam._core.state.entry import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Chain", "Link", "Mark"]


def _new_id() -> str:
    """The name of a file in its chain."""
    return secrets.token_hex(16)


class Link(NamedTuple):
    """A file of a chain. A base has the number 0 and its own id for ``base``."""

    base: str
    id: str
    number: int

    @classmethod
    def new(cls) -> Link:
        """A base."""
        name = _new_id()
        return cls(name, name, 0)

    def next(self) -> Link:
        """The delta that follows."""
        return Link(self.base, _new_id(), self.number + 1)


@dataclass
class Mark:
    """What became of one variable since the last file."""

    place: int  # in the store
    key: Key | None
    slots: frozenset[str]  # that the file has
    position: int = 0  # steps of its histories from the base to the file
    history: History | None = None  # that it had when the file was saved
    begin: int = 0  # the steps of this history by then
    is_table: bool = False  # its gradients have been sparse
    is_whole: bool = False  # every row may have changed
    rows: npt.NDArray[np.uint8] | None = None  # of a lazy table: which have changed

    @classmethod
    def of(cls, entry: Entry, position: int = 0, *, is_table: bool = False) -> Mark:
        """The variable as it is now, when a file has been saved."""
        history = entry.history
        key = None if entry.buffer is None else key_of(entry.buffer)
        total = 0 if history is None else history.total
        return cls(entry.place, key, frozenset(entry.slots), position, history, total, is_table or history is not None)

    def note(self, indices: npt.NDArray[np.integer] | None, rows: int) -> None:
        """A step is about to change these rows, or all if None; some may be out of range."""
        if indices is None:
            self.is_whole = True
            return
        self.is_table = True
        if self.is_whole:  # the place may be another variable's by now, or the variable longer
            return
        if self.rows is None:
            self.rows = untouched_zeros((rows,), np.uint8)
        self.rows[indices[(indices >= 0) & (indices < rows)]] = 1


class Chain:
    """The last file of the chain, and for each variable in it a mark."""

    def __init__(self, link: Link, marks: Sequence[Mark], *, is_complete: bool) -> None:
        self.link = link
        self.marks = list(marks)
        self.is_complete = is_complete  # the files have all variables of the optimizer
        self._by_place = {mark.place: mark for mark in marks}

    @classmethod
    def at(
        cls,
        link: Link,
        entries: Sequence[Entry],
        positions: Sequence[int],
        are_tables: Sequence[bool],
        *,
        is_complete: bool,
    ) -> Chain:
        """The chain when a file with these entries has been saved or loaded."""
        marks = [
            Mark.of(entry, position, is_table=is_table)
            for entry, position, is_table in zip(entries, positions, are_tables, strict=True)
        ]
        return cls(link, marks, is_complete=is_complete)

    def note(self, entry: Entry | None, indices: npt.NDArray[np.integer] | None) -> None:
        """A step is about to change these rows of a variable that has no history; None: all rows."""
        mark = None if entry is None else self._by_place.get(entry.place)
        if mark is not None and entry is not None:
            mark.note(indices, entry.spec.shape[0] if entry.spec.shape else 0)

    def note_all(self) -> None:
        """Every row of every variable may have changed."""
        for mark in self.marks:
            mark.is_whole = True

    def entries_of(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries of the variables in the chain; raises ValueError if there are others now."""
        found = [entries[mark.place] if mark.place < len(entries) else None for mark in self.marks]
        for i, (mark, entry) in enumerate(zip(self.marks, found, strict=True)):
            if entry is None or entry.buffer is None or key_of(entry.buffer) != mark.key:
                raise ValueError(
                    f"save_delta: variable {i} is another array than in the last save, expected a new base, "
                    "save(values=True)"
                )
        if self.is_complete and len(entries) > len(self.marks):
            new = next(entry for entry in entries if entry.place not in self._by_place)
            raise ValueError(
                f"save_delta: the variable {new.spec} came after the last save(values=True), expected a new base"
            )
        return [entry for entry in found if entry is not None]
