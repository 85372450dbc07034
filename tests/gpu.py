"""A GPU for tests: a real one with CuPy, or the CUDA extension on the runtime that tests/native/fake_cuda fakes.

Both put their work on a stream that is not the default one.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import re
import sys

import fastadam
import numpy as np
import pytest
from compiled import build
from fastadam._core.native.gpu import cuda_module, why_not


def build_fake(name):
    """The path of an extension, its kernels compiled for the CPU."""
    options = {"FASTADAM_FAKE_CUDA": "ON", "FASTADAM_CUDA": "OFF"}
    options |= {"CMAKE_BUILD_TYPE": "Debug", "CMAKE_CXX_FLAGS_DEBUG": "-O1"}
    options |= {
        "pybind11_DIR": importlib.import_module("pybind11").get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    return next(build("fake-cuda", name, **options).glob(f"{name}.*so"))


class FakeGpu:
    """Control of the fake runtime: memory that only its work may touch, streams, captures, faults, a log of calls."""

    name = "fake"

    def __init__(self, path):
        spec = importlib.util.spec_from_file_location("fastadam._cuda", path)
        self.native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.native)
        self.runtime = ctypes.CDLL(os.fspath(path))
        for name in ("allocate", "stream"):
            getattr(self.runtime, f"fake_cuda_{name}").restype = ctypes.c_void_p
        for name in ("log", "end_capture", "queued"):
            getattr(self.runtime, f"fake_cuda_{name}").restype = ctypes.c_int64

    def start(self):
        gc.collect()  # arrays of tests before: a launch is the slower the more there are
        self.runtime.fake_cuda_reset()
        self.stream = self.new_stream()

    def use_new_stream(self):
        self.stream = self.new_stream()

    def replace_stream(self):
        """By another at its address, as a driver may after it is destroyed, while its work is still queued."""
        self.runtime.fake_cuda_replace_stream(ctypes.c_void_p(self.stream))

    def new_stream(self, device=0):
        return int(self.runtime.fake_cuda_stream(device))

    def array(self, values, **options):
        return FakeArray(self, np.asarray(values), **options)

    def get(self, array):
        return array.get()

    def calls(self, name=""):
        """The calls of the runtime since the last `clear_log`, as lists [name, device, stream, detail]."""
        size = self.runtime.fake_cuda_log(None, ctypes.c_int64(0))
        text = ctypes.create_string_buffer(size + 1)
        self.runtime.fake_cuda_log(text, ctypes.c_int64(size))
        return [line.split(" ") for line in text.raw[:size].decode().splitlines() if line.startswith(name)]

    def clear_log(self):
        self.runtime.fake_cuda_clear_log()

    def set_devices(self, count, error=0):
        self.runtime.fake_cuda_set_devices(count, error)

    def fail(self, function, error):
        self.runtime.fake_cuda_fail(function.encode(), error)

    def watch_the_gil(self):
        """From here on `calls` has "locked" in calls that wait for the GPU and hold the GIL."""
        self.runtime.fake_cuda_watch_waits(ctypes.cast(ctypes.pythonapi.PyGILState_Check, ctypes.c_void_p))

    def begin_capture(self):
        assert self.runtime.fake_cuda_begin_capture(ctypes.c_void_p(self.stream)) == 0

    def end_capture(self):
        return self.runtime.fake_cuda_end_capture(ctypes.c_void_p(self.stream))

    def replay(self, graph):
        assert self.runtime.fake_cuda_launch_graph(ctypes.c_int64(graph), ctypes.c_void_p(self.stream)) == 0


class FakeArray:
    """What a library of GPU arrays would export: nothing but ``__cuda_array_interface__``."""

    def __init__(self, gpu, host, device=0, managed=False, stream=None, writable=True, offset=0):
        self._gpu, self._stream, self._writable = gpu, stream, writable
        self.dtype, self.shape, self._strides = host.dtype, host.shape, host.strides
        order = "F" if host.flags.f_contiguous and not host.flags.c_contiguous else "C"
        self._packed = host.flags.forc
        data = host.tobytes(order)
        self._base = int(gpu.runtime.fake_cuda_allocate(ctypes.c_int64(len(data) + offset + 1), device, int(managed)))
        self.address = self._base + offset
        self._size = len(data)
        gpu.runtime.fake_cuda_write(ctypes.c_void_p(self.address), data, ctypes.c_int64(len(data)))

    def __del__(self):
        self._gpu.runtime.fake_cuda_free(ctypes.c_void_p(self._base))

    @property
    def __cuda_array_interface__(self):
        typestr = "<V2" if self.dtype.name == "bfloat16" else self.dtype.str
        address = self.address if self._size else 0
        interface = {"shape": self.shape, "typestr": typestr, "data": (address, not self._writable), "version": 3}
        interface["strides"] = self._strides
        interface["stream"] = self._gpu.stream if self._stream is None else self._stream
        return interface

    def get(self):
        assert self._packed
        data = ctypes.create_string_buffer(self._size)
        self._gpu.runtime.fake_cuda_read(data, ctypes.c_void_p(self.address), ctypes.c_int64(self._size))
        flat = np.frombuffer(data.raw[: self._size], self.dtype)
        order = "C" if self._strides == np.empty(self.shape, self.dtype).strides else "F"
        return flat.reshape(self.shape, order=order)


class RealGpu:
    """CuPy's arrays, on a stream of CuPy's."""

    name = "real"

    def __init__(self):
        self.cupy = importlib.import_module("cupy")
        self.native = cuda_module()

    def start(self):
        self._copies = self.cupy.cuda.Stream(non_blocking=True)
        self._kept = []  # streams and arrays: CuPy would give the memory of work that is queued to work that is not ordered
        self.use_new_stream()

    def use_new_stream(self):
        self.cupy_stream = self.cupy.cuda.Stream(non_blocking=True)
        self._kept.append(self.cupy_stream)
        self.cupy_stream.use()
        self.stream = self.cupy_stream.ptr

    def stop(self):
        """Free what CuPy keeps for later: other libraries need the memory."""
        self.cupy.cuda.Stream.null.use()
        self.cupy.cuda.runtime.deviceSynchronize()
        self._kept.clear()
        gc.collect()
        self.cupy.get_default_memory_pool().free_all_blocks()

    def array(self, values):
        values = np.asarray(values)
        if values.dtype.name == "bfloat16" and int(self.cupy.__version__.split(".")[0]) < 14:
            pytest.skip("needs CuPy 14, the first with bfloat16")
        order = "F" if values.flags.f_contiguous and values.ndim > 1 else "C"
        self._copies.use()  # other streams go on meanwhile, and find the values whichever they are
        try:
            self._kept.append(self.cupy.asarray(values, order=order))
            self._copies.synchronize()
        finally:
            self.cupy_stream.use()
        return self._kept[-1]

    def get(self, array):
        return array.get()

    def begin_capture(self):
        self.cupy_stream.begin_capture()

    def end_capture(self):
        return self.cupy_stream.end_capture()

    def replay(self, graph):
        graph.launch(self.cupy_stream)


def asks_for_gpu(config):
    """Whether this run has been told, by ``-m gpu``, that there is a GPU."""
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr or "") is not None


def skip_or_fail(config, reason):
    """Skip; but with ``-m gpu`` fail, or a run in which nothing ran would look like one that passed."""
    (pytest.fail if asks_for_gpu(config) else pytest.skip)(reason)


def real_or_skip(config):
    if not fastadam.cuda.is_available():
        skip_or_fail(config, f"needs a GPU: {why_not()}")
    if importlib.util.find_spec("cupy") is None:
        skip_or_fail(config, "needs CuPy, which brings the arrays of a GPU")
    return RealGpu()
