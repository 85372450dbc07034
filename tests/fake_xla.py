"""Imported, or as a plugin of pytest: steps of JAX are made by the handlers of CUDA devices, on the fake runtime."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

import fastadam._jax

_get = ctypes.pythonapi.PyCapsule_GetPointer
_get.restype, _get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _replace_handlers(path):
    """With those of tests/native/fake_xla.cpp, which stand between."""
    spec = importlib.util.spec_from_file_location("fastadam._jax_cuda", path)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    library = ctypes.CDLL(path)
    library.fake_cuda_log.restype = ctypes.c_int64
    for i, name in enumerate(("dense", "sparse")):
        handler = getattr(native, f"{name}_handler")()
        library.fake_xla_set(i, ctypes.c_void_p(_get(handler, None)))
        capsule = _new(ctypes.cast(getattr(library, f"fake_xla_{name}"), ctypes.c_void_p).value, None, None)
        setattr(fastadam._jax, f"{name}_handler", lambda capsule=capsule: capsule)
    return library


runtime = _replace_handlers(os.environ["FASTADAM_FAKE_JAX_CUDA"])


def calls(name):
    """How often the runtime was called by this name."""
    text = ctypes.create_string_buffer(runtime.fake_cuda_log(None, ctypes.c_int64(0)) + 1)
    runtime.fake_cuda_log(text, ctypes.c_int64(len(text) - 1))
    return sum(line.split(" ")[0] == name for line in text.value.decode().splitlines())


def pytest_itemcollected(item):
    """Programs that a test runs begin with this module, too."""
    code = getattr(item.module, "SHARDED", None)
    if code is not None and "fake_xla" not in code:
        here = str(Path(__file__).parent)
        item.module.SHARDED = f"import sys\nsys.path.insert(0, {here!r})\nimport fake_xla\n{code}"


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{calls('cudaLaunchKernelEx')} launches")
