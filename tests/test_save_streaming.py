"""Files are written and read in pieces: memory maps larger than the memory at hand stay out of it."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits
from fastadam._core.native import chunks
from helpers import assert_same

F32 = np.float32
PAGE = mmap.PAGESIZE
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


# ---- resident memory ---------------------------------------------------------------------------------------------------

PEAK = """
import os, re, resource, sys
import fastadam, numpy as np
from pathlib import Path

MIB = 2**20

def resident(*names):
    status = Path("/proc/self/status").read_text()
    return sum(int(re.search(name + r":\\s+(\\d+) kB", status)[1]) * 1024 for name in names)

def assert_bounded(work, most=64 * MIB):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, now = resident("VmRSS"), resident("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (now + most, resource.RLIM_INFINITY))
    work()
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    peak, after = resident("VmHWM") - before, resident("VmRSS") - before
    assert peak < most and after < most // 4, (peak / MIB, after / MIB)

def blocks(path):
    return os.stat(path).st_blocks * 512

path, mode, order = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
rows, width = (2**19 if order == "C" else 2**18), 128  # 256 or 128 MiB: F order takes its time
w = np.memmap(path / "w", np.float32, "w+", shape=(rows, width), order=order)
ids = np.arange(5, rows, rows // 1000)
w[ids] = ids[:, None]
w.flush()
"""

SAVED = (
    PEAK
    + """
optimizer = fastadam.Adam(0.1)
optimizer.build([w])
if mode == "r":
    w.flags.writeable = False
assert_bounded(lambda: optimizer.save(path / "opt.safetensors", values=True))
assert blocks(path / "opt.safetensors") < (32 if order == "C" else 160) * MIB, blocks(path / "opt.safetensors") / MIB
del optimizer, w
x = np.memmap(path / "x", np.float32, "w+", shape=(rows, width), order=order)
loaded = []
def load():
    loaded.append(fastadam.Adam.load(path / "opt.safetensors", [x]))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
load()
peak = resident("VmHWM") - before
assert peak < 64 * MIB, peak / MIB
assert (x[ids] == ids[:, None]).all() and not x[ids + 1].any()
assert blocks(path / "x") < (32 if order == "C" else 160) * MIB, blocks(path / "x") / MIB
"""
)


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_table_that_is_a_memory_map_does_not_become_resident(order, tmp_path):
    subprocess.run([sys.executable, "-c", SAVED, str(tmp_path), "r+", order], check=True)


# ---- what may be dropped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r+", "w+", "c", "anonymous", "private"])
def test_no_value_is_lost_in_memory_that_is_saved(mode, tmp_path):
    """Pages of private and anonymous maps have values that no file has."""
    (tmp_path / "w").write_bytes(bytes(4 * 50 * PAGE))
    if mode == "anonymous":
        w = np.frombuffer(mmap.mmap(-1, 4 * 50 * PAGE), F32)
    elif mode == "private":
        with (tmp_path / "w").open("r+b") as file:
            w = np.frombuffer(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE), F32)
    else:
        w = np.memmap(tmp_path / "w", F32, mode, shape=(50 * PAGE,))
    values = np.random.RandomState(0).standard_normal(w.size).astype(F32)
    w[...] = values
    view = np.asarray(w)[3:]
    optimizer = fastadam.Adam(0.1)
    optimizer.build([view])
    optimizer.save(tmp_path / "opt", values=True)
    np.testing.assert_array_equal(w, values)
    fastadam.Adam.load(tmp_path / "opt", [other := np.zeros_like(values[3:])])
    np.testing.assert_array_equal(other, values[3:])


@pytest.mark.parametrize("offset", [0, 3, PAGE + 1])
@pytest.mark.parametrize("order", ["C", "F"])
def test_changes_to_a_memory_map_reach_its_file(offset, order, tmp_path):
    shape = (700, 61)
    w = np.memmap(tmp_path / "w", F32, "w+", offset=4 * offset, shape=shape, order=order)
    w[...] = np.random.RandomState(0).standard_normal(shape)
    expected = np.array(w)
    optimizer = fastadam.Adam(0.1)
    optimizer.build([w])
    optimizer.save(tmp_path / "opt", values=True)
    w[::7] = 5
    fastadam.Adam.load(tmp_path / "opt", [w])
    w.flush()
    again = np.memmap(tmp_path / "w", F32, "r", offset=4 * offset, shape=shape, order=order)
    np.testing.assert_array_equal(again, expected)


# ---- pieces ------------------------------------------------------------------------------------------------------------

SHAPES = [(), (0, 3), (1,), (PAGE // 4,), (3 * PAGE + 5,), (70, 90), (5, 3000), (3000, 5), (3, 4, 700), (2, 9000, 1)]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, F32, np.float64])
def test_pieces_are_the_bytes_in_c_order(shape, order, dtype, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 4 * PAGE)
    size = int(np.prod(shape))
    raw = np.random.RandomState(size).randint(0, 255, size * np.dtype(dtype).itemsize + 64).astype(np.uint8)
    for skew in (0, 8):
        array = raw[skew : skew + size * np.dtype(dtype).itemsize].view(dtype).reshape(shape, order=order)
        pieces = list(chunks.pieces_of(array))
        assert all(0 < piece.nbytes <= 4 * PAGE for piece in pieces)
        data = b"".join(piece.tobytes() for piece in pieces)
        assert data == np.ascontiguousarray(array).tobytes()
        for is_zero in (True, False):
            target = np.zeros_like(array)
            if not is_zero:
                target.reshape(-1, order="A")[:] = np.ones((), dtype)
            source = iter(data)
            chunks.store(
                target,
                lambda count, source=source: np.array([next(source) for _ in range(count)], np.uint8),
                is_zero=is_zero,
            )
            assert target.tobytes() == array.tobytes()


@pytest.mark.parametrize("address", [0, 8, PAGE - 8, PAGE])
def test_runs_are_whole_pages_and_cover_what_differs(address):
    rng = np.random.RandomState(address)
    for size in (0, 5, PAGE - 1, PAGE, 2 * PAGE + 8, 9 * PAGE + 3):
        for density in (0, 3e-5, 1):
            data = (rng.uniform(size=size) < density).astype(np.uint8)
            found = list(chunks.runs(data, address))
            covered = np.zeros(size, bool)
            for begin, end in found:
                assert begin < end
                assert begin == 0 or (address + begin) % PAGE == 0
                assert end == size or (address + end) % PAGE == 0
                assert data[begin : min(end, begin + PAGE - (address + begin) % PAGE)].any()
                covered[begin:end] = True
            assert not data[~covered].any()
            assert list(chunks.runs(data, address, data)) == []


# ---- values ------------------------------------------------------------------------------------------------------------


def gradients(step, variables):
    rng = np.random.RandomState(step)
    return [rng.standard_normal(np.shape(w)).astype(np.asarray(w).dtype) for w in variables]


def train(optimizer, variables, steps):
    for step in steps:
        optimizer.apply_gradients(zip(gradients(step, variables), variables, strict=True))


VARIABLES = [
    np.ones(3, F32),
    np.ones((4, 5), np.float64),
    np.ones((), np.float16),
    np.ones((6, 7), ml_dtypes.bfloat16),
    np.ones((8, 9), F32, order="F"),
    np.ones((0, 4), F32),
]


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"use_ema": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_values_go_into_the_variables_that_are_given(options, tmp_path):
    variables = [w.copy(order="K") for w in VARIABLES]
    optimizer = fastadam.Adam(0.1, **options)
    train(optimizer, variables, range(3))
    optimizer.save(tmp_path / "opt", values=True)
    others = [np.full_like(w, 7) for w in variables]
    again = fastadam.Adam.load(tmp_path / "opt", others)
    assert_same(others, variables)
    for made, mine in ((optimizer, variables), (again, others)):
        train(made, mine, range(3, 6))
    assert_same(others, variables)
    assert_same(again.get_weights(), optimizer.get_weights())


def test_values_of_some_variables_in_another_order(tmp_path):
    variables = [w.copy(order="K") for w in VARIABLES]
    optimizer = fastadam.Adam(0.1)
    train(optimizer, variables, range(2))
    optimizer.save(tmp_path / "opt", [variables[4], variables[0]], values=True)
    others = [np.zeros_like(variables[i]) for i in (4, 0)]
    fastadam.Adam.load(tmp_path / "opt", others)
    assert_same(others, [variables[4], variables[0]])


def test_values_of_tables_are_up_to_date(tmp_path):
    tables = [np.ones((50, 3), F32) for _ in range(3)]
    optimizers = [fastadam.Adam(0.1, sparse_update=mode) for mode in ("dense", "deferred")]
    for i in range(5):
        gradient = fastadam.IndexedSlices(np.full((1, 3), 0.5, F32), [i])
        for optimizer, table in zip(optimizers, tables, strict=False):
            optimizer.apply_gradients([(gradient, table)])
    optimizers[1].save(tmp_path / "opt", values=True)
    fastadam.Adam.load(tmp_path / "opt", tables[2:])
    np.testing.assert_array_equal(bits(tables[2]), bits(tables[0]))


def test_an_average_that_begins_after_the_file_begins_at_the_values(tmp_path):
    w = np.full(3, 5, F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.build([w])
    optimizer.use_ema = True
    optimizer.save(tmp_path / "opt", values=True)
    again = fastadam.Adam.load(tmp_path / "opt", [np.zeros(3, F32)])
    np.testing.assert_array_equal(again.get_weights()[-1], w)


def test_a_file_without_values_leaves_the_variables(tmp_path):
    w = np.ones(3, F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.build([w])
    optimizer.save(tmp_path / "opt")
    fastadam.Adam.load(tmp_path / "opt", [other := np.full(3, 7, F32)])
    assert (other == 7).all()


def test_a_loss_scale_optimizer_forwards_values(tmp_path):
    w = np.ones(3, F32)
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1))
    optimizer.apply_gradients([(np.ones(3, F32), w)])
    optimizer.save(tmp_path / "opt", values=True)
    fastadam.LossScaleOptimizer.load(tmp_path / "opt", [other := np.zeros(3, F32)])
    np.testing.assert_array_equal(other, w)
    other[:] = 7
    with pytest.raises(ValueError, match="state of LossScaleOptimizer, expected Adam"):
        fastadam.Adam.load(tmp_path / "opt", [other])
    assert (other == 7).all()


def test_values_are_refused_where_they_are_not_the_variables(tmp_path):
    w = np.ones(3, F32)
    optimizer = fastadam.Adam(0.1, use_ema=True)
    optimizer.apply_gradients([(np.ones(3, F32), w)])
    with optimizer.averages([w]), pytest.raises(RuntimeError, match=r"save\(values=True\): inside of"):
        optimizer.save(tmp_path / "opt", values=True)
    optimizer.save(tmp_path / "state")
    with pytest.raises(TypeError, match="values: 1, expected True or False"):
        optimizer.save(tmp_path / "opt", values=1)
    import pickle

    with pytest.raises(ValueError, match=r"values: variable 0, .* expected build\(\) with all variables first"):
        pickle.loads(pickle.dumps(optimizer)).save(tmp_path / "opt", values=True)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.slow
def test_a_damaged_file_with_values_changes_nothing(tmp_path):
    w = np.random.RandomState(0).standard_normal(40).astype(F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.ones(40, F32), w)])
    optimizer.save(tmp_path / "opt", values=True)
    data = (tmp_path / "opt").read_bytes()
    other = np.full(40, 7, F32)
    for at in range(0, len(data), 3):
        (tmp_path / "opt").write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        with pytest.raises(ValueError, match=str(tmp_path / "opt")):
            fastadam.Adam.load(tmp_path / "opt", [other])
        assert (other == 7).all()


# ---- slots of the user's -----------------------------------------------------------------------------------------------


def test_moments_are_written_to_arrays_that_are_given(tmp_path):
    variables = [np.ones((300, 5), F32), np.ones(3, F32)]
    optimizer = fastadam.Adam(0.1, amsgrad=True)
    train(optimizer, variables, range(3))
    optimizer.save(tmp_path / "opt", values=True)
    m = np.memmap(tmp_path / "m", F32, "w+", shape=(300, 5))
    v = np.full((300, 5), 7, F32)
    others = [np.zeros_like(w) for w in variables]
    again = fastadam.Adam.load(tmp_path / "opt", others, slots=[{"m": m, "v": v}, None])
    assert again.get_slot(others[0], "m") is m
    assert again.get_slot(others[0], "v") is v
    assert_same(again.get_weights(), optimizer.get_weights())
    for made, mine in ((optimizer, variables), (again, others)):
        train(made, mine, range(3, 6))
    assert_same(others, variables)
    assert_same(again.get_weights(), optimizer.get_weights())


def test_moments_of_deltas_are_written_to_arrays_that_are_given(tmp_path):
    table = np.ones((300, 5), F32)
    optimizer = fastadam.Adam(0.1, sparse_update="deferred")
    optimizer.build([table])
    optimizer.save(tmp_path / "opt", values=True)
    for i in (3, 7, 3):
        optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((1, 5), F32), [i]), table)])
    optimizer.save_delta(tmp_path / "delta")
    m, other = np.full((300, 5), 7, F32), np.zeros_like(table)
    again = fastadam.Adam.load(tmp_path / "opt", [other], deltas=[tmp_path / "delta"], slots=[{"m": m}])
    assert_same(again.get_weights(), optimizer.get_weights())
    assert again.get_slot(other, "m") is m


W = np.ones((4, 2), F32)
BAD_SLOTS = {
    "too few": ([], ValueError, "slots: 0 items, expected one for each of 1 variables"),
    "an array": ([np.zeros((4, 2), F32)], TypeError, r"slots\[0\]: ndarray, expected a dict of arrays or None"),
    "a list": ([{"m": [0]}], TypeError, r"slots\[0\]\['m'\]: list, expected a NumPy array"),
    "dtype": ([{"m": np.full((4, 2), 7.0)}], TypeError, r"slots\[0\]\['m'\]: float64, expected float32"),
    "shape": ([{"v": np.full(8, 7, F32)}], ValueError, r"slots\[0\]\['v'\]: shape \(8,\), expected \(4, 2\)"),
    "order": ([{"v": np.full((4, 2), 7, F32, order="F")}], ValueError, r"slots\[0\]\['v'\]: strides"),
    "another slot": (
        [{"vhat": np.full((4, 2), 7, F32)}],
        ValueError,
        r"slots\[0\]\['vhat'\]: not a slot that the file",
    ),
    "the variable": ([{"m": W}], ValueError, r"slots\[0\]\['m'\]: shares memory with"),
    "one twice": ([dict.fromkeys("mv", np.full((4, 2), 7, F32))], ValueError, "shares memory with"),
    "damaged file": ([{"m": np.full((4, 2), 7, F32)}], ValueError, "checksum of tensor"),
}


@pytest.mark.parametrize("kind", BAD_SLOTS)
def test_slots_that_do_not_fit_are_refused_and_nothing_changes(kind, tmp_path):
    slots, error, message = BAD_SLOTS[kind]
    optimizer = fastadam.Adam(0.1)
    optimizer.build([w := np.zeros((4, 2), F32)])
    optimizer.save(tmp_path / "opt", values=True)
    if kind == "damaged file":
        data = (tmp_path / "opt").read_bytes()
        (tmp_path / "opt").write_bytes(data[:-1] + b"\1")
    with pytest.raises(error, match=message):
        fastadam.Adam.load(tmp_path / "opt", [W], slots=slots)
    assert (W == 1).all()
    assert all(
        (array == 7).all()
        for item in slots
        if isinstance(item, dict)
        for array in item.values()
        if isinstance(array, np.ndarray) and array is not W
    )
    del w
