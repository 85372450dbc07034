"""IndexedSlices and deferred tables on a GPU: the bits of the CPU, in every mode."""

from __future__ import annotations

import copy
import pickle
import sys

import fastadam
import numpy as np
import pytest
from cases import random_array
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda import F32, same

pytestmark = pytest.mark.usefixtures("rows_wait")
MODES = ("dense", "lazy", "deferred", "deferred_fast")
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.01},
    "clipped": {"clipnorm": 0.3, "clipvalue": 0.5},
    "global": {"global_clipnorm": 0.3, "clip_after_dedupe": True},
    "value": {"clipvalue": 0.1, "clip_after_dedupe": True},
}


class Tables:
    """One table on the host, one on a GPU, and the same gradients for both."""

    def __init__(self, gpu, mode, shape=(40, 5), dtype="float32", seed=0, **options):
        self.gpu, self.rng = gpu, np.random.RandomState(seed)
        self.table = random_array(self.rng, shape).astype(dtype)
        self.twin = gpu.array(self.table)
        self.host = fastadam.Adam(0.01, sparse_update=mode, **options)
        self.device = fastadam.Adam(0.01, sparse_update=mode, **options)

    def values(self, count, dtype=None):
        return random_array(self.rng, (count, *self.table.shape[1:])).astype(dtype or self.table.dtype)

    def step(self, ids, index_type=np.int64, grad_dtype=None):
        values, ids = self.values(len(ids), grad_dtype), np.asarray(ids, index_type)
        self.host.apply_gradients([(fastadam.IndexedSlices(values, ids), self.table)])
        slices = fastadam.IndexedSlices(self.gpu.array(values), self.gpu.array(ids))
        self.device.apply_gradients([(slices, self.twin)])

    def dense_step(self):
        gradient = self.values(len(self.table))
        self.host.apply_gradients([(gradient, self.table)])
        self.device.apply_gradients([(self.gpu.array(gradient), self.twin)])

    def check(self):
        self.host.sync()
        self.device.sync()
        assert same(self.table, self.gpu.get(self.twin))
        for ours, theirs in zip(self.host.get_weights(), self.device.get_weights(), strict=True):
            assert same(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_have_the_bits_of_the_cpu(gpu, mode, options, dtype):
    tables = Tables(gpu, mode, dtype=dtype, **OPTIONS[options])
    for ids in ([3, 3, 39], [0], [], [7, 3, 7, 0, 7], [12], [38, 39]):
        tables.step(ids, np.int32 if len(ids) == 1 else np.int64)
    tables.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(9,), (70, 1), (5, 2, 3), (3, 130), (4, 0), (300, 33)])
