"""Deferred and lazy tables larger than memory: what becomes resident and what is written."""

from __future__ import annotations

import errno
import importlib
import shutil
import sys
from unittest.mock import Mock

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from fastadam import IndexedSlices
from helpers import Pair, history_of, run_python, slow, weekly

F32 = np.float32
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: counts pages in /proc")

# Of a child process: a table and its moments in files, all holes, ten times the memory that the process may have.
OUT_OF_CORE = """
import os, resource, numpy as np, fastadam
MODE, KIND, FOLDER = (os.environ[name] for name in ("MODE", "KIND", "FOLDER"))
ROWS, WIDTH, PAGE = 1_000_000, 64, 4096
def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("Rss" + kind))
def mapped(name):
    return np.memmap(f"{FOLDER}/{name}", np.float32, "w+", shape=(ROWS, WIDTH))
def written(name):
    os.sync()
    return os.stat(f"{FOLDER}/{name}").st_blocks * 512
table = mapped("table")
optimizer = fastadam.Adam(0.01, sparse_update=MODE, gradient_accumulation_steps=4 if KIND == "accumulated" else None)
slots = {"files": ["m", "v"], "accumulated": ["m", "v", "gradient_accumulator"]}.get(KIND, [])
names = ["table", *slots]
if slots:
    optimizer.build([table], slots=[{name: mapped(name) for name in slots}])
elif KIND == "built":
    optimizer.build([table])
rng = np.random.default_rng(0)
def step(count):
    ids = rng.integers(0, ROWS, count)
    optimizer.gather(table, ids)
    optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((count, WIDTH), np.float32), ids), table)])
    return set(ids.tolist())
touched = step(1)  # what a first step allocates
if slots:
    limit = 3 * ROWS * WIDTH * 4 // 10
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[5]) * PAGE
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + limit, in_use + limit))
anonymous, of_files = resident("Anon"), resident("File")
for _ in range(20):
    touched |= step(100)
"""


def out_of_core(mode, kind, folder, rest):
    result = run_python(OUT_OF_CORE + rest, MODE=mode, KIND=kind, FOLDER=str(folder))
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@ON_LINUX
@pytest.mark.parametrize("mode", ["deferred", *slow("deferred_fast", "lazy")])
@pytest.mark.parametrize("kind", ["files", "memory", *slow("accumulated", "built")])
def test_resident_memory_and_writes_are_proportional_to_the_rows_touched(mode, kind, tmp_path):
    out_of_core(
        mode,
        kind,
        tmp_path,
        """
def check():
    # a page of each array, and one of each of the two counters that history has of rows
    anonymous_pages = {"memory": 4, "built": 4}.get(KIND, 0)
    assert resident("Anon") - anonymous < len(touched) * PAGE * anonymous_pages + 4_000_000, resident("Anon") - anonymous
    pages = (len(names) + 2) * 2
    assert resident("File") - of_files < len(touched) * PAGE * pages + 4_000_000, resident("File") - of_files
    for name in names:
        assert written(name) <= len(touched) * PAGE * 2 + 100_000, (name, written(name))
check()
before = {name: written(name) for name in names}
optimizer.sync()
optimizer.get_config()
optimizer.gather(table, rng.integers(0, ROWS, 100))
touched |= set(range(100))  # the rows gathered are read
optimizer.beta_1 = 0.8
touched |= step(10)
optimizer.get_slot(table, "m")
check()
""",
    )


@pytest.mark.slow
@ON_LINUX
def test_counters_of_rows_stay_in_files_when_a_table_moves_to_others(tmp_path):
    out_of_core(
        "deferred",
        "files",
        tmp_path,
        """
touched |= step(1000)
optimizer.sync()
assert sorted(os.listdir(FOLDER)) == sorted(names)
moved, m, v = (mapped(name + " moved") for name in names)
ids = sorted(touched)
moved[ids] = table[ids]
optimizer.resize(table, moved, slots={"m": np.asarray(m), "v": v})
table = moved
with open("/proc/self/smaps") as smaps:
    flags = smaps.read().split("/table moved", 1)[1].split("VmFlags:", 1)[1].split("\\n", 1)[0]
assert " rr " in flags  # the kernel expects random reads before the first step, too
anonymous = resident("Anon")
step(2000)
assert resident("Anon") - anonymous < 2_000_000, resident("Anon") - anonymous
""",
    )


