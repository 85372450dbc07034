"""Averages and accumulators in the user's arrays: memory maps, so that a table larger than memory can have them."""

from __future__ import annotations

import itertools

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits
from fastadam import IndexedSlices
from fastadam._core.parts import parts_of
from helpers import run_python, weekly
from test_interrupts import either_way, interrupted

F32 = np.float32


def train(optimizer, table, steps):
    for step in steps:
        ids = [step % 3, 7]
        optimizer.gather(table, ids)
        slices = IndexedSlices(np.full((2, *table.shape[1:]), 0.5 + step, optimizer.get_slot(table, "m").dtype), ids)
        optimizer.apply_gradients([(slices, table)])


def table_of(dtype=F32, order="C", rows=30_000):
    values = np.random.default_rng(0).standard_normal((rows, 20), F32).astype(dtype, order=order)
    values[100:25_000] = 0
    return values


def arrays(kind, path, table):
    """An average: a file of holes, a file of zeros, or zeros in memory."""
    dtype = np.float64 if table.dtype == np.float64 else F32
    order = "C" if table.flags.c_contiguous else "F"
    if kind == "memory":
        return np.zeros(table.shape, dtype, order)
    found = np.memmap(path / f"average{len(list(path.iterdir()))}", dtype, "w+", shape=table.shape, order=order)
    if kind == "zeros":
        found[...] = 0
    return found


@pytest.mark.parametrize("kind", ["holes", "zeros", "memory"])
@pytest.mark.parametrize(
    ("dtype", "order"), [(F32, "C"), (F32, "F"), (np.float64, "C"), (np.float16, "C"), (ml_dtypes.bfloat16, "C")]
)
def test_an_average_of_zeros_begins_at_its_variable(dtype, order, kind, tmp_path):
    tables = [table_of(dtype, order) for _ in range(2)]
    optimizers = [fastadam.Adam(0.1, use_ema=True, ema_momentum=0.9) for _ in range(2)]
    optimizers[0].build([tables[0]])
    average = arrays(kind, tmp_path, tables[1])
    optimizers[1].build([tables[1]], slots=[{"average": average}])
    np.testing.assert_array_equal(bits(average), bits(optimizers[0].get_slot(tables[0], "average")))
    for step in range(4):
        for optimizer, table in zip(optimizers, tables, strict=True):
            optimizer.apply_gradients([(np.full_like(table, step - 1), table)])
    assert optimizers[1].get_slot(tables[1], "average") is average
    np.testing.assert_array_equal(bits(average), bits(optimizers[0].get_slot(tables[0], "average")))


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred", "deferred_fast"])
def test_sparse_steps_have_the_same_bits(mode, tmp_path):
    tables = [table_of() for _ in range(2)]
    optimizers = [fastadam.Adam(0.1, use_ema=True, ema_momentum=0.9, sparse_update=mode) for _ in range(2)]
    optimizers[0].build([tables[0]])
    average = arrays("holes", tmp_path, tables[1])
    optimizers[1].build([tables[1]], slots=[{"average": average}])
    for optimizer, table in zip(optimizers, tables, strict=True):
        train(optimizer, table, range(6))
        optimizer.sync()
    np.testing.assert_array_equal(bits(tables[0]), bits(tables[1]))
    np.testing.assert_array_equal(bits(average), bits(optimizers[0].get_slot(tables[0], "average")))
    before = tables[1].copy()
    with optimizers[1].averages([tables[1]]):
        np.testing.assert_array_equal(bits(tables[1]), bits(average))
    np.testing.assert_array_equal(bits(tables[1]), bits(before))
    optimizers[1].finalize_variable_values([tables[1]])
    np.testing.assert_array_equal(bits(tables[1]), bits(average))


@pytest.mark.parametrize("place", [0, -1])
def test_an_average_of_other_values_goes_on(place, tmp_path):
    """As after a crash, from files that were not saved."""
    table = table_of()
    average = arrays("holes", tmp_path, table)
    average[place, place] = 3.0
    optimizer = fastadam.Adam(0.1, use_ema=True)
    optimizer.build([table], slots=[{"average": average}])
    assert average[place, place] == 3.0
    assert np.count_nonzero(average) == 1