def test_rows_of_any_width(gpu, mode, shape):
    tables = Tables(gpu, mode, shape)
    for _ in range(4):
        tables.step(tables.rng.randint(0, shape[0], 3))
    tables.check()


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("count", [300, 70_000])
@pytest.mark.parametrize("accumulate", [False, True])
def test_more_rows_than_a_block_has_threads(gpu, width, count, accumulate):
    tables = Tables(gpu, "dense", (count, width), **({"gradient_accumulation_steps": 2} if accumulate else {}))
    for part in (count, count // 2, 3):
        tables.step(tables.rng.permutation(count)[:part])
        tables.step(tables.rng.randint(0, count, 5))
    tables.check()


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_many_steps_and_histories_that_grow(gpu, mode, monkeypatch):
    monkeypatch.setattr("fastadam._core.deferred.history._FIRST_ROOM", 64)
    schedule = fastadam.schedules.CosineDecay(0.1, 200)
    tables = Tables(gpu, mode, (200, 3))
    tables.host.learning_rate = tables.device.learning_rate = schedule
    for step in range(150):
        tables.step([step % 7, 150 + step % 50])
        if step == 90:
            tables.device.sync()
            tables.host.sync()
    tables.check()


@pytest.mark.parametrize("mode", MODES)
def test_crowded_steps_dense_gradients_and_other_numbers(gpu, mode):
    tables = Tables(gpu, mode)
    tables.step([1, 2])
    tables.step(np.arange(40))
    tables.step([5])
    tables.dense_step()
    tables.step([6])
    tables.host.beta_1 = tables.device.beta_1 = 0.8
    tables.step([1, 6])
    tables.host.amsgrad = tables.device.amsgrad = True
    tables.step([7])
    tables.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids_on", ["host", "gpu"])
def test_gather_brings_rows_up_to_date(gpu, mode, ids_on):
    tables = Tables(gpu, mode)
    for ids in ([1, 2], [3], [39, 3]):
        tables.step(ids)
    ids = np.array([[3, 39], [0, 3]])
    found = tables.device.gather(tables.twin, ids if ids_on == "host" else gpu.array(ids))
    assert same(tables.host.gather(tables.table, ids), gpu.get(found))
    out = gpu.array(np.zeros((2, 5), F32))
    assert tables.device.gather(tables.twin, gpu.array(np.array([1, 2])), out=out) is out
    assert same(tables.host.gather(tables.table, [1, 2]), gpu.get(out))
    tables.step([0])
    tables.check()


def test_gather_refuses_what_it_cannot_write(gpu):
    tables = Tables(gpu, "deferred")
    with pytest.raises(ValueError, match=r"out: float32 \(2, 4\), expected a writable float32 \(2, 5\)"):
        tables.device.gather(tables.twin, [1, 2], out=gpu.array(np.zeros((2, 4), F32)))
    with pytest.raises(ValueError, match="indices: 40 is not a row of"):
        tables.device.gather(tables.twin, [40])
    with pytest.raises(TypeError, match="ids: expected a contiguous array of int32 or int64"):
        tables.device.gather(tables.twin, gpu.array(np.zeros(2, F32)))


def test_rows_and_dense_gradients_in_one_step(gpu):
    rng = np.random.RandomState(0)
    table, w = random_array(rng, (20, 3)), random_array(rng, (7,))
    twins = [gpu.array(table), gpu.array(w)]
    ours, theirs = (fastadam.Adam(0.01, global_clipnorm=0.1) for _ in range(2))
    for _ in range(3):
        values, gradient = random_array(rng, (2, 3)), random_array(rng, (7,))
        again = random_array(rng, (20, 3))
        slices = fastadam.IndexedSlices(values, [4, 4])
        ours.apply_gradients([(slices, table), (gradient, w), (again, table)])
        slices = fastadam.IndexedSlices(gpu.array(values), [4, 4])
        theirs.apply_gradients([(slices, twins[0]), (gpu.array(gradient), twins[1]), (gpu.array(again), twins[0])])
    assert same(table, gpu.get(twins[0]))
    assert same(w, gpu.get(twins[1]))


def test_accumulated_rows(gpu):
    tables = Tables(gpu, "dense", gradient_accumulation_steps=3, use_ema=True)
    for ids in ([1], [2, 1], [], [3], [3, 3], [0, 39]):
        tables.step(ids)
    tables.check()


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_of_a_lagging_table_go_on(gpu, mode, how):
    tables = Tables(gpu, mode)
    for ids in ([1, 2], [3], [4]):
        tables.step(ids)
    tables.host.sync()
    tables.device = pickle.loads(pickle.dumps(tables.device)) if how == "pickle" else copy.deepcopy(tables.device)
    tables.twin = gpu.array(gpu.get(tables.twin).copy())
    for ids in ([1], [5]):
        tables.step(ids)
    tables.check()


def test_a_lagging_table_of_the_host_goes_on_on_a_gpu(gpu):
    tables = Tables(gpu, "deferred")
    for ids in ([1, 2], [3], [4]):
        tables.host.apply_gradients([(fastadam.IndexedSlices(tables.values(len(ids)), ids), tables.table)])
    tables.device = pickle.loads(pickle.dumps(tables.host))
    tables.twin = gpu.array(tables.table)
    for ids in ([1], [5]):
        tables.step(ids)
    tables.check()


def test_max_staleness_sweeps(gpu):
    tables = Tables(gpu, "deferred", max_staleness=3)
    for ids in ([1, 2], [3], [4], [5], [1]):
        tables.step(ids)
    tables.check()


def test_other_modes_later(gpu):
    tables = Tables(gpu, "deferred")
    for mode in ("lazy", "deferred_fast", "dense"):
        tables.step([1, 2])
        tables.step([9])
        tables.host.sparse_update = tables.device.sparse_update = mode
    tables.step([5])
    tables.check()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(MODES),
    st.lists(
        st.lists(st.integers(0, 39), max_size=9) | st.sampled_from(["gather", "sync", "dense", "rate"]), max_size=9
    ),
)
def test_any_program_of_steps_and_reads(fake_extension, mode, program):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fastadam._cuda", fake_extension.native)
        patch.setattr(fastadam, "_cuda", fake_extension.native, raising=False)
        fake_extension.start()
        tables = Tables(fake_extension, mode, seed=1)
        for action in program:
            if action == "gather":
                ours = tables.host.gather(tables.table, [0, 5, 39])
                assert same(ours, tables.device.gather(tables.twin, [0, 5, 39]).get())
            elif action == "sync":
                tables.host.sync()
                tables.device.sync()
            elif action == "dense":
                tables.dense_step()
            elif action == "rate":
                tables.host.learning_rate = tables.device.learning_rate = 0.5
            else:
                tables.step(action)
        tables.check()


@pytest.mark.parametrize(("name", "value"), [("use_ema", True), ("gradient_accumulation_steps", 2)])
@pytest.mark.parametrize("mode", ["lazy", "deferred", "deferred_fast"])
def test_options_whose_steps_of_rows_only_the_host_makes_are_refused(gpu, mode, name, value):
    table = gpu.array(np.ones((40, 5), F32))
    slices = fastadam.IndexedSlices(gpu.array(np.ones((1, 5), F32)), gpu.array(np.array([1])))
    optimizer = fastadam.Adam(sparse_update=mode, **{name: value})
    message = f"a sparse gradient on a GPU with {name} and sparse_update='{mode}', expected sparse_update='dense'"
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients([(slices, table)])
    assert len(optimizer.weights) == 1
    optimizer.apply_gradients([(gpu.array(np.ones((40, 5), F32)), table)])
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients([(slices, table)])
    assert optimizer.iterations <= 1


def test_repeated_gradients_are_summed_unless_all_are_sparse(gpu):
    tables = Tables(gpu, "dense", sum_repeated=True)
    values, ids, dense = tables.values(4), np.array([3, 1, 3, 7]), tables.values(40)
    tables.host.apply_gradients([(fastadam.IndexedSlices(values, ids), tables.table), (dense, tables.table)])
    slices = fastadam.IndexedSlices(gpu.array(values), gpu.array(ids))
    tables.device.apply_gradients([(slices, tables.twin), (gpu.array(dense), tables.twin)])
    tables.check()
    with pytest.raises(ValueError, match=r"grads\[1\]: sparse, for vars\[0\] on a GPU, which comes twice"):
        tables.device.apply_gradients([(slices, tables.twin), (slices, tables.twin)])
    tables.check()
