"""What a file says of an optimizer beside its tensors: configuration, variables, which slots they have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fastadam._core.common.types import AnyArray, Config, Foreign
from fastadam._core.native.buffers import buffers_of, key_of
from fastadam._core.options.exclusions import Exclusions
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import BLOCK, kind_of
from fastadam._core.parts import parts_of
from fastadam._core.saving.file_format import VERSION, lacking_in
from fastadam._core.state.entry import Entry
from fastadam._core.state.slots import SlotStore
from fastadam._core.state.state import State

__all__ = ["accumulated_rows_of", "description_of", "entries_of", "text_of"]


def description_of(optimizer: Foreign, config: Config, entries: Sequence[Entry]) -> Config:
    """All but the checksums and what belongs to one kind of file.

    ``config`` is what ``get_config`` returned before the state was looked at: it calls callable hyperparameters, and
    these may make a step.
    """
    options, state, _, _ = parts_of(optimizer)
    store = state.slots
    if callable(options.small.float32_for):
        raise ValueError(
            "float32_for: a function, expected a size, a list of patterns or None in an optimizer to be saved"
        )
    for i, entry in enumerate(entries):
        has_codes = _moments_of(store, entry) == "8bit"
        if lacking := lacking_in(set(entry.slots), accumulates=options.accumulation is not None, has_codes=has_codes):
            raise ValueError(
                f"variables[{i}] {entry.spec}: slots {list(entry.slots)} without {lacking}, expected all of them: a "
                "step or build() makes what add_slot has left out"
            )
    accumulating = [i for i, entry in enumerate(entries) if _is_accumulating(state, entry, options.calls_per_step)]
    return {
        "version": VERSION,
        "optimizer": type(optimizer).__name__,
        "config": config,
        "variables": [entry.spec._asdict() for entry in entries],
        "excluded": _excluded(options.exclusions, entries),
        "sparse": [i for i, entry in enumerate(entries) if entry.history or options.sparse_update == "lazy"],
        "slots": [list(entry.slots) for entry in entries],
        "moments": [_moments_of(store, entry) for entry in entries],
        "block": BLOCK,
        "numbers": [entry.number for entry in entries],
        "accumulating": accumulating,
    }


def accumulated_rows_of(state: State, entry: Entry, calls_per_step: int) -> npt.NDArray[np.int64] | None:
    """The rows of a variable that have accumulated gradients, in order; None if they are unknown, or none has."""
    if not _is_accumulating(state, entry, calls_per_step):
        return None
    rows = state.accumulated_rows(entry, calls_per_step)
    return None if rows is None else np.unique(rows)


def text_of(description: Config, checksums: Mapping[str, int], name: str) -> str:
    """The description as it is written; ``name``: of the optimizer."""
    try:
        return json.dumps({**description, "weights": list(map(list, checksums.items()))}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"get_config of {name}: not plain JSON ({error})") from None


def entries_of(store: SlotStore, variables: list[AnyArray] | None) -> list[Entry]:
    """The entries of these variables, or all."""
    if variables is None:
        return store.entries
    entries: list[Entry] = []
    for i, buffer in enumerate(buffers_of(variables, range(len(variables)))):
        entry = store.entry_of(buffer)
        if entry is None:
            raise ValueError(
                f"variables[{i}]: not a variable of this optimizer, expected one that a step or build() has used"
            )
        if entry in entries:
            raise ValueError(f"variables[{i}]: the same as variables[{entries.index(entry)}], expected it once")
        entries.append(entry)
    return entries


def _moments_of(store: SlotStore, entry: Entry) -> str | None:
    """How the moments of a variable are stored; None if it has none."""
    return kind_of(store.arrays[entry.slots["m"]]) if "m" in entry.slots else None


def _is_accumulating(state: State, entry: Entry, calls_per_step: int) -> bool:
    return ACCUMULATOR in entry.slots and state.is_accumulating(entry, calls_per_step)


def _excluded(exclusions: Exclusions, entries: Sequence[Entry]) -> Config:
    """The variables and names given to ``exclude_from_weight_decay``, which are not part of the configuration."""
    keys = [entry.buffer and key_of(entry.buffer) for entry in entries]
    if None in keys and not exclusions.keys <= set(keys):
        raise ValueError(
            "exclude_from_weight_decay: var_list has a variable that was not used since the optimizer was restored, "
            "expected build() with all variables first"
        )
    indices = [i for i, key in enumerate(keys) if key in exclusions.keys]
    return {"names": list(exclusions.patterns), "variables": indices}