@pytest.mark.parametrize("wrong", ["the folder is gone", "the disk is full"])
def test_counters_of_rows_are_in_memory_where_no_file_can_be_made(wrong, tmp_path, monkeypatch):
    rows = 300_000
    (tmp_path / "files").mkdir()
    m, v = (np.memmap(tmp_path / "files" / name, F32, "w+", shape=(rows,)) for name in "mv")
    if wrong == "the folder is gone":
        shutil.rmtree(tmp_path / "files")
    else:
        full = Mock(side_effect=OSError(errno.ENOSPC, "full"))
        monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    tables = [np.ones(rows, F32) for _ in range(2)]
    optimizers = [fastadam.Adam(0.1, sparse_update="deferred") for _ in tables]
    optimizers[0].build([tables[0]], slots=[{"m": m, "v": v}])
    for _ in range(3):
        for optimizer, table in zip(optimizers, tables, strict=True):
            optimizer.apply_gradients([(IndexedSlices(np.ones(2, F32), [5, 299_999]), table)])
    optimizers[0].sync(), optimizers[1].sync()
    np.testing.assert_array_equal(bits(tables[0]), bits(tables[1]))
    assert tables[0][5] < 0.8
    assert wrong != "the disk is full" or full.called


@pytest.mark.slow
@ON_LINUX
def test_reading_the_state_writes_no_row_that_did_not_change(tmp_path):
    """After `weights` any row may have moments, so all are read; those of zeros are not stored."""
    out_of_core(
        "deferred",
        "files",
        tmp_path,
        """
optimizer.weights
touched |= step(10)
optimizer.sync()
for name in names:
    assert written(name) <= len(touched) * PAGE * 2 + 100_000, (name, written(name))
""",
    )


@pytest.mark.slow
@ON_LINUX
def test_a_crowded_step_moves_only_the_rows_that_were_ever_touched(tmp_path):
    out_of_core(
        "deferred",
        "files",
        tmp_path,
        """
import fastadam._core.deferred.history as history
history.crossover = lambda *_: 1e9
optimizer.beta_1 = 0.8
touched |= step(10)
assert optimizer._parts.state.entries[0].history.waits
touched |= step(10)  # with a new plan
for name in names:
    assert written(name) <= len(touched) * PAGE * 2 + 100_000, (name, written(name))
assert not optimizer._parts.state.entries[0].history.waits
""",
    )


# ---- rows that are left as they are ----------------------------------------------------------------------------------


@pytest.fixture
def all_steps_are_crowded(monkeypatch):
    monkeypatch.setattr("fastadam._core.deferred.history.crossover", lambda *_: 1e9)


CHANGES = {
    "none": lambda optimizer: None,
    "negative rate": lambda optimizer: setattr(optimizer, "learning_rate", -0.01),
    "zero rate": lambda optimizer: setattr(optimizer, "learning_rate", 0.0),
    "decay of weights": lambda optimizer: setattr(optimizer, "weight_decay", 0.1),
    "amsgrad": lambda optimizer: setattr(optimizer, "amsgrad", True),
    "beta_2": lambda optimizer: setattr(optimizer, "beta_2", 0.9),
}
ROOMS = ["rows_wait", "all_steps_are_crowded"]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_a_row_never_touched_has_the_bits_of_dense_steps(room, change, mode, request):
    """Its zeros of both signs, infinities and NaN too."""
    request.getfixturevalue(room)
    pair = Pair(rows=300, mode=mode)
    for table in pair.tables:
        table[:10] = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    pair.step([50, 51])
    pair.rest(5)
    for optimizer in pair.optimizers:
        CHANGES[change](optimizer)
    pair.step([52])
    pair.rest(3)
    pair.gather([0, 1])
    pair.optimizers[1].sync()
    found, expected = (table[[*range(50), *range(60, 300)]] for table in pair.tables[::-1])
    if mode == "deferred":
        pair.compare()
    elif change != "decay of weights":
        np.testing.assert_array_equal(bits(found), bits(expected))
    np.testing.assert_allclose(found, expected, 1e-6)


def write_to(array):
    array[7] = 0.5


WRITES = {
    "get_slot": lambda optimizer, table: write_to(optimizer.get_slot(table, "m")),
    "weights": lambda optimizer, table: write_to(optimizer.weights[1]),
    "set_weights": lambda optimizer, table: optimizer.set_weights(
        [3, np.full((300, 5), 0.25, F32), np.ones((300, 5), F32)]
    ),
    "dense gradient": lambda optimizer, table: optimizer.apply_gradients([(np.ones((300, 5), F32), table)]),
    "other mode": lambda optimizer, table: in_mode(optimizer, table, "dense"),
    "lazily": lambda optimizer, table: in_mode(optimizer, table, "lazy"),
}


