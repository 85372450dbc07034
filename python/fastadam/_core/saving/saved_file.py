"""A file that ``save`` wrote: its description and its tensors, with their checksums."""

from __future__ import annotations

import json
import zlib
from typing import NoReturn

from fastadam._core.common.types import Config, Foreign, HostArray
from fastadam._core.saving.file_format import ITERATIONS, VERSION, crc32

__all__ = ["SavedFile"]

_HEADER: dict[str, type] = {"optimizer": str, "config": dict, "variables": list, "weights": list, "excluded": dict}


class SavedFile:
    """Every part is checked when it is read; a ValueError names the file."""

    def __init__(self, path: str, file: Foreign) -> None:
        self.path = path
        self._file = file
        self.header = self._read_header()
        self.checksums = self._read_checksums()  # of all tensors, in the order of ``weights``

    def _read_header(self) -> Config:
        text = (self._file.metadata() or {}).get("fastadam")
        if text is None:
            self.fail("no metadata 'fastadam'", "a file that fastadam saved")
        checksum = self._file.metadata().get("fastadam_crc32")
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
        listed, keys = self.header["weights"], sorted(self._file.keys())
        good = all(isinstance(item, list) and [type(part) for part in item] == [str, int] for item in listed)
        good = good and sorted(key for key, _ in listed) == keys and listed[:1] != [] and listed[0][0] == ITERATIONS
        self.require(good, f"tensors {keys!s:.80}", f"{listed!s:.80}")
        return dict(listed)

    def tensor(self, key: str) -> HostArray:
        """One tensor, whose checksum is compared."""
        array: HostArray = self._file.get_tensor(key)
        is_intact = crc32(array) == self.checksums[key]
        self.require(is_intact, f"damaged: the checksum of tensor '{key}' differs", "the saved one")
        return array

    def check_tensor(self, key: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise unless a tensor has this shape, and this dtype in the words of safetensors."""
        tensor = self._file.get_slice(key)
        actual_shape, actual_dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        good = (actual_shape, actual_dtype) == (shape, dtype)
        self.require(good, f"tensor '{key}' {actual_dtype} {actual_shape}", f"{dtype} {shape}")

    def require(self, condition: bool, actual: str, expected: str) -> None:
        """Raise unless the condition holds."""
        if not condition:
            self.fail(actual, expected)

    def fail(self, actual: str, expected: str) -> NoReturn:
        """Raise what is wrong with the file."""
        raise ValueError(f"{self.path}: {actual}, expected {expected}")
