"""Work on several streams of a GPU, in the order of the calls. The fake runtime runs what nothing orders in another."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from cases import random_array
from fastadam._core.native import arrays
from test_cuda import F32, Pair, arrays_of, same
from test_cuda_rows import MODES, Tables

pytestmark = pytest.mark.usefixtures("rows_wait")


def test_every_step_on_a_stream_of_its_own(gpu):
    pair = Pair(gpu, arrays_of("float32"), global_clipnorm=0.5, use_ema=True)
    for seed in range(1, 6):
        gpu.use_new_stream()
        pair.step(arrays_of("float32", seed))
    pair.check()


def test_a_new_stream_at_the_address_of_one_that_is_gone_waits_for_its_work(fake_gpu):
    pair = Pair(fake_gpu, arrays_of("float32"))
    pair.step(arrays_of("float32", 1))
    gradients = [arrays_of("float32", seed) for seed in (2, 3)]
    placed = [[fake_gpu.array(g) for g in given] for given in gradients]
    for given, theirs in zip(gradients, placed, strict=True):
        pair.host.apply_gradients(zip(given, pair.arrays, strict=True))
        pair.device.apply_gradients(zip(theirs, pair.twins, strict=True))
        fake_gpu.replace_stream()  # its work is still queued
    pair.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_steps_and_gathers_each_on_a_stream_of_its_own(gpu, mode, seed):
    tables, rng = Tables(gpu, mode, seed=seed), np.random.RandomState(seed)
    found = []
    for _ in range(12):
        gpu.use_new_stream()
        ids = rng.randint(0, 40, 5)
        if rng.randint(2):
            tables.step(ids)
        else:
            placed = gpu.array(ids)
            found.append((tables.host.gather(tables.table, ids), tables.device.gather(tables.twin, placed)))
    for ours, theirs in found:
        assert same(ours, gpu.get(theirs))
    tables.check()


def test_a_gather_right_after_a_step_on_another_stream_reads_the_new_rows(gpu):
    tables = Tables(gpu, "dense")
    tables.step([1, 2])
    ids, out = gpu.array(np.array([1, 2])), gpu.array(np.zeros((2, 5), F32))
    tables.device.gather(tables.twin, ids, out=out)
    values, rows = tables.values(2), np.array([2, 3])
    slices = fastadam.IndexedSlices(gpu.array(values), gpu.array(rows))
    gpu.use_new_stream()
    tables.device.apply_gradients([(slices, tables.twin)])  # nothing waits for it
    gpu.use_new_stream()
    tables.device.gather(tables.twin, ids, out=out)
    tables.host.apply_gradients([(fastadam.IndexedSlices(values, rows), tables.table)])
    assert same(tables.host.gather(tables.table, [1, 2]), gpu.get(out))


def test_a_step_right_after_a_gather_on_another_stream_leaves_it_the_old_rows(gpu):
    tables = Tables(gpu, "dense")
    tables.step([1, 2])
    ids, out = gpu.array(np.array([1, 2])), gpu.array(np.zeros((2, 5), F32))
    tables.device.gather(tables.twin, ids, out=out)
    before = tables.host.gather(tables.table, [1, 2])
    slices = fastadam.IndexedSlices(gpu.array(tables.values(1)), gpu.array(np.array([1])))
    gpu.use_new_stream()
    tables.device.gather(tables.twin, ids, out=out)
    gpu.use_new_stream()
    tables.device.apply_gradients([(slices, tables.twin)])
    assert same(before, gpu.get(out))


@pytest.mark.parametrize("what", ["variable", "learning rate"])
def test_what_the_host_writes_is_there_for_any_stream(gpu, what):
    w, rate = np.ones(5, F32), np.array(0.5, F32)
    twin, placed = gpu.array(w), gpu.array(rate)
    host, device = fastadam.Adam(0.5), fastadam.Adam(placed)
    for seed in range(3):
        gradient = random_array(np.random.RandomState(seed), (5,))
        given = gpu.array(gradient)
        gpu.use_new_stream()
        if what == "variable":
            w[:] = seed
            arrays.assign(twin, w)
        else:
            host.learning_rate = 0.5**seed
            arrays.assign(placed, 0.5**seed)
        device.apply_gradients([(given, twin)])
        host.apply_gradients([(gradient, w)])
    assert same(w, gpu.get(twin))


def test_the_first_of_the_bad_ids_of_gathers_is_reported(gpu):
    tables = Tables(gpu, "dense")
    ids = np.zeros(5000, np.int64)
    ids[[1234, 600, 4000]] = [40, -3, 41]
    out = tables.device.gather(tables.twin, gpu.array(ids))
    assert not gpu.get(out)[[600, 1234, 4000]].any()
    with pytest.raises(ValueError, match=r"an earlier gather read index -3 at position 600, out of range"):
        tables.device.gather(tables.twin, [1])


def test_bad_ids_of_gathers_on_several_streams_are_reported_one_gather_at_a_time(fake_gpu):
    tables = Tables(fake_gpu, "dense")
    tables.step([1])
    placed = [fake_gpu.array(np.array(ids)) for ids in ([1, 50, 51], [60, 2, 61])]
    out = [fake_gpu.array(np.zeros((3, 5), F32)) for _ in placed]
    for ids, to in zip(placed, out, strict=True):
        fake_gpu.use_new_stream()
        tables.device.gather(tables.twin, ids, out=to)  # a real GPU may have told the host
    assert not fake_gpu.get(out[0])[1:].any()
    with pytest.raises(ValueError, match="read index 50 at position 1"):
        tables.device.gather(tables.twin, [1])
    fake_gpu.get(tables.device.gather(tables.twin, placed[1]))
    with pytest.raises(ValueError, match="read index 60 at position 0"):
        tables.device.gather(tables.twin, [1])
    tables.step([2])
    tables.check()