def in_mode(optimizer, table, mode):
    before = optimizer.sparse_update
    optimizer.sparse_update = mode if before != "dense" else "dense" if mode == "dense" else mode
    optimizer.apply_gradients([(IndexedSlices(np.ones((1, 5), F32), [7]), table)])
    optimizer.sparse_update = before


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("begin", ["built", "stepped", "new"])
@pytest.mark.parametrize("write", WRITES)
def test_moments_that_no_sparse_step_made_move_their_rows(room, begin, write, request):
    request.getfixturevalue(room)
    pair = Pair(rows=300)
    for optimizer, table in zip(pair.optimizers, pair.tables, strict=True):
        if begin != "new" or write in ("get_slot", "weights", "set_weights"):
            optimizer.build([table])
    if begin == "stepped":
        pair.step([1, 2])
    for optimizer, table in zip(pair.optimizers, pair.tables, strict=True):
        WRITES[write](optimizer, table)
    pair.step([3])
    pair.rest(4)
    pair.gather([7, 8])
    pair.optimizers[1].sync()
    pair.rest(4)
    pair.compare()
    assert (pair.tables[1][7] != pair.start[7]).any()


def test_an_array_from_before_the_first_step_may_be_written_to_at_any_time():
    pair = Pair(rows=300)
    for optimizer, table in zip(pair.optimizers, pair.tables, strict=True):
        optimizer.build([table])
    slots = [o.get_slot(t, "m") for o, t in zip(pair.optimizers, pair.tables, strict=True)]
    for k in range(3):
        pair.step([1])
        pair.rest(3)
        pair.optimizers[1].sync()
        for slot in slots:
            slot[100 + k] = 0.5
    pair.rest(3)
    pair.compare()


# ---- a bounded history -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", *slow("decays", "restarts")])
@pytest.mark.parametrize("room", [128, *slow(1024)])
def test_a_history_has_no_more_room_than_its_most(schedule, room, monkeypatch, request):
    request.getfixturevalue("rows_wait")
    monkeypatch.setattr("fastadam._core.deferred.history._FIRST_ROOM", 64)
    monkeypatch.setattr("fastadam._core.deferred.history._MOST_ROOM", room)
    schedules = fastadam.schedules
    rate = {
        "constant": 0.01,
        "decays": schedules.ExponentialDecay(0.01, 100, 0.9),
        "restarts": schedules.CosineDecayRestarts(0.01, 50),
    }[schedule]
    pair = Pair(rows=400, learning_rate=rate)
    pair.step([0])
    for k in range(4000):
        pair.step([1, 2 + k % 30] if k % 10 == 0 else [3] if k % 700 == 0 else [])
    history = history_of(pair.optimizers[1])
    assert history.room <= room
    assert history.dropped + history.steps == 4001
    pair.gather([0, 3])
    pair.compare()


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"amsgrad": True}], ids=str)
def test_a_bounded_history_of_rows_that_all_move(options, monkeypatch, request):
    request.getfixturevalue("rows_wait")
    monkeypatch.setattr("fastadam._core.deferred.history._MOST_ROOM", 128)
    monkeypatch.setattr("fastadam._core.deferred.history._FIRST_ROOM", 64)
    pair = Pair(rows=400, **options)
    for k in range(600):
        pair.step([k % 3] if k % 50 == 0 else [])
    assert history_of(pair.optimizers[1]).room == 128
    pair.compare()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [70_000, *weekly(300_000)])
def test_any_number_of_steps_takes_constant_memory(steps, monkeypatch):
    """One row is touched once, and then waits; the dense optimizer has only that row."""
    monkeypatch.setattr("fastadam._core.deferred.history.crossover", lambda *_: 1)
    table = random_array(np.random.RandomState(0), (50, 4))
    start, dense = table.copy(), table[:1].copy()
    optimizer, oracle = fastadam.Adam(1e-3, sparse_update="deferred"), fastadam.Adam(1e-3)
    first = IndexedSlices(np.full((1, 4), 0.5, F32), np.array([0]))
    nothing = IndexedSlices(np.zeros((0, 4), F32), np.zeros(0, np.int64))
    other = IndexedSlices(np.full((1, 4), 0.5, F32), np.array([1]))
    optimizer.apply_gradients([(first, table)])
    oracle.apply_gradients([(first, dense)])
    rooms = set()
    for k in range(steps):
        optimizer.apply_gradients([(nothing if k % 1000 else other, table)])
        oracle.apply_gradients([(nothing, dense)])
        if k % 1000 == 0:
            rooms.add(history_of(optimizer).room)
    assert max(rooms) == 2**16
    assert history_of(optimizer).dropped >= steps - 2**16
    np.testing.assert_array_equal(bits(optimizer.gather(table, [0])), bits(dense))
    for name in ("m", "v"):
        found, expected = optimizer.get_slot(table, name)[:1], oracle.get_slot(dense, name)
        np.testing.assert_array_equal(bits(found), bits(expected))
    np.testing.assert_array_equal(table[2:], start[2:])


