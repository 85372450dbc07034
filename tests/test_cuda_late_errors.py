"""Indices on a GPU that are no rows: the error comes with a later call, and nothing of their step is left."""

from __future__ import annotations

import pickle

import fastadam
import numpy as np
import pytest
from fastadam._core.parts import parts_of
from test_cuda import F32, same
from test_cuda_rows import MODES, Tables

pytestmark = pytest.mark.usefixtures("rows_wait")


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_ids_of_a_lagging_table_that_are_no_rows_are_found_later(gpu, mode):
    tables = Tables(gpu, mode)
    for ids in ([1, 2], [3], [4]):
        tables.step(ids)
    tables.device.gather(tables.twin, gpu.array(np.array([1, 40])))
    for context in parts_of(tables.device).runtime.contexts.values():
        context.wait()
    with pytest.raises(ValueError, match=r"ids\b.*\b40 (is not a row|at position 1, out of range)"):
        tables.device.gather(tables.twin, [1])
    assert int(tables.device.iterations) == 3
    tables.step([5])
    tables.check()


def test_ids_on_a_gpu_that_are_no_rows_give_zeros_and_an_error_later(gpu):
    tables = Tables(gpu, "dense")
    found = tables.device.gather(tables.twin, gpu.array(np.array([1, 40])))
    assert same(gpu.get(found)[0], tables.table[1])
    assert not gpu.get(found)[1].any()
    with pytest.raises(ValueError, match="ids: an earlier gather read index 40 at position 1, out of range"):
        tables.device.gather(tables.twin, [1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_an_index_that_is_no_row_undoes_its_step_and_those_after_it(gpu, mode, bad):
    tables = Tables(gpu, mode)
    tables.step([1, 2])
    tables.step([3])
    slices = fastadam.IndexedSlices(gpu.array(tables.values(3)), gpu.array(np.array([5, bad, bad])))
    tables.device.apply_gradients([(slices, tables.twin)])
    good = fastadam.IndexedSlices(gpu.array(tables.values(1)), gpu.array(np.array([1])))
    for _ in range(3):
        try:
            tables.device.apply_gradients([(good, tables.twin)])
        except ValueError as error:
            message = str(error)
            break
    else:
        with pytest.raises(ValueError, match="is not a row") as caught:
            tables.device.get_weights()
        message = str(caught.value)
    assert message.startswith(f"grads[0].indices[1]: {bad} is not a row of vars[0], expected 0 <= index < 40")
    assert "after iteration 2" in message
    assert int(tables.device.iterations) == 2
    tables.step([3, 1])
    tables.step([39])
    tables.check()


def bad_step(tables):
    slices = fastadam.IndexedSlices(tables.gpu.array(tables.values(1)), tables.gpu.array(np.array([40])))
    tables.device.apply_gradients([(slices, tables.twin)])


CHANGES = {
    "mode": lambda o: setattr(o, "sparse_update", "lazy"),
    "iterations": lambda o: setattr(o, "iterations", 9),
    "weights": lambda o: o.set_weights(o.get_weights()),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_comes_after_the_error_of_a_bad_step(gpu, change):
    tables = Tables(gpu, "deferred")
    for ids in ([1, 2], [3], [4]):
        tables.step(ids)
    bad_step(tables)
    with pytest.raises(ValueError, match="40 is not a row"):
        CHANGES[change](tables.device)
    tables.step([1])
    tables.check()


def test_other_betas_after_a_bad_step(gpu):
    tables = Tables(gpu, "deferred")
    for ids in ([1, 2], [3], [4]):
        tables.step(ids)
    bad_step(tables)
    tables.host.beta_1 = tables.device.beta_1 = 0.5
    slices = fastadam.IndexedSlices(gpu.array(tables.values(1)), gpu.array(np.array([1])))
    with pytest.raises(ValueError, match="40 is not a row"):
        tables.device.apply_gradients([(slices, tables.twin)])
    tables.step([1])
    tables.check()


def test_a_bad_step_after_the_count_was_set_back(gpu):
    tables = Tables(gpu, "deferred")
    for step in range(6):
        tables.step([step])
    tables.host.iterations = tables.device.iterations = 0
    tables.step([1])
    tables.step([2])
    bad_step(tables)
    with pytest.raises(ValueError, match="40 is not a row"):
        tables.device.get_weights()
    tables.step([3])
    tables.check()


def test_a_bad_index_while_gradients_accumulate(gpu):
    tables = Tables(gpu, "dense", gradient_accumulation_steps=2)
    tables.step([1])
    tables.step([2])
    with pytest.raises(ValueError, match="40 is not a row"):
        bad_step(tables)
    tables.step([3])
    with pytest.raises(ValueError, match="40 is not a row"):
        bad_step(tables)
    tables.step([4])
    tables.check()


def test_steps_on_the_host_come_after_the_error_of_a_bad_step(gpu):
    tables = Tables(gpu, "dense")
    tables.step([1])
    bad_step(tables)
    w = np.ones(3, F32)
    with pytest.raises(ValueError, match="40 is not a row"):
        tables.device.apply_gradients([(np.ones(3, F32), w)])
    assert (w == 1).all()
    tables.check()