def test_rows_of_zeros_take_no_room_in_the_file(tmp_path):
    table = np.zeros((30_000, 64), F32)
    table[::3000] = 1
    average = arrays("holes", tmp_path, table)
    fastadam.Adam(use_ema=True).build([table], slots=[{"average": average}])
    average.flush()
    np.testing.assert_array_equal(average, table)
    assert (tmp_path / "average0").stat().st_blocks * 512 < 400_000


def test_an_average_in_a_file_is_loaded_into_a_file(tmp_path):
    table, other = table_of(), table_of()
    optimizer = fastadam.Adam(0.1, use_ema=True, sparse_update="deferred")
    optimizer.build([table], slots=[{"average": arrays("holes", tmp_path, table)}])
    train(optimizer, table, range(4))
    optimizer.save(tmp_path / "saved", values=True)
    train(optimizer, table, range(4, 8))
    optimizer.save_delta(tmp_path / "delta")
    for deltas in ([], [tmp_path / "delta"]):
        average = arrays("holes", tmp_path, table)
        loaded = fastadam.Adam.load(tmp_path / "saved", [other], deltas=deltas, slots=[{"average": average}])
        assert loaded.get_slot(other, "average") is average
        if not deltas:
            train(loaded, other, range(4, 8))
        loaded.sync()
        np.testing.assert_array_equal(bits(average), bits(optimizer.get_slot(table, "average")))


def test_an_average_moves_to_a_longer_file(tmp_path):
    table = table_of(rows=300)
    optimizer = fastadam.Adam(0.1, use_ema=True, sparse_update="deferred")
    optimizer.build([table], slots=[{"average": arrays("holes", tmp_path, table)}])
    train(optimizer, table, range(4))
    optimizer.sync()
    before = optimizer.get_slot(table, "average").copy()
    new = np.concatenate([table, np.full((50, 20), 2.0, F32)])
    average = arrays("holes", tmp_path, new)
    average[...] = 5.0  # it is overwritten
    optimizer.resize(table, new, slots={"average": average})
    assert optimizer.get_slot(new, "average") is average
    np.testing.assert_array_equal(average[:300], before)
    assert (average[300:] == 2.0).all()


