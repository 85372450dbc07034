"""The same tensors given to the C interface for the CPU and, on a GPU, to the one for CUDA."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
from cases import number_bits
from test_c_interface import ABI, Hyper, List, Tensor, option

DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
OK, INVALID, NOT_FINITE, CUDA_ERROR = 0, 1, 3, 4
POINTER, INT, BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
SIGNATURES = {
    "fastadam_step": [POINTER, POINTER, BOOL],
    "fastadam_accumulate": [POINTER, BOOL, BOOL],
    "fastadam_sort_rows": [POINTER, BOOL, INT, INT, INT, POINTER, POINTER, POINTER],
    "fastadam_sum_rows": [POINTER, POINTER],
    "fastadam_sum_squares": [POINTER, POINTER],
    "fastadam_norm": [POINTER, POINTER],
    "fastadam_cuda_device_count": [],
    "fastadam_cuda_plan_create": [ctypes.c_int32, POINTER, POINTER],
    "fastadam_cuda_plan_destroy": [POINTER],
    "fastadam_cuda_sort_rows": [POINTER, INT, POINTER, BOOL, INT, INT, INT, POINTER, POINTER],
    "fastadam_cuda_sum_rows": [POINTER, INT, POINTER, ctypes.c_int32, POINTER, POINTER],
    "fastadam_cuda_step": [POINTER, POINTER, POINTER, BOOL, POINTER],
    "fastadam_cuda_accumulate": [POINTER, POINTER, BOOL, BOOL, POINTER],
    "fastadam_cuda_sum_squares": [POINTER, POINTER, POINTER, POINTER],
    "fastadam_cuda_wait": [POINTER, POINTER],
}


class Rows(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("rows", "starts", "order")), ("count", INT), ("width", INT)]


def with_signatures(library, prefix):
    for name, arguments in SIGNATURES.items():
        if name.startswith("fastadam_cuda") == (prefix == "fastadam_cuda"):
            getattr(library, name).argtypes = arguments
    getattr(library, f"{prefix}_error").restype = ctypes.c_char_p
    return library


def hyper_of(step=1, **numbers):
    hyper = Hyper(step, 0.001, 0.9, 0.999, 1e-7, 0, *[np.inf] * 3, 1, 0, 0, *[False] * 3, 0, False, False)
    for name, number in numbers.items():
        setattr(hyper, name, number)
    return hyper


def stored(values, dtype):
    """As an array of the dtype; bfloat16 as its bits, which every library of GPU arrays can hold."""
    if dtype != "bfloat16":
        return np.asarray(values).astype(dtype)
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bits_of_stored(values):
    return number_bits(values.view(ml_dtypes.bfloat16) if values.dtype == np.uint16 else values)


def random(rng, size, dtype):
    return stored(rng.standard_normal(size), dtype)


def wide(dtype):
    return "float64" if dtype == "float64" else "float32"


def variable(rng, size, dtype, slot=None, **extra):
    """The arrays of a tensor by field, and fields that are no arrays."""
    slot = slot or wide(dtype)
    arrays = {"var": random(rng, size, dtype), "m": stored(np.zeros(size), slot), "v": stored(np.zeros(size), slot)}
    fields = {"dtype": DTYPES[dtype], "grad_dtype": DTYPES[dtype], "next": -1, "grad_factor": 1.0, "decays": True}
    return arrays, fields | {"size": size, "moments": int(slot == dtype and slot in ("float16", "bfloat16"))} | extra


class Side:
    """Tensors in the memory of the host or of a GPU."""

    def __init__(self, tensors, heads=None, make=lambda array: array):
        self.make = make
        made = {id(arrays): {name: make(array.copy()) for name, array in arrays.items()} for arrays, _ in tensors}
        self.arrays = [made[id(arrays)] for arrays, _ in tensors]
        self.tensors = (Tensor * len(tensors))()
        for tensor, arrays, (_, fields) in zip(self.tensors, self.arrays, tensors, strict=True):
            for name, array in arrays.items():
                setattr(tensor, name, self.address(array))
            for name, value in fields.items():
                setattr(tensor, name, value)
            tensor.grad_size = tensor.size
        self.heads = None if heads is None else np.array(heads)
        sizes = [self.tensors[head].size for head in heads or ()]
        self.offsets = np.cumsum([0, *sizes])

    @staticmethod
    def address(array):
        if isinstance(array, np.ndarray):
            return array.ctypes.data or None
        return array.__cuda_array_interface__["data"][0] or None

    def give(self, gradients):
        self.gradients = [self.make(gradient.copy()) for gradient in gradients]  # which must outlive the work
        for tensor, gradient in zip(self.tensors, self.gradients, strict=True):
            tensor.grad = self.address(gradient)

    @property
    def listed(self):
        chains = (None, None, 0) if self.heads is None else (self.heads.ctypes.data, self.offsets.ctypes.data)
        count = () if self.heads is None else (len(self.heads),)
        return ctypes.byref(List(ABI, self.tensors, len(self.tensors), *chains, *count))


class Twins:
    """The same tensors on the CPU and, with a plan, on a GPU."""

    def __init__(self, gpu, tensors, heads=None):
        self.gpu = gpu
        self.cpu = with_signatures(ctypes.CDLL(option("--library").strip()), "fastadam")
        self.cuda = with_signatures(cuda_library(gpu), "fastadam_cuda")
        self.host = Side(tensors, heads)
        self.device = Side(tensors, heads, gpu.array)
        self.plan = POINTER()
        assert self.cuda.fastadam_cuda_plan_create(0, self.device.listed, ctypes.byref(self.plan)) == OK, self.error()
        self.kept = []

    def close(self):
        assert self.cuda.fastadam_cuda_plan_destroy(self.plan) == OK

    def error(self):
        return self.cuda.fastadam_cuda_error().decode()

    def give(self, gradients):
        self.host.give(gradients)
        self.device.give(gradients)

    def step(self, hyper, lazy=False):
        """The status, which is that of both."""
        status = self.device_step(hyper, lazy)
        assert self.cpu.fastadam_step(self.host.listed, ctypes.byref(hyper), lazy) == status, self.error()
        return status

    def device_step(self, hyper, lazy=False):
        return self.cuda.fastadam_cuda_step(self.plan, self.device.listed, ctypes.byref(hyper), lazy, self.gpu.stream)

    def accumulate(self, restart, require_finite=False):
        status = self.cuda.fastadam_cuda_accumulate(
            self.plan, self.device.listed, restart, require_finite, self.gpu.stream
        )
        assert self.cpu.fastadam_accumulate(self.host.listed, restart, require_finite) == status, self.error()
        return status

    def sort(self, place, indices, row_count):
        """Rows of the gradient of a tensor, on both sides."""
        host, device = self.host.tensors[place], self.device.tensors[place]
        width = host.size // row_count
        rows, memory = Rows(), np.empty(4 * indices.size + 2, np.int64)
        self.kept += [rows, memory]
        options = (indices.itemsize == 8, indices.size, row_count, width)
        assert (
            self.cpu.fastadam_sort_rows(indices.ctypes.data, *options, memory.ctypes.data, ctypes.byref(rows), None)
            == OK
        )
        host.rows = ctypes.addressof(rows)
        device.rows = self.sort_on_device(place, indices, row_count)
        host.grad_size = device.grad_size = indices.size * width

    def sort_on_device(self, place, indices, row_count):
        width = self.device.tensors[place].size // row_count
        on_device, rows = self.gpu.array(indices), POINTER()
        self.kept.append(on_device)
        status = self.cuda.fastadam_cuda_sort_rows(
            self.plan, place, Side.address(on_device), indices.itemsize == 8, indices.size, row_count, width,
            self.gpu.stream, ctypes.byref(rows),
        )  # fmt: skip
        assert status == OK, self.error()
        return rows.value

    def wait(self):
        step = INT(-1)
        return self.cuda.fastadam_cuda_wait(self.plan, ctypes.byref(step)), step.value

    def check(self):
        assert self.wait() == (OK, 0)
        for i, (ours, theirs) in enumerate(zip(self.host.arrays, self.device.arrays, strict=True)):
            for name, array in ours.items():
                both = (bits_of_stored(values) for values in (self.gpu.get(theirs[name]), array))
                np.testing.assert_array_equal(*both, err_msg=f"{name} of {i}")


def cuda_library(gpu):
    """That of the fake runtime, or the one that is installed."""
    if gpu.name == "fake":
        return gpu.runtime
    return ctypes.CDLL(str(Path(option("--library").strip()).with_name("libfastadam_cuda.so")))


def slots_of(names, tensors):
    for arrays, fields in tensors:
        dtype = next(name for name, value in DTYPES.items() if value == fields["dtype"])
        for name in names:
            arrays[name] = stored(np.zeros(fields["size"]), wide(dtype))
    return tensors
