"""Other threads of Python run while one waits for a GPU. The fake runtime tells which waits hold the GIL."""

from __future__ import annotations

from functools import partial

import fastadam
import numpy as np
import pytest
from fastadam._core.native import arrays
from fastadam._core.parts import parts_of
from test_cuda import F32
from test_cuda_late_errors import bad_step
from test_cuda_numbers import HYPER, Plans
from test_cuda_rows import Tables

pytestmark = pytest.mark.usefixtures("rows_wait")
MANY = 20000  # indices, parameters, ...: more than the driver copies without a wait


def failed(gpu):
    tables = Tables(gpu, "dense")
    tables.step([1])
    bad_step(tables)
    context = parts_of(tables.device).runtime.contexts[0]
    context.wait()
    return context


def rates(gpu):
    numbers = [np.zeros(MANY, F32) for _ in range(3)]
    return lambda: gpu.native.History(*numbers, MANY, 0, gpu.stream)


def steps(gpu, make=fastadam.Adam):
    w, gradient = gpu.array(np.ones(4, F32)), gpu.array(np.ones(4, F32))
    optimizer = make()
    return lambda: optimizer.apply_gradients([(gradient, w)])


def indices_of_the_host(gpu):
    table, values = gpu.array(np.ones((5, 1), F32)), gpu.array(np.ones((MANY, 1), F32))
    slices = fastadam.IndexedSlices(values, np.zeros(MANY, np.int64))
    return lambda: fastadam.Adam().apply_gradients([(slices, table)])


def many_variables(gpu):
    pairs = [(gpu.array(np.ones(1, F32)), gpu.array(np.ones(1, F32))) for _ in range(700)]
    return lambda: fastadam.Adam().apply_gradients(pairs)


WAITS = {
    "a bad index is reported": lambda gpu: failed(gpu).take_failure,
    "the count of steps": lambda gpu: Plans(gpu, [np.ones(3, F32)]).plans[1][2].step,
    "the wait of a context": lambda gpu: failed(gpu).wait,
    "a write from the host": lambda gpu: partial(arrays.assign, gpu.array(np.ones(3, F32)), np.zeros(3, F32)),
    "a read by the host": lambda gpu: partial(arrays.to_host, gpu.array(np.ones(3, F32))),
    "a new array": lambda gpu: lambda: fastadam.cuda.array(np.ones(3, F32)),
    "the first step": steps,
    "many variables": many_variables,
    "a history": rates,
    "indices of the host": indices_of_the_host,
    "finite gradients": lambda gpu: steps(gpu, lambda: fastadam.LossScaleOptimizer(fastadam.Adam())),
}


@pytest.mark.parametrize("kind", WAITS)
def test_a_wait_does_not_hold_the_gil(fake_gpu, kind):
    act = WAITS[kind](fake_gpu)
    fake_gpu.clear_log()
    fake_gpu.watch_the_gil()
    kept = act()
    waits = [call for call in fake_gpu.calls() if is_wait(call)]
    assert waits
    assert [call for call in waits if call[-1] == "locked"] == []
    del kept


def is_wait(call):
    return "ynchronize" in call[0] or (call[0].startswith("cudaMemcpy") and len(call) == 6)


def test_whether_a_step_has_failed_is_asked_without_a_call_of_cuda(fake_gpu):
    plans = Plans(fake_gpu, [np.ones(3, F32)])
    plans.step([np.ones(3, F32)], HYPER, scale=1.0)
    fake_gpu.clear_log()
    assert plans.plans[1][2].take_failure() is None
    assert [call[0] for call in fake_gpu.calls()] == []
