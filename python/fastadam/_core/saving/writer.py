"""Saving an optimizer: the file is replaced completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastadam._core.averages import refuse_while_swapped
from fastadam._core.common.checks import check_bool, check_list
from fastadam._core.common.types import AnyArray, Config, Foreign
from fastadam._core.deferred.chain import Chain, Link
from fastadam._core.native.backend import _cpu
from fastadam._core.parts import Parts, parts_of
from fastadam._core.saving.contents import Part, write_parts
from fastadam._core.saving.description import accumulated_rows_of, description_of, entries_of, text_of
from fastadam._core.saving.file_format import path_of
from fastadam._core.state.entry import Entry
from fastadam._core.state.slots import SlotStore

__all__ = ["begin_chain", "check_target", "known_buffers", "save_optimizer"]

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
    loss_scale: Callable[[], Config] | None = None,
    *,
    values: bool = False,
) -> None:
    """Save as described at ``Adam.save``; ``loss_scale`` returns the state of a LossScaleOptimizer."""
    name = check_target(path)
    has_values = check_bool("values", values)
    selection = None if variables is None else check_list("variables", variables)
    options, state, runtime, tables = parts_of(optimizer)
    with runtime.lock:
        if has_values:
            refuse_while_swapped(parts_of(optimizer), "save(values=True)")
        config = optimizer.get_config()  # calls callables, which may make steps: what else is saved is read after it
        entries = entries_of(state.slots, selection)
        buffers = known_buffers(state.slots, entries) if has_values else [None] * len(entries)
        tables.settle()
        slots = [{at: (slot, state.slots.arrays[at]) for slot, at in entry.slots.items()} for entry in entries]
        description = description_of(optimizer, config, entries)
        description |= {"loss_scale": loss_scale() if loss_scale else None, "values": has_values}
        link = Link.new()
        if has_values:
            description["chain"] = {**link._asdict(), "previous": None}
            description["positions"] = [0] * len(entries)
        accumulated = [accumulated_rows_of(state, entry, options.calls_per_step) for entry in entries]
        written = [
            Part(buffer, arrays, accumulated=rows)
            for buffer, arrays, rows in zip(buffers, slots, accumulated, strict=True)
        ]
        write_parts(name, written, state.calls, lambda checksums: text_of(description, checksums, optimizer.name))
        if has_values:
            is_complete, zeros = len(entries) == len(state.entries), [0] * len(entries)
            chain = Chain.at(link, entries, zeros, [False] * len(entries), is_complete=is_complete)
            begin_chain(parts_of(optimizer), chain, entries)


def begin_chain(parts: Parts, chain: Chain, entries: Sequence[Entry]) -> None:
    """What changes from here on is for the next delta: a file of these entries was written."""
    options, state, runtime, _ = parts
    runtime.repeats = False  # steps note which rows they change
    runtime.chain = chain
    for entry in entries:
        if entry.history is not None:
            entry.history.begin_trail()
            entry.history.clear_changed()
        elif state.is_accumulating(entry, options.calls_per_step):
            chain.note(entry, state.accumulated_rows(entry, options.calls_per_step))


def check_target(path: str | os.PathLike[str]) -> str:
    """The name of a file to be written; raises ValueError if its suffix is that of another format."""
    name = path_of(path)
    target = Path(name)
    if target.suffix.lower() in _OTHER_SUFFIXES:
        raise ValueError(
            f"path: '{target}' has the suffix of another format, expected {target.stem}.safetensors: the file would be "
            "in safetensors format"
        )
    return name


def known_buffers(store: SlotStore, entries: Sequence[Entry]) -> list[_cpu.Buffer]:
    """The variables of these entries, whose values are to be saved."""
    buffers = []
    for i, entry in enumerate(entries):
        buffer = store.variable_of(entry)
        if buffer is None:
            raise ValueError(
                f"values: variable {i}, {entry.spec}, has not come since the optimizer was restored or copied, "
                "expected build() with all variables first"
            )
        if buffer.device >= 0:
            raise ValueError(f"values: {buffer.label} is on a GPU, expected variables in CPU memory")
        buffers.append(buffer)
    return buffers
