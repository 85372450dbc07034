"""Slots in the user's arrays: ``build(variables, slots=...)``, and of ``load`` and ``resize``."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import fastadam
import numpy as np
import pytest
from cases import bits
from fastadam import IndexedSlices

F32 = np.float32
TELLS_FILES = Path("/proc/self/maps").exists()  # of the system: which file lies at an address


def slots_of(table, *names):
    return {name: np.zeros_like(table) for name in names}


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("start", [0.0, 0.25])
@pytest.mark.usefixtures("rows_wait")
def test_arrays_that_are_given_are_the_slots(mode, amsgrad, start):
    names = ("m", "v", "vhat") if amsgrad else ("m", "v")
    tables = [np.ones((300, 3), F32) for _ in range(2)]
    given = {name: np.full((300, 3), start, F32) for name in names}
    optimizers = [fastadam.Adam(0.1, sparse_update=mode, amsgrad=amsgrad) for _ in range(2)]
    optimizers[0].build([tables[0]])
    optimizers[0].set_weights([0, *(np.full((300, 3), start, F32) for _ in names)])
    optimizers[1].build([tables[1]], slots=[given])
    for k in range(10):
        for optimizer, table in zip(optimizers, tables, strict=True):
            optimizer.apply_gradients([(IndexedSlices(np.ones((1, 3), F32), [k % 3]), table)])
    for optimizer in optimizers:
        optimizer.sync()
    np.testing.assert_array_equal(bits(tables[0]), bits(tables[1]))
    for name in names:
        assert optimizers[1].get_slot(tables[1], name) is given[name]
        np.testing.assert_array_equal(bits(given[name]), bits(optimizers[0].get_slot(tables[0], name)))


def test_some_slots_of_some_variables_are_given(tmp_path):
    tables = [np.ones((40, 3), F32), np.ones(5, np.float64), np.ones((4, 2), F32)]
    mapped = np.memmap(tmp_path / "v", F32, "w+", shape=(40, 3))
    optimizer = fastadam.Adam(0.1)
    optimizer.build(tables, slots=[{"v": mapped}, {"m": np.zeros(5)}, None])
    assert optimizer.get_slot(tables[0], "v") is mapped
    optimizer.apply_gradients([(np.ones_like(table), table) for table in tables])
    assert (mapped != 0).all()
    assert [type(array) for array in optimizer.get_weights()[1:]] == [np.ndarray] * 6
    copied = pickle.loads(pickle.dumps(optimizer))
    copied.build(tables)
    assert type(copied.get_slot(tables[0], "v")) is np.ndarray


BAD_SLOTS = {
    "count": (lambda t: [], ValueError, "slots: 0 items, expected one for each of 1 variables"),
    "no list": (lambda t: 3, TypeError, "slots: int, expected None or a dict for each variable"),
    "no dict": (lambda t: [t], TypeError, r"slots\[0\]: ndarray, expected a dict"),
    "name": (
        lambda t: [slots_of(t, "vhat")],
        ValueError,
        r"slots\[0\]\['vhat'\]: not a slot that can be given, expected 'm', 'v'",
    ),
    "list": (lambda t: [{"m": t.tolist()}], TypeError, r"slots\[0\]\['m'\]: list, expected a NumPy array"),
    "dtype": (lambda t: [{"m": np.zeros(t.shape)}], TypeError, r"slots\[0\]\['m'\]: float64, expected float32"),
    "byte order": (lambda t: [{"m": np.zeros(t.shape, ">f4")}], TypeError, r"slots\[0\]\['m'\]: >f4, expected float32"),
    "shape": (
        lambda t: [{"m": np.zeros((3, 2), F32)}],
        ValueError,
        r"slots\[0\]\['m'\]: shape \(3, 2\), expected \(20, 2\)",
    ),
    "layout": (
        lambda t: [{"m": np.zeros(t.shape, F32, "F")}],
        ValueError,
        r"slots\[0\]\['m'\]: strides .*, expected a contiguous",
    ),
    "read-only": (lambda t: [{"m": frozen(t)}], ValueError, r"slots\[0\]\['m'\]: read-only"),
    "the variable": (lambda t: [{"m": t}], ValueError, r"slots\[0\]\['m'\]: shares memory with vars\[0\]"),
    "one twice": (
        lambda t: [dict.fromkeys("mv", np.zeros_like(t))],
        ValueError,
        r"slots\[0\]\['v'\]: shares memory with slots\[0\]\['m'\]",
    ),
}


def frozen(like):
    array = np.zeros_like(like)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("kind", BAD_SLOTS)
def test_slots_that_cannot_be_used_are_refused_by_name_and_nothing_is_changed(kind):
    make, error, pattern = BAD_SLOTS[kind]
    table, optimizer = np.ones((20, 2), F32), fastadam.Adam()
    with pytest.raises(error, match=pattern):
        optimizer.build([table], slots=make(table))
    assert len(optimizer.get_weights()) == 1
    optimizer.build([table], slots=[slots_of(table, "m", "v")])


def test_slots_of_a_variable_that_has_them_are_refused():
    table, other, optimizer = np.ones((20, 2), F32), np.ones((20, 2), F32), fastadam.Adam()
    optimizer.build([table])
    with pytest.raises(ValueError, match=r"slots\[0\]\['m'\]: .* has this slot already"):
        optimizer.build([table], slots=[slots_of(table, "m")])
    with pytest.raises(ValueError, match=r"slots\[0\]\['m'\]: shares memory with v of"):
        optimizer.build([other], slots=[{"m": optimizer.get_slot(table, "v")}])


FILES = {  # names of files, and the element at which each array begins
    "m and v": [("table", 0), ("m", 0), ("m", 0)],
    "parts of m and v": [("table", 0), ("m", 0), ("m", 30)],
    "table and m": [("m", 0), ("m", 0), ("v", 0)],
    "parts of one": [("all", 0), ("all", 40), ("all", 80)],
    "three": [("table", 0), ("m", 0), ("v", 0)],
}


def in_files(folder, kind, shape=(20, 2)):
    arrays = []
    for name, at in FILES[kind]:
        (folder / name).touch()
        os.truncate(folder / name, 1000)
        arrays.append(np.memmap(folder / name, F32, "r+", offset=4 * at, shape=shape))
    return arrays


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("call", ["build", "load"])
def test_two_arrays_in_one_part_of_a_file_are_refused(call, kind, tmp_path):
    table, m, v = in_files(tmp_path, kind)
    optimizer = fastadam.Adam(0.1)
    if call == "load":
        saved = np.ones((20, 2), F32)
        optimizer.apply_gradients([(np.ones_like(saved), saved)])
        optimizer.save(tmp_path / "saved")

    def give():
        if call == "build":
            optimizer.build([table], slots=[{"m": m, "v": v}])
        else:
            fastadam.Adam.load(tmp_path / "saved", [table], slots=[{"m": m, "v": v}])

    if kind in ("three", "parts of one") or not TELLS_FILES:
        give()
        return
    before = len(optimizer.get_weights())
    with pytest.raises(ValueError, match=r"^slots\[0\]\['[mv]'\]: lies in the same part of a file as "):
        give()
    assert len(optimizer.get_weights()) == before
    assert not any(array.any() for array in (table, m, v))


@pytest.mark.parametrize("rows", [None, "in their places", "permuted"])
def test_the_files_of_a_table_grow_in_place(rows, tmp_path):
    (table, m, v), twin = in_files(tmp_path, "three"), np.zeros((20, 2), F32)
    optimizers = [fastadam.Adam(0.1, sparse_update="deferred") for _ in range(2)]
    optimizers[0].build([table], slots=[{"m": m, "v": v}])
    slices = IndexedSlices(np.ones((2, 2), F32), [3, 7])
    for optimizer, each in zip(optimizers, (table, twin), strict=True):
        optimizer.gather(each, [3, 7])
        optimizer.apply_gradients([(slices, each)])
    before = m.copy()
    longer, *slots = in_files(tmp_path, "three", (30, 2))
    given = dict(zip("mv", slots, strict=True))
    if rows == "permuted":
        if not TELLS_FILES:
            return
        longer[20:] = longer[:10]
        with pytest.raises(ValueError, match=r"^slots\['m'\]: lies in the same part of a file as m of vars\[0\]"):
            optimizers[0].resize(table, longer, rows=np.arange(30) % 20, slots=given)
        np.testing.assert_array_equal(m, before)
        return
    optimizers[0].resize(table, longer, rows=rows and np.where(np.arange(30) < 20, np.arange(30), -1), slots=given)
    optimizers[1].resize(twin, grown := np.concatenate([twin, np.zeros((10, 2), F32)]))
    for optimizer, each in zip(optimizers, (longer, grown), strict=True):
        optimizer.gather(each, [3, 25])
        optimizer.apply_gradients([(IndexedSlices(np.ones((2, 2), F32), [3, 25]), each)])
        optimizer.sync()
    np.testing.assert_array_equal(bits(longer), bits(grown))
    for name, slot in given.items():
        assert optimizers[0].get_slot(longer, name) is slot
        np.testing.assert_array_equal(bits(slot), bits(optimizers[1].get_slot(grown, name)))


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="needs Linux: finds holes of files")
def test_a_file_of_holes_is_known_to_be_zero(tmp_path):
    from fastadam._core.state.given_slots import is_a_hole

    array = np.memmap(tmp_path / "m", F32, "w+", shape=(100_000, 3))
    assert is_a_hole(array)
    assert is_a_hole(array[5:])
    private = np.memmap(tmp_path / "m", F32, "c", shape=(100_000, 3))
    private[50_000] = 1
    assert not is_a_hole(private)
    assert not is_a_hole(np.zeros(3, F32))
    array[50_000] = 1
    assert not is_a_hole(array)
