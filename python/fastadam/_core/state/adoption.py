"""Which variables take the state of a restored optimizer, which does not know its variables."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Literal

import numpy as np

from fastadam._core.common.types import AnyArray
from fastadam._core.common.warning import warn
from fastadam._core.native.arrays import to_host
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, fingerprint_of, key_of
from fastadam._core.state.entry import Entry, Spec

__all__ = ["Adoption"]

SlotsOf = Callable[[Entry], dict[str, AnyArray]]


class Adoption:
    """Gives entries that wait to variables.

    In a store from a pickle the next entry is adopted by whatever unknown variable comes. In a deep copy an entry is
    adopted by the original's variable, or by a copy of it, which has the values that the original had when the copy was
    made, and its name if both have one. Among equal ones without names the order decides, if as many come in one call
    as wait; else the call is refused.
    """

    def __init__(self) -> None:
        self._origins: dict[Key, Entry] = {}
        self._left: dict[Key, weakref.ref[AnyArray]] = {}  # originals whose entries copies have adopted
        # Which variables a deep copy goes on with: None until the first has come, then the originals or copies of them.
        self.follows: Literal["originals", "copies"] | None = None
        self._has_warned = False  # of a variable that could be a changed copy

    def draft(self) -> Adoption:
        """A copy, to be changed."""
        draft = Adoption()
        draft._origins = {**self._origins}
        draft._left = {key: ref for key, ref in self._left.items() if ref() is not None}
        draft.follows, draft._has_warned = self.follows, self._has_warned
        return draft

    def without_origins(self) -> Adoption:
        """A draft to which the entries that wait are added anew."""
        draft = self.draft()
        draft._origins = {}
        return draft

    def add(self, entry: Entry) -> None:
        """Add an entry that waits."""
        if entry.origin:
            self._origins[key_of(entry.origin)] = entry

    def of_original(self, key: Key) -> Entry | None:
        """The entry that waits for the original's variable with this key, or for copies of it."""
        waiting = self._origins.get(key)
        return waiting if waiting and waiting.origin and waiting.origin.is_current() else None

    def note(self, entry: Entry, buffer: _cpu.Buffer) -> None:
        """A variable has taken an entry; in a draft."""
        if not entry.origin:
            return
        self._origins.pop(key_of(entry.origin), None)
        if key_of(entry.origin) == key_of(buffer):
            self.follows = self.follows or "originals"
        else:
            self.follows = "copies"
            with contextlib.suppress(TypeError):  # an object of another library without weak references
                self._left[key_of(entry.origin)] = weakref.ref(entry.origin.source)

    def choose(self, unknown: dict[Key, _cpu.Buffer], waiting: list[Entry], slots_of: SlotsOf) -> dict[Key, Entry]:
        """Which of the entries each of the unknown variables takes, if any."""
        chosen: dict[Key, Entry] = {}
        rest, left = waiting[:], dict(unknown) if waiting else {}
        prints: dict[int, int] = {}
        while left:
            key, buffer = next(iter(left.items()))
            if (entry := self._next_for(buffer, rest, list(left.values()), prints, slots_of)) is not None:
                rest.remove(entry)
                chosen[key] = entry
            del left[key]
        return chosen

    def _next_for(
        self,
        buffer: _cpu.Buffer,
        waiting: list[Entry],
        unknown: list[_cpu.Buffer],
        prints: dict[int, int],
        slots_of: SlotsOf,
    ) -> Entry | None:
        """The entry that an unknown variable adopts, if there is one; ``unknown``: it and those after it."""
        if waiting and waiting[0].fingerprint is None:  # from a pickle
            _require_match(buffer, waiting[0])
            return waiting[0]
        alike = [entry for entry in waiting if entry.spec[:2] == Spec.of(buffer)[:2]]
        if copied := _copied_by(buffer, alike, prints):
            rivals = sum(_copied_by(other, alike, prints) == copied for other in unknown)
            if rivals != len(copied) and not _are_interchangeable(copied, slots_of, rivals):
                raise ValueError(
                    f"{buffer.label}: {rivals} such variables have the values that {len(copied)} had when the "
                    "optimizer was deep-copied, whose moments could go to any of them; expected build() first, with "
                    "the copies of these alone, in the order in which the originals came"
                )
            return copied[0]
        if alike and not self._has_warned:
            self._has_warned = True
            warn(
                f"{buffer.label}: neither a variable of the optimizer that this one was deep-copied from nor a copy of "
                "one, with its name and values as they were then: it starts with moments of zero. Copy variables "
                "together with the optimizer, copy.deepcopy((optimizer, variables)), or before they change"
            )
        return None

    def require_not_left(self, key: Key, buffer: _cpu.Buffer) -> None:
        """Refuse an original whose moments a copy of it has taken: it would start anew unseen."""
        if key in self._left and self._left[key]() is not None:
            raise ValueError(
                f"{buffer.label}: its moments in this deep copy went to another variable, which had its values when it "
                "came; expected the variables of the original or copies of them, not both (to go on with the "
                "original's, give them to build() of the copy first)"
            )


def _are_interchangeable(entries: list[Entry], slots_of: SlotsOf, variables: int) -> bool:
    """Whether it makes no difference which of so many equal variables adopts which entry, or none."""
    first, *others = [slots_of(entry) for entry in entries]
    if any(entry.history for entry in entries) or any(list(other) != list(first) for other in others):
        return False
    is_new = not any(to_host(array).any() for name, array in first.items() if name != "average")
    return (is_new or variables <= len(entries)) and all(
        np.array_equal(to_host(other[name]), to_host(array)) for other in others for name, array in first.items()
    )


def _require_match(buffer: _cpu.Buffer, entry: Entry) -> None:
    spec = Spec.of(buffer)
    if not entry.spec.admits(spec):
        raise ValueError(
            f"{buffer.label}: {spec.dtype} {spec.shape}, expected {entry.spec}: "
            f"the state restored for variable {entry.place} waits for it"
        )


def _copied_by(buffer: _cpu.Buffer, entries: list[Entry], prints: dict[int, int]) -> list[Entry]:
    """The entries of whose variables this can be a copy: equal values, and the same name where both have one."""
    spec = Spec.of(buffer)
    entries = [entry for entry in entries if entry.spec.admits(spec)]
    if entries and id(buffer) not in prints:
        prints[id(buffer)] = fingerprint_of(buffer)
    equal = [entry for entry in entries if entry.fingerprint == prints[id(buffer)]]
    named = [entry for entry in equal if spec.name and entry.spec.name == spec.name]
    return named or equal
