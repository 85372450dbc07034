"""One file of a chain must hold together, whoever wrote it: checked before anything is written or merged."""

from __future__ import annotations

import sys
from typing import Any

from fastadam._core.common.checks import check_iterations
from fastadam._core.common.types import Config
from fastadam._core.deferred.rates import Numbers
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import BLOCK, LOW, SCALES, VariableFormat
from fastadam._core.saving.file_format import (
    ACCUMULATED,
    ALPHAS,
    DTYPES,
    HAD,
    ITERATIONS,
    KEEPS,
    ROWS,
    VALUE,
    Tensor,
    lacking_in,
)
from fastadam._core.saving.saved_file import SavedFile
from fastadam._core.state.entry import Spec

__all__ = ["check_file", "specs_of"]

_KINDS = ("float32", "bfloat16", "8bit")  # of moments
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_MOST_STEPS = 2**62  # sums of two such counts are still int64


def check_file(file: SavedFile) -> None:
    """Raise ValueError unless a base or delta has all that it says, and says all that it needs.

    What its tensors hold is checked later, with their checksums.
    """
    specs, header = specs_of(file), file.header
    slots = _slots_of(file, specs)
    _check_lists(file, slots)
    file.require(header.get("values") is True, f"'values' {header.get('values')!r:.60}", "true in a file of a chain")
    tables = _tables_of(file, specs, slots)
    expected = {ITERATIONS: Tensor("I64", ())}
    for i, spec in enumerate(specs):
        expected.update(_tensors_of(file, i, spec, slots[i], tables.get(str(i))))
    for key in sorted(set(file.checksums) - set(expected)):
        file.fail(f"tensor '{key}'", "only slots and values of its variables")
    for key, tensor in expected.items():
        file.require(file.holds(key), f"no tensor '{key}'", "every slot and value of each variable")
        file.check_tensor(key, tensor.shape, tensor.dtype)
    file.check_checksum(ITERATIONS)
    try:
        check_iterations(ITERATIONS, file.tensor(ITERATIONS))
    except ValueError as error:
        file.fail(str(error), "a number of steps")


def specs_of(file: SavedFile) -> list[Spec]:
    """Its variables."""
    specs = []
    for i, record in enumerate(file.header["variables"]):
        good = isinstance(record, dict) and set(record) == set(Spec._fields) and isinstance(record["shape"], list)
        good = good and all(type(n) is int and n >= 0 for n in record["shape"]) and record["order"] in ("C", "F")
        good = good and isinstance(record["dtype"], str) and isinstance(record["name"], (str, type(None)))
        file.require(good, f"variable {i} {record!r:.60}", "its shape, dtype, order and name")
        specs.append(Spec(**{**record, "shape": tuple(record["shape"])}))
    return specs


def _slots_of(file: SavedFile, specs: list[Spec]) -> list[list[str]]:
    header, count = file.header, len(specs)
    slots: Any = header.get("slots")
    kinds: Any = header.get("moments")
    good = isinstance(slots, list) and len(slots) == count and all(isinstance(names, list) for names in slots)
    good = good and all(names and all(isinstance(name, str) for name in names) for names in slots)
    good = good and all(len(set(names)) == len(names) for names in slots)
    file.require(good, f"'slots' {slots!r:.60}", f"the names of the slots of {count} variables")
    good = isinstance(kinds, list) and len(kinds) == count
    good = good and all(kind in (_KINDS if "m" in names else (None,)) for kind, names in zip(kinds, slots, strict=True))
    file.require(good, f"'moments' {kinds!r:.60}", f"moments of {count} variables")
    accumulates = header["config"].get("gradient_accumulation_steps") is not None
    for i, names in enumerate(slots):
        for name in lacking_in(set(names), accumulates=accumulates, has_codes=kinds[i] == "8bit"):
            file.fail(f"no tensor '{i}/{name}'", f"it beside the slots {sorted(names)} of variable {i}")
        for name in names:
            good = kinds[i] == "8bit" if name in SCALES else name != LOW or specs[i].dtype == "bfloat16"
            file.require(good, f"tensor '{i}/{name}'", f"no such one with {kinds[i]} moments of a {specs[i].dtype}")
        file.require(specs[i].dtype in _FLOATS, f"variable {i} of {specs[i].dtype:.20}", f"one of {_FLOATS}")
    return [list(names) for names in slots]


