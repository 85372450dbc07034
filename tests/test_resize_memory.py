"""Memory of variables that are replaced, forgotten or reset, and moments in arrays of the user."""

from __future__ import annotations

import gc
import sys
import weakref

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import random_array
from fastadam import IndexedSlices
from helpers import F32, ones, rss_anon, slow
from resize_cases import MODES, NEW, Twins, state_of, used

pytestmark = pytest.mark.usefixtures("passes_touch_all_rows")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["resize", "forget"])
def test_nothing_of_the_old_array_is_kept_alive(mode, how):
    optimizer, table = used(**MODES[mode])
    optimizer.exclude_from_weight_decay(var_list=[table])
    optimizer.sync()
    dead = [weakref.ref(table), *(weakref.ref(slot) for slot in optimizer.weights[1:])]
    assert len(dead) > 2
    if how == "resize":
        optimizer.resize(table, table[:4].copy())
    else:
        optimizer.forget(table)
    del table
    gc.collect()
    assert [ref() is None for ref in dead] == [True] * len(dead)


def test_a_step_in_buckets_that_is_over_keeps_nothing_alive():
    optimizer, table = fastadam.Adam(0.1, global_clipnorm=1.0), ones(6, 2)
    optimizer.build([table])
    optimizer.begin_step(early=True)
    optimizer.step_bucket([(ones(6, 2), table)]).result()
    optimizer.end_step()
    dead = weakref.ref(table)
    optimizer.forget(table)
    del table
    gc.collect()
    assert dead() is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: counts pages in /proc")
@pytest.mark.parametrize("mode", ["lazy", "deferred"])
def test_a_large_table_that_grows_makes_only_moments_of_touched_rows_resident(mode, tmp_path):
    old = np.memmap(tmp_path / "old", F32, "w+", shape=(200_000, 64))
    new = np.memmap(tmp_path / "new", F32, "w+", shape=(400_000, 64))
    optimizer = fastadam.Adam(0.1, sparse_update=mode)
    optimizer.apply_gradients([(IndexedSlices(ones(3, 64), [5, 70_000, 199_999]), old)])
    optimizer.sync()
    new[[5, 70_000, 199_999]] = old[[5, 70_000, 199_999]]
    before = rss_anon()
    optimizer.resize(old, new)
    optimizer.reset(new, [5])
    assert rss_anon() - before < 10 * 1024  # m and v have 200 MB; the copies of a few thousand rows, and their numbers
    optimizer.apply_gradients([(IndexedSlices(ones(1, 64), [399_999]), new)])
    assert optimizer.get_slot(new, "m")[[5, 70_000, 399_999], 0].round(4).tolist() == pytest.approx(
        [0, 0.1, 0.1], abs=0.02
    )


@pytest.mark.parametrize("mode", ["lazy", "deferred"])
def test_files_that_are_given_take_room_for_the_rows_that_moved(mode, tmp_path):
    def files(name, rows):
        return [np.memmap(tmp_path / f"{name}{k}", F32, "w+", shape=(rows, 64)) for k in "tmv"]

    (old, *slots), (new, *others) = files("old", 100_000), files("new", 100_100)
    ids = np.random.default_rng(0).choice(100_000, 50, replace=False)
    optimizer = fastadam.Adam(0.1, sparse_update=mode)
    optimizer.build([old], slots=[dict(zip("mv", slots, strict=True))])
    optimizer.apply_gradients([(IndexedSlices(ones(50, 64), ids), old)])
    new[ids] = old[ids]
    optimizer.resize(old, new, slots=dict(zip("mv", others, strict=True)))
    for name, before, after in zip("mv", slots, others, strict=True):
        np.testing.assert_array_equal(after[:100_000], before)
        assert (tmp_path / f"new{name}").stat().st_blocks * 512 < 50 * 3 * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: counts pages in /proc")
