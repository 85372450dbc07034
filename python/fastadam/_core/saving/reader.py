"""Loading a saved optimizer: every part of the file is checked against the variables first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from fastadam._core.common.checks import check_custom_objects, check_iterations, check_list
from fastadam._core.common.types import AnyArray, Config, Foreign
from fastadam._core.deferred.chain import Chain
from fastadam._core.native.arrays import assign
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import buffers_of
from fastadam._core.native.chunks import bytes_of, store
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.small_states import check_changes
from fastadam._core.options.state_format import VariableFormat
from fastadam._core.parts import parts_of
from fastadam._core.saving.contents import values_of
from fastadam._core.saving.file_format import ACCUMULATED, DTYPES, ITERATIONS, VALUE, check_paths, path_of
from fastadam._core.saving.saved_chain import SavedChain
from fastadam._core.saving.slots_reader import SlotsReader
from fastadam._core.saving.writer import begin_chain
from fastadam._core.state.entry import Entry, Spec
from fastadam._core.state.given_slots import GivenSlots
from fastadam._core.state.state import Rows, State

__all__ = ["load_optimizer"]

Optimizer = TypeVar("Optimizer", bound="Saved")


def load_optimizer(
    classes: Sequence[type[Optimizer]],
    path: str | os.PathLike[str],
    variables: Iterable[AnyArray],
    finish: Callable[[Foreign, Config | None], Foreign],
    custom_objects: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    deltas: Iterable[str | os.PathLike[str]] = (),
    given: Iterable[object] | None = None,
) -> Foreign:
    """Load as described at ``Adam.load``; ``changes`` are options of small states in place of those in the file.

    Args:
        classes: The optimizer is of one of these.
        path: The file.
        variables: As of ``Adam.load``, like the next but one and its follower.
        finish: Makes the result from the optimizer and the state of a LossScaleOptimizer, which the file may have;
            called before anything is written to the variables. What it raises as a ValueError gets the file's name.
        custom_objects: Schedules by name.
        changes: Options of small states.
        deltas: The files that follow.
        given: Arrays for slots, as ``slots`` of ``Adam.load``.
    """
    name = path_of(path)
    custom_objects = check_custom_objects(custom_objects)
    small = check_changes(changes)
    names = check_paths("deltas", deltas)
    if names and small:
        raise ValueError(f"changes: {changes} with deltas, expected None (merge_deltas makes one file of them first)")
    variables = check_list("variables", variables)
    buffers = buffers_of(variables, range(len(variables)))
    with SavedChain(name, names) as saved:
        return _Reader(saved, small, given).read(classes, variables, buffers, finish, custom_objects)


class Saved(Protocol):
    """What is made of a file."""

    def build(self, var_list: Iterable[Any]) -> None:
        """Let the variables take their slots."""


class _Reader:
    """Reads a file. Every part is checked against the variables before the optimizer is returned."""

    def __init__(self, saved: SavedChain, changes: Config, given: Iterable[object] | None) -> None:
        self._saved, self._changes, self._given = saved, changes, given
        self._header, self._require, self._fail = saved.header, saved.require, saved.fail

    def read(
        self,
        classes: Sequence[type[Optimizer]],
        variables: list[AnyArray],
        buffers: list[_cpu.Buffer],
        finish: Callable[[Foreign, Config | None], Foreign],
        custom_objects: Mapping[str, Any] | None,
    ) -> Foreign:
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
        has_values = self._check_values(buffers)
        given = None if self._given is None else GivenSlots(self._given, buffers, options.state_format)
        slots.place(options, state, given, converts=not {"moments", "float32_for"}.isdisjoint(self._changes))
        self._set_accumulating(optimizer)
        try:
            optimizer.build(variables)
        except ValueError as error:
            self._fail(str(error), "the variables it was saved with")
        self._require(not state.slots.unclaimed(), "the same variable is given twice", "each variable once")
        self._exclude(optimizer, variables)
        try:
            result = finish(optimizer, self._header.get("loss_scale"))  # absent from files of version 0.1
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._saved.path}: {error}") from None
        self._saved.check_checksums()
        slots.write(state)  # from here on nothing is refused
        if has_values:
            self._write_values(state, buffers, slots)
            self._begin_chain(optimizer)
        return result

    def _check_values(self, buffers: list[_cpu.Buffer]) -> bool:
        """Whether the file has the values of the variables, which fit these."""
        has_values = self._header.get("values", False)  # absent from files of version 2
        self._require(type(has_values) is bool, f"'values' {has_values!r:.60}", "true or false")
        expected = {f"{VALUE}{i}" for i in range(len(buffers) if has_values else 0)}
        found = {key for key in self._saved.checksums if key.startswith(VALUE)}
        self._require(found == expected, f"tensors {sorted(found)!s:.60}", f"values of {len(expected)} variables")
        for i, buffer in enumerate(buffers if has_values else []):
            self._require(buffer.device < 0, f"values of {buffer.label}, which is on a GPU", "it in CPU memory")
            self._saved.check_tensor(f"{VALUE}{i}", buffer.shape, DTYPES[buffer.dtype])
        return bool(has_values)

    def _write_values(self, state: State, buffers: list[_cpu.Buffer], reader: SlotsReader) -> None:
        for i, (buffer, saved) in enumerate(zip(buffers, self._header["slots"], strict=True)):
            slots = state.slots.slots_of(state.entries[i])
            if i in self._saved.tables:
                self._write_table(i, buffer, slots, reader)
            else:
                store(values_of(buffer), self._saved.reader_of(f"{VALUE}{i}"), is_zero=False)
            if "average" in slots and "average" not in saved:  # made from the values that the variable had before
                assign(slots["average"], VariableFormat(()).begin(buffer, "average"))

    def _write_table(self, i: int, buffer: _cpu.Buffer, slots: dict[str, AnyArray], reader: SlotsReader) -> None:
        targets = {f"{VALUE}{i}": values_of(buffer), **{f"{i}/{name}": array for name, array in slots.items()}}
        are_zero = {f"{i}/{name}": reader.is_zero(i, name) for name in slots}
        for begin, arrays in self._saved.tables[i].blocks():
            for key, rows in arrays.items():
                block = targets[key][begin : begin + len(rows)]
                store(block, bytes_of(rows), is_zero=are_zero.get(key, False))

    def _begin_chain(self, optimizer: Foreign) -> None:
        """The next delta follows the last file."""
        state = parts_of(optimizer).state
        link = self._saved.link
        if link is not None:
            are_tables = [i in self._saved.tables or i in self._header["sparse"] for i in range(len(state.entries))]
            chain = Chain.at(link, state.entries, self._saved.positions, are_tables, is_complete=True)
            begin_chain(parts_of(optimizer), chain, state.entries)

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
        indices = {f"{ACCUMULATED}{i}": i for i in places}  # not in the files of fastadam 0.1
        found = {}
        for key in self._saved.checksums:
            if not key.startswith(ACCUMULATED):
                continue
            self._require(key in indices, f"tensor '{key}'", "rows of variables whose gradients are accumulated")
            entry = entries[indices[key]]
            self._saved.check_tensor(key, (self._saved.tensor_of(key).nbytes // 8,), "I64")
            self._saved.check_checksum(key)
            rows = self._saved.tensor(key)
            good = bool((rows[1:] > rows[:-1]).all()) and bool(entry.spec.shape)
            good = good and (not len(rows) or (rows[0] >= 0 and rows[-1] < entry.spec.shape[0]))
            self._require(bool(good), f"tensor '{key}' {rows!s:.60}", f"rows of variable {indices[key]}, in order")
            found[entry.place] = (rows.astype(np.int64),)
        return found

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
        specs = self._saved.specs
        self._require(len(specs) == len(buffers), f"state of {len(specs)} variables", f"{len(buffers)} like variables")
        for i, (spec, buffer) in enumerate(zip(specs, buffers, strict=True)):
            self._require(
                spec.admits(Spec.of(buffer)), f"variable {i} {spec}", f"{Spec.of(buffer)} like {buffer.label}"
            )
        return specs

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
            self._saved.check_checksum(ITERATIONS)
            return check_iterations(ITERATIONS, self._saved.tensor(ITERATIONS))
        except ValueError as error:
            self._fail(str(error), "a number of steps")
