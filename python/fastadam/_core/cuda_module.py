"""The extension module of the CUDA kernels, which this build may lack and this machine may have no GPU for."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastadam._core.backend import _cpu

__all__ = ["cuda_module", "why_not"]


def cuda_module() -> ModuleType:
    """The extension module, once it is known that a GPU can be used; imported when the first array on one comes.

    Raises:
        RuntimeError: One sentence that says what is missing.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"fastadam: no array on a GPU can be updated here: {reason}")
    return importlib.import_module("fastadam._cuda")


def why_not() -> str | None:
    """Why CUDA cannot be used; None if it can."""
    try:
        _cuda = importlib.import_module("fastadam._cuda")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error)
        if not missing:
            return f"the CUDA kernels do not load ({error})"
        return f"the CUDA kernels are {_cpu.cuda_build}"
    count, reason = _cuda.device_count()
    return None if count else f"{reason} (is an NVIDIA driver installed, and a GPU visible?)"