@pytest.mark.parametrize("mode", ["lazy", "deferred"])
@pytest.mark.parametrize("after", ["steps", *slow("get_slot", "load")])
@pytest.mark.parametrize("which", ["one", "all", "rows"])
def test_a_reset_writes_only_rows_that_have_moments(which, after, mode, tmp_path):
    table = np.memmap(tmp_path / "table", F32, "w+", shape=(200_000, 64))
    optimizer = fastadam.Adam(0.1, sparse_update=mode)
    rows = np.arange(7, 200_000, 4999)
    for _ in range(2):
        optimizer.apply_gradients([(IndexedSlices(ones(len(rows), 64), rows), table)])
    if after == "get_slot":
        optimizer.get_slot(table, "m")
    elif after == "load":
        optimizer.save(tmp_path / "adam")
        optimizer = fastadam.Adam.load(tmp_path / "adam", [table])
    before = rss_anon()
    optimizer.reset(*{"one": [table], "all": [], "rows": [table, np.arange(200_000)]}[which])
    assert rss_anon() - before < 30 * 1024  # m and v have 100 MB; 200000 indices are sorted and checked
    assert not optimizer.get_slot(table, "m").any()
    assert not optimizer.get_slot(table, "v").any()


@pytest.mark.parametrize("ids", [None, [0, 2, 3, 97, 98]])
@pytest.mark.parametrize("dtype", [F32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("mode", ["lazy averages", "averages"])
def test_a_reset_reaches_every_row_between_rows_that_have_started(mode, dtype, ids):
    table = random_array(np.random.RandomState(0), (100, 700), dtype=dtype)
    optimizer = fastadam.Adam(0.1, use_ema=True, sparse_update="lazy" if "lazy" in mode else "dense")
    for rows in ([0, 1, 2, 40, 97], [2, 3, 41, 99]):
        optimizer.apply_gradients([(IndexedSlices(np.ones((len(rows), 700), dtype), rows), table)])
    names = ("m", "v", "average")
    expected = {name: optimizer.get_slot(table, name).copy() for name in names}
    for name, start in zip(names, (0, 0, table), strict=True):
        expected[name][slice(None) if ids is None else ids] = np.broadcast_to(start, table.shape)[
            slice(None) if ids is None else ids
        ]
    optimizer.reset(table, ids)
    for name in names:
        np.testing.assert_array_equal(optimizer.get_slot(table, name), expected[name])


@pytest.mark.parametrize("mode", ["dense", "deferred", "amsgrad"])
def test_moments_can_be_given_arrays_of_the_users(mode):
    twins = Twins(**MODES[mode])
    for ids in ([0, 1], [2]):
        twins.step(ids)
    names = ("m", "v", "vhat")[: 3 if mode == "amsgrad" else 2]
    slots = {name: np.full((4, 3), np.nan, F32) for name in names}
    resize = twins.optimizer.resize
    twins.optimizer.resize = lambda old, new, rows: resize(old, new, rows, slots)
    twins.resize([2, -1, 0, 1])
    del twins.optimizer.resize
    assert all(twins.optimizer.get_slot(twins.table, name) is slots[name] for name in names)
    twins.step([1, 3])
    twins.compare()


SLOTS = {
    "not a dict": (lambda m: [m], TypeError, "^slots: list, expected a dict"),
    "shape": (lambda m: {"m": np.zeros((6, 2), F32)}, ValueError, r"^slots\['m'\]: shape \(6, 2\), expected \(3, 2\)"),
    "dtype": (lambda m: {"v": np.zeros((3, 2))}, TypeError, r"^slots\['v'\]: float64, expected float32"),
    "name": (lambda m: {"vhat": np.zeros((3, 2), F32)}, ValueError, r"^slots\['vhat'\]: not a slot that can be given"),
    "shared": (lambda m: {"m": m[:3]}, ValueError, r"^slots\['m'\]: shares memory with m of vars\[0\]"),
    "the new one": (lambda m: {"m": NEW}, ValueError, r"^slots\['m'\]: shares memory with new"),
}  # fmt: skip


@pytest.mark.parametrize("case", SLOTS)
def test_arrays_that_cannot_be_moments_are_refused(case):
    make, error, message = SLOTS[case]
    optimizer, table = used()
    given = make(optimizer.get_slot(table, "m"))
    before = state_of(optimizer, table)
    with pytest.raises(error, match=message):
        optimizer.resize(table, NEW, slots=given)
    assert state_of(optimizer, table) == before
