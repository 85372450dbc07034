"""The extension module with the CUDA kernels, if this build has it and the machine has a GPU."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastadam._core.native.backend import _cpu

__all__ = ["cuda_module", "why_not"]


def cuda_module() -> ModuleType:
    """Import the extension module, when the first array on a GPU appears.

    Raises:
        RuntimeError: No GPU can be used; the message says what is missing.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"fastadam: arrays on a GPU cannot be updated here: {reason}")
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


def late_error(message: str, which: str) -> ValueError:
    """The error for a step that a GPU refused after the call had returned; it and all later ones did nothing."""
    return ValueError(
        f"{message}; found on the GPU after the call had returned: {which} and those since then have changed nothing"
    )
