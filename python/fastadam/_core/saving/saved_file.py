"""A file that ``save`` wrote: its description and its tensors, with their checksums."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from fastadam._core.common.files import require_regular
from fastadam._core.common.frameworks import require
from fastadam._core.common.types import Config, HostArray
from fastadam._core.deferred.chain import Link
from fastadam._core.native.chunks import CHUNK, Bytes
from fastadam._core.saving.file_format import DTYPES, ITERATIONS, MAX_HEADER, VERSION, Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SavedFile"]

_HEADER: dict[str, type] = {"optimizer": str, "config": dict, "variables": list, "weights": list, "excluded": dict}
_MAGIC = {
    b"PK\x03\x04": "a zip archive (.npz of NumPy, .pt of PyTorch, .keras of Keras)",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF\r\n\x1a\n": "HDF5 (.h5)",
    **{bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)},
    b"\x1f\x8b": "gzip",
    b"{": "JSON",
}


_NAMES = {code: name for name, code in DTYPES.items()}


class _File(io.FileIO):
    """A file that is closed without a warning if Ctrl-C comes before anyone can close it."""

    __del__ = io.FileIO.close  # native, so that no signal handler runs in it

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # it never returns None
        try:
            return super().readinto(buffer)
        except OSError as error:
            error.filename = self.name
            raise


class SavedFile:
    """Every part is checked when it is read; a ValueError names the file.

    Args:
        path: The file.
        label: What messages call it.
    """

    def __init__(self, path: str, label: str | None = None) -> None:
        self.path = path
        self.label = label or path
        safetensors = _safetensors()
        require_regular(path)
        self._file = _File(path)
        try:
            while True:
                self._check_header_size()
                try:
                    with safetensors.safe_open(path, framework="numpy") as file:
                        metadata = file.metadata() or {}
                except safetensors.SafetensorError as error:
                    actual = _format_of(path) or f"not a complete safetensors file ({error})"
                    self.fail(actual, "a file that `save` wrote")
                if os.path.samestat(os.stat(path), os.fstat(self._file.fileno())):  # noqa: PTH116
                    break
                self._file.close()  # another file has taken its place meanwhile
                self._file = _File(path)
            self._places = self._read_places()
            self.header = self._read_header(metadata)
            self.checksums = self._read_checksums()  # of all tensors, in the order of ``weights``
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be read from now on."""
        self._file.close()

    # ---- what it says ----------------------------------------------------------------------------------------------

    def _check_header_size(self) -> None:
        """Raise before a header is read that is longer than one that `save` writes; other files fail later."""
        size = self._header_size()
        if MAX_HEADER < size <= os.fstat(self._file.fileno()).st_size:
            self.fail(f"a header of {size} bytes", f"at most {MAX_HEADER}")

    def _header_size(self) -> int:
        """Bytes of the header, or another number if there is none."""
        begin = bytearray(8)
        self._file.seek(0)
        self._file.readinto(memoryview(begin))
        return int.from_bytes(begin, "little")

    def _read_places(self) -> dict[str, tuple[Tensor, int]]:
        """What the tensors are and where they begin, from a header that the library has found good."""
        size = self._header_size()
        header = json.loads(self._exactly(8, size).tobytes())
        return {
            key: (Tensor(record["dtype"], tuple(record["shape"])), 8 + size + record["data_offsets"][0])
            for key, record in header.items()
            if key != "__metadata__"
        }

    def _read_header(self, metadata: Config) -> Config:
        text = metadata.get("fastadam")
        if text is None:
            self.fail("no metadata 'fastadam'", "a file that fastadam saved")
        checksum = metadata.get("fastadam_crc32")
        self.require(
            checksum == str(zlib.crc32(text.encode())), "damaged: the metadata's checksum differs", "the saved one"
        )
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.fail(f"metadata that is not JSON ({error})", "a file that fastadam saved")
        self.require(isinstance(header, dict), "metadata that is not an object", "a file that fastadam saved")
        version = header.get("version")
        self.require(type(version) is int and 1 <= version <= VERSION, f"format version {version!r}", f"1 to {VERSION}")
        for key, kind in _HEADER.items():
            self.require(isinstance(header.get(key), kind), f"'{key}' {header.get(key)!r:.60}", f"a {kind.__name__}")
        return dict(header)

    def _read_checksums(self) -> dict[str, int]:
        listed, keys = self.header["weights"], sorted(self._places)
        good = all(isinstance(item, list) and [type(part) for part in item] == [str, int] for item in listed)
        good = good and sorted(key for key, _ in listed) == keys and listed[:1] != [] and listed[0][0] == ITERATIONS
        self.require(good, f"tensors {keys!s:.80}", f"{listed!s:.80}")
        return dict(listed)

    @property
    def link(self) -> Link | None:
        """The place of the file in a chain; None if it belongs to none."""
        record = self.header.get("chain")
        if record is None:
            return None
        good = isinstance(record, dict) and set(record) == {*Link._fields, "previous"}
        good = good and type(record["number"]) is int and record["number"] >= 0
        good = good and isinstance(record["base"], str) and isinstance(record["id"], str)
        good = good and isinstance(record["previous"], (str, type(None)))
        self.require(good, f"'chain' {record!r:.60}", "the ids of this file and those before it")
        return Link(record["base"], record["id"], record["number"])

    @property
    def previous(self) -> str | None:
        """The id of the file that a delta follows; None for a file that can be loaded alone."""
        return None if self.link is None else self.header["chain"]["previous"]

    def has_rows_of(self, index: int) -> bool:
        """Whether it has only some rows of this variable."""
        tables = self.header.get("tables", {})
        self.require(isinstance(tables, dict), f"'tables' {tables!r:.60}", "a dict")
        return str(index) in tables

    def tensor_of(self, key: str) -> Tensor:
        """What this tensor consists of."""
        self.require(key in self._places, f"no tensor '{key}'", "one of that name")
        return self._places[key][0]

    def holds(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in self._places

    def check_tensor(self, key: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise unless a tensor has this shape, and this dtype in the words of safetensors."""
        tensor = self.tensor_of(key)
        self.require(tensor == (dtype, shape), f"tensor '{key}' {tensor.dtype} {tensor.shape}", f"{dtype} {shape}")

    # ---- tensors ---------------------------------------------------------------------------------------------------

    def check_checksum(self, key: str) -> None:
        """Raise if a tensor is not as it was written."""
        checksum = 0
        for piece in self.pieces(key):
            checksum = zlib.crc32(piece.data, checksum)
        is_intact = checksum == self.checksums[key]
        self.require(is_intact, f"damaged: the checksum of tensor '{key}' differs", "the saved one")

    def pieces(self, key: str) -> Iterator[Bytes]:
        """The bytes of a tensor, at most ``CHUNK`` at a time."""
        read, left = self.reader_of(key), self._places[key][0].nbytes
        while left:
            yield read(min(left, CHUNK))
            left -= min(left, CHUNK)

    def reader_of(self, key: str) -> Callable[[int], Bytes]:
        """A function that returns the next bytes of a tensor, so many of them."""
        place = self._places[key][1]

        def read(count: int) -> Bytes:
            nonlocal place
            place += count
            return self._exactly(place - count, count)

        return read

    def tensor(self, key: str) -> HostArray:
        """All of a tensor."""
        tensor = self._places[key][0]
        name = _NAMES[tensor.dtype]
        if name == "bfloat16":
            import ml_dtypes  # noqa: F401  # registers the dtype
        data = self.reader_of(key)(tensor.nbytes)
        array: HostArray = data.view(name).reshape(tensor.shape)
        return array

    def _exactly(self, begin: int, count: int) -> Bytes:
        data = np.empty(count, np.uint8)
        rest = data.data
        self._file.seek(begin)
        while rest:
            done = self._file.readinto(rest)
            if not done:
                self.fail(f"ends at byte {begin + count - len(rest)}, though it was longer", "a file that nobody cuts")
            rest = rest[done:]
        return data

    # ---- errors ----------------------------------------------------------------------------------------------------

    def require(self, condition: bool, actual: str, expected: str) -> None:
        """Raise unless the condition holds."""
        if not condition:
            self.fail(actual, expected)

    def fail(self, actual: str, expected: str) -> NoReturn:
        """Raise what is wrong with the file."""
        raise ValueError(f"{self.label}: {actual}, expected {expected}")


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


def _safetensors() -> ModuleType:
    require("safetensors", "loading a saved optimizer")
    import safetensors.numpy

    return safetensors
