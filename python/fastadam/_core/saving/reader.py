"""Loading a saved optimizer: every part of the file is checked against the variables first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np

from fastadam._core.common.checks import check_iterations, check_list
from fastadam._core.common.files import require_regular
from fastadam._core.common.frameworks import require
from fastadam._core.common.types import AnyArray, Config, Foreign
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import buffers_of
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.small_states import check_changes
from fastadam._core.parts import parts_of
from fastadam._core.saving.file_format import ITERATIONS, path_of
from fastadam._core.saving.saved_file import SavedFile
from fastadam._core.saving.slots_reader import SlotsReader
from fastadam._core.state.entry import Entry, Spec
from fastadam._core.state.state import Rows

__all__ = ["load_optimizer"]

Optimizer = TypeVar("Optimizer", bound="Saved")

_MAGIC = {
    b"PK\x03\x04": "a zip archive (.npz of NumPy, .pt of PyTorch, .keras of Keras)",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF\r\n\x1a\n": "HDF5 (.h5)",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
    b"\x1f\x8b": "gzip",
    b"{": "JSON",
}


def load_optimizer(
    classes: Sequence[type[Optimizer]],
    path: str | os.PathLike[str],
    variables: Iterable[AnyArray],
    custom_objects: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Optimizer, Config | None]:
    """Load as described at ``Adam.load``; ``changes`` are options of small states in place of those in the file.

    Returns:
        An optimizer of one of the classes, and the state of a LossScaleOptimizer if the file has one.
    """
    name = path_of(path)
    small = check_changes(changes)
    variables = check_list("variables", variables)
    buffers = buffers_of(variables, range(len(variables)))
    safetensors = _safetensors()
    require_regular(name)
    Path(name).open("rb").close()  # an unreadable file raises the usual OSError
    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            reader = _Reader(SavedFile(name, file), small)
            return reader.read(classes, variables, buffers, custom_objects), reader.loss_scale()
    except safetensors.SafetensorError as error:
        actual = _format_of(name) or f"not a complete safetensors file ({error})"
        raise ValueError(f"{name}: {actual}, expected a file that `save` wrote") from error


def _format_of(path: str) -> str | None:
    """A phrase that names the format of a file that is not in safetensors format, if its first bytes show it."""
    with Path(path).open("rb") as file:
        begin = file.read(8)
    if begin[2:] == bytes(6):  # a safetensors file begins with the size of its header in eight bytes
        return None
    for magic, name in _MAGIC.items():
        if begin.startswith(magic):
            return f"a file of another format, {name}"
    return None


class Saved(Protocol):
    """What is made of a file."""

    def build(self, var_list: Iterable[Any]) -> None:
        """Let the variables take their slots."""


class _Reader:
    """Reads a file. Every part is checked against the variables before the optimizer is returned."""

    def __init__(self, saved: SavedFile, changes: Config) -> None:
        self._saved, self._changes = saved, changes
        self._header, self._require, self._fail = saved.header, saved.require, saved.fail

    def read(
        self,
        classes: Sequence[type[Optimizer]],
        variables: list[AnyArray],
        buffers: list[_cpu.Buffer],
        custom_objects: Mapping[str, Any] | None,
    ) -> Optimizer:
        named = {cls.__name__: cls for cls in classes}
        saved_by = self._header["optimizer"]
        self._require(saved_by in named, f"state of {saved_by}", " or ".join(named))
        cls = named[saved_by]
        specs = self._match(buffers)
        optimizer = self._configured(cls, custom_objects)
        options, state, _, _ = parts_of(optimizer)
        state.calls[...] = self._iterations()
        slots = SlotsReader(self._saved, specs, buffers)
        slots.check(accumulates=options.accumulation is not None)
        slots.fill(options, state, converts=not {"moments", "float32_for"}.isdisjoint(self._changes))
        self._set_accumulating(optimizer)
        try:
            optimizer.build(variables)
        except ValueError as error:
            self._fail(str(error), "the variables it was saved with")
        self._require(not state.slots.unclaimed(), "the same variable is given twice", "each variable once")
        self._exclude(optimizer, variables)
        return optimizer

    def loss_scale(self) -> Config | None:
        state: Config | None = self._header.get("loss_scale")  # absent from files of version 0.1
        return state

    def _set_accumulating(self, optimizer: Foreign) -> None:
        options, state, _, _ = parts_of(optimizer)
        places: Any = self._header.get("accumulating", None if options.accumulation else [])  # not in the first files
        entries = dict(enumerate(state.entries))
        good = isinstance(places, list) and all(type(i) is int and i in entries for i in places)
        good = good and all(ACCUMULATOR in entries[i].slots for i in places)
        self._require(good, f"'accumulating' {places!r:.60}", f"indices of variables with a '{ACCUMULATOR}'")
        state.restart_accumulation(
            [entries[i].place for i in places], options.calls_per_step, self._accumulated_rows(entries, places)
        )

    def _accumulated_rows(self, entries: dict[int, Entry], places: list[int]) -> Rows:
        """The rows outside of which accumulators are zero, of tables in the middle of a cycle."""
        saved: Any = self._header.get("accumulated_rows", {})  # not in the files of fastadam 0.1
        indices = {str(i): i for i in places}
        good = isinstance(saved, dict) and set(saved) <= set(indices)
        for key, rows in saved.items() if good else ():
            shape = entries[indices[key]].spec.shape
            good = good and bool(shape) and isinstance(rows, list)
            good = good and all(type(row) is int and 0 <= row < shape[0] for row in rows)
        self._require(good, f"'accumulated_rows' {saved!r:.60}", "rows of variables whose gradients are accumulated")
        return {entries[indices[key]].place: (np.array(rows, np.int64),) for key, rows in saved.items()}

    def _exclude(self, optimizer: Any, variables: list[AnyArray]) -> None:
        excluded = self._header["excluded"]
        try:
            if not all(type(i) is int for i in excluded["variables"]):
                raise TypeError("an index that is not a whole number")
            var_list = [dict(enumerate(variables))[i] for i in excluded["variables"]]
            optimizer.exclude_from_weight_decay(var_list, excluded["names"])
        except (TypeError, ValueError, LookupError) as error:
            self._fail(f"'excluded' {excluded!r:.60} ({error!r})", "patterns and indices of variables")

    def _match(self, buffers: list[_cpu.Buffer]) -> list[Spec]:
        specs = [self._spec(i, record) for i, record in enumerate(self._header["variables"])]
        self._require(len(specs) == len(buffers), f"state of {len(specs)} variables", f"{len(buffers)} like variables")
        for i, (spec, buffer) in enumerate(zip(specs, buffers, strict=True)):
            self._require(
                spec.admits(Spec.of(buffer)), f"variable {i} {spec}", f"{Spec.of(buffer)} like {buffer.label}"
            )
        return specs

    def _spec(self, i: int, record: object) -> Spec:
        if not isinstance(record, dict) or set(record) != set(Spec._fields):
            self._fail(f"variable {i} {record!r:.60}", "its shape, dtype, order and name")
        good = isinstance(record["shape"], list) and all(type(n) is int for n in record["shape"])
        good = good and isinstance(record["dtype"], str) and record["order"] in ("C", "F")
        good = good and isinstance(record["name"], (str, type(None)))
        self._require(good, f"variable {i} {record!r:.60}", "its shape, dtype, order and name")
        return Spec(**{**record, "shape": tuple(record["shape"])})

    def _configured(self, cls: type[Optimizer], custom_objects: Mapping[str, Any] | None) -> Optimizer:
        make: Any = cls
        if cls.__module__.partition(".")[0] == "fastadam":  # what another class writes is its own affair
            missing = sorted(set(make().get_config()) - set(self._header["config"]))
            self._require(not missing, f"'config' without {missing}", "every hyperparameter")
        try:
            optimizer: Optimizer = make.from_config({**self._header["config"], **self._changes}, custom_objects)
        except Exception as error:  # anything that a class in custom_objects raises, too
            raise ValueError(f"{self._saved.path}: {cls.__name__} refuses its config ({error})") from error
        return optimizer

    def _iterations(self) -> int:
        self._saved.check_tensor(ITERATIONS, (), "I64")
        try:
            return check_iterations(ITERATIONS, self._saved.tensor(ITERATIONS))
        except ValueError as error:
            self._fail(str(error), "a number of steps")


def _safetensors() -> ModuleType:
    require("safetensors", "loading a saved optimizer")
    import safetensors.numpy

    return safetensors
