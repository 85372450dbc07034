"""The compiled extension, and the environment variables that are read when it is first imported."""

from __future__ import annotations

import contextlib
import os

try:
    from fastadam import _cpu
except ImportError as error:
    raise ImportError(
        f"fastadam: its compiled extension fastadam._cpu is missing or does not load ({error}). "
        "Install the package with `pip install .` in its source tree (a C++17 compiler is all it needs), "
        "with the same Python that imports it."
    ) from error

__all__ = ["_cpu", "parse_thread_count"]


def parse_thread_count(count: object, name: str) -> int:
    """An int >= 1 from an integer or a string; the ValueError names the argument."""
    try:
        threads = int(count) if isinstance(count, str) else count.__index__()  # type: ignore[attr-defined]
    except (ValueError, AttributeError):
        threads = 0
    if not 1 <= threads <= 65536 or isinstance(count, bool):
        raise ValueError(f"{name}: {count!r}, expected an integer from 1 to 65536")
    return int(threads)


def _read_environment() -> None:
    isa = os.environ.get("FASTADAM_ISA")
    if isa:
        try:
            _cpu.set_isa(isa)
        except ValueError as error:
            raise ValueError(f"environment variable FASTADAM_ISA: {error}") from None
    threads = os.environ.get("FASTADAM_NUM_THREADS")
    if threads:
        _cpu.set_num_threads(parse_thread_count(threads, "environment variable FASTADAM_NUM_THREADS"))
    elif openmp_threads := os.environ.get("OMP_NUM_THREADS"):
        # In a list such as "4,2" for nested regions the first number counts. OpenMP reports invalid values itself.
        with contextlib.suppress(ValueError):
            _cpu.set_num_threads(parse_thread_count(openmp_threads.split(",")[0], "OMP_NUM_THREADS"))


_read_environment()