def _check_lists(file: SavedFile, slots: list[list[str]]) -> None:
    """Raise unless indices are those of variables, and there is a number for each variable."""
    header, count = file.header, len(slots)
    for key in ("sparse", "accumulating"):
        indices: Any = header.get(key)
        good = isinstance(indices, list) and all(type(i) is int and 0 <= i < count for i in indices)
        good = good and len(set(indices)) == len(indices)
        good = good and (key == "sparse" or all(ACCUMULATOR in slots[i] for i in indices))
        file.require(good, f"'{key}' {indices!r:.60}", "indices of variables")
    for key, end in (("positions", _MOST_STEPS), ("numbers", 2**63)):
        numbers: Any = header.get(key)
        good = isinstance(numbers, list) and len(numbers) == count
        good = good and all(type(n) is int and 0 <= n < end for n in numbers)
        good = good and (key == "positions" or len(set(numbers)) == count)
        file.require(good, f"'{key}' {numbers!r:.60}", f"{key} of {count} variables")
    excluded = header["excluded"]
    names, places = excluded.get("names"), excluded.get("variables")
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    good = good and isinstance(places, list) and all(type(i) is int and 0 <= i < count for i in places)
    file.require(good, f"'excluded' {excluded!r:.60}", "patterns and indices of variables")
    block = header.get("block")
    file.require(type(block) is int and block == BLOCK, f"'block' {block!r:.60}", str(BLOCK))


# ---- tables ----------------------------------------------------------------------------------------------------------


def _tables_of(file: SavedFile, specs: list[Spec], slots: list[list[str]]) -> Config:
    """What the file says of the tables of which it has only some rows."""
    tables: Any = file.header.get("tables", {} if file.previous is None else None)
    indices = {str(i): i for i, spec in enumerate(specs) if spec.shape}
    good = isinstance(tables, dict) and set(tables) <= set(indices) and (file.previous is not None or not tables)
    file.require(good, f"'tables' {tables!r:.60}", "those of its variables of which a delta has rows")
    for key, record in tables.items():
        good = isinstance(record, dict) and set(record) == {"rows", "steps", "exact"} and type(record["exact"]) is bool
        good = good and type(record["rows"]) is int and 0 <= record["rows"] <= specs[indices[key]].shape[0]
        good = good and isinstance(record["steps"], list)
        good = good and all(_is_stretch(stretch, slots[indices[key]]) for stretch in record["steps"])
        file.require(good, f"table {key} {record!r:.60}", "its rows and the numbers of its steps")
    return dict(tables)


def _is_stretch(record: object, slots: list[str]) -> bool:
    """Whether it is the numbers of steps that a variable with these slots can make, and how many there were."""
    if not isinstance(record, list) or len(record) != 2 or type(record[1]) is not int:
        return False
    numbers, steps = record
    if not isinstance(numbers, list) or len(numbers) != len(Numbers._fields) or not 1 <= steps < _MOST_STEPS:
        return False
    beta_1, beta_2, epsilon, amsgrad, momentum, accumulates = numbers
    return (
        all(type(number) in (int, float) for number in (beta_1, beta_2, epsilon))
        and 0 <= beta_1 < 1
        and 0 <= beta_2 < 1
        and 0 <= epsilon <= sys.float_info.max
        and type(amsgrad) is bool
        and (not amsgrad or "vhat" in slots)
        and (momentum is None or (type(momentum) in (int, float) and 0 <= momentum <= 1 and "average" in slots))
        and type(accumulates) is bool
        and (not accumulates or ACCUMULATOR in slots)
    )


def _tensors_of(file: SavedFile, i: int, spec: Spec, slots: list[str], record: Config | None) -> dict[str, Tensor]:
    """All tensors of a variable; ``record``: what is said of the rows that there are, None if it is all of them."""
    chosen = VariableFormat((), file.header["moments"][i] or "float32")
    shape = spec.shape if record is None else (record["rows"], *spec.shape[1:])
    size = Tensor("U8", spec.shape).nbytes
    tensors = {
        f"{i}/{name}": Tensor(DTYPES[chosen.dtype_of(spec, name)], chosen.shape_of(shape, size, name)) for name in slots
    }
    tensors[f"{VALUE}{i}"] = Tensor(DTYPES[spec.dtype], shape)
    rows = f"{ACCUMULATED}{i}"
    if i in file.header["accumulating"] and file.holds(rows):
        tensors[rows] = Tensor("I64", (file.tensor_of(rows).nbytes // 8,))
    if record is not None:
        steps = sum(stretch[1] for stretch in record["steps"])
        tensors[f"{ROWS}{i}"] = Tensor("I64", (record["rows"],))
        if steps or file.holds(f"{HAD}{i}"):
            tensors[f"{HAD}{i}"] = Tensor("I64", (record["rows"],))
        if steps:
            tensors.update({f"{name}{i}": Tensor(DTYPES[spec.state_dtype], (steps,)) for name in (ALPHAS, KEEPS)})
    return tensors
