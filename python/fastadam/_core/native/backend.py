"""The compiled extension, and the environment variables that are read when it is first imported."""

from __future__ import annotations

import contextlib
import os


def _require_main_interpreter() -> None:
    try:
        import _interpreters as interpreters  # type: ignore[import-not-found]  # Python 3.13
    except ImportError:
        try:
            import _xxsubinterpreters as interpreters  # type: ignore[import-not-found]
        except ImportError:
            return
    if interpreters.get_current() != interpreters.get_main():
        raise ImportError(
            "fastadam: imported in a subinterpreter, expected the main interpreter, or a process of its own "
            "(multiprocessing): its compiled extension does not support subinterpreters."
        )


_require_main_interpreter()  # where the extension would hang

try:
    from fastadam import _cpu
except ImportError as error:
    raise ImportError(
        f"fastadam: its compiled extension fastadam._cpu is missing or does not load ({error}). "
        "Install the package with `pip install .` in its source tree (a C++17 compiler is all it needs), "
        "with the same Python that imports it."
    ) from error

__all__ = ["__version__", "_cpu", "parse_thread_count", "select_isa"]

__version__: str = _cpu.__version__


def parse_thread_count(count: object, name: str) -> int:
    """An int from 1 to the limit of the library, from an integer or a string; the ValueError names the argument."""
    try:
        threads = int(count) if isinstance(count, str) else count.__index__()  # type: ignore[attr-defined]
    except (ValueError, AttributeError, TypeError):  # arrays of several have an __index__, too
        threads = 0
    if not 1 <= threads <= _cpu.most_threads or isinstance(count, bool):
        from fastadam._core.common.checks import shown  # imports NumPy

        raise ValueError(f"{name}: {shown(count)}, expected an integer from 1 to {_cpu.most_threads}")
    return int(threads)


def select_isa(name: str) -> None:
    """Set the instruction set of the process; the ValueError lists those that there are."""
    # Escaped, a lone surrogate can be passed on, and a null character does not end the name.
    _cpu.set_isa(name if name.isascii() and name.isprintable() else ascii(name)[1:-1])


def _read_environment() -> None:
    isa = os.environ.get("FASTADAM_ISA")
    if isa:
        try:
            select_isa(isa)
        except ValueError as error:
            raise ValueError(f"environment variable FASTADAM_ISA: {error}") from None
    threads = os.environ.get("FASTADAM_NUM_THREADS")
    if threads:
        _cpu.set_num_threads(parse_thread_count(threads, "environment variable FASTADAM_NUM_THREADS"))
    elif openmp_threads := os.environ.get("OMP_NUM_THREADS"):
        # In a list such as "4,2" for nested regions the first number counts. OpenMP reports invalid values itself, and
        # may allow more threads.
        with contextlib.suppress(ValueError):
            count = min(int(openmp_threads.split(",")[0]), _cpu.most_threads)
            _cpu.set_num_threads(parse_thread_count(count, "OMP_NUM_THREADS"))


_read_environment()
