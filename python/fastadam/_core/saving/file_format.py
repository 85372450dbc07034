"""What a saved optimizer consists of: a safetensors file of slots, with a description in its metadata."""

from __future__ import annotations

import os
import zlib
from collections.abc import Set

import numpy as np

from fastadam._core.common.types import HostArray
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import LOW, SCALES

__all__ = ["DTYPES", "ITERATIONS", "VERSION", "crc32", "lacking_in", "memory_of", "path_of"]

VERSION = 2  # 1: without "moments", "block" and "numbers", all moments in full
ITERATIONS = "iterations"
DTYPES = {"int64": "I64", "float32": "F32", "float64": "F64", "bfloat16": "BF16", "uint8": "U8", "int16": "I16"}


def lacking_in(slots: Set[str], *, accumulates: bool, has_codes: bool = False) -> list[str]:
    """What a variable with one of these slots must have beside it; "vhat" and "average" may be switched on later."""
    together = {"m", "v", *([ACCUMULATOR] if accumulates else []), *(SCALES if has_codes else ())}
    return sorted(together - slots) if slots & {*together, *SCALES, LOW, "vhat", "average"} else []


def crc32(array: HostArray) -> int:
    return zlib.crc32(memory_of(array))


def memory_of(array: HostArray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def path_of(path: str | os.PathLike[str]) -> str:
    try:
        name = os.fsdecode(path)
    except TypeError as error:
        raise TypeError(f"path: {type(path).__name__}, expected a string or a path") from error
    if not name or "\0" in name:
        raise ValueError(
            f"path: {name!r:.200}, expected the name of a file" + (", without null characters" * bool(name))
        )
    return name
