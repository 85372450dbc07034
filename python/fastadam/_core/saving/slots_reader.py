"""The slots of a saved optimizer: checked, then laid out and converted for their variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from fastadam._core.common.frameworks import require
from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.arrays import assign, to_host, zeros_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.chunks import store as store_pieces
from fastadam._core.options.options import Options
from fastadam._core.options.state_format import BLOCK, LOW, MOMENTS, NAMES, SCALES, VariableFormat
from fastadam._core.saving.file_format import ACCUMULATED, DTYPES, ITERATIONS, VALUE, lacking_in
from fastadam._core.saving.saved_chain import SavedChain
from fastadam._core.state.entry import Entry, Spec
from fastadam._core.state.given_slots import GivenSlots, is_a_hole
from fastadam._core.state.moments import RandomKey, check_scales, decoded, stored
from fastadam._core.state.state import State

__all__ = ["SlotsReader"]

_KINDS = ("float32", "bfloat16", "8bit", None)  # of moments; None for a variable without


class SlotsReader:
    """Fills the store of an optimizer from a file.

    Args:
        saved: The file.
        specs: What it says of its variables, which fit the buffers.
        buffers: The variables.
    """

    def __init__(self, saved: SavedChain, specs: list[Spec], buffers: list[_cpu.Buffer]) -> None:
        self._saved, self._specs, self._buffers = saved, specs, buffers
        count = len(specs)
        slots = [key for key in saved.checksums if key != ITERATIONS and not key.startswith((VALUE, ACCUMULATED))]
        self._owners = {key: self._owner(key, count) for key in slots}
        self._slots: list[set[str]] = [set() for _ in specs]
        for i, name in self._owners.values():
            self._slots[i].add(name)
        is_new = saved.header["version"] > 1
        full = ["float32" if "m" in names else None for names in self._slots]
        self._kinds: list[str | None] = self._listed("moments") if is_new else full
        self._numbers: list[int] = self._listed("numbers") if is_new else list(range(count))
        self._given: list[Mapping[str, HostArray]] = [{} for _ in specs]
        self._tables: list[int] = saved.header.get("sparse", [])  # absent from files of version 2
        saved.require(isinstance(self._tables, list), f"'sparse' {self._tables!r:.60}", "indices of tables")
        block = saved.header.get("block", BLOCK)
        saved.require(type(block) is int and block == BLOCK, f"'block' {block!r:.60}", str(BLOCK))

    def _listed(self, key: str) -> list[AnyArray]:
        values: AnyArray = self._saved.header.get(key)
        count = len(self._specs)
        good = isinstance(values, list) and len(values) == count
        if key == "moments":
            good = good and all(value in _KINDS for value in values)
        else:
            good = good and all(type(n) is int and 0 <= n < 2**63 for n in values) and len(set(values)) == count
        self._saved.require(good, f"'{key}' {values!r:.60}", f"{key} of {count} variables")
        return list(values)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def check(self, *, accumulates: bool) -> None:
        """Refuse a file without some slots, which would start anew at zero, or with one of a wrong shape or dtype."""
        self._check_complete(accumulates=accumulates)
        for key, (i, name) in self._owners.items():
            spec, buffer, kind = self._specs[i], self._buffers[i], self._kinds[i] or "float32"
            if (name in SCALES and kind != "8bit") or (name == LOW and spec.dtype != "bfloat16"):
                self._saved.fail(f"tensor '{key}'", f"no such one with {kind} moments of a {spec.dtype} variable")
            saved_in = VariableFormat((), kind)
            shape = saved_in.shape_of(spec.shape, buffer.size, name)
            self._saved.check_tensor(key, shape, DTYPES[saved_in.dtype_of(buffer, name)])
            if saved_in.dtype_of(buffer, name) == "bfloat16":
                require("ml_dtypes", "loading bfloat16 moments")
            if name in SCALES:
                check_scales(name, self._saved.tensor(key), f"{self._saved.path}: tensor '{key}'")

    def _check_complete(self, *, accumulates: bool) -> None:
        slots, variables = self._slots, len(self._specs)
        named = self._saved.header.get("slots", [["m", "v"]] * variables)  # absent from files of version 0.1
        good = isinstance(named, list) and len(named) == variables
        good = good and all(isinstance(names, list) and names for names in named)
        good = good and all(isinstance(name, str) for names in named for name in names)
        self._saved.require(good, f"'slots' {named!r:.60}", f"the names of the slots of {variables} variables")
        for i, names in enumerate(named):
            for name in sorted(set(names) - slots[i]):
                self._saved.fail(f"no tensor '{i}/{name}'", "every slot of each variable")
        if "slots" in self._saved.header:
            for i, names in enumerate(named):
                for name in sorted(slots[i] - set(names)):
                    self._saved.fail(f"tensor '{i}/{name}'", f"the slots {names} of variable {i}")
        for i, present in enumerate(slots):
            for name in lacking_in(present, accumulates=accumulates, has_codes=self._kinds[i] == "8bit"):
                self._saved.fail(f"no tensor '{i}/{name}'", f"it beside the slots {sorted(present)} of variable {i}")

    def _owner(self, key: str, variables: int) -> tuple[int, str]:
        """The index of the variable that a tensor belongs to, and the name of the slot."""
        index, slash, name = key.partition("/")
        good = index.isascii() and index.isdigit() and len(index) < 10 and bool(slash and name)
        good = good and str(int(index)) == index and int(index) < variables
        self._saved.require(good, f"tensor '{key:.60}'", f"'<variable>/<slot>' of {variables} variables")
        return int(index), name

    # ---- reading ---------------------------------------------------------------------------------------------------

    def place(self, options: Options, state: State, given: GivenSlots | None, *, converts: bool) -> None:
        """Make every slot that is not given, all zero, in the order of ``weights``; those of a conversion come last.

        Moments stay in the format they were saved in if the optimizer has it, unless it ``converts`` them to its own.
        """
        store = state.slots
        self._key = RandomKey(options.small.seed, int(state.calls) // options.calls_per_step, 0)
        self._targets = [self._target(i, options, converts=converts) for i in range(len(self._specs))]
        if given is not None:
            self._given = [given.of_file(buffer, self._dtypes_of(i)) for i, buffer in enumerate(self._buffers)]
            given.require_apart((buffer.label, buffer.address, buffer.nbytes) for buffer in self._buffers)
        places: list[dict[str, int]] = [{} for _ in self._specs]
        late: dict[tuple[str, int], AnyArray] = {}
        for i, name in self._owners.values():
            target = self._targets[i]
            if name == LOW and options.small.master is None:
                continue
            if target is None or name not in (*MOMENTS, *SCALES):
                arrays = {name: self._begin(i, name, self._saved_format(i))}
            else:
                names = () if name in SCALES else (name, *_scales_of(target, self._buffers[i], name))
                arrays = {each: self._begin(i, each, target) for each in names}
            if name in arrays:
                places[i][name] = len(store.arrays)
                store.arrays.append(arrays.pop(name))
            late.update({(other, i): array for other, array in arrays.items()})
        for (name, i), array in sorted(late.items(), key=lambda item: (NAMES.index(item[0][0]), item[0][1])):
            places[i][name] = len(store.arrays)
            store.arrays.append(array)
        present = set().union(*places)
        used = [name for _, name in self._owners.values()]
        store.names = [name for name in dict.fromkeys([*used, *NAMES]) if name in present]
        for spec, slots, number in zip(self._specs, places, self._numbers, strict=True):
            store.add_waiting(Entry(spec, slots, number=number))

    def write(self, state: State) -> None:
        """Copy or convert every tensor into its slot, but those of tables in deltas; everything has been checked."""
        for key, (i, name) in self._owners.items():
            if i in self._saved.tables:
                continue
            slots, target = state.slots.slots_of(state.entries[i]), self._targets[i]
            if target is not None and name in MOMENTS:
                random = self._key._replace(number=self._numbers[i])
                for part, values in stored(target, self._buffers[i], name, self._decoded(i, name), random).items():
                    assign(slots[part], to_host(values))
            elif name in slots and (target is None or name not in SCALES):
                self._copy(key, slots[name], is_zero=self.is_zero(i, name))

    def is_zero(self, i: int, name: str) -> bool:
        """Whether a slot is known to be all zero before it is written."""
        return name not in self._given[i] or is_a_hole(self._given[i][name])

    def _copy(self, key: str, slot: AnyArray, *, is_zero: bool) -> None:
        if isinstance(slot, np.ndarray):
            store_pieces(slot, self._saved.reader_of(key), is_zero=is_zero)
        else:
            assign(slot, self._saved.tensor(key))

    def _begin(self, i: int, name: str, chosen: VariableFormat) -> AnyArray:
        """The array that is given for a slot, or zeros, the moving average too."""
        if name in self._given[i]:
            return self._given[i][name]
        buffer = self._buffers[i]
        shape = chosen.shape_of(buffer.shape, buffer.size, name)
        return zeros_beside(buffer, chosen.dtype_of(buffer, name), shape, untouched=chosen.moves_rows_alone)

    def _saved_format(self, i: int) -> VariableFormat:
        """How a variable's slots were saved; of tables, rows of zeros take no memory."""
        return VariableFormat((), self._kinds[i] or "float32", moves_rows_alone=i in self._tables)

    def _dtypes_of(self, i: int) -> dict[str, str]:
        """The dtypes that the slots of a variable will have."""
        chosen = self._targets[i] or self._saved_format(i)
        return {name: chosen.dtype_of(self._buffers[i], name) for name in self._slots[i]}

    def _target(self, i: int, options: Options, *, converts: bool) -> VariableFormat | None:
        """The format that the moments of a variable are converted to; None if they stay as they are."""
        kind, buffer = self._kinds[i], self._buffers[i]
        if kind is None:
            return None
        target = options.state_format.of(buffer, {})
        if not converts and kind in ("float32", options.small.moments):
            target = target._replace(moments=kind)
        is_same = target.moments == kind and (kind != "8bit" or self._specs[i].order == buffer.order)
        return None if is_same else target

    def _decoded(self, i: int, name: str) -> HostArray:
        """The values of a moment. Blocks of codes follow the order that the variable had in memory."""
        keys = [key for key in (name, f"{name}_scale") if key in self._slots[i]]
        slots = {key: self._saved.tensor(f"{i}/{key}") for key in keys}
        layout: Literal["C", "F"] = "F" if self._specs[i].order == "F" else "C"
        return decoded({**slots, name: np.asarray(slots[name], order=layout)}, name)


def _scales_of(target: VariableFormat, buffer: _cpu.Buffer, name: str) -> list[str]:
    """The scales that a moment has in a format."""
    return [f"{name}_scale"] if target.dtype_of(buffer, name) == "uint8" else []
