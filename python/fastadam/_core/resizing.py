"""Variables that are replaced by longer, shorter or permuted ones, forgotten, or given moments of zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fastadam._core.averages import refuse_while_swapped
from fastadam._core.native.arrays import assign, copy_beside, expect_random_rows, to_host, zeros_like_variable
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import buffer_of, key_of
from fastadam._core.native.gradients import bfloat16_to_float32
from fastadam._core.native.rows import CHUNK_BYTES, RowMap, bits_of, chunks_of, with_rows
from fastadam._core.native.slices import check_ids
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import MOMENTS, SCALES, VariableFormat
from fastadam._core.state.given_slots import AVERAGE, GivenSlots, is_a_hole
from fastadam._core.state.moments import RandomKey, decoded, stored

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, ArrayLike, HostArray, VariableLike
    from fastadam._core.deferred.history import History
    from fastadam._core.parts import Parts
    from fastadam._core.state.entry import Entry

__all__ = ["forget", "reset", "resize"]

_PAGE = 4096  # bytes: rows closer together are overwritten with what lies between them
_OF_STEPS = (*MOMENTS, AVERAGE, ACCUMULATOR, *SCALES)  # slots that steps have made what they are


# ---- resize ----------------------------------------------------------------------------------------------------------


def resize(
    parts: Parts,
    old: VariableLike,
    new: VariableLike,
    rows: ArrayLike | None,
    slots: Mapping[str, HostArray] | None,
) -> None:
    """See ``Adam.resize``."""
    options, state, runtime, tables = parts
    with runtime.lock:
        _require_between_steps(parts, "resize")
        entry, known = _known(parts, old, "old")
        buffer = _replacement(parts, new, known)
        row_map = RowMap.of(rows, _rows_of(known), _rows_of(buffer), known.label)
        given = {} if slots is None else _given(parts, slots, buffer, entry if row_map.keeps_places else None)
        history = _moved_history(entry, known, buffer, row_map, given.get("m"))
        draft = state.slots.draft()
        draft.make_way(entry)
        draft.require_new_memory(buffer)
        draft.replace(entry, buffer, _moved(parts, entry, buffer, row_map, given), history)
        key, excluded = key_of(known), options.exclusions
        if key in excluded.keys:
            options.exclusions = excluded.with_variable(buffer)  # both, for a signal may come before the next lines
        tables.note_all_changed()  # first: a mark with the old length or place is used no more
        state.take(draft, state.cycle.moved(entry.place, row_map))
        if key in excluded.keys and key != key_of(buffer):
            options.exclusions = options.exclusions.without(key)
        runtime.let_go(key)
        if key != key_of(buffer):
            runtime.replacements.note_resized(known)
        if history is not None and buffer.device < 0:
            expect_random_rows(buffer.array(), small_pages=False)  # rows are read before the next step would do this
        if options.max_staleness is not None:
            tables.catch_up(buffer)


def _replacement(parts: Parts, new: VariableLike, known: _cpu.Buffer) -> _cpu.Buffer:
    """The new array, which fits the variable, or raise what is wrong with it."""
    buffer = buffer_of(new, argument="new")
    if _kind_of(buffer) != _kind_of(known):
        found = f"{buffer.dtype} {buffer.shape}{_place(buffer)}"
        shape = str(("n", *known.shape[1:]) if known.shape else ()).replace("'", "")
        raise ValueError(f"{buffer.label}: {found}, expected {known.dtype} {shape}{_place(known)} like {known.label}")
    if key_of(buffer) != key_of(known) and parts.state.slots.entry_of(buffer) is not None:
        raise ValueError(
            f"{buffer.label}: a variable of this optimizer already, expected an array that it has not stepped (or "
            "forget() of this one first)"
        )
    return buffer


def _kind_of(buffer: _cpu.Buffer) -> tuple[object, ...]:
    """What a variable and the array in its place must have in common."""
    return buffer.dtype, buffer.device, len(buffer.shape), buffer.shape[1:]


def _place(buffer: _cpu.Buffer) -> str:
    return f" on GPU {buffer.device}" if buffer.device >= 0 else ""


def _given(
    parts: Parts, slots: Mapping[str, HostArray], buffer: _cpu.Buffer, entry: Entry | None
) -> Mapping[str, HostArray]:
    """The user's arrays for the slots, or raise what is wrong with them; they may lie in the files of ``entry``."""
    checked = GivenSlots.of_one(slots, buffer, parts.options.state_format)
    given = checked.format_of(buffer, {}).given
    store = parts.state.slots
    before = {} if entry is None else store.slots_of(entry)
    replaced = {name: slot.ctypes.data for name, slot in before.items() if isinstance(slot, np.ndarray)}
    checked.require_apart(store.memory_with([buffer]), replaced)
    return given


