"""The state arrays of an optimizer: found by the memory of their variable, listed in the order of their creation."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fastadam._core.common.types import AnyArray, Config
from fastadam._core.deferred.history import History
from fastadam._core.deferred.rates import Doubt
from fastadam._core.native.arrays import copy_beside, to_host, zeros_like_variable
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, fingerprint_of, key_of
from fastadam._core.native.rows import RowMap, has_few_rows
from fastadam._core.options.state_format import NAMES
from fastadam._core.state.adoption import Adoption
from fastadam._core.state.entry import Entry, Spec
from fastadam._core.state.given_slots import GivenSlots
from fastadam._core.state.moments import laid_out

__all__ = ["SlotStore"]


class Format(Protocol):
    """Which slots a variable is to have, and how they begin."""

    @property
    def names(self) -> Sequence[str]:
        """Of the slots."""

    def begin(self, buffer: _cpu.Buffer, name: str, /) -> AnyArray:
        """A slot that the variable does not have yet."""


FormatOf = Callable[[_cpu.Buffer, Mapping[str, AnyArray]], Format]


@dataclass
class Prepared:
    """Slots for a step or a build; the store is as it was until ``commit``."""

    slots: dict[str, list[AnyArray | None]]  # for each name, for each variable; None where its format has no such slot
    numbers: list[int]  # of the variables, for the generator of random numbers
    store: SlotStore
    version: int
    adopted: dict[Key, tuple[Entry, _cpu.Buffer, dict[str, AnyArray]]]
    created: dict[tuple[Key, str], tuple[_cpu.Buffer, AnyArray]]

    def entry_of(self, buffer: _cpu.Buffer) -> Entry | None:
        """The entry that this variable has or adopts; None for a new one."""
        adopted = self.adopted.get(key_of(buffer))
        return self.store.entry_of(buffer) if adopted is None else adopted[0]

    def commit(self, doubtful: Iterable[Key] = ()) -> None:
        """Register the new slots, and the variables that adopt restored ones.

        Args:
            doubtful: Variables whose new moments may be other than zero.
        """
        if self.version != self.store.version:
            raise RuntimeError("the optimizer's slots were changed by code that ran while a step was prepared")
        if not self.adopted and not self.created:
            return
        draft = self.store.draft()
        for entry, buffer, arrays in self.adopted.values():
            draft.adopt(entry, buffer, arrays)
        for (_, name), (buffer, array) in self.created.items():
            draft.add(buffer, name, array)
        for key in doubtful:
            draft._known[key].raise_doubt(Doubt.ONCE)
        self.store.become(draft)


class SlotStore:
    """Slots of all variables, and the flat list of them that ``weights`` shows.

    A restored store has slots whose variables it has not met: entries that wait to be adopted.
    """

    def __init__(self) -> None:
        self.arrays: list[AnyArray] = []
        self.names: list[str] = []
        self.entries: list[Entry] = []
        self.version = 0
        self._next_number = 0
        self._known: dict[Key, Entry] = {}
        self._adoption = Adoption()
        self._intervals: list[tuple[int, int, _cpu.Buffer]] = []

    def entry_of(self, buffer: _cpu.Buffer) -> Entry | None:
        """The entry of this variable, or None for a variable never seen."""
        key = key_of(buffer)
        entry = self._known.get(key)
        if entry is None:
            return self._adoption.of_original(key)
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
        """The variable of an entry; in a deep copy that has been used with some of the originals, this one's, too.

        Before that nobody knows whether its variables have been copied with it.
        """
        if entry.buffer is not None or entry.origin is None or self._adoption.follows != "originals":
            return entry.buffer
        return entry.origin if entry.origin.is_current() else None

    def prepare(self, buffers: Sequence[_cpu.Buffer], format_of: FormatOf) -> Prepared:
        """The slots of these variables in their formats, begun where there are none; nothing is registered yet.

        The new ones come in TF's order: all m, then all v, then all vhat. ``format_of`` gets a variable and the slots
        that it has.
        """
        version = self.version  # before `begin`, which may be a caller's code
        distinct: dict[Key, _cpu.Buffer] = {}
        for buffer in buffers:
            distinct.setdefault(key_of(buffer), buffer)
        _require_apart(list(distinct.values()))
        adopted = self._adoptions(distinct)
        slots = {k: dict(adopted[k][2]) if k in adopted else self.find(b) or {} for k, b in distinct.items()}
        formats = {key: format_of(buffer, slots[key]) for key, buffer in distinct.items()}
        used = {name for each in formats.values() for name in each.names}
        names = [*(name for name in NAMES if name in used), *sorted(used.difference(NAMES))]
        created: dict[tuple[Key, str], tuple[_cpu.Buffer, AnyArray]] = {}
        for name in names:
            for key, buffer in distinct.items():
                if name not in slots[key] and name in formats[key].names:
                    slots[key][name] = formats[key].begin(buffer, name)
                    created[key, name] = (buffer, slots[key][name])
        keys = [key_of(buffer) for buffer in buffers]
        listed = {name: [slots[k][name] if name in formats[k].names else None for k in keys] for name in names}
        numbers = {key: self._known[key].number for key in distinct if key in self._known}
        numbers.update({key: entry.number for key, (entry, _, _) in adopted.items()})
        new = (key for key in dict.fromkeys(key for key, _ in created) if key not in numbers)  # as a commit adds them
        numbers.update({key: number for number, key in enumerate(new, self._next_number)})
        return Prepared(listed, [numbers.get(key, 0) for key in keys], self, version, adopted, created)

    def take(self, given: GivenSlots, buffers: Sequence[_cpu.Buffer]) -> None:
        """Register new variables, with the slots that are given for some of them."""
        prepared = self.prepare(buffers, given.format_of)
        given.require_apart(self.memory_with(buffers))
        given.require_no_sums()
        doubtful = [key for key in given.by_key if not given.are_zeros(key)]
        try:
            given.begin_averages(buffers)
            prepared.commit(doubtful)
        except BaseException:  # Ctrl-C, too: the next build would go on from averages that were half begun
            if self.version == prepared.version:
                given.empty_averages()
            raise

    def memory_with(self, buffers: Sequence[_cpu.Buffer]) -> list[tuple[str, int, int]]:
        """The label, address and bytes of these variables, the known ones and all slots in host memory."""
        variables = {key_of(b): b for b in (*buffers, *(e.buffer for e in self.entries if e.buffer is not None))}
        found = [(buffer.label, buffer.address, buffer.nbytes) for buffer in variables.values()]
        for entry in self.entries:
            label = "a variable of this optimizer" if entry.buffer is None else entry.buffer.label
            for name, at in entry.slots.items():
                if isinstance(array := self.arrays[at], np.ndarray):
                    found.append((f"{name} of {label}", array.ctypes.data, array.nbytes))
        return found

    def _adoptions(self, buffers: dict[Key, _cpu.Buffer]) -> dict[Key, tuple[Entry, _cpu.Buffer, dict[str, AnyArray]]]:
        """Which waiting entry each unknown variable takes: that of its own memory, else the next one."""
        chosen: dict[Key, Entry] = {}
        for key, buffer in buffers.items():
            entry = self.entry_of(buffer)
            if entry is None:
                self._adoption.require_not_left(key, buffer)
                self.require_new_memory(buffer)
            elif entry.buffer is None:
                chosen[key] = entry
        taken = {id(entry) for entry in chosen.values()}
        waiting = [entry for entry in self.unclaimed() if id(entry) not in taken]
        unknown = {key: b for key, b in buffers.items() if key not in chosen and key not in self._known}
        chosen.update(self._adoption.choose(unknown, waiting, self.slots_of))
        for key, entry in chosen.items():
            self._require_history(buffers[key], entry)
        placed = {key: laid_out(self.slots_of(entry), buffers[key], entry.number) for key, entry in chosen.items()}
        return {key: (entry, buffers[key], placed[key]) for key, entry in chosen.items()}

    def _require_history(self, buffer: _cpu.Buffer, entry: Entry) -> None:
        if entry.history is not None and not entry.history.fits(buffer):
            raise ValueError(
                f"{buffer.label}: changed since the state was copied, while rows lagged behind; expected the table as "
                "it was then (sync() before a deferred optimizer is copied apart from its tables)"
            )

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
        draft.version, draft._next_number = self.version + 1, self._next_number
        draft._known, draft._intervals = {**self._known}, self._intervals[:]
        draft._adoption = self._adoption.draft()
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
        if history is not None and entry.origin and key_of(entry.origin) != key_of(buffer):
            history.sharing = None  # a deep copy with a table of its own
        self._put(Entry(spec, dict(entry.slots), buffer, history, place=entry.place, number=entry.number))
        self._adoption.note(entry, buffer)
        self._register(buffer)

    def add(self, buffer: _cpu.Buffer, name: str, array: AnyArray) -> None:
        """Add a new slot; in a draft."""
        entry = self._known.get(key_of(buffer))
        slots = {} if entry is None else entry.slots
        new = Entry(Spec.of(buffer), {}, buffer, doubt=Doubt.NONE) if entry is None else replace(entry)
        new.slots = {**slots, name: len(self.arrays)}
        self.arrays.append(array)
        self.names = list(dict.fromkeys([*self.names, name]))
        if entry is None:
            new.place, new.number = len(self.entries), self._next_number
            self._next_number += 1
            self.entries.append(new)
            self._register(buffer)
        self._put(new)

    def make_way(self, entry: Entry) -> None:
        """Drop the variable of an entry, which another one is to replace; in a draft."""
        if entry.buffer is not None:
            key = key_of(entry.buffer)
            del self._known[key]
            self._intervals = [interval for interval in self._intervals if key_of(interval[2]) != key]

    def replace(
        self, entry: Entry, buffer: _cpu.Buffer, arrays: Mapping[str, AnyArray], history: History | None
    ) -> None:
        """Give an entry that has made way another variable with these slots; in a draft."""
        for name, array in arrays.items():
            self.arrays[entry.slots[name]] = array
        spec = Spec.of(buffer)._replace(name=Spec.of(buffer).name or entry.spec.name)
        doubt = min(entry.doubt, Doubt.ONCE)  # nobody has the new arrays
        self._put(replace(entry, recorded=spec, buffer=buffer, history=history, doubt=doubt))
        self._register(buffer)

    def remove(self, entry: Entry) -> None:
        """Drop a known variable and its slots; the places of others move up. In a draft."""
        self.make_way(entry)
        gone = set(entry.slots.values())
        places = list(itertools.accumulate((at not in gone for at in range(len(self.arrays))), initial=0))
        self.arrays = [array for at, array in enumerate(self.arrays) if at not in gone]
        others = [other for other in self.entries if other is not entry]
        self.entries, self._adoption = [], self._adoption.without_origins()
        for place, other in enumerate(others):
            slots = {name: places[at] for name, at in other.slots.items()}
            self.entries.append(replace(other, slots=slots, place=place))
            self._put(self.entries[place])
            self._adoption.add(self.entries[place])

    def _put(self, entry: Entry) -> None:
        self.entries[entry.place] = entry
        if entry.buffer:
            self._known[key_of(entry.buffer)] = entry

    def add_waiting(self, entry: Entry) -> None:
        """Register an entry of a restored store, without a buffer; without a number it gets the next one."""
        entry.place = len(self.entries)
        if entry.number < 0:
            entry.number = self._next_number
        self._next_number = max(self._next_number, entry.number + 1)
        self.entries.append(entry)
        self._adoption.add(entry)

    def _register(self, buffer: _cpu.Buffer) -> None:
        if buffer.nbytes:
            end = buffer.address + buffer.nbytes
            bisect.insort(self._intervals, (buffer.address, end, buffer), key=lambda interval: interval[:2])

    # ---- copies ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> Config:
        entries = [(tuple(entry.spec), dict(entry.slots), _copied(entry), entry.number) for entry in self.entries]
        return {
            "arrays": [np.array(to_host(array), order="K") for array in self.arrays],  # in memory, if it is of a file
            "names": list(self.names),
            "entries": entries,
        }

    def __setstate__(self, state: Config) -> None:
        self.__init__()  # type: ignore[misc]
        # Buffers that a pickle keeps outside of itself may come back read-only.
        self.arrays = [array if array.flags.writeable else array.copy(order="K") for array in state["arrays"]]
        self.names = list(state["names"])
        for spec, slots, history, *number in state["entries"]:  # the number is missing in pickles of fastadam 0.1
            self.add_waiting(Entry(Spec(*spec), slots, None, history, number=number[0] if number else -1))

    def __deepcopy__(self, memo: dict[int, object]) -> SlotStore:
        twin = type(self)()
        homes = {at: entry.buffer or entry.origin for entry in self.entries for at in entry.slots.values()}
        for at, array in enumerate(self.arrays):
            memo[id(array)] = _copy_of(array, homes[at])
            twin.arrays.append(memo[id(array)])
        twin.names = self.names[:]
        owner: list[object] = [None]
        tokens = object(), object()
        for entry in self.entries:
            origin = entry.buffer or entry.origin
            fingerprint = entry.fingerprint if entry.buffer is None else fingerprint_of(entry.buffer)
            history = _copied(entry)
            if entry.history is not None and history is not None:
                entry.history.share(history, owner, tokens)
            twin.add_waiting(
                Entry(entry.spec, dict(entry.slots), None, history, origin, fingerprint, number=entry.number)
            )
        return twin


def _copy_of(array: AnyArray, home: _cpu.Buffer | None) -> AnyArray:
    """A copy of a slot in the layout of its variable; of a table in pages that come to be as rows are written."""
    if home is None:
        return array.copy(order="K")
    if home.device >= 0 or not isinstance(array, np.ndarray) or not has_few_rows(array):
        return copy_beside(array, home)
    twin = zeros_like_variable(home, array.dtype.name, array.shape, untouched=True)
    RowMap.of(None, len(array), len(array), "slot").move(array, twin)
    return twin


def _copied(entry: Entry) -> History | None:
    return None if entry.history is None else entry.history.copy(entry.buffer)


def _require_apart(buffers: list[_cpu.Buffer]) -> None:
    lying = sorted((buffer for buffer in buffers if buffer.size), key=lambda buffer: buffer.address)
    for before, after in itertools.pairwise(lying):
        if after.address < before.address + before.nbytes:
            raise ValueError(
                f"{after.label}: overlaps {before.label} in memory, expected separate arrays "
                "(or the same variable with the same state)"
            )
