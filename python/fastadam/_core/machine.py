"""What this build and machine support, and the two settings of the process: instruction set and threads."""

from __future__ import annotations

import platform

import numpy as np

from fastadam._core.native.backend import _cpu, parse_thread_count, select_isa
from fastadam._core.native.gpu import why_not

__all__ = ["current_isa", "get_num_threads", "isas", "set_isa", "set_num_threads", "show_config"]


def isas() -> list[str]:
    """Names of the instruction sets that this build has and this CPU runs, from the baseline to the widest.

    The last one is the default; :func:`set_isa` or ``FASTADAM_ISA`` selects another. All give the same bits.

    >>> import fastadam
    >>> len(fastadam.isas()) >= 1
    True
    """
    return [name for name, usable in _cpu.compiled_isas() if usable]


def current_isa() -> str:
    """The instruction set in use, one of :func:`isas`.

    >>> import fastadam
    >>> fastadam.current_isa() in fastadam.isas()
    True
    """
    return _cpu.current_isa()


def set_isa(name: str) -> None:
    """Select an instruction set for the whole process, as the environment variable ``FASTADAM_ISA`` does.

    Args:
        name: One of :func:`isas`.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: This build or this CPU does not have the instruction set; the setting is unchanged.

    >>> import fastadam
    >>> fastadam.set_isa(fastadam.isas()[-1])
    """
    if not isinstance(name, str):
        raise TypeError(f"isa: {type(name).__name__}, expected one of {isas()}")
    select_isa(name)


def get_num_threads() -> int:
    """The maximum number of threads of a step.

    >>> import fastadam
    >>> fastadam.get_num_threads() >= 1
    True
    """
    return _cpu.num_threads()


def set_num_threads(count: int | None) -> None:
    """Set the maximum number of threads of a step for the whole process. Results do not depend on it.

    Args:
        count: The number of threads, at most 1024, which then exist until the process ends. None restores the default:
            ``FASTADAM_NUM_THREADS`` if it was set at import, else ``OMP_NUM_THREADS`` (1024 if that is more), else the
            number of CPUs that this process may use.

    Raises:
        ValueError: ``count`` is not an integer from 1 to 1024.

    >>> import fastadam
    >>> fastadam.set_num_threads(2)
    >>> fastadam.get_num_threads()
    2
    >>> fastadam.set_num_threads(None)
    """
    if isinstance(count, str):
        raise ValueError(f"count: {count!r}, expected an integer from 1 to {_cpu.most_threads}")
    _cpu.set_num_threads(_DEFAULT_THREADS if count is None else parse_thread_count(count, "count"))


_DEFAULT_THREADS = _cpu.requested_threads()


def show_config() -> None:
    """Print the facts for a bug report: versions, instruction sets, threads, CUDA."""
    compiled = ", ".join(name if usable else f"{name} (not on this CPU)" for name, usable in _cpu.compiled_isas())
    rows = {
        "fastadam": _cpu.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "numpy": np.__version__,
        "compiler": _cpu.compiler,
        "isas": compiled,
        "isa in use": current_isa(),
        "threads": str(get_num_threads()),
        "cuda": why_not() or f"available, built by {_cpu.cuda_build}",
    }
    for label, value in rows.items():
        print(f"{label:<12}{value}")