# ---- where slots lie ------------------------------------------------------------------------------------------------


def test_huge_pages_are_avoided_whoever_made_the_slots():
    """A smoke test where there is no /proc: the calls take arrays of every size."""
    from fastadam._core.native.arrays import expect_random_rows, untouched_zeros

    for shape in ((0,), (3, 5), (600_000, 3)):
        array = untouched_zeros(shape, F32)
        expect_random_rows(array, small_pages=True)
        assert array.shape == shape
        assert not array.any()
        array[...] = 1
        assert array.all()


# ---- PyTorch -----------------------------------------------------------------------------------------------------------


def torch_pair(torch, **options):
    pair = []
    for mode in ("dense", "deferred"):
        torch.manual_seed(0)
        table = torch.nn.Embedding(300, 3, sparse=True, dtype=torch.float64)
        pair.append((table, fastadam.torch.Adam(table.parameters(), lr=0.1, sparse_update=mode, **options)))
    return pair


def train(pair, ids):
    for table, optimizer in pair:
        for each in ids:
            optimizer.zero_grad()
            optimizer.gather(table.weight, table.weight.new_tensor([each], dtype=int))
            table(table.weight.new_tensor([each], dtype=int)).sum().backward()
            optimizer.step()


def assert_alike(torch, pair):
    """But for epsilon, which dense steps of torch correct for bias."""
    pair[1][1].sync()
    torch.testing.assert_close(pair[1][0].weight, pair[0][0].weight, rtol=1e-6, atol=1e-6)


def load_torch():
    torch = pytest.importorskip("torch")
    importlib.import_module("fastadam.torch")
    return torch


def moved(torch, state):
    """Moments of all rows."""
    return {**state, **{key: torch.full_like(state[key], 0.25) for key in ("exp_avg", "exp_avg_sq")}}


def write_in_place(torch, optimizer, state):
    for key in ("exp_avg", "exp_avg_sq"):
        state[key][7].fill_(0.25)


TORCH_WRITES = {
    "in place": write_in_place,
    "replaced": lambda torch, optimizer, state: state.update(moved(torch, state)),
    "loaded": lambda torch, optimizer, state: optimizer.load_state_dict(
        {**optimizer.state_dict(), "state": {0: moved(torch, state)}}
    ),
}


@pytest.mark.parametrize("write", TORCH_WRITES)
@pytest.mark.usefixtures("rows_wait")
def test_moments_written_by_a_user_of_torch_move_their_rows(write):
    torch = load_torch()
    pair = torch_pair(torch)
    train(pair, [1, 2, 1])
    for table, optimizer in pair:
        optimizer.sync()
        TORCH_WRITES[write](torch, optimizer, optimizer.state[table.weight])
    train(pair, [3, 3, 4])
    for _, optimizer in pair:
        optimizer.sync()
    train(pair, [5, 5])
    assert_alike(torch, pair)
    start = torch_pair(torch)[0][0].weight
    assert not pair[1][0].weight[7].equal(start[7])


