"""Loading a saved optimizer: every part of the file is checked against the variables first."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol, TypeVar

from fastadam._core.common.checks import check_iterations, check_list
from fastadam._core.common.files import require_regular
from fastadam._core.common.frameworks import require
from fastadam._core.common.types import AnyArray, Config, Foreign, HostArray
from fastadam._core.native.arrays import copy_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import buffers_of
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.options import Options
from fastadam._core.parts import parts_of
from fastadam._core.saving.file_format import DTYPES, ITERATIONS, VERSION, crc32, lacking_in, path_of
from fastadam._core.state.entry import Entry, Spec
from fastadam._core.state.slots import SlotStore

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
_HEADER: dict[str, type] = {"optimizer": str, "config": dict, "variables": list, "weights": list, "excluded": dict}


def load_optimizer(
    classes: Sequence[type[Optimizer]],
    path: str | os.PathLike[str],
    variables: Iterable[AnyArray],
    custom_objects: Mapping[str, Any] | None = None,
) -> tuple[Optimizer, Config | None]:
    """Load as described at ``Adam.load``.

    Returns:
        An optimizer of one of the classes, and the state of a LossScaleOptimizer if the file has one.
    """
    name = path_of(path)
    variables = check_list("variables", variables)
    buffers = buffers_of(variables, range(len(variables)))
    safetensors = _safetensors()
    require_regular(name)
    Path(name).open("rb").close()  # an unreadable file raises the usual OSError
    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            reader = _Reader(name, file)
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

    def __init__(self, path: str, file: Foreign) -> None:
        self._path = path
        self._file = file
        self._header = self._read_header()
        self._checksums = self._read_checksums()

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
        self._fill(state.slots, options, specs, buffers)
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
        state.restart_accumulation([entries[i] for i in places], options.calls_per_step)

    def _exclude(self, optimizer: Any, variables: list[AnyArray]) -> None:
        excluded = self._header["excluded"]
        try:
            if not all(type(i) is int for i in excluded["variables"]):
                raise TypeError("an index that is not a whole number")
            var_list = [dict(enumerate(variables))[i] for i in excluded["variables"]]
            optimizer.exclude_from_weight_decay(var_list, excluded["names"])
        except (TypeError, ValueError, LookupError) as error:
            self._fail(f"'excluded' {excluded!r:.60} ({error!r})", "patterns and indices of variables")

    def _read_header(self) -> Config:
        text = (self._file.metadata() or {}).get("fastadam")
        if text is None:
            self._fail("no metadata 'fastadam'", "a file that fastadam saved")
        checksum = self._file.metadata().get("fastadam_crc32")
        self._require(
            checksum == str(zlib.crc32(text.encode())), "damaged: the metadata's checksum differs", "the saved one"
        )
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._fail(f"metadata that is not JSON ({error})", "a file that fastadam saved")
        self._require(isinstance(header, dict), "metadata that is not an object", "a file that fastadam saved")
        version = header.get("version")
        self._require(type(version) is int and version == VERSION, f"format version {version!r}", str(VERSION))
        for key, kind in _HEADER.items():
            self._require(isinstance(header.get(key), kind), f"'{key}' {header.get(key)!r:.60}", f"a {kind.__name__}")
        return dict(header)

    def _read_checksums(self) -> dict[str, int]:
        """The checksums of all tensors in the file, in the order of ``weights``."""
        listed, keys = self._header["weights"], sorted(self._file.keys())
        good = all(isinstance(item, list) and [type(part) for part in item] == [str, int] for item in listed)
        good = good and sorted(key for key, _ in listed) == keys and listed[:1] != [] and listed[0][0] == ITERATIONS
        self._require(good, f"tensors {keys!s:.80}", f"{listed!s:.80}")
        return dict(listed)

    def _tensor(self, key: str) -> HostArray:
        array: HostArray = self._file.get_tensor(key)
        is_intact = crc32(array) == self._checksums[key]
        self._require(is_intact, f"damaged: the checksum of tensor '{key}' differs", "the saved one")
        return array

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
            optimizer: Optimizer = make.from_config(self._header["config"], custom_objects)
        except Exception as error:  # anything that a class in custom_objects raises, too
            raise ValueError(f"{self._path}: {cls.__name__} refuses its config ({error})") from error
        return optimizer

    def _iterations(self) -> int:
        self._check_tensor(ITERATIONS, (), "I64")
        try:
            return check_iterations(ITERATIONS, self._tensor(ITERATIONS))
        except ValueError as error:
            self._fail(str(error), "a number of steps")

    def _fill(self, store: SlotStore, options: Options, specs: list[Spec], buffers: list[_cpu.Buffer]) -> None:
        """Copy every tensor into the layout of its variable, one at a time, in the order of ``weights``."""
        keys = list(self._checksums)
        slots: list[dict[str, int]] = [{} for _ in specs]
        owners = {key: self._owner(key, slots) for key in keys[1:]}
        self._check_complete(list(owners.values()), len(specs), accumulates=options.accumulation is not None)
        state_format = options.state_format
        for key, (i, _) in owners.items():
            self._check_tensor(key, specs[i].shape, DTYPES[state_format.dtype_of(buffers[i])])
        for at, (key, (i, name)) in enumerate(owners.items()):
            slots[i][name] = at
            store.arrays.append(copy_beside(self._tensor(key), buffers[i]))
        store.names = list(dict.fromkeys(name for _, name in owners.values()))
        for spec, places in zip(specs, slots, strict=True):
            store.add_waiting(Entry(spec, places))

    def _check_complete(self, owners: list[tuple[int, str]], variables: int, *, accumulates: bool) -> None:
        """Refuse a file without some slots, which would start anew at zero."""
        slots: list[set[str]] = [set() for _ in range(variables)]
        for i, name in owners:
            slots[i].add(name)
        named = self._header.get("slots", [["m", "v"]] * variables)  # absent from files of version 0.1
        good = isinstance(named, list) and len(named) == variables
        good = good and all(isinstance(names, list) and names for names in named)
        good = good and all(isinstance(name, str) for names in named for name in names)
        self._require(good, f"'slots' {named!r:.60}", f"the names of the slots of {variables} variables")
        for i, names in enumerate(named):
            for name in sorted(set(names) - slots[i]):
                self._fail(f"no tensor '{i}/{name}'", "every slot of each variable")
        if "slots" in self._header:
            for i, names in enumerate(named):
                for name in sorted(slots[i] - set(names)):
                    self._fail(f"tensor '{i}/{name}'", f"the slots {names} of variable {i}")
        for i, present in enumerate(slots):
            for name in lacking_in(present, accumulates=accumulates):
                self._fail(f"no tensor '{i}/{name}'", f"it beside the slots {sorted(present)} of variable {i}")

    def _owner(self, key: str, slots: list[dict[str, int]]) -> tuple[int, str]:
        """The index of the variable that a tensor belongs to, and the name of the slot."""
        index, slash, name = key.partition("/")
        good = index.isascii() and index.isdigit() and len(index) < 10 and bool(slash and name)
        good = good and str(int(index)) == index and int(index) < len(slots)
        self._require(good, f"tensor '{key:.60}'", f"'<variable>/<slot>' of {len(slots)} variables")
        return int(index), name

    def _check_tensor(self, key: str, shape: tuple[int, ...], dtype: str) -> None:
        tensor = self._file.get_slice(key)
        actual_shape, actual_dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        good = (actual_shape, actual_dtype) == (shape, dtype)
        self._require(good, f"tensor '{key}' {actual_dtype} {actual_shape}", f"{dtype} {shape}")

    def _require(self, condition: bool, actual: str, expected: str) -> None:
        if not condition:
            self._fail(actual, expected)

    def _fail(self, actual: str, expected: str) -> NoReturn:
        raise ValueError(f"{self._path}: {actual}, expected {expected}")


def _safetensors() -> ModuleType:
    require("safetensors", "loading a saved optimizer")
    import safetensors.numpy

    return safetensors
