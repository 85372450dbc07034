"""Optimizers in safetensors files, written so that a killed or failed save leaves the old file whole."""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fastadam._core.backend import _cpu
from fastadam._core.buffers import buffers_of, key_of
from fastadam._core.checks import check_iterations, check_list
from fastadam._core.extras import Extras
from fastadam._core.frameworks import require
from fastadam._core.parts import parts_of
from fastadam._core.placement import copy_beside, to_host
from fastadam._core.slots import Entry, SlotStore, Spec

if TYPE_CHECKING:
    from fastadam._core.types import AnyOptimizer

__all__ = ["load", "save"]

_VERSION = 1
_ITERATIONS = "iterations"
_DTYPES = {"int64": "I64", "float32": "F32", "float64": "F64"}
Optimizer = TypeVar("Optimizer", bound="Saved")


def save(
    optimizer: AnyOptimizer,
    path: str | os.PathLike[str],
    variables: Iterable[Any] | None = None,
    loss_scale: dict[str, Any] | None = None,
) -> None:
    """See ``Adam.save``; ``loss_scale`` is what a LossScaleOptimizer adds."""
    target = Path(os.fsdecode(path))
    if target.suffix.lower() in _OTHER_SUFFIXES:
        raise ValueError(
            f"path: '{target}' with the suffix of another format, expected {target.stem}.safetensors: the file is a "
            "safetensors one"
        )
    chosen = None if variables is None else check_list("variables", variables)
    _, _, runtime, tables = parts_of(optimizer)
    with runtime.lock:
        tables.settle()
        tensors, header = _contents(optimizer, chosen)
        header["loss_scale"] = loss_scale
        try:
            text = json.dumps(header, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"get_config of {optimizer.name}: not plain JSON ({error})") from None
        _replace_whole(target, [_safetensors_header(tensors, text), *(_memory(a) for a in tensors.values())])


def _safetensors_header(tensors: dict[str, npt.NDArray[Any]], text: str) -> bytes:
    """The library's own ``save_file`` copies all tensors first, and leaves temporary files of its own."""
    metadata = {"fastadam": text, "fastadam_crc32": str(zlib.crc32(text.encode()))}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _contents(optimizer: Any, chosen: list[Any] | None) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    options, state, _, _ = parts_of(optimizer)
    store = state.slots
    entries = store.entries if chosen is None else _entries_of(store, chosen)
    places = {at: f"{i}/{name}" for i, entry in enumerate(entries) for name, at in entry.slots.items()}
    slots = {places[at]: np.asarray(to_host(store.arrays[at]), order="C") for at in sorted(places)}
    tensors = {_ITERATIONS: np.array(state.calls), **slots}
    header = {
        "version": _VERSION,
        "optimizer": type(optimizer).__name__,
        "config": optimizer.get_config(),
        "variables": [entry.spec._asdict() for entry in entries],
        "weights": [[name, _crc32(array)] for name, array in tensors.items()],
        "excluded": _excluded(options.extras, entries),
        "accumulating": [i for i, e in enumerate(entries) if state.is_accumulating(e, options.calls_per_step)],
    }
    return tensors, header


def _crc32(array: npt.NDArray[Any]) -> int:
    return zlib.crc32(_memory(array))