@pytest.mark.parametrize("mode", ["lazy", "deferred"])
def test_weight_and_state_of_torch_may_be_files(mode, tmp_path):
    torch = pytest.importorskip("torch")
    fastadam_torch = importlib.import_module("fastadam.torch")
    maps = [np.memmap(tmp_path / name, F32, "w+", shape=(3000, 4)) for name in ("table", "m", "v")]
    table, m, v = (torch.from_numpy(each) for each in maps)
    weights = [torch.nn.Parameter(table), torch.nn.Parameter(torch.zeros(3000, 4))]
    optimizers = [fastadam_torch.Adam([w], sparse_update=mode) for w in weights]
    optimizers[0].state[weights[0]] = {"step": torch.tensor(0.0), "exp_avg": m, "exp_avg_sq": v}
    for row in (3, 7, 3):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            if mode == "deferred":
                optimizer.gather(weight, torch.tensor([row]))
            weight.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 4), (3000, 4), check_invariants=True)
            optimizer.step()
    states = [optimizer.state[weight] for weight, optimizer in zip(weights, optimizers, strict=True)]
    assert (states[0]["exp_avg"] is m, states[0]["exp_avg_sq"] is v) == (True, True)
    for found, name in zip(maps[1:], ("exp_avg", "exp_avg_sq"), strict=True):
        np.testing.assert_array_equal(bits(found), bits(states[1][name].numpy()))
        assert found[3].all()
    for optimizer in optimizers:
        optimizer.sync()
    np.testing.assert_array_equal(bits(maps[0]), bits(weights[1].detach().numpy()))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.usefixtures("rows_wait")
def test_a_bounded_history_in_torch(amsgrad, monkeypatch):
    torch = load_torch()
    monkeypatch.setattr("fastadam._core.deferred.history._FIRST_ROOM", 64)
    monkeypatch.setattr("fastadam._core.deferred.history._MOST_ROOM", 128)
    pair = torch_pair(torch, amsgrad=amsgrad)
    train(pair, [7])
    train(pair, [k % 5 for k in range(500)])
    (table,) = pair[1][1]._stepper.tables.of(None)
    assert table.history.room == 128
    assert_alike(torch, pair)


@ON_LINUX
@pytest.mark.parametrize("mode", ["deferred", "lazy"])
def test_the_state_of_a_torch_table_is_resident_where_rows_were_touched(mode):
    load_torch()
    program = """
import os, numpy, torch, fastadam.torch
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
weight = torch.nn.Parameter(torch.zeros(1_000_000, 64))
optimizer = fastadam.torch.Adam([weight], sparse_update=os.environ["MODE"], amsgrad=True)
def step(ids):
    values = torch.ones(len(ids), 64)
    weight.grad = torch.sparse_coo_tensor(torch.tensor(ids)[None], values, weight.shape, check_invariants=False)
    optimizer.step()
step([1, 2])
before = resident()
step(list(range(0, 1_000_000, 5000)))
optimizer.sync()
# 200 rows, in 3 arrays of moments and 2 of counters; the table itself is resident
assert resident() - before < 200 * 5 * 4096 + 4_000_000, resident() - before
state = optimizer.state[weight]
assert all(state[key][5000].any() for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
"""
    result = run_python(program, MODE=mode)
    assert result.returncode == 0, result.stderr


def test_skip_gram_on_files_trains_to_the_bits_of_dense_steps(tmp_path):
    """Words and contexts of a walk in a ring: neighbours become alike."""
    rng = np.random.default_rng(0)
    corpus = np.cumsum(rng.choice([-1, 1], 4000)) % 50
    start = rng.standard_normal((2, 50, 8)).astype(np.float32) * 0.1

    def train(tables, **options):
        optimizer = fastadam.Adam(0.05, **options)
        rng, losses = np.random.default_rng(1), []
        for _ in range(300):
            at = rng.integers(0, len(corpus) - 1, 16)
            centres, contexts = corpus[at], np.stack([corpus[at + 1], rng.integers(0, 50, 16)], 1)  # one is noise
            word, others = optimizer.gather(tables[0], centres), optimizer.gather(tables[1], contexts)
            score = 1 / (1 + np.exp(-np.einsum("nd,nkd->nk", word, others)))
            error = (score - np.float32([1, 0])).astype(np.float32)
            losses.append(-np.log(score[:, 0]).mean() - np.log(1 - score[:, 1]).mean())
            of_others = (error[:, :, None] * word[:, None]).reshape(-1, 8)
            gradients = (np.einsum("nk,nkd->nd", error, others), of_others)
            rows = (fastadam.IndexedSlices(g, i) for g, i in zip(gradients, (centres, contexts.ravel()), strict=True))
            optimizer.apply_gradients(zip(rows, tables, strict=True))
        optimizer.sync()
        return losses

    files = [np.memmap(tmp_path / name, np.float32, "w+", shape=(50, 8)) for name in ("words", "contexts")]
    for file, values in zip(files, start, strict=True):
        file[...] = values
    dense = [*start.copy()]
    losses = train(files, sparse_update="deferred")
    assert losses == train(dense)
    assert all(np.array_equal(file, table) for file, table in zip(files, dense, strict=True))
    assert np.mean(losses[-20:]) < 0.8 * losses[0]
