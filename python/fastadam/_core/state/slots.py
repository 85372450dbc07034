"""The state arrays of an optimizer: found by the memory of their variable, listed in the order of their creation."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._core.common.types import AnyArray, Config
from fastadam._core.common.warning import warn
from fastadam._core.deferred.history import History
from fastadam._core.native.arrays import assign, beside, copy_beside, to_host, zeros_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, fingerprint_of, key_of
from fastadam._core.native.gradients import as_float_array, bfloat16_to_float32
from fastadam._core.native.variable import present_name

__all__ = ["Entry", "Initializer", "SlotStore", "Spec", "initial_value"]

Maker = Callable[[_cpu.Buffer, str], AnyArray]
Initializer = str | Callable[..., npt.ArrayLike] | npt.ArrayLike


def initial_value(
    initializer: Initializer, shape: tuple[int, ...], dtype: npt.DTypeLike, order: str = "C"
) -> npt.NDArray[np.generic]:
    """A new array: "zeros", "ones", the result of ``initializer(shape, dtype)``, or a value of that shape."""
    layout: Literal["C", "F"] = "C" if order == "C" else "F"
    if isinstance(initializer, str):
        makers = {"zeros": np.zeros, "ones": np.ones}
        if initializer not in makers:
            raise ValueError(f"initializer: {initializer!r}, expected 'zeros', 'ones', a callable or an array")
        return makers[initializer](shape, dtype, order=layout)
    value: AnyArray = initializer(shape, dtype=dtype) if callable(initializer) else initializer
    if np.dtype(dtype).kind in "fiu":  # a conversion from text, dates or complex numbers would lose something
        value = as_float_array(value, "initializer", "fiub")
    array = np.array(value, dtype=dtype, order=layout)
    if array.shape != shape:
        raise ValueError(f"initializer: shape {array.shape}, expected {shape}")
    return array


class Spec(NamedTuple):
    """What is known of a variable that is not at hand."""

    shape: tuple[int, ...]
    dtype: str
    order: str
    name: str | None

    @classmethod
    def of(cls, buffer: _cpu.Buffer) -> Spec:
        """Only a :class:`fastadam.Variable` has a name; its label is "variable 'name'"."""
        name = buffer.label[len(_NAMED) : -1] if buffer.label.startswith(_NAMED) else None
        return cls(buffer.shape, buffer.dtype, buffer.order, name)

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

    @property
    def spec(self) -> Spec:
        """With the present name of the variable."""
        if self.buffer is None:
            return self.recorded
        return self.recorded._replace(name=present_name(self.buffer.source, self.recorded.name))


@dataclass
class Prepared:
    """Slots for a step or a build; the store is as it was until ``commit``."""

    slots: list[list[AnyArray]]  # for each name, for each variable
    store: SlotStore
    version: int
    adopted: dict[Key, tuple[Entry, _cpu.Buffer, dict[str, AnyArray]]]
    created: dict[tuple[Key, str], tuple[_cpu.Buffer, AnyArray]]

    def entry_of(self, buffer: _cpu.Buffer) -> Entry | None:
        """The entry that this variable has or adopts; None for a new one."""
        adopted = self.adopted.get(key_of(buffer))
        return self.store.entry_of(buffer) if adopted is None else adopted[0]

    def commit(self) -> None:
        """Register the new slots, and the variables that adopt restored ones."""
        if self.version != self.store.version:
            raise RuntimeError("the optimizer's slots were changed by code that ran while a step was prepared")
        if not self.adopted and not self.created:
            return
        draft = self.store.draft()
        for entry, buffer, arrays in self.adopted.values():
            draft.adopt(entry, buffer, arrays)
        for (_, name), (buffer, array) in self.created.items():
            draft.add(buffer, name, array)
        self.store.become(draft)


class SlotStore:
    """Slots of all variables, and the flat list of them that ``weights`` shows.

    A restored store has slots whose variables it has not met: entries that wait. In a store from a pickle the next one
    is adopted by whatever unknown variable comes. In a deep copy an entry is adopted by the original's variable, or by
    a copy of it, which has the values that the original had when the copy was made, and its name if both have one.
    Among equal ones without names the order decides, if as many come in one call as wait; else the call is refused.
    """

    def __init__(self) -> None:
        self.arrays: list[AnyArray] = []
        self.names: list[str] = []
        self.entries: list[Entry] = []
        self.version = 0
        self._known: dict[Key, Entry] = {}
        self._origins: dict[Key, Entry] = {}
        self._intervals: list[tuple[int, int, _cpu.Buffer]] = []
        self._left: dict[Key, weakref.ref[AnyArray]] = {}  # originals whose entries copies have adopted
        self.follows_copies = False  # of the variables, in a deep copy, which some have shown
        self._has_warned = False  # of a variable that could be a changed copy

    def entry_of(self, buffer: _cpu.Buffer) -> Entry | None:
        """The entry of this variable, or None for a variable never seen."""
        key = key_of(buffer)
        entry = self._known.get(key)
        if entry is None:
            waiting = self._origins.get(key)
            return waiting if waiting and waiting.origin and waiting.origin.is_current() else None
        if entry.buffer is None or not entry.buffer.is_current():
            raise ValueError(
                f"{buffer.label}: lies where a variable of this optimizer was before its memory was freed "
                "(ndarray.resize with refcheck=False?); its state belongs to that one"
            )
        return entry

    def knows(self, key: Key) -> bool:
        """Whether a variable has slots."""
        return key in self._known

    def find(self, buffer: _cpu.Buffer) -> dict[str, AnyArray] | None:
        """The slots of this variable by name, or None for a variable never seen."""
        return None if (entry := self.entry_of(buffer)) is None else self.slots_of(entry)

    def slots_of(self, entry: Entry) -> dict[str, AnyArray]:
        """The slots of an entry by name."""
        return {name: self.arrays[at] for name, at in entry.slots.items()}

    def unclaimed(self) -> list[Entry]:
        """Restored entries whose variable has not come."""
        return [entry for entry in self.entries if entry.buffer is None]

    def variable_of(self, entry: Entry) -> _cpu.Buffer | None:
        """The variable of an entry; in a deep copy the original's, unless it has been used with copies of others."""
        if entry.buffer is not None or entry.origin is None or self.follows_copies:
            return entry.buffer
        return entry.origin if entry.origin.is_current() else None

    def prepare(self, buffers: Sequence[_cpu.Buffer], names: Sequence[str], make: Maker | None = None) -> Prepared:
        """The slots of these variables, made by ``make`` where there are none; nothing is registered yet.

        The new ones come in TF's order: all m, then all v, then all vhat.
        """
        version = self.version  # before `make`, which may be a caller's code
        distinct: dict[Key, _cpu.Buffer] = {}
        for buffer in buffers:
            distinct.setdefault(key_of(buffer), buffer)
        _require_apart(list(distinct.values()))
        adopted = self._adoptions(distinct)
        slots = {k: dict(adopted[k][2]) if k in adopted else self.find(b) or {} for k, b in distinct.items()}
        created: dict[tuple[Key, str], tuple[_cpu.Buffer, AnyArray]] = {}
        for name in names:
            for key, buffer in distinct.items():
                if name not in slots[key]:
                    slots[key][name] = (make or _fresh_slot)(buffer, name)
                    created[key, name] = (buffer, slots[key][name])
        listed = [[slots[key_of(buffer)][name] for buffer in buffers] for name in names]
        return Prepared(listed, self, version, adopted, created)

    def _adoptions(self, buffers: dict[Key, _cpu.Buffer]) -> dict[Key, tuple[Entry, _cpu.Buffer, dict[str, AnyArray]]]:
        """Which waiting entry each unknown variable takes: that of its own memory, else the next one."""
        chosen: dict[Key, Entry] = {}
        for key, buffer in buffers.items():
            entry = self.entry_of(buffer)
            if entry is None:
                self._require_not_left(key, buffer)
                self.require_new_memory(buffer)
            elif entry.buffer is None:
                chosen[key] = entry
        taken = {id(entry) for entry in chosen.values()}
        rest = [entry for entry in self.unclaimed() if id(entry) not in taken]
        unknown = {key: b for key, b in buffers.items() if key not in chosen and key not in self._known} if rest else {}
        prints: dict[int, int] = {}
        while unknown:
            key, buffer = next(iter(unknown.items()))
            if (entry := self._next_for(buffer, rest, list(unknown.values()), prints)) is not None:
                rest.remove(entry)
                chosen[key] = entry
            del unknown[key]
        for key, entry in chosen.items():
            self._require_history(buffers[key], entry)
        return {key: (entry, buffers[key], self._laid_out(entry, buffers[key])) for key, entry in chosen.items()}

    def _next_for(
        self, buffer: _cpu.Buffer, waiting: list[Entry], unknown: list[_cpu.Buffer], prints: dict[int, int]
    ) -> Entry | None:
        """The entry that an unknown variable adopts, if there is one; ``unknown``: it and those after it."""
        if waiting and waiting[0].fingerprint is None:  # from a pickle
            self._require_match(buffer, waiting[0])
            return waiting[0]
        alike = [entry for entry in waiting if entry.spec[:2] == Spec.of(buffer)[:2]]
        if copied := _copied_by(buffer, alike, prints):
            rivals = sum(_copied_by(other, alike, prints) == copied for other in unknown)
            if rivals != len(copied) and not self._are_interchangeable(copied, rivals):
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

    def _are_interchangeable(self, entries: list[Entry], variables: int) -> bool:
        """Whether it makes no difference which of so many equal variables adopts which entry, or none."""
        first, *others = [self.slots_of(entry) for entry in entries]
        if any(entry.history for entry in entries) or any(list(other) != list(first) for other in others):
            return False
        is_new = not any(to_host(array).any() for name, array in first.items() if name != "average")
        return (is_new or variables <= len(entries)) and all(
            np.array_equal(to_host(other[name]), to_host(array)) for other in others for name, array in first.items()
        )

    def _require_match(self, buffer: _cpu.Buffer, entry: Entry) -> None:
        spec = Spec.of(buffer)
        if not entry.spec.admits(spec):
            raise ValueError(
                f"{buffer.label}: {spec.dtype} {spec.shape}, expected {entry.spec}: "
                f"the state restored for variable {self.entries.index(entry)} waits for it"
            )

    def _require_history(self, buffer: _cpu.Buffer, entry: Entry) -> None:
        if entry.history is not None and not entry.history.fits(buffer):
            raise ValueError(
                f"{buffer.label}: changed since the state was copied, while rows lagged behind; expected the table as "
                "it was then (sync() before a deferred optimizer is copied apart from its tables)"
            )

    def _require_not_left(self, key: Key, buffer: _cpu.Buffer) -> None:
        """Refuse an original whose moments a copy of it has taken: it would start anew unseen."""
        if key in self._left and self._left[key]() is not None:
            raise ValueError(
                f"{buffer.label}: its moments in this deep copy went to another variable, which had its values when it "
                "came; expected the variables of the original or copies of them, not both (to go on with the "
                "original's, give them to build() of the copy first)"
            )

    def _laid_out(self, entry: Entry, buffer: _cpu.Buffer) -> dict[str, AnyArray]:
        arrays = self.slots_of(entry).items()
        return {name: a if beside(a, buffer) else copy_beside(a, buffer) for name, a in arrays}

    def require_new_memory(self, buffer: _cpu.Buffer) -> None:
        """Refuse a variable that overlaps a known one under another shape: its moments would start at zero unseen."""
        at = bisect.bisect_left(self._intervals, (buffer.address, 0), key=lambda interval: interval[:2])
        for begin, end, known in self._intervals[max(at - 1, 0) : at + 1]:
            if begin < buffer.address + buffer.nbytes and buffer.address < end:
                raise ValueError(
                    f"{buffer.label}: overlaps a variable of this optimizer known as {known.dtype} {known.shape} in "
                    f"order {known.order}, expected that view or separate memory, got {buffer.dtype} {buffer.shape} in "
                    f"order {buffer.order}"
                )

    # ---- a commit --------------------------------------------------------------------------------------------------

    def draft(self) -> SlotStore:
        """A store with the same entries, to be changed and then put in the place of this one."""
        draft = SlotStore()
        draft.arrays, draft.names, draft.entries = self.arrays[:], self.names[:], self.entries[:]
        draft.version = self.version + 1
        draft._known, draft._origins, draft._intervals = {**self._known}, {**self._origins}, self._intervals[:]
        draft._left = {key: ref for key, ref in self._left.items() if ref() is not None}
        draft.follows_copies, draft._has_warned = self.follows_copies, self._has_warned
        return draft

    def become(self, draft: SlotStore) -> None:
        """Take over all of a draft in one assignment, which no signal handler can cut in two."""
        self.__dict__ = draft.__dict__

    def adopt(self, entry: Entry, buffer: _cpu.Buffer, arrays: dict[str, AnyArray]) -> None:
        """Give the slots of a waiting entry, laid out for this variable, to it; in a draft."""
        for name, array in arrays.items():
            self.arrays[entry.slots[name]] = array
        spec = Spec.of(buffer)._replace(name=Spec.of(buffer).name or entry.spec.name)
        history = entry.history and entry.history.placed(buffer)
        self._put(Entry(spec, dict(entry.slots), buffer, history, place=entry.place))
        if entry.origin:
            self._origins.pop(key_of(entry.origin), None)
            if key_of(entry.origin) != key_of(buffer):
                self.follows_copies = True
                with contextlib.suppress(TypeError):  # an object of another library without weak references
                    self._left[key_of(entry.origin)] = weakref.ref(entry.origin.source)
        self._register(buffer)

    def add(self, buffer: _cpu.Buffer, name: str, array: AnyArray) -> None:
        """Add a new slot; in a draft."""
        entry = self._known.get(key_of(buffer))
        slots = {} if entry is None else entry.slots
        new = Entry(Spec.of(buffer), {}, buffer) if entry is None else replace(entry)
        new.slots = {**slots, name: len(self.arrays)}
        self.arrays.append(array)
        self.names = list(dict.fromkeys([*self.names, name]))
        if entry is None:
            new.place = len(self.entries)
            self.entries.append(new)
            self._register(buffer)
        self._put(new)

    def _put(self, entry: Entry) -> None:
        self.entries[entry.place] = entry
        if entry.buffer:
            self._known[key_of(entry.buffer)] = entry

    def add_waiting(self, entry: Entry) -> None:
        """Register an entry of a restored store, without a buffer."""
        entry.place = len(self.entries)
        self.entries.append(entry)
        if entry.origin:
            self._origins[key_of(entry.origin)] = entry

    def _register(self, buffer: _cpu.Buffer) -> None:
        if buffer.nbytes:
            end = buffer.address + buffer.nbytes
            bisect.insort(self._intervals, (buffer.address, end, buffer), key=lambda interval: interval[:2])

    # ---- copies ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> Config:
        entries = [(tuple(entry.spec), dict(entry.slots), _copied(entry)) for entry in self.entries]
        return {
            "arrays": [to_host(array).copy(order="K") for array in self.arrays],
            "names": list(self.names),
            "entries": entries,
        }

    def __setstate__(self, state: Config) -> None:
        self.__init__()  # type: ignore[misc]
        # Buffers that a pickle keeps outside of itself may come back read-only.
        self.arrays = [array if array.flags.writeable else array.copy(order="K") for array in state["arrays"]]
        self.names = list(state["names"])
        for spec, slots, history in state["entries"]:
            self.add_waiting(Entry(Spec(*spec), slots, None, history))

    def __deepcopy__(self, memo: dict[int, object]) -> SlotStore:
        twin = type(self)()
        homes = {at: entry.buffer or entry.origin for entry in self.entries for at in entry.slots.values()}
        for at, array in enumerate(self.arrays):
            memo[id(array)] = copy_beside(array, home) if (home := homes[at]) else array.copy(order="K")
            twin.arrays.append(memo[id(array)])
        twin.names = self.names[:]
        for entry in self.entries:
            origin = entry.buffer or entry.origin
            fingerprint = entry.fingerprint if entry.buffer is None else fingerprint_of(entry.buffer)
            twin.add_waiting(Entry(entry.spec, dict(entry.slots), None, _copied(entry), origin, fingerprint))
        return twin


