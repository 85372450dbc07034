"""Saving an optimizer: the file is replaced completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastadam._core.averages import refuse_while_swapped
from fastadam._core.common.checks import check_bool, check_list
from fastadam._core.common.types import AnyArray, Config, Foreign, HostArray
from fastadam._core.native.arrays import to_host
from fastadam._core.native.backend import _cpu
from fastadam._core.parts import parts_of
from fastadam._core.saving.chunks import pieces_of
from fastadam._core.saving.description import description_of, entries_of, text_of
from fastadam._core.saving.file_format import DTYPES, ITERATIONS, VALUE, Tensor, path_of
from fastadam._core.saving.tensor_file import TensorFile, write_tensors
from fastadam._core.state.entry import Entry
from fastadam._core.state.slots import SlotStore

__all__ = ["check_target", "known_buffers", "save_optimizer", "values_of"]

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
    *,
    values: bool = False,
) -> None:
    """Save as described at ``Adam.save``; ``loss_scale`` is the state of a LossScaleOptimizer."""
    name = check_target(path)
    has_values = check_bool("values", values)
    selection = None if variables is None else check_list("variables", variables)
    _, state, runtime, tables = parts_of(optimizer)
    with runtime.lock:
        if has_values:
            refuse_while_swapped(parts_of(optimizer), "save(values=True)")
        entries = entries_of(state.slots, selection)
        buffers = known_buffers(state.slots, entries) if has_values else []
        tables.settle()
        arrays = _arrays_of(state.slots, entries)
        tensors = {ITERATIONS: Tensor("I64", ()), **{key: Tensor.like(array) for key, array in arrays.items()}}
        tensors.update({f"{VALUE}{i}": Tensor(DTYPES[b.dtype], b.shape) for i, b in enumerate(buffers)})
        description = {**description_of(optimizer, entries), "loss_scale": loss_scale, "values": has_values}

        def fill(file: TensorFile) -> None:
            file.append(ITERATIONS, np.array([state.calls]).view(np.uint8))
            for key, array in arrays.items():
                for piece in pieces_of(to_host(array)):
                    file.append(key, piece)
            for i, buffer in enumerate(buffers):
                for piece in pieces_of(values_of(buffer)):
                    file.append(f"{VALUE}{i}", piece)

        write_tensors(name, tensors, lambda checksums: text_of(description, checksums, optimizer.name), fill)


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


def known_buffers(store: SlotStore, entries: list[Entry]) -> list[_cpu.Buffer]:
    """The variables of these entries, whose values are to be saved."""
    buffers = []
    for i, entry in enumerate(entries):
        buffer = store.variable_of(entry)
        if buffer is None:
            raise ValueError(
                f"values: variable {i}, {entry.spec}, has not come since the optimizer was restored, expected build() "
                "with all variables first"
            )
        if buffer.device >= 0:
            raise ValueError(f"values: {buffer.label} is on a GPU, expected variables in CPU memory")
        buffers.append(buffer)
    return buffers


def values_of(buffer: _cpu.Buffer) -> HostArray:
    """The memory of a variable on the host; bfloat16 may come as its bits."""
    return buffer.source if isinstance(buffer.source, np.ndarray) else buffer.array()


def _arrays_of(store: SlotStore, entries: list[Entry]) -> dict[str, AnyArray]:
    """The slots by their names in the file, in the order of ``weights``."""
    places = {at: f"{i}/{name}" for i, entry in enumerate(entries) for name, at in entry.slots.items()}
    return {places[at]: store.arrays[at] for at in sorted(places)}
