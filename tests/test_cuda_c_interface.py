"""The C interface for CUDA devices: the bits of the one for the CPU, errors that name their reason, no waiting."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from c_twins import (
    CUDA_ERROR,
    DTYPES,
    INVALID,
    NOT_FINITE,
    OK,
    POINTER,
    Rows,
    Side,
    Twins,
    hyper_of,
    random,
    slots_of,
    variable,
    wide,
)
from compiled import ROOT, run, tool
from helpers import bits
from test_c_interface import ABI, WARNINGS, List


@pytest.fixture
def twins(gpu):
    made = []

    def make(*arguments):
        made.append(Twins(gpu, *arguments))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


def dense_tensors(rng):
    sizes = [("float32", 5), ("float64", 700), ("float16", 33), ("bfloat16", 1000), ("float32", 16384 * 2 + 5)]
    return [variable(rng, size, dtype) for dtype, size in [*sizes, ("float32", 0)]]


def gradients_of(rng, side):
    names = list(DTYPES)
    return [random(rng, tensor.grad_size, names[tensor.grad_dtype]) for tensor in side.tensors]


NUMBERS = {
    "plain": {},
    "decay": {"decay": 0.1, "weight_decay": 0.1},
    "clip_value": {"clip_value": 0.2},
    "clip_norm": {"clip_norm": 0.3},
    "global_clip_norm": {"global_clip_norm": 0.5, "clip_value": 1.0, "gradient_scale": 0.25},
    "pytorch": {"l2": 0.01, "epsilon_corrected": True},
    "finite": {"require_finite": True},
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("slots", [(), ("vhat",), ("average",)])
def test_dense_lists_of_all_dtypes_have_the_bits_of_the_cpu(twins, numbers, slots):
    rng = np.random.default_rng(1)
    pair = twins(slots_of(slots, dense_tensors(rng)))
    scale = NUMBERS[numbers].get("gradient_scale", 1.0)
    for side in (pair.host, pair.device):
        side.tensors[1].grad_factor = 2 * scale
    for step in (1, 2, 3):
        pair.give(gradients_of(rng, pair.host))
        assert pair.step(hyper_of(step, ema_momentum=0.9, **NUMBERS[numbers])) == OK, pair.error()
    pair.check()


@pytest.mark.parametrize(
    "numbers", [{"clip_norm": 0.3}, {"global_clip_norm": 0.5}, {"clip_norm": 1e250, "global_clip_norm": 0.5}]
)
@pytest.mark.parametrize("require_finite", [False, True])
def test_norms_of_float64_gradients_whose_squares_overflow(twins, numbers, require_finite):
    rng = np.random.default_rng(1)
    pair = twins(dense_tensors(rng))
    hyper = hyper_of(1, require_finite=require_finite, **numbers)
    gradients = gradients_of(rng, pair.host)
    gradients[1] *= 2.0**700
    pair.give(gradients)
    assert pair.step(hyper) == OK, pair.error()
    assert pair.host.arrays[1]["m"].any()
    pair.check()
    gradients[1][:] = 1.7e308  # a norm that is not finite
    pair.give(gradients)
    before = pair.host.arrays[1]["var"].copy()
    hyper.step = 2
    assert pair.step(hyper) == (NOT_FINITE if require_finite else OK)
    assert np.array_equal(before, pair.host.arrays[1]["var"]) == require_finite
    pair.check()


def test_half_moments_and_wide_gradients(twins):
    rng = np.random.default_rng(2)
    tensors = [variable(rng, 100, "bfloat16", "bfloat16"), variable(rng, 50, "float16", "float16", decays=False)]
    tensors.append(variable(rng, 70, "float16", grad_dtype=DTYPES["float32"]))
    pair = twins(tensors)
    for step in (1, 2):
        pair.give(gradients_of(rng, pair.host))
        assert pair.step(hyper_of(step, weight_decay=0.1)) == OK, pair.error()
    pair.check()


def test_a_variable_given_twice_is_updated_twice(twins):
    rng = np.random.default_rng(3)
    first, fields = variable(rng, 40, "float32", next=2)
    pair = twins([(first, fields), variable(rng, 9, "float32"), (first, fields | {"next": -1})], [0, 1])
    for step in (1, 2):
        pair.give(gradients_of(rng, pair.host))
        assert pair.step(hyper_of(step)) == OK, pair.error()
    pair.check()
    assert not np.array_equal(first["var"], pair.host.arrays[0]["var"])


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("numbers", [{}, {"clip_norm": 0.5, "weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_sparse_gradients_beside_dense_ones(twins, lazy, numbers, dtype):
    rng = np.random.default_rng(4)
    tensors = [variable(rng, 24 * 7, dtype), variable(rng, 300, "float32"), variable(rng, 10, dtype)]
    pair = twins(slots_of(["vhat"], tensors))
    for step, index_type in ((1, np.int32), (2, np.int64), (3, np.int32)):
        pair.sort(0, rng.integers(0, 24, 40 * step).astype(index_type), 24)
        pair.sort(2, np.array([], index_type), 5)
        pair.give(gradients_of(rng, pair.host))
        assert pair.step(hyper_of(step, **numbers), lazy) == OK, pair.error()
    pair.check()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_sums_of_repeated_rows(twins, dtype):
    rng = np.random.default_rng(5)
    pair = twins([variable(rng, 30, dtype)])
    indices = np.array([4, 1, 4, 4, 0])
    pair.sort(0, indices, 10)
    pair.give(gradients_of(rng, pair.host))
    on_host = np.zeros((5, 3), wide(dtype))
    assert pair.cpu.fastadam_sum_rows(pair.host.listed, ctypes.byref(POINTER(on_host.ctypes.data))) == OK
    sums, grad = POINTER(), pair.device.tensors[0].grad
    assert (
        pair.cuda.fastadam_cuda_sum_rows(pair.plan, 0, grad, DTYPES[dtype], pair.gpu.stream, ctypes.byref(sums)) == OK
    ), pair.error()
    rows, places = Rows(), np.arange(4)
    table = np.array([0, 1, 4])
    rows = Rows(table.ctypes.data, places.ctypes.data, places.ctypes.data, 3, 3)
    host, device = pair.host.tensors[0], pair.device.tensors[0]
    host.rows, host.grad, host.grad_size = ctypes.addressof(rows), on_host.ctypes.data, 9
    device.grad, device.grad_size = sums, 15
    host.grad_dtype = device.grad_dtype = DTYPES[wide(dtype)]
    assert pair.step(hyper_of(global_clip_norm=0.1)) == OK, pair.error()
    pair.check()


def test_sums_of_squares_of_each_gradient(twins):
    rng = np.random.default_rng(14)
    pair = twins([*dense_tensors(rng), variable(rng, 30, "float32")])
    pair.sort(6, np.array([1, 1, 2]), 10)
    pair.give(gradients_of(rng, pair.host))
    sums = np.full(7, np.nan)
    on_device = pair.gpu.array(sums)
    assert pair.cpu.fastadam_sum_squares(pair.host.listed, sums.ctypes.data) == OK
    arguments = (pair.plan, pair.device.listed, Side.address(on_device), pair.gpu.stream)
    assert pair.cuda.fastadam_cuda_sum_squares(*arguments) == OK, pair.error()
    pair.check()
    np.testing.assert_array_equal(bits(sums), bits(pair.gpu.get(on_device)))
    expected = [np.square(gradient.astype(np.float64)).sum() for gradient in pair.host.gradients[:3]]
    np.testing.assert_allclose(sums[:3], expected, rtol=1e-14)
    assert pair.cuda.fastadam_cuda_sum_squares(pair.plan, pair.device.listed, sums.ctypes.data, None) == INVALID
    assert pair.error() == "sums: CPU memory, expected memory of CUDA device 0"


def test_gradients_are_accumulated_and_stepped_with(twins):
    rng = np.random.default_rng(6)
    pair = twins(slots_of(["accumulator"], [*dense_tensors(rng), variable(rng, 60, "float32")]))
    for step in (1, 2):
        for restart in (True, False):
            pair.sort(6, rng.integers(0, 12, 9), 12)
            pair.give(gradients_of(rng, pair.host))
            assert pair.accumulate(restart) == OK, pair.error()
        for side in (pair.host, pair.device):
            for tensor in side.tensors:
                tensor.grad, tensor.rows, tensor.grad_size = tensor.accumulator, None, tensor.size
                tensor.grad_dtype = DTYPES["float64"] if tensor.dtype == DTYPES["float64"] else DTYPES["float32"]
        assert pair.step(hyper_of(step, clip_norm=1.0)) == OK, pair.error()
        for side in (pair.host, pair.device):
            for tensor in side.tensors:
                tensor.grad_dtype = tensor.dtype
    pair.check()


def test_gradients_that_are_not_finite_change_nothing(twins):
    rng = np.random.default_rng(7)
    pair = twins(slots_of(["accumulator"], dense_tensors(rng)))
    gradients = gradients_of(rng, pair.host)
    gradients[4][-1] = np.inf
    pair.give(gradients)
    assert pair.step(hyper_of(require_finite=True)) == NOT_FINITE
    assert pair.error() == "a gradient is not finite"
    assert pair.accumulate(True, True) == NOT_FINITE
    pair.check()
    gradients[4][-1] = 1
    pair.give(gradients)
    assert pair.accumulate(True, True) == OK
    assert pair.step(hyper_of(require_finite=True)) == OK
    pair.check()


def test_an_index_that_is_no_row_is_told_once_and_steps_go_on_after_it(twins):
    rng = np.random.default_rng(8)
    pair = twins([variable(rng, 12, "float32"), variable(rng, 30, "float32")])
    pair.sort(1, np.array([3, 3, 9]), 10)
    pair.give(gradients_of(rng, pair.host))
    assert pair.step(hyper_of(1)) == OK
    pair.device.tensors[1].rows = pair.sort_on_device(1, np.array([3, 10, -1]), 10)
    assert pair.device_step(hyper_of(2)) == OK  # only the device knows yet
    assert pair.wait() == (INVALID, 1)
    assert pair.error() == "indices[1] of tensors[1]: 10 is not a row, expected 0 <= index < 10"
    pair.check()
    pair.device.tensors[1].rows = pair.sort_on_device(1, np.array([3, 3, 10]), 10)
    assert pair.device_step(hyper_of(2)) == OK
    pair.gpu.get(pair.device.arrays[0]["var"])  # waits
    for _ in range(2):
        assert pair.device_step(hyper_of(3)) == INVALID
        assert "indices[2] of tensors[1]: 10 is not a row" in pair.error()
    assert pair.wait() == (INVALID, 1)
    pair.sort(1, np.array([1, 3, 9]), 10)
    assert pair.step(hyper_of(2)) == OK
    pair.check()


def test_what_cannot_be_is_refused_with_a_reason_and_changes_nothing(twins):
    rng = np.random.default_rng(9)
    pair = twins([variable(rng, 6, "float32"), variable(rng, 6, "float32")])
    gradients = gradients_of(rng, pair.host)
    pair.give(gradients)
    pair.sort(1, np.array([2, 0]), 3)
    other, tensors, cuda = pair.gpu.array(gradients[0]), pair.device.tensors, pair.cuda
    host_rows = pair.host.tensors[1].rows

    def refused(message, hyper=None, status=INVALID, **fields):
        place = fields.pop("place", 0)
        kept = {name: getattr(tensors[place], name) for name in fields}
        for name, value in fields.items():
            setattr(tensors[place], name, value)
        assert pair.device_step(hyper or hyper_of()) == status
        assert pair.error() == message
        for name, value in kept.items():
            setattr(tensors[place], name, value)

    tensors[1].grad_size = 4
    refused("tensors[0].grad: CPU memory, expected memory of CUDA device 0", grad=gradients[0].ctypes.data)
    refused("tensors[0].grad: null", grad=None)
    misaligned = "tensors[0].grad: misaligned, expected an address that is a multiple of the item size"
    refused(misaligned, grad=tensors[0].grad + 1)
    refused("tensors[0].var: expected the array of the plan", var=Side.address(other))
    refused("tensors[0].vhat: expected the array of the plan", vhat=Side.address(other))
    refused("tensors[0].size, dtype, next, decays, moments: expected the values of the plan", decays=False)
    wide = "tensors[0].grad_dtype: 3 for dtype 2, expected the same, float32 for a half variable, or a half type for "
    wide += "a dense gradient of float32"
    refused(wide, grad_dtype=3)
    refused("tensors[0].grad_size: 5, expected 6 for a dense gradient", grad_size=5)
    refused("tensors[0].grad: shares memory with var, expected its own", grad=tensors[0].var)
    refused("tensors[1].grad: shares memory with m, expected its own", place=1, grad=tensors[1].m + 4)
    rows_of_the_plan = "tensors[{}].rows: expected the result of fastadam_cuda_sort_rows for this tensor"
    refused(rows_of_the_plan.format(1), place=1, rows=host_rows)
    refused(rows_of_the_plan.format(0), rows=tensors[1].rows)
    refused("tensors[1].grad_size: 6, expected rows->width times the number of indices", place=1, grad_size=6)
    refused("tensors[1].l2: 0.100000, expected 0 with a sparse gradient; use weight_decay", hyper_of(l2=0.1))
    refused("tensors[0].stale: not null, expected null", stale=1)
    refused("step: 0, expected 1 or more", hyper_of(0))
    refused("beta_2: 1.000000 is 1 in float32, expected less", hyper_of(beta_2=1 - 1e-10))
    assert cuda.fastadam_cuda_step(None, pair.device.listed, ctypes.byref(hyper_of()), False, None) == INVALID
    assert pair.error() == "plan: null"
    shorter = List(ABI, tensors, 1, None, None, 0)
    assert cuda.fastadam_cuda_step(pair.plan, ctypes.byref(shorter), ctypes.byref(hyper_of()), False, None) == INVALID
    assert pair.error() == "list: 1 tensors, expected the 2 of the plan"
    assert cuda.fastadam_cuda_accumulate(pair.plan, pair.device.listed, True, False, None) == INVALID
    assert pair.error() == "tensors[0].accumulator: null"
    rows = POINTER()
    sort = [1, Side.address(other), True, 1, 4, 2, pair.gpu.stream, ctypes.byref(rows)]
    assert cuda.fastadam_cuda_sort_rows(pair.plan, *sort) == INVALID
    assert pair.error() == "row_count, width: do not match tensors[1].size"
    assert cuda.fastadam_cuda_sort_rows(pair.plan, 2, *sort[1:]) == INVALID
    assert pair.error() == "place: 2, expected one of 2 tensors"
    for count, row_count, width, text in [
        (1 << 60, 4, 2, f"count: {1 << 60}, expected 0 to 2^57"),
        (-1, 4, 2, "count: -1, expected 0 to 2^57"),
        (1, 1 << 62, 4, f"row_count, width: {1 << 62}, 4, expected 0 or more each"),
        (1 << 50, 4, 1 << 10, f"row_count, width: 4, {1 << 10}, expected 0 or more each"),
    ]:
        assert cuda.fastadam_cuda_sort_rows(pair.plan, *sort[:3], count, row_count, width, *sort[6:]) == INVALID
        assert pair.error().startswith(text)
    pair.check()


def test_plans_that_cannot_be(twins):
    rng = np.random.default_rng(10)
    pair = twins([variable(rng, 6, "float32"), variable(rng, 6, "float32")])

    def refused(message, listed, device=0, status=INVALID):
        plan = POINTER()
        assert pair.cuda.fastadam_cuda_plan_create(device, listed, ctypes.byref(plan)) == status
        assert message in pair.error()
        assert plan.value is None

    refused("tensors[0].var: CPU memory, expected memory of CUDA device 0", pair.host.listed)
    refused("CUDA: ", pair.device.listed, device=99, status=CUDA_ERROR)
    refused("list: null", None)
    tensors = pair.device.tensors
    refused(
        f"list: ABI {ABI + 1}, expected {ABI}, the ABI of this library",
        ctypes.byref(List(ABI + 1, tensors, 2, None, None, 0)),
    )
    heads = np.array([0, 0])
    twice = List(ABI, tensors, 2, heads.ctypes.data, None, 2)
    refused("heads: expected each tensor to belong to exactly one variable", ctypes.byref(twice))
    tensors[1].dtype = 7
    refused("tensors[1].dtype: 7, expected a fastadam_dtype", pair.device.listed)
    tensors[1].dtype = DTYPES["float32"]
    assert pair.cuda.fastadam_cuda_plan_destroy(None) == OK


def test_a_captured_step_is_one_more_at_each_replay(twins, gpu):
    rng = np.random.default_rng(11)
    pair = twins([variable(rng, 50, "float32"), variable(rng, 30, "float32")])
    indices = np.array([3, 1, 3])
    pair.sort(1, indices, 10)
    pair.give(gradients_of(rng, pair.host))
    assert pair.step(hyper_of(1, clip_norm=0.5)) == OK
    assert pair.wait() == (OK, 0)
    gpu.begin_capture()
    assert pair.device_step(hyper_of(2, require_finite=True)) == INVALID
    assert "cannot be captured" in pair.error()
    assert pair.device_step(hyper_of(2, clip_norm=0.5)) == OK, pair.error()
    graph = gpu.end_capture()
    for step in (2, 3, 4):
        gpu.replay(graph)
        pair.cpu.fastadam_step(pair.host.listed, ctypes.byref(hyper_of(step, clip_norm=0.5)), False)
    pair.check()


def test_a_step_waits_for_nothing_and_allocates_once(fake_gpu):
    rng = np.random.default_rng(12)
    pair = Twins(fake_gpu, dense_tensors(rng))
    for step in (1, 2):
        pair.give(gradients_of(rng, pair.host))
        fake_gpu.clear_log()
        assert pair.device_step(hyper_of(step, clip_norm=1.0)) == OK
    calls = fake_gpu.calls()
    assert {
        name for name, *_ in calls if "Synchronize" in name or name in ("cudaMalloc", "cudaFree", "cudaMemcpy")
    } == set()
    launched = {stream for name, _, stream, _ in calls if "Launch" in name}
    assert launched == {str(fake_gpu.stream)}
    pair.close()


def test_errors_of_the_runtime_have_its_message(fake_gpu):
    rng = np.random.default_rng(13)
    pair = Twins(fake_gpu, [variable(rng, 6, "float32")])
    pair.give(gradients_of(rng, pair.host))
    fake_gpu.clear_log()
    assert pair.device_step(hyper_of()) == OK
    launch = next(name for name, *_ in fake_gpu.calls() if "Launch" in name)
    fake_gpu.fail(launch, 700)
    assert pair.device_step(hyper_of(2)) == CUDA_ERROR
    assert pair.error().startswith("CUDA: ")
    pair.close()
    assert pair.cuda.fastadam_cuda_device_count() == 1
    fake_gpu.set_devices(0)
    assert pair.cuda.fastadam_cuda_device_count() == 0
    assert pair.error()


@pytest.mark.parametrize(("compiler", "language"), [("cc", "c99"), ("c++", "c++17")])
def test_the_header_is_plain_c_and_c_plus_plus(tmp_path, compiler, language):
    source = tmp_path / ("program.c" if compiler == "cc" else "program.cpp")
    source.write_text('#include "fastadam_cuda.h"\nint main(void) { return fastadam_cuda_device_count() < 0; }\n')
    run(tool(compiler), f"-std={language}", *WARNINGS, "-I", ROOT / "csrc" / "include", "-fsyntax-only", source)