def _moved(
    parts: Parts, entry: Entry, buffer: _cpu.Buffer, row_map: RowMap, given: Mapping[str, HostArray]
) -> dict[str, AnyArray]:
    """The slots of a variable for the array that replaces it; 8-bit moments are rounded anew."""
    slots = parts.state.slots.slots_of(entry)
    moves_rows_alone = entry.history is not None or parts.options.sparse_update == "lazy"
    arrays: dict[str, AnyArray] = {}
    for name, slot in slots.items():
        if name in SCALES:
            continue  # they come with their moments
        is_coded = f"{name}_scale" in slots
        before: HostArray = decoded(slots, name) if is_coded else to_host(slot)
        if name in given:
            after = given[name]
            # To read a file with holes to find out would have Linux write much more of it later than what is set.
            write = row_map.move if is_a_hole(after) else row_map.overwrite
            write(with_rows(before), with_rows(after))
        else:
            after = zeros_like_variable(buffer, before.dtype.name, untouched=moves_rows_alone)
            row_map.move(with_rows(before), with_rows(after))
        if name == AVERAGE:
            values = with_rows(_host_values(buffer))
            for fresh in chunks_of(np.flatnonzero(row_map.sources < 0), after.nbytes // max(len(values), 1)):
                with_rows(after)[fresh] = _floats_of(values[fresh])
        if name in given:
            arrays[name] = after
        elif is_coded:
            key = RandomKey(parts.options.small.seed, int(parts.state.calls), entry.number)
            arrays.update(stored(VariableFormat((name, *SCALES), "8bit"), buffer, name, after, key))
        else:
            arrays[name] = after if buffer.device < 0 else copy_beside(after, buffer)
    return arrays


def _moved_history(
    entry: Entry, known: _cpu.Buffer, buffer: _cpu.Buffer, row_map: RowMap, moment: HostArray | None
) -> History | None:
    """The history of a deferred table for the array that replaces it: rows that wait go on waiting."""
    history = entry.history
    if history is None:
        return None
    history.require_own(known.label)
    before, after = _host_values(known), _host_values(buffer)
    is_shared = np.may_share_memory(before, after)
    is_shifted = is_shared and not (row_map.keeps_places and known.address == buffer.address)
    if is_shifted and history.waits:
        raise ValueError(
            f"{buffer.label}: in the memory of {known.label}, whose rows wait for their steps; expected sync() before "
            "the values are moved"
        )
    row = None if is_shared else row_map.differing(before, after, history.moved_so_far())
    if row is not None:
        raise ValueError(
            f"{buffer.label}: row {row} is not the one of {known.label} as it is now, so that steps of it may be "
            "missing; expected the values to be copied right before the call, and changed after it"
        )
    moved = history.moved(buffer, row_map, moment)
    moved.sharing = history.sharing if is_shared else None
    return moved


# ---- forget ----------------------------------------------------------------------------------------------------------


def forget(parts: Parts, variable: VariableLike) -> None:
    """See ``Adam.forget``."""
    options, state, runtime, tables = parts
    with runtime.lock:
        _require_between_steps(parts, "forget")
        _, known = _known(parts, variable, "var")
        tables.catch_up(known)
        tables.raise_late(wait=True)
        entry, _ = _known(parts, variable, "var")
        key = key_of(known)
        if key in options.exclusions.keys:
            options.exclusions = options.exclusions.without(key)
        tables.note_all_changed()  # first: places move up
        state.drop(entry)
        runtime.let_go(key)


# ---- reset -----------------------------------------------------------------------------------------------------------


def reset(parts: Parts, variable: VariableLike | None, rows: ArrayLike | None) -> None:
    """See ``Adam.reset``."""
    _, state, runtime, tables = parts
    if variable is None and rows is not None:
        raise ValueError("rows: given without var, expected the variable that they are rows of")
    with runtime.lock:
        _require_between_steps(parts, "reset")
        if variable is None:
            tables.catch_up_all()
            entries, ids = state.entries, None
        else:
            entry, known = _known(parts, variable, "var")
            ids = None if rows is None else np.unique(check_ids(rows, known.shape, known.label, "rows"))
            tables.catch_up(known, ids)
            entries = [entry]
        tables.raise_late(wait=True)
        starts = [start for entry in entries for start in _starts_of(parts, entry, ids)]
        if runtime.chain is not None:
            for entry in entries:
                runtime.chain.note(entry, None)
        _cpu.copy_all([pair for start in starts for pair in start.on_host()], np.zeros((), np.int64))
        for start in starts:
            start.on_gpu()
        for entry in entries:
            if entry.history is not None:
                entry.history.note_reset(ids)


class _Start(NamedTuple):
    """A slot, and what it is before the first step."""

    slot: AnyArray
    values: HostArray | None  # None: zero
    ids: npt.NDArray[np.integer] | None  # the rows that begin anew; None for all

    def on_host(self) -> Iterator[tuple[HostArray, HostArray]]:
        """What is to be overwritten and with what, for rows that are something else."""
        if not isinstance(self.slot, np.ndarray) or not self.slot.size:
            return
        if not (self.slot.ndim and self.slot.flags.c_contiguous):
            yield self.slot, self._whole(self.slot)
            return
        row_bytes = self.slot.nbytes // len(self.slot)
        zeros, size = np.zeros(max(CHUNK_BYTES, row_bytes), np.uint8), max(1, CHUNK_BYTES // row_bytes)
        spans = (np.arange(i, min(i + size, len(self.slot))) for i in range(0, len(self.slot), size))
        for chunk in spans if self.ids is None else chunks_of(self.ids.astype(np.int64), row_bytes):
            for run in _runs(chunk, 1):
                here = self.slot[run[0] : run[-1] + 1]
                start = None if self.values is None else self.values[run[0] : run[-1] + 1]
                differs = (bits_of(here) if start is None else bits_of(here) != bits_of(start)).any(1)
                for rows in _runs(np.flatnonzero(differs), 1 + _PAGE // row_bytes):
                    part = here[rows[0] : rows[-1] + 1]
                    yield part, zeros[: part.nbytes] if start is None else start[rows[0] : rows[-1] + 1]

    def on_gpu(self) -> None:
        """Overwrite a slot that is there."""
        if not isinstance(self.slot, np.ndarray):
            assign(self.slot, self._whole(to_host(self.slot)))

    def _whole(self, slot: HostArray) -> HostArray:
        whole: HostArray = slot.copy(order="K")
        rows = slice(None) if self.ids is None else self.ids
        with_rows(whole)[rows] = 0 if self.values is None else with_rows(self.values)[rows]
        return whole


def _runs(rows: npt.NDArray[np.integer], apart: int) -> list[npt.NDArray[np.integer]]:
    """Sorted rows, split where one is more than so far from the next."""
    return np.split(rows, np.flatnonzero(np.diff(rows) > apart) + 1) if len(rows) else []


def _starts_of(parts: Parts, entry: Entry, ids: npt.NDArray[np.integer] | None) -> Iterator[_Start]:
    """The slots that steps have changed; codes of zero need no other scale."""
    for name, slot in parts.state.slots.slots_of(entry).items():
        if name not in _OF_STEPS or (name in SCALES and ids is not None):
            continue
        if isinstance(slot, np.ndarray) and not slot.flags.writeable:
            raise ValueError(f"{name} of {entry.spec}: was made read-only, expected a writable array")
        if name == AVERAGE and entry.buffer is None:
            raise ValueError(
                f"{entry.spec}: its moving average cannot start at a variable that a restored optimizer has not seen "
                "yet; expected build() with all variables first"
            )
        if name == AVERAGE and entry.buffer is not None:
            values = _floats_of(_host_values(entry.buffer))
            dtype = slot.dtype if isinstance(slot, np.ndarray) else to_host(slot).dtype
            yield _Start(slot, values.astype(dtype, order="K", copy=False), ids)
        elif name in MOMENTS and ids is None and entry.history is not None:
            yield _Start(slot, None, entry.history.moving_rows())
        else:
            yield _Start(slot, None, ids)


# ---- all -------------------------------------------------------------------------------------------------------------


def _require_between_steps(parts: Parts, call: str) -> None:
    parts.runtime.require_between_steps(call)
    refuse_while_swapped(parts, call)
    parts.tables.raise_late(wait=True)


def _known(parts: Parts, variable: VariableLike, argument: str) -> tuple[Entry, _cpu.Buffer]:
    """What is kept for a variable, and its memory; raises if the optimizer does not know it."""
    slots = parts.state.slots
    buffer = buffer_of(variable, argument=argument)
    entry = slots.entry_of(buffer)
    if entry is not None and entry.buffer is None:  # a deep copy goes on with the original's variable
        no_more = VariableFormat(())
        slots.prepare([buffer], lambda *_: no_more).commit()
        entry = slots.entry_of(buffer)
    if entry is None or entry.buffer is None:
        raise ValueError(
            f"{buffer.label}: not a variable of this optimizer, expected one that a step or build() has used"
        )
    return entry, buffer


def _rows_of(buffer: _cpu.Buffer) -> int:
    return buffer.shape[0] if buffer.shape else 1


def _host_values(buffer: _cpu.Buffer) -> HostArray:
    """The elements of a variable, bfloat16 as bits; a copy if it is on a GPU."""
    return buffer.array() if buffer.device < 0 else to_host(buffer.source)


def _floats_of(values: HostArray) -> HostArray:
    return bfloat16_to_float32(values) if values.dtype == np.uint16 else values
