"""Passes over all rows of a table in memory maps: with weight decay every row moves, and none stays resident for it."""

from __future__ import annotations

import mmap
from pathlib import Path

import fastadam
import numpy as np
import pytest
from cases import bits
from fastadam import IndexedSlices
from helpers import run_python, slow

F32 = np.float32
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

# Of a child process: a table of 128 MiB and its moments in files.
PROGRAM = """
import os, re, numpy as np, fastadam
from pathlib import Path
MODE, WORK, FOLDER = (os.environ[name] for name in ("MODE", "WORK", "FOLDER"))
ROWS, WIDTH = 500_000, 64
def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def mapped(name):
    return np.memmap(f"{FOLDER}/{name}", np.float32, "w+", shape=(ROWS, WIDTH))
def step(row):
    optimizer.gather(table, [row])
    optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((1, WIDTH), np.float32), [row]), table)])
names = ["m", "v", "vhat"]
table, slots = mapped("table"), {name: mapped(name) for name in names}
optimizer = fastadam.Adam(0.01, sparse_update=MODE, weight_decay=0.1, amsgrad=True)
optimizer.build([table], slots=[slots])
table[300_000:300_005] = 1.0
table.flush()
for row in (1, 400_000, 1):
    step(row)
works = {
    "sync": optimizer.sync,
    "save": lambda: optimizer.save(f"{FOLDER}/saved", values=True),
    "get_slot": lambda: optimizer.get_slot(table, "m"),
    "other beta": lambda: (setattr(optimizer, "beta_1", 0.8), step(2)),
}
for work in (WORK, "sync"):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    works[work]()
    peak, after = resident("VmHWM") - before, resident("VmRSS") - before
    assert peak < 40e6 and after < 8e6, (work, peak, after)
    step(2)
optimizer.sync()
one = np.float32(1)
assert np.all(table[300_000:300_005] < one) and np.all(table[300_000:300_005] > 0.98)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "work"),
    [
        ("deferred", "save"),
        pytest.param("deferred", "get_slot", marks=pytest.mark.slow),
        pytest.param("deferred", "other beta", marks=pytest.mark.slow),
        pytest.param("deferred_fast", "sync", marks=pytest.mark.slow),
    ],
)
def test_a_pass_over_all_rows_gives_their_pages_back(mode, work, tmp_path):
    result = run_python(PROGRAM, MODE=mode, WORK=work, FOLDER=str(tmp_path))
    assert result.returncode == 0, result.stderr


def memmap(path, mode):
    return lambda shape: np.memmap(path, F32, mode, shape=shape)


def anonymous(flags):
    return lambda shape: np.frombuffer(mmap.mmap(-1, 4 * shape[0] * shape[1], flags=flags), F32).reshape(shape)


def of_file(path, flags):
    def make(shape):
        with path.open("r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, flags=flags), F32).reshape(shape)

    return make


@pytest.mark.parametrize("kind", ["memory", "w+", "r+", "c", "anonymous", "shared", "private file", "shared file"])
@pytest.mark.parametrize("mode", ["deferred", *slow("deferred_fast")])
def test_values_are_the_same_in_memory_of_any_kind(mode, kind, tmp_path):
    """Pages of private and anonymous maps have values that no file has. A page out of line begins and ends a piece."""
    shape, path = (40_001, 67), tmp_path / "table"  # 10.7 MB, so that there are several pieces
    path.write_bytes(bytes(4 * shape[0] * shape[1]))
    make = {
        "memory": lambda shape: np.zeros(shape, F32),
        "anonymous": anonymous(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
        "shared": anonymous(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS),
        "private file": of_file(path, mmap.MAP_PRIVATE),
        "shared file": of_file(path, mmap.MAP_SHARED),
        **{mode: memmap(path, mode) for mode in ("w+", "r+", "c")},
    }[kind]
    values = np.random.default_rng(0).standard_normal(shape, F32)
    tables = [values[1:].copy(), make(shape)[1:]]
    tables[1][...] = values[1:]
    # One that is up to date after each step is the oracle; the others wait.
    for table, most in zip(tables, (1, None), strict=True):
        optimizer = fastadam.Adam(0.01, sparse_update=mode, weight_decay=0.1, max_staleness=most)
        optimizer.build([table])
        for row in (1, 30_000, 1, 39_999):
            optimizer.gather(table, [row])
            optimizer.apply_gradients([(IndexedSlices(np.ones((1, 67), F32), [row]), table)])
        optimizer.sync()
    if mode == "deferred":
        np.testing.assert_array_equal(bits(tables[1]), bits(tables[0]))
    np.testing.assert_allclose(tables[1], tables[0], 1e-6)


def test_a_table_of_torch_in_a_file(tmp_path):
    pytest.importorskip("torch")
    result = run_python(
        """
import os, re, numpy as np, torch, fastadam.torch
from pathlib import Path
def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
file = np.memmap(os.environ["FOLDER"] + "/table", np.float32, "w+", shape=(500_000, 64))
table = torch.nn.Parameter(torch.from_numpy(file))
optimizer = fastadam.torch.AdamW([table], sparse_update="deferred", weight_decay=0.1)
def step(row):
    optimizer.gather(table, torch.tensor([row]))
    table.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 64), table.shape, check_invariants=False)
    optimizer.step()
for row in (1, 400_000, 1):
    step(row)
Path("/proc/self/clear_refs").write_text("5")
before, files = resident("VmRSS"), resident("RssFile")
optimizer.sync()
assert resident("RssFile") - files < 4e6, resident("RssFile") - files
""",
        FOLDER=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
