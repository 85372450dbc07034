"""What the C interface refuses: sizes whose products and sums overflow, and arrays that share memory."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from c_twins import DTYPES, INVALID, OK, Rows, hyper_of, with_signatures
from test_c_interface import ABI, List, Tensor, option

SIZE = 8
FAR = 1 << 61  # addresses of arrays that are refused before anything reads them


@pytest.fixture(scope="module")
def library():
    library = with_signatures(ctypes.CDLL(option("--library").strip()), "fastadam")
    library.fastadam_sort_memory.argtypes, library.fastadam_sort_memory.restype = [ctypes.c_int64], ctypes.c_int64
    return library


class Case:
    """One tensor with arrays of its own."""

    def __init__(self, library, dtype="float32"):
        self.library = library
        slot = "float64" if dtype == "float64" else "float32"
        dtypes = dict.fromkeys(("m", "v", "vhat", "average", "accumulator"), slot) | {"var": dtype, "grad": dtype}
        self.arrays = {name: np.ones(2 * SIZE, kind) for name, kind in dtypes.items()}
        self.tensor = Tensor(size=SIZE, grad_size=SIZE, next=-1, grad_factor=1.0, dtype=DTYPES[dtype])
        self.tensor.grad_dtype = DTYPES[dtype]
        for name, array in self.arrays.items():
            setattr(self.tensor, name, array.ctypes.data)
        self.hyper = hyper_of(1, ema_momentum=0.5)

    @property
    def listed(self):
        return ctypes.byref(List(ABI, ctypes.pointer(self.tensor), 1, None, None, 0))

    def step(self):
        return self.library.fastadam_step(self.listed, ctypes.byref(self.hyper), False)

    def accumulate(self):
        return self.library.fastadam_accumulate(self.listed, True, False)

    def refuses(self, call, text):
        before = {name: array.copy() for name, array in self.arrays.items()}
        assert (call(), self.library.fastadam_error().decode()) == (INVALID, text)
        for name, array in self.arrays.items():
            np.testing.assert_array_equal(array, before[name])


WRITTEN = ["var", "m", "v", "vhat", "average"]


@pytest.mark.parametrize("offset", [0, 1, SIZE - 1, -(SIZE - 1)])
@pytest.mark.parametrize(
    ("name", "other"),
    [(b, a) for i, a in enumerate(WRITTEN) for b in WRITTEN[i + 1 :]] + [("grad", name) for name in WRITTEN],
)
def test_a_step_refuses_arrays_that_share_memory(library, name, other, offset):
    case = Case(library)
    start = SIZE if offset < 0 else 0
    setattr(case.tensor, other, case.arrays[other][start:].ctypes.data)
    setattr(case.tensor, name, case.arrays[other][start + offset :].ctypes.data)
    case.refuses(case.step, f"tensors[0].{name}: shares memory with {other}, expected its own")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_step_takes_arrays_side_by_side_and_gradients_from_anywhere_else(library, dtype):
    case = Case(library, dtype)
    case.tensor.grad = case.arrays["var"][SIZE:].ctypes.data
    assert case.step() == OK
    if dtype != "float16":
        case.tensor.grad = case.tensor.accumulator
        assert case.step() == OK


def test_an_accumulation_refuses_its_accumulator_as_gradient(library):
    case = Case(library)
    case.tensor.grad = case.arrays["accumulator"][1:].ctypes.data
    case.refuses(case.accumulate, "tensors[0].grad: shares memory with accumulator, expected its own")
    case.tensor.grad = case.tensor.var  # which an accumulation does not write
    assert case.accumulate() == OK


def rows_of(starts, width, count=1):
    arrays = [np.arange(count, dtype=np.int64), np.array(starts, np.int64), np.zeros(SIZE, np.int64)]
    rows = Rows(*(a.ctypes.data for a in arrays), count, width)
    rows.kept = arrays
    return rows


@pytest.mark.parametrize(
    ("starts", "width", "grad_size"),
    [
        ([0, 1 << 62], 4, 0),  # the product is 0
        ([0, (1 << 62) + 1], 4, 4),  # it is 4
        ([0, 1 << 61], 8, 0),
        ([0, 3], 4, 4),
        ([0, 1], 4, 8),
    ],
)
def test_rows_whose_number_of_values_overflows_are_refused(library, starts, width, grad_size):
    case = Case(library)
    rows = rows_of(starts, width)
    case.tensor.rows, case.tensor.grad_size = ctypes.addressof(rows), grad_size
    text = f"tensors[0].grad_size: {grad_size}, expected rows->width times the number of indices"
    case.refuses(case.step, text)
    case.refuses(case.accumulate, text)
    sums = np.ones(SIZE, np.float32)
    pointers = np.array([sums.ctypes.data], np.uint64)
    case.refuses(lambda: library.fastadam_sum_rows(case.listed, pointers.ctypes.data), text)
    assert (sums == 1).all()


@pytest.mark.parametrize("width", [-1, 0, 3, 16, 1 << 62])
@pytest.mark.parametrize("count", [0, 1])
def test_a_width_that_does_not_divide_the_table_is_refused(library, width, count):
    case = Case(library)
    rows = rows_of([0, 1], width, count)
    case.tensor.rows, case.tensor.grad_size = ctypes.addressof(rows), 0
    case.refuses(case.step, f"tensors[0].rows: width {width}, expected a divisor of size {SIZE}")


def test_a_gradient_without_rows_has_no_values(library):
    case = Case(library)
    rows = rows_of([0], 4, count=0)
    case.tensor.rows, case.tensor.grad_size = ctypes.addressof(rows), 4
    case.refuses(case.step, "tensors[0].grad_size: 4, expected rows->width times the number of indices")
    case.tensor.grad_size = 0
    assert case.step() == OK


def test_an_accumulator_is_no_gradient_with_rows(library):
    """It has a place for each row of the table, the gradient only for those that it names."""
    case = Case(library)
    rows = rows_of([0, 1], 4)
    case.tensor.rows, case.tensor.grad_size = ctypes.addressof(rows), 4
    case.tensor.grad = case.tensor.accumulator
    text = "tensors[0].accumulator: the same as grad, which has rows, expected null or another array"
    case.refuses(case.step, text)


def test_norms_read_no_rows(library):
    """Not even those of an accumulator, which steps of the Python package read."""
    case = Case(library)
    rows = Rows(None, FAR, FAR, 1 << 40, 4)
    case.tensor.rows, case.tensor.accumulator = ctypes.addressof(rows), case.tensor.grad
    sums = np.zeros(2)
    assert library.fastadam_sum_squares(case.listed, sums.ctypes.data) == OK
    assert library.fastadam_norm(case.listed, sums[1:].ctypes.data) == OK
    assert sums.tolist() == [SIZE, SIZE**0.5]


@pytest.mark.parametrize("count", [-1, (1 << 57) + 1, 1 << 59, 1 << 60, (1 << 63) - 1])
def test_sorting_refuses_the_counts_for_which_there_is_no_memory(library, count):
    assert library.fastadam_sort_memory(count) == -1
    memory, rows, index = np.zeros(8, np.int64), Rows(), np.zeros(1, np.int64)
    status = library.fastadam_sort_rows(
        index.ctypes.data, True, count, 4, 1, memory.ctypes.data, ctypes.byref(rows), None
    )
    assert (status, library.fastadam_error().decode()) == (INVALID, f"count: {count}, expected 0 to 2^57")


def test_the_bytes_of_the_largest_memory_for_sorting_can_be_counted(library):
    assert 0 < 8 * library.fastadam_sort_memory(1 << 57) < 1 << 63


@pytest.mark.parametrize(("rows", "width"), [(1 << 40, 1 << 20), (1 << 62, 4), (-1, 1), (1, -1), (4, 1 << 60)])
def test_sorting_refuses_tables_whose_size_overflows(library, rows, width):
    memory, result, index = np.zeros(8, np.int64), Rows(), np.zeros(1, np.int64)
    status = library.fastadam_sort_rows(
        index.ctypes.data, True, 1, rows, width, memory.ctypes.data, ctypes.byref(result), None
    )
    text = (
        f"row_count, width: {rows}, {width}, expected 0 or more each and tables and gradients of at most 2^59 elements"
    )
    assert (status, library.fastadam_error().decode()) == (INVALID, text)


@pytest.mark.parametrize("misaligned", ["indices", "memory"])
def test_sorting_refuses_misaligned_arrays(library, misaligned):
    arrays = {"indices": np.zeros(2, np.int32), "memory": np.zeros(9, np.int64)}
    places = {name: array.ctypes.data + (name == misaligned) for name, array in arrays.items()}
    rows = Rows()
    status = library.fastadam_sort_rows(places["indices"], False, 1, 4, 1, places["memory"], ctypes.byref(rows), None)
    assert status == INVALID
    assert library.fastadam_error().decode().startswith(f"{misaligned}: ")


@pytest.mark.parametrize("call", ["step", "accumulate", "sum_squares", "norm"])
def test_lists_whose_sum_of_sizes_overflows_are_refused(library, call):
    """Before anything reads the arrays, which do not exist."""
    tensors = (Tensor * 32)()
    for tensor in tensors:
        tensor.size = tensor.grad_size = 1 << 59
        tensor.dtype = tensor.grad_dtype = DTYPES["float16"]
        tensor.next, tensor.grad_factor = -1, 1.0
        for i, name in enumerate(("var", "grad", "m", "v", "accumulator")):
            setattr(tensor, name, 64 + (i % 2) * FAR // 2 + max(i - 1, 0) * FAR)
    listed = ctypes.byref(List(ABI, tensors, 32, None, None, 0))
    result = np.zeros(32)
    calls = {
        "step": lambda: library.fastadam_step(listed, ctypes.byref(hyper_of()), False),
        "accumulate": lambda: library.fastadam_accumulate(listed, True, False),
        "sum_squares": lambda: library.fastadam_sum_squares(listed, result.ctypes.data),
        "norm": lambda: library.fastadam_norm(listed, result.ctypes.data),
    }
    text = "tensors: more than 2^59 elements together, expected fewer"
    assert (calls[call](), library.fastadam_error().decode()) == (INVALID, text)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("dtype", 7, "tensors[0].dtype: 7, expected a fastadam_dtype"),
        ("dtype", -1, "tensors[0].dtype: -1, expected a fastadam_dtype"),
        (
            "grad_dtype",
            9,
            "tensors[0].grad_dtype: 9 for dtype 2, expected the same, float32 for a half variable, or a half type for a dense gradient of float32",
        ),
        ("grad_size", 5, "tensors[0].grad_size: 5, expected 8 for a dense gradient"),
        ("size", -1, "tensors[0].var: -1 elements, expected 0 to 2^59"),
        ("size", (1 << 59) + 1, f"tensors[0].var: {(1 << 59) + 1} elements, expected 0 to 2^59"),
    ],
)
def test_messages_say_what_came(library, field, value, text):
    case = Case(library)
    setattr(case.tensor, field, value)
    case.refuses(case.step, text)


@pytest.mark.parametrize("step", [0, -1, -(1 << 63)])
def test_the_message_for_a_step_says_what_came(library, step):
    case = Case(library)
    case.hyper.step = step
    case.refuses(case.step, f"step: {step}, expected 1 or more")


@pytest.mark.parametrize("count", [-1, -(1 << 63)])
def test_a_negative_number_of_tensors_is_refused(library, count):
    listed = ctypes.byref(List(ABI, None, count, None, None, 0))
    assert library.fastadam_step(listed, ctypes.byref(hyper_of()), False) == INVALID
    assert library.fastadam_error().decode() == f"count: {count}, expected 0 or more tensors"


def test_sums_of_rows_need_memory_of_their_own(library):
    case = Case(library)
    rows = rows_of([0, 2], 4)
    case.tensor.rows, case.tensor.grad_size = ctypes.addressof(rows), SIZE
    for place, reason in (
        (4, "shares memory with grad, expected its own"),
        (1, "misaligned, expected an array of float32"),
    ):
        pointers = np.array([case.arrays["grad"].ctypes.data + place], np.uint64)
        case.refuses(lambda to=pointers: library.fastadam_sum_rows(case.listed, to.ctypes.data), f"sums[0]: {reason}")


@pytest.mark.parametrize("written", ["var", "m", "v"])
@pytest.mark.parametrize("name", ["rows", "starts", "order"])
def test_arrays_of_rows_lie_in_nothing_that_a_step_writes(library, name, written):
    """A step would read its own results as positions."""
    case = Case(library, "float64")
    rows = rows_of([0, 2], 4)
    bytes_of = {"rows": 8, "starts": 16, "order": 16}[name]
    place = case.arrays[written].ctypes.data + 8
    ctypes.memmove(place, getattr(rows, name), bytes_of)
    setattr(rows, name, place)
    case.tensor.rows, case.tensor.grad_size = ctypes.addressof(rows), SIZE
    case.tensor.vhat = case.tensor.average = None
    case.refuses(case.step, f"tensors[0].rows->{name}: shares memory with {written}, expected its own")


@pytest.mark.parametrize("name", ["rows", "starts", "order"])
def test_sums_lie_in_no_array_of_rows(library, name):
    case = Case(library)
    rows = rows_of([0, 2], 4)
    case.tensor.rows, case.tensor.grad_size = ctypes.addressof(rows), SIZE
    pointers = np.array([getattr(rows, name)], np.uint64)
    text = f"sums[0]: shares memory with rows->{name}, expected its own"
    case.refuses(lambda: library.fastadam_sum_rows(case.listed, pointers.ctypes.data), text)


@pytest.mark.parametrize(("offset", "reason"), [(0, "shares memory with var, expected its own"), (4, "misaligned")])
def test_telemetry_has_memory_of_its_own(library, offset, reason):
    case = Case(library)
    case.arrays["var"] = memory = np.ones(256, np.float32)
    case.tensor.var = memory.ctypes.data
    case.tensor.size = case.tensor.grad_size = SIZE
    case.tensor.telemetry = memory.ctypes.data + offset
    assert case.step() == INVALID
    assert library.fastadam_error().decode().startswith(f"tensors[0].telemetry: {reason}")
    assert (memory == 1).all()


@pytest.mark.parametrize("count", [-1, 1025, 65536, 2**31 - 1])
def test_the_number_of_threads_has_a_limit(library, count):
    assert library.fastadam_set_num_threads(count) == INVALID
    assert library.fastadam_error().decode() == f"count: {count}, expected 0 to 1024"