REFUSED = {
    "no average": ({}, lambda t, a: [{"average": a}], "expected 'm', 'v'; an average needs use_ema=True"),
    "dtype": (
        {"use_ema": True},
        lambda t, a: [{"average": a.astype(np.float64)}],
        r"slots\[0\]\['average'\]: float64, expected float32",
    ),
    "the table": ({"use_ema": True}, lambda t, a: [{"average": t}], r"\['average'\]: shares memory with vars\[0\]"),
    "one array": ({"use_ema": True}, lambda t, a: [{"average": a, "m": a}], r"shares memory with slots\[0\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_average_changes_nothing(kind, tmp_path):
    options, slots, message = REFUSED[kind]
    table = table_of()
    average = arrays("holes", tmp_path, table)
    before = table.copy()
    optimizer = fastadam.Adam(**options)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.build([table], slots=slots(table, average))
    assert not average.any()
    np.testing.assert_array_equal(table, before)
    assert optimizer.weights == [0]


@pytest.mark.slow
def test_a_table_and_its_average_do_not_become_resident(tmp_path):
    result = run_python(
        """
import os, re, numpy as np, fastadam
from pathlib import Path
def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
names = ("table", "m", "v", "average")
folder, shape = os.environ["FOLDER"], (400_000, 64)  # 102 MB each
table, m, v, average = (np.memmap(f"{folder}/{name}", np.float32, "w+", shape=shape) for name in names)
table[::7] = 1.0
table.flush()
table._mmap.madvise(4)  # MADV_DONTNEED
optimizer = fastadam.Adam(0.1, sparse_update="deferred", use_ema=True, ema_momentum=0.9)
def step():
    optimizer.gather(table, [0, 399_999])
    slices = fastadam.IndexedSlices(np.ones((2, 64), np.float32), [0, 399_999])
    optimizer.apply_gradients([(slices, table)])
works = {
    "build": lambda: optimizer.build([table], slots=[{"m": m, "v": v, "average": average}]),
    "step": step,
    "sync": optimizer.sync,
    "another step": step,
    "save": lambda: optimizer.save(f"{folder}/saved", values=True),
}
for name, work in works.items():
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    work()
    peak = resident("VmHWM") - before
    assert peak < 60e6, (name, peak)
assert abs(average[7, 0] - 1) < 1e-6 and average[8, 0] == 0 and abs(average[0, 0] - 0.89) < 1e-4
""",
        FOLDER=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a generator that is closed
@either_way
@pytest.mark.parametrize("mode", ["deferred", *weekly("dense")])
def test_a_build_that_is_interrupted_leaves_an_average_of_zeros_or_all_of_it(way, mode, monkeypatch):
    """Half of it would be taken for one that goes on."""
    monkeypatch.setattr("fastadam._core.native.chunks.CHUNK", 4096)
    table = np.random.default_rng(0).standard_normal((100, 16), F32)
    half_begun = 0
    for place in itertools.count():
        m, v, average = np.ones_like(table), np.ones_like(table), np.zeros_like(table)
        optimizer = fastadam.Adam(0.1, use_ema=True, sparse_update=mode)
        slots = [{"m": m, "v": v, "average": average}]
        error = interrupted(lambda o=optimizer, s=slots: o.build([table], slots=s), place, way)
        if error is None:
            break
        if not parts_of(optimizer).state.slots.arrays:  # not get_slot, after which every row is looked at
            half_begun += 1
            assert not average.any() or np.array_equal(average, table)
            optimizer.build([table], slots=slots)
        np.testing.assert_array_equal(average, table)
        values = table.copy()
        optimizer.apply_gradients([(IndexedSlices(np.ones((1, 16), F32), [3]), table)])
        optimizer.sync()
        assert (table != values).all(), "moments that were given move every row"
        table[...] = values
    assert half_begun > 10


# ---- accumulators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred", "deferred_fast"])
def test_accumulated_steps_have_the_same_bits(mode, tmp_path):
    tables = [table_of() for _ in range(2)]
    optimizers = [fastadam.Adam(0.1, sparse_update=mode, gradient_accumulation_steps=3) for _ in range(2)]
    optimizers[0].build([tables[0]])
    sums = arrays("holes", tmp_path, tables[1])
    optimizers[1].build([tables[1]], slots=[{"gradient_accumulator": sums}])
    for optimizer, table in zip(optimizers, tables, strict=True):
        train(optimizer, table, range(10))
        optimizer.save(tmp_path / "saved")
        train(optimizer, table, range(10, 13))
        optimizer.sync()
    assert optimizers[1].get_slot(tables[1], "gradient_accumulator") is sums
    np.testing.assert_array_equal(bits(tables[0]), bits(tables[1]))
    for found, expected in zip(optimizers[1].get_weights(), optimizers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(bits(found), bits(expected))
    loaded_sums = arrays("holes", tmp_path, tables[1])
    loaded = fastadam.Adam.load(tmp_path / "saved", [tables[1]], slots=[{"gradient_accumulator": loaded_sums}])
    assert loaded.get_slot(tables[1], "gradient_accumulator") is loaded_sums
    assert np.flatnonzero(loaded_sums.any(1)).tolist() == [0, 7]  # of the call after three whole cycles


def test_an_accumulator_that_has_sums_is_refused():
    table, sums = np.ones((5, 2), F32), np.zeros((5, 2), F32)
    sums[3, 1] = 1
    optimizer = fastadam.Adam(gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"^slots\[0\]\['gradient_accumulator'\]: has sums of earlier gradients"):
        optimizer.build([table], slots=[{"gradient_accumulator": sums}])
    assert len(optimizer.get_weights()) == 1
    with pytest.raises(ValueError, match=r"expected 'm', 'v'; an accumulator needs gradient_accumulation_steps$"):
        fastadam.Adam().build([table], slots=[{"gradient_accumulator": sums}])


def test_an_accumulator_moves_to_a_file_with_its_rows(tmp_path):
    table = table_of(rows=20)
    optimizer = fastadam.Adam(sparse_update="deferred", gradient_accumulation_steps=2)
    optimizer.build([table])
    train(optimizer, table, [1])
    before = optimizer.get_slot(table, "gradient_accumulator").copy()
    optimizer.sync()
    longer = np.concatenate([table, table])
    sums = np.full_like(longer, np.nan)
    optimizer.resize(table, longer, slots={"gradient_accumulator": sums})
    np.testing.assert_array_equal(sums, np.concatenate([before, np.zeros_like(before)]))