def _memory(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _entries_of(store: SlotStore, variables: list[Any]) -> list[Entry]:
    entries: list[Entry] = []
    for i, buffer in enumerate(buffers_of(variables, range(len(variables)))):
        entry = store.entry_of(buffer)
        if entry is None:
            raise ValueError(
                f"variables[{i}]: not a variable of this optimizer, which has slots for those of its steps"
            )
        if entry in entries:
            raise ValueError(f"variables[{i}]: the same as variables[{entries.index(entry)}], expected it once")
        entries.append(entry)
    return entries


def _excluded(extras: Extras, entries: list[Entry]) -> dict[str, Any]:
    """What ``exclude_from_weight_decay`` named: the configuration does not have it."""
    known = [entry.buffer and key_of(entry.buffer) for entry in entries]
    if None in known and not extras.excluded_keys <= set(known):
        raise ValueError("exclude_from_weight_decay: var_list has a variable not met since the restore; build it first")
    indices = [i for i, key in enumerate(known) if key in extras.excluded_keys]
    return {"names": list(extras.excluded_names), "variables": indices}


def _replace_whole(target: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Under another name, to the disk, then renamed: at every moment ``target`` is the old file or the new one."""
    temporary = target.parent / f".fastadam-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb", buffering=0) as file:
            for part in parts:
                rest = memoryview(part)
                while rest:  # a write may be short: a full disk, or more than 2 GiB
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.replace(temporary, target)  # noqa: PTH105
        _sync_directory(target.parent)
    except OSError as error:
        raise OSError(error.errno, f"not saved: {error.strerror}", str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(
    classes: Sequence[type[Optimizer]],
    path: str | os.PathLike[str],
    variables: Iterable[Any],
    custom_objects: Mapping[str, Any] | None = None,
) -> tuple[Optimizer, dict[str, Any] | None]:
    """See ``Adam.load``: an optimizer of one of the classes, and what a LossScaleOptimizer added."""
    name = os.fsdecode(path)
    given = check_list("variables", variables)
    buffers = buffers_of(given, range(len(given)))
    safetensors = _safetensors()
    Path(name).open("rb").close()  # a missing file is an OSError that names it, not an invalid one
    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            reader = _Reader(name, file)
            return reader.read(classes, given, buffers, custom_objects), reader.loss_scale()
    except safetensors.SafetensorError as error:
        found = _format_of(name) or f"not a whole safetensors file ({error})"
        raise ValueError(f"{name}: {found}, expected one that `save` wrote") from error


def _format_of(path: str) -> str | None:
    """What a file of another format is, as far as its first bytes say so."""
    with Path(path).open("rb") as file:
        begin = file.read(8)
    if begin[2:] == bytes(6):  # of safetensors, whose first eight bytes are the size of a header
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
    """A file whose every part is checked against the variables before an optimizer is made of it."""

    def __init__(self, path: str, file: Any) -> None:
        self._path = path
        self._file = file
        self._header = self._read_header()
        self._checksums = self._read_checksums()

    def read(
        self,
        classes: Sequence[type[Optimizer]],
        variables: list[Any],
        buffers: list[_cpu.Buffer],
        custom_objects: Mapping[str, Any] | None,
    ) -> Optimizer:
        named = {cls.__name__: cls for cls in classes}
        saved_by = self._header["optimizer"]
        self._require(saved_by in named, f"state of {saved_by}", " or ".join(named))
        cls = named[saved_by]
        specs = self._match(buffers)
        optimizer = self._configured(cls, custom_objects)
        state = parts_of(optimizer).state
        state.calls[...] = self._iterations()
        self._fill(state.slots, specs, buffers)
        self._set_accumulating(optimizer)
        try:
            optimizer.build(variables)
        except ValueError as error:
            self._fail(str(error), "the variables it was saved with")
        self._require(not state.slots.waiting(), "as many variables as given, of which two are one", "others")
        self._exclude(optimizer, variables)
        return optimizer

    def loss_scale(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._header.get("loss_scale")  # files of version 0.1 have none
        return found

    def _set_accumulating(self, optimizer: Any) -> None:
        places = self._header.get("accumulating", [])  # files of version 0.1 have none
        options, state, _, _ = parts_of(optimizer)
        entries = dict(enumerate(state.entries))
        good = isinstance(places, list) and all(type(i) is int and i in entries for i in places)
        self._require(good, f"'accumulating' {places!r:.60}", "places of variables")
        state.restart_accumulation([entries[i] for i in places], options.calls_per_step)

    def _exclude(self, optimizer: Any, variables: list[Any]) -> None:
        excluded = self._header["excluded"]
        try:
            for name in excluded["names"]:
                re.compile(name)
            chosen = [dict(enumerate(variables))[i] for i in excluded["variables"]]
            optimizer.exclude_from_weight_decay(chosen, excluded["names"])
        except (TypeError, ValueError, LookupError, re.error) as error:
            self._fail(f"'excluded' {excluded!r:.60} ({error!r})", "patterns and places of variables")

    def _read_header(self) -> dict[str, Any]:
        text: Any = (self._file.metadata() or {}).get("fastadam")
        self._require(text is not None, "no metadata 'fastadam'", "a file that fastadam saved")
        checksum = self._file.metadata().get("fastadam_crc32")
        self._require(checksum == str(zlib.crc32(text.encode())), "metadata of another checksum", "it as it was saved")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._fail(f"metadata that is not JSON ({error})", "a file that fastadam saved")
        self._require(isinstance(header, dict), "metadata that is no object", "a file that fastadam saved")
        version = header.get("version")
        self._require(type(version) is int and version == _VERSION, f"format version {version!r}", str(_VERSION))
        for key, kind in _HEADER.items():
            self._require(isinstance(header.get(key), kind), f"'{key}' {header.get(key)!r:.60}", f"a {kind.__name__}")
        return dict(header)

    def _read_checksums(self) -> dict[str, int]:
        """The tensors in the order of ``weights``, all that the file has."""
        listed, found = self._header["weights"], sorted(self._file.keys())
        good = all(isinstance(item, list) and [type(part) for part in item] == [str, int] for item in listed)
        good = good and sorted(key for key, _ in listed) == found and listed[:1] != [] and listed[0][0] == _ITERATIONS
        self._require(good, f"tensors {found!s:.80}", f"{listed!s:.80}")
        return dict(listed)

    def _tensor(self, key: str) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = self._file.get_tensor(key)
        self._require(
            _crc32(array) == self._checksums[key], f"tensor '{key}' of another checksum", "it as it was saved"
        )
        return array

    def _match(self, buffers: list[_cpu.Buffer]) -> list[Spec]:
        specs = [self._spec(i, record) for i, record in enumerate(self._header["variables"])]
        self._require(len(specs) == len(buffers), f"state of {len(specs)} variables", f"{len(buffers)} like variables")
        for i, (spec, buffer) in enumerate(zip(specs, buffers, strict=True)):
            self._require(
                spec.admits(Spec.of(buffer)), f"variable {i} {spec}", f"{Spec.of(buffer)} like {buffer.label}"
            )
        return specs

    def _spec(self, i: int, record: Any) -> Spec:
        good = isinstance(record, dict) and set(record) == set(Spec._fields)
        good = good and isinstance(record["shape"], list) and all(type(n) is int for n in record["shape"])
        good = good and isinstance(record["dtype"], str) and record["order"] in ("C", "F")
        good = good and isinstance(record["name"], (str, type(None)))
        self._require(good, f"variable {i} {record!r:.60}", "its shape, dtype, order and name")
        return Spec(**{**record, "shape": tuple(record["shape"])})

    def _configured(self, cls: type[Optimizer], custom_objects: Mapping[str, Any] | None) -> Optimizer:
        make: Any = cls
        try:
            optimizer: Optimizer = make.from_config(self._header["config"], custom_objects)
        except Exception as error:  # of a class in custom_objects, too
            raise ValueError(f"{self._path}: config that {cls.__name__} refuses ({error})") from error
        return optimizer

    def _iterations(self) -> int:
        self._check_tensor(_ITERATIONS, (), "I64")
        try:
            return check_iterations(_ITERATIONS, self._tensor(_ITERATIONS))
        except ValueError as error:
            self._fail(str(error), "a count of steps")

    def _fill(self, store: SlotStore, specs: list[Spec], buffers: list[_cpu.Buffer]) -> None:
        """Lay every tensor out for its variable, one at a time, in the order of ``weights``."""
        keys = list(self._checksums)
        slots: list[dict[str, int]] = [{} for _ in specs]
        homes = {key: self._home(key, slots) for key in keys[1:]}
        for key, (i, _) in homes.items():
            self._check_tensor(key, specs[i].shape, _DTYPES[buffers[i].state_dtype])
        for at, (key, (i, name)) in enumerate(homes.items()):
            slots[i][name] = at
            store.arrays.append(copy_beside(self._tensor(key), buffers[i]))
        store.names = list(dict.fromkeys(name for _, name in homes.values()))
        for spec, places in zip(specs, slots, strict=True):
            store.add_waiting(Entry(spec, places))

    def _home(self, key: str, slots: list[dict[str, int]]) -> tuple[int, str]:
        index, slash, name = key.partition("/")
        good = index.isascii() and index.isdigit() and len(index) < 10 and bool(slash and name)
        good = good and str(int(index)) == index and int(index) < len(slots)
        self._require(good, f"tensor '{key:.60}'", f"'<variable>/<slot>' of {len(slots)} variables")
        return int(index), name

    def _check_tensor(self, key: str, shape: tuple[int, ...], dtype: str) -> None:
        lies = self._file.get_slice(key)
        found = (tuple(lies.get_shape()), lies.get_dtype())
        self._require(found == (shape, dtype), f"tensor '{key}' {found[1]} {found[0]}", f"{dtype} {shape}")

    def _require(self, condition: bool, found: str, expected: str) -> None:
        if not condition:
            self._fail(found, expected)

    def _fail(self, found: str, expected: str) -> NoReturn:
        raise ValueError(f"{self._path}: {found}, expected {expected}")


_OTHER_SUFFIXES = (
    *(".npy", ".npz", ".mat"),
    *(".pt", ".pth", ".bin", ".ckpt", ".onnx"),
    *(".h5", ".hdf5", ".keras", ".index", ".msgpack"),
    *(".pkl", ".pickle", ".joblib"),
    *(".json", ".yaml", ".txt", ".csv"),
    *(".zip", ".gz", ".tar"),
)
_MAGIC = {
    b"PK\x03\x04": "a zip archive (of NumPy, PyTorch or Keras: .npz, .pt, .keras)",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF\r\n\x1a\n": "HDF5 (.h5)",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
    b"\x1f\x8b": "gzip",
    b"{": "JSON",
}
_HEADER: dict[str, type] = {"optimizer": str, "config": dict, "variables": list, "weights": list, "excluded": dict}


def _safetensors() -> Any:
    require("safetensors", "loading a saved optimizer")
    import safetensors.numpy

    return safetensors
