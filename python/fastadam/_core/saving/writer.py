"""Saving an optimizer: the file is replaced completely or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastadam._core.common.checks import check_list
from fastadam._core.common.files import replace_whole
from fastadam._core.common.types import AnyArray, Config, Foreign, HostArray
from fastadam._core.native.arrays import to_host
from fastadam._core.native.buffers import buffers_of, key_of
from fastadam._core.options.exclusions import Exclusions
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import BLOCK, kind_of
from fastadam._core.parts import parts_of
from fastadam._core.saving.file_format import DTYPES, ITERATIONS, VERSION, crc32, lacking_in, memory_of, path_of
from fastadam._core.state.entry import Entry
from fastadam._core.state.slots import SlotStore
from fastadam._core.state.state import State

__all__ = ["save_optimizer"]

_OTHER_SUFFIXES = (
    *(".npy", ".npz", ".mat"),
    *(".pt", ".pth", ".bin", ".ckpt", ".onnx"),
    *(".h5", ".hdf5", ".keras", ".index", ".msgpack"),
    *(".pkl", ".pickle", ".joblib"),
    *(".json", ".yaml", ".txt", ".csv"),
    *(".zip", ".gz", ".tar"),
)


def save_optimizer(
    optimizer: Foreign,
    path: str | os.PathLike[str],
    variables: Iterable[AnyArray] | None = None,
    loss_scale: Config | None = None,
) -> None:
    """Save as described at ``Adam.save``; ``loss_scale`` is the state of a LossScaleOptimizer."""
    name = path_of(path)
    target = Path(name)
    if target.suffix.lower() in _OTHER_SUFFIXES:
        raise ValueError(
            f"path: '{target}' has the suffix of another format, expected {target.stem}.safetensors: the file would be "
            "in safetensors format"
        )
    selection = None if variables is None else check_list("variables", variables)
    options, _, runtime, tables = parts_of(optimizer)
    if callable(options.small.float32_for):
        raise ValueError(
            "float32_for: a function, expected a size, a list of patterns or None in an optimizer to be saved"
        )
    with runtime.lock:
        tables.settle()
        tensors, header = _contents(optimizer, selection)
        header["loss_scale"] = loss_scale
        try:
            text = json.dumps(header, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"get_config of {optimizer.name}: not plain JSON ({error})") from None
        replace_whole(name, [_safetensors_header(tensors, text), *(memory_of(a) for a in tensors.values())])


def _safetensors_header(tensors: dict[str, HostArray], text: str) -> bytes:
    """The header of the file. The library's own ``save_file`` would copy all tensors and leave temporary files."""
    metadata = {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()))}
    header: Config = {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _contents(optimizer: Foreign, selection: list[AnyArray] | None) -> tuple[dict[str, HostArray], Config]:
    options, state, _, _ = parts_of(optimizer)
    store = state.slots
    entries = store.entries if selection is None else _entries_of(store, selection)
    for i, entry in enumerate(entries):
        has_codes = _moments_of(store, entry) == "8bit"
        if lacking := lacking_in(set(entry.slots), accumulates=options.accumulation is not None, has_codes=has_codes):
            raise ValueError(
                f"variables[{i}] {entry.spec}: slots {list(entry.slots)} without {lacking}, expected all of them: a "
                "step or build() makes what add_slot has left out"
            )
    places = {at: f"{i}/{name}" for i, entry in enumerate(entries) for name, at in entry.slots.items()}
    slots = {places[at]: np.asarray(to_host(store.arrays[at]), order="C") for at in sorted(places)}
    tensors = {ITERATIONS: np.array(state.calls), **slots}
    header: Config = {
        "version": VERSION,
        "optimizer": type(optimizer).__name__,
        "config": optimizer.get_config(),
        "variables": [entry.spec._asdict() for entry in entries],
        "weights": [[name, crc32(array)] for name, array in tensors.items()],
        "excluded": _excluded(options.exclusions, entries),
        "slots": [list(entry.slots) for entry in entries],
        "moments": [_moments_of(store, entry) for entry in entries],
        "block": BLOCK,
        "numbers": [entry.number for entry in entries],
        "accumulating": [i for i, e in enumerate(entries) if _is_accumulating(state, e, options.calls_per_step)],
    }
    rows = {i: state.cycle.rows.get(entries[i].place) for i in header["accumulating"]}
    if known := {i: np.unique(np.concatenate(noted)).tolist() for i, noted in rows.items() if noted}:
        header["accumulated_rows"] = known
    return tensors, header


def _moments_of(store: SlotStore, entry: Entry) -> str | None:
    """How the moments of a variable are stored; None if it has none."""
    return kind_of(store.arrays[entry.slots["m"]]) if "m" in entry.slots else None


def _is_accumulating(state: State, entry: Entry, calls_per_step: int) -> bool:
    return ACCUMULATOR in entry.slots and state.is_accumulating(entry, calls_per_step)


def _entries_of(store: SlotStore, variables: list[AnyArray]) -> list[Entry]:
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


def _excluded(exclusions: Exclusions, entries: list[Entry]) -> Config:
    """The variables and names given to ``exclude_from_weight_decay``, which are not part of the configuration."""
    keys = [entry.buffer and key_of(entry.buffer) for entry in entries]
    if None in keys and not exclusions.keys <= set(keys):
        raise ValueError(
            "exclude_from_weight_decay: var_list has a variable that was not used since the optimizer was restored, "
            "expected build() with all variables first"
        )
    indices = [i for i, key in enumerate(keys) if key in exclusions.keys]
    return {"names": list(exclusions.patterns), "variables": indices}
