"""Delta checkpoints: what changed since the last file of a chain."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastadam._core.averages import refuse_while_swapped
from fastadam._core.common.types import Config, Foreign
from fastadam._core.deferred.chain import Chain, Link, Mark
from fastadam._core.native.backend import _cpu
from fastadam._core.options.state_format import SCALES
from fastadam._core.parts import Parts, parts_of
from fastadam._core.saving.contents import Part, write_parts
from fastadam._core.saving.description import accumulated_rows_of, description_of, text_of
from fastadam._core.saving.saved_file import SavedFile
from fastadam._core.saving.writer import begin_chain, check_target, known_buffers
from fastadam._core.state.entry import Entry

__all__ = ["save_delta"]


def save_delta(
    optimizer: Foreign, path: str | os.PathLike[str], loss_scale: Callable[[], Config] | None = None
) -> None:
    """Save as described at ``Adam.save_delta``; ``loss_scale`` returns the state of a LossScaleOptimizer."""
    name = check_target(path)
    parts = parts_of(optimizer)
    options, state, runtime, tables = parts
    with runtime.lock:
        refuse_while_swapped(parts, "save_delta")
        config = optimizer.get_config()
        chain = runtime.chain
        if chain is None:
            raise ValueError(
                "save_delta: this optimizer has saved no base and was not loaded from one, nor does a copy go on with "
                "the chain of its original; expected save(path, values=True) first"
            )
        tables.raise_late(wait=True)
        entries = chain.entries_of(state.entries)
        buffers = known_buffers(state.slots, entries)
        _refuse_to_replace(name, chain.link)
        link = chain.link.next()
        changed = [_part_of(parts, *row) for row in zip(chain.marks, entries, buffers, strict=True)]
        accumulated = [accumulated_rows_of(state, entry, options.calls_per_step) for entry in entries]
        changed = [part._replace(accumulated=rows) for part, rows in zip(changed, accumulated, strict=True)]
        tables_in = {str(i): part.record for i, part in enumerate(changed) if part.rows is not None}
        description = {
            **description_of(optimizer, config, entries),
            "loss_scale": loss_scale() if loss_scale else None,
            "values": True,
            "chain": {**link._asdict(), "previous": chain.link.id},
            "positions": [part.position for part in changed],
            "tables": tables_in,
        }
        write_parts(name, changed, state.calls, lambda checksums: text_of(description, checksums, optimizer.name))
        # First the chain: what an interrupt leaves marked comes again in the next delta.
        positions, are_tables = [part.position for part in changed], [part.rows is not None for part in changed]
        chain = Chain.at(link, entries, positions, are_tables, is_complete=chain.is_complete)
        begin_chain(parts, chain, entries)


def _refuse_to_replace(path: str, link: Link) -> None:
    """Raise if the file is one that the new delta would need."""
    if not Path(path).is_file():
        return
    try:
        with SavedFile(path) as saved:
            there = saved.link
    except (ValueError, OSError):
        return
    if there is not None and there.base == link.base and there.number <= link.number:
        what = f"delta {there.number}" if there.number else "the base"
        raise ValueError(
            f"path: {path} is {what} of the chain that this delta continues, expected another name (delete the file "
            "first if it has been merged)"
        )


def _part_of(parts: Parts, mark: Mark, entry: Entry, buffer: _cpu.Buffer) -> Part:
    options, state, _, tables = parts
    history = entry.history
    slots = {at: (name, state.slots.arrays[at]) for name, at in entry.slots.items()}
    if history is not None:
        history.require_own(buffer.label)
    begin = mark.begin if history is mark.history else 0
    position = mark.position + (0 if history is None else history.total - begin)
    accumulated = state.accumulated_rows(entry, options.calls_per_step)
    is_whole = (
        mark.is_whole
        or not (mark.is_table or history is not None)
        or options.sparse_update == "dense"
        or (mark.history is not None and history is not mark.history)
        or not set(entry.slots) - {"m", "v", "vhat"} <= mark.slots  # a new average
        or not entry.slots.keys().isdisjoint(SCALES)  # which are not those of rows
    )
    if is_whole or accumulated is None:
        if history is not None:
            tables.catch_up(buffer)
        return Part(buffer, slots, position)
    if history is not None and history.trail is not None and history.trail.is_lost:
        raise ValueError(
            f"save_delta: {buffer.label} has had more than 2**20 steps since the last file, expected a new base, "
            "save(values=True)"
        )
    rows = _changed_rows(mark, entry, accumulated)
    if history is None:
        return Part(buffer, slots, position, rows)
    had = history.had(rows) - begin + mark.position
    return Part(buffer, slots, position, rows, had, history.segments(begin), history.exact)


def _changed_rows(mark: Mark, entry: Entry, accumulated: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of a table that had a gradient since the last file, and of which one waits, in order."""
    found = [accumulated]
    if mark.rows is not None:
        found.append(np.flatnonzero(mark.rows))
    if entry.history is not None:
        found.append(entry.history.changed_rows())
    return np.unique(np.concatenate(found))
