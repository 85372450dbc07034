"""The slots of a saved optimizer: checked, then laid out and converted for their variables."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fastadam._core.common.frameworks import require
from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.arrays import copy_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.options.options import Options
from fastadam._core.options.state_format import BLOCK, LOW, MOMENTS, NAMES, SCALES, VariableFormat
from fastadam._core.saving.file_format import DTYPES, lacking_in
from fastadam._core.saving.saved_file import SavedFile
from fastadam._core.state.entry import Entry, Spec
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

    def __init__(self, saved: SavedFile, specs: list[Spec], buffers: list[_cpu.Buffer]) -> None:
        self._saved, self._specs, self._buffers = saved, specs, buffers
        count = len(specs)
        self._owners = {key: self._owner(key, count) for key in list(saved.checksums)[1:]}
        self._slots: list[set[str]] = [set() for _ in specs]
        for i, name in self._owners.values():
            self._slots[i].add(name)
        is_new = saved.header["version"] > 1
        full = ["float32" if "m" in names else None for names in self._slots]
        self._kinds: list[str | None] = self._listed("moments") if is_new else full
        self._numbers: list[int] = self._listed("numbers") if is_new else list(range(count))
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

    def fill(self, options: Options, state: State, *, converts: bool) -> None:
        """Copy every slot, one at a time, in the order of ``weights``; new slots of a conversion come last.

        Moments stay in the format they were saved in if the optimizer has it, unless it ``converts`` them to its own.
        """
        store, seed = state.slots, options.small.seed
        step = int(state.calls) // options.calls_per_step
        targets = [self._target(i, options, converts=converts) for i in range(len(self._specs))]
        places: list[dict[str, int]] = [{} for _ in self._specs]
        late: dict[tuple[str, int], AnyArray] = {}
        for key, (i, name) in self._owners.items():
            buffer, target = self._buffers[i], targets[i]
            if target is None or name not in (*MOMENTS, *SCALES):
                arrays = {name: copy_beside(self._tensor(key, name), buffer)}
            elif name in MOMENTS:
                arrays = stored(target, buffer, name, self._decoded(i, name), RandomKey(seed, step, self._numbers[i]))
            else:
                arrays = {}
            if name == LOW and options.small.master is None:
                arrays = {}
            if name in arrays:
                places[i][name] = len(store.arrays)
                store.arrays.append(arrays.pop(name))
            late.update({(other, i): array for other, array in arrays.items()})
        for (name, i), array in sorted(late.items(), key=lambda item: (NAMES.index(item[0][0]), item[0][1])):
            places[i][name] = len(store.arrays)
            store.arrays.append(array)
        given = set().union(*places)
        used = [name for _, name in self._owners.values()]
        store.names = [name for name in dict.fromkeys([*used, *NAMES]) if name in given]
        for spec, slots, number in zip(self._specs, places, self._numbers, strict=True):
            store.add_waiting(Entry(spec, slots, number=number))

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
        slots = {key: self._tensor(f"{i}/{key}", key) for key in keys}
        layout: Literal["C", "F"] = "F" if self._specs[i].order == "F" else "C"
        return decoded({**slots, name: np.asarray(slots[name], order=layout)}, name)

    def _tensor(self, key: str, name: str) -> HostArray:
        array = self._saved.tensor(key)
        check_scales(name, array, f"{self._saved.path}: tensor '{key}'")
        return array