def _copied(entry: Entry) -> History | None:
    return None if entry.history is None else entry.history.copy(entry.buffer)


def _copied_by(buffer: _cpu.Buffer, entries: list[Entry], prints: dict[int, int]) -> list[Entry]:
    """The entries of whose variables this can be a copy: equal values, and the same name where both have one."""
    spec = Spec.of(buffer)
    entries = [entry for entry in entries if entry.spec.admits(spec)]
    if entries and id(buffer) not in prints:
        prints[id(buffer)] = fingerprint_of(buffer)
    equal = [entry for entry in entries if entry.fingerprint == prints[id(buffer)]]
    named = [entry for entry in equal if spec.name and entry.spec.name == spec.name]
    return named or equal


def _require_apart(buffers: list[_cpu.Buffer]) -> None:
    lying = sorted((buffer for buffer in buffers if buffer.size), key=lambda buffer: buffer.address)
    for before, after in itertools.pairwise(lying):
        if after.address < before.address + before.nbytes:
            raise ValueError(
                f"{after.label}: overlaps {before.label} in memory, expected separate arrays "
                "(or the same variable with the same state)"
            )


def _fresh_slot(buffer: _cpu.Buffer, name: str) -> AnyArray:
    """Zeros, but a moving average starts at its variable."""
    slot = zeros_beside(buffer)
    if name == "average":
        values = buffer.array()
        assign(slot, bfloat16_to_float32(values) if buffer.dtype == "bfloat16" else values)
    return slot


_NAMED = "variable '"
