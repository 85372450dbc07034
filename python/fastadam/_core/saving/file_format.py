"""What a saved optimizer consists of: a safetensors file of slots, with a description in its metadata."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Set
from typing import NamedTuple

from fastadam._core.common.checks import check_list
from fastadam._core.common.types import HostArray
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import LOW, SCALES

__all__ = [
    "ACCUMULATED",
    "ALPHAS",
    "DTYPES",
    "HAD",
    "ITEM_SIZES",
    "ITERATIONS",
    "KEEPS",
    "MAX_HEADER",
    "ROWS",
    "VALUE",
    "VERSION",
    "Tensor",
    "check_paths",
    "lacking_in",
    "path_of",
]

VERSION = 3  # 1: without "moments", "block" and "numbers", all moments in full. 2: without "values" and "chain"
MAX_HEADER = 2**25  # bytes, which some 70,000 variables need; one that is longer is neither written nor read
ITERATIONS = "iterations"
VALUE = "value/"  # begins the name of the values of a variable: "value/0"; its slots are "0/m", "0/v", ...
ACCUMULATED = "accumulated_rows/"  # the rows outside of which an accumulator is zero, in the middle of a cycle
ROWS = "rows/"  # of a table in a delta: which rows the file has
HAD = "had/"  # how many steps since the base each of them has had
ALPHAS, KEEPS = "alphas/", "keeps/"  # the rates of the steps since the last file
DTYPES = {
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "uint8": "U8",
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}
ITEM_SIZES = {"I64": 8, "I32": 4, "I16": 2, "U8": 1, "F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Tensor(NamedTuple):
    """What a tensor of a file consists of."""

    dtype: str  # in the words of safetensors
    shape: tuple[int, ...]

    @classmethod
    def like(cls, array: HostArray) -> Tensor:
        """One that holds this array."""
        return cls(DTYPES[str(array.dtype)], tuple(array.shape))

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def lacking_in(slots: Set[str], *, accumulates: bool, has_codes: bool = False) -> list[str]:
    """What a variable with one of these slots must have beside it; "vhat" and "average" may be switched on later."""
    together = {"m", "v", *([ACCUMULATOR] if accumulates else []), *(SCALES if has_codes else ())}
    return sorted(together - slots) if slots & {*together, *SCALES, LOW, "vhat", "average"} else []


def check_paths(argument: str, paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The names of files in a list."""
    return [path_of(path, f"{argument}[{i}]") for i, path in enumerate(check_list(argument, paths))]


def path_of(path: str | os.PathLike[str], argument: str = "path") -> str:
    """The name of a file."""
    try:
        name = os.fsdecode(path)
    except TypeError as error:
        raise TypeError(f"{argument}: {type(path).__name__}, expected a string or a path") from error
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError(f"{argument}: {name!r:.200}, expected characters that the name of a file can have") from None
    if not name or "\0" in name:
        raise ValueError(
            f"{argument}: {name!r:.200}, expected the name of a file" + (", without null characters" * bool(name))
        )
    return name
