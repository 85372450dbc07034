"""What reads, copies, refuses or interrupts a deferred table: rows that are up to date, or an error, and no bit lost."""

from __future__ import annotations

import copy
import pickle

import fastadam
import numpy as np
import pytest
from cases import bits
from fastadam import IndexedSlices
from helpers import Pair, history_of, run_python

F32 = np.float32
pytestmark = pytest.mark.usefixtures("rows_wait")


def test_a_row_that_waits_is_stale_until_it_is_read():
    pair = Pair()
    pair.step([3])
    pair.step([4])
    assert (pair.tables[1][3] != pair.tables[0][3]).any()
    assert pair.lags()
    pair.optimizers[1].gather(pair.tables[1], [3])
    np.testing.assert_array_equal(pair.tables[1], pair.tables[0])
    pair.step([5])
    pair.optimizers[1].sync(pair.tables[1])
    assert not pair.lags()
    pair.step([6])
    with pair.optimizers[1].dense_view(pair.tables[1]) as values:
        assert values is pair.tables[1]
        np.testing.assert_array_equal(values, pair.tables[0])


@pytest.mark.parametrize("read", ["get_weights", "get_slot", "weights", "variables"])
def test_what_reads_the_state_finds_every_row_up_to_date(read):
    pair = Pair()
    pair.step([3])
    pair.rest(4)
    assert pair.lags()
    found = getattr(pair.optimizers[1], read)
    if read == "get_slot":
        found(pair.tables[1], "m")
    elif callable(found):
        found()
    assert not pair.lags()
    np.testing.assert_array_equal(bits(pair.tables[1]), bits(pair.tables[0]))


def test_a_configuration_moves_no_row():
    pair = Pair()
    pair.step([3])
    pair.rest(4)
    before = pair.tables[1].copy()
    config = pair.optimizers[1].get_config()
    np.testing.assert_array_equal(before, pair.tables[1])
    assert pair.lags()
    assert config == fastadam.Adam(0.01, sparse_update="deferred").get_config()
    pair.compare()


def test_a_refused_step_leaves_history_and_rows_as_they_were():
    pair = Pair()
    pair.step([1, 2])
    pair.rest(3)
    table, optimizer = pair.tables[1], pair.optimizers[1]
    before, history = table.copy(), history_of(optimizer)
    steps, last = history.steps, history.rates.last.copy()
    for bad in (IndexedSlices(np.ones((1, 5), F32), [3000]), IndexedSlices(np.ones((1, 4), F32), [0])):
        with pytest.raises(ValueError, match="grads"):
            optimizer.apply_gradients([(bad, table)])
    with pytest.raises(ValueError, match="indices: 3000 is not a row of .*, expected 0 <= index < 3000"):
        optimizer.gather(table, [3, 3000])
    with pytest.raises(ValueError, match="out: float64"):
        optimizer.gather(table, [3], out=np.ones((1, 5)))
    np.testing.assert_array_equal(before, table)
    np.testing.assert_array_equal(last, history.rates.last)
    assert (history.steps, optimizer.iterations) == (steps, 4)
    pair.compare()


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
@pytest.mark.parametrize("read", [False, True])
def test_a_refused_step_with_a_full_history_changes_nothing(mode, read):
    pair = Pair(rows=5000, mode=mode)
    table, optimizer = pair.tables[1], pair.optimizers[1]
    for step in range(1024):
        if read and step == 700:
            optimizer.gather(table, np.arange(5000))
        pair.step([step % 50])
    with pytest.raises(ValueError, match="values: shape"):
        optimizer.apply_gradients([(IndexedSlices(np.ones((1, 3), F32), [1]), table)])
    for ids in ([1], np.arange(2000), [2], [3]):
        pair.step(ids)
    if mode == "deferred":
        pair.compare()
    optimizer.sync()
    np.testing.assert_allclose(table, pair.tables[0], rtol=1e-4, atol=1e-6)  # a step left out is 1e-2


def test_a_refused_dense_gradient_settles_no_row():
    pair = Pair()
    pair.step([1, 2])
    pair.rest(5)
    before = pair.tables[1].copy()
    with pytest.raises(ValueError, match="shape"):
        pair.optimizers[1].apply_gradients([(np.ones((2, 5), F32), pair.tables[1])])
    np.testing.assert_array_equal(bits(before), bits(pair.tables[1]))
    assert pair.lags()
    pair.compare()


COPIES = {
    "pickle": lambda optimizer, table, path: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": lambda optimizer, table, path: copy.deepcopy(optimizer),
    "file": lambda optimizer, table, path: (optimizer.save(path), fastadam.Adam.load(path, [table]))[1],
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("synced", [False, True])
def test_a_copy_made_while_rows_wait_goes_on_to_the_bit(kind, synced, tmp_path):
    pair = Pair()
    pair.step([1, 2, 3])
    pair.rest(20)
    if synced:
        pair.optimizers[1].sync()
    copied = COPIES[kind](pair.optimizers[1], pair.tables[1], tmp_path / "state")
    if kind != "deepcopy":
        pair.tables[1] = pair.tables[1].copy()
    if kind == "file":
        copied = fastadam.Adam.load(tmp_path / "state", [pair.tables[1]])
    pair.optimizers[1] = copied
    assert copied.sparse_update == "deferred"
    pair.step([2, 9])
    pair.rest(20)
    pair.step([3])
    pair.compare()


def test_a_restored_optimizer_reads_no_table_that_it_has_not_met():
    pair = Pair()
    pair.step([1, 2])
    pair.step([3])
    again = pickle.loads(pickle.dumps(pair.optimizers[1]))
    for read in (lambda: again.gather(pair.tables[1], [1]), lambda: again.sync(pair.tables[1]), again.get_weights):
        with pytest.raises(ValueError, match="build"):
            read()
    again.build([pair.tables[1]])
    np.testing.assert_array_equal(again.gather(pair.tables[1], [1, 2]), pair.tables[0][[1, 2]])


@pytest.mark.parametrize("provider", ["autograd", "jax", "torch"])
def test_a_loss_reads_rows_that_are_up_to_date(provider):
    pytest.importorskip(provider)
    start = np.random.RandomState(0).standard_normal((400, 3)).astype(F32)
    tables = [fastadam.Variable(start.copy()) for _ in range(2)]
    optimizers = [fastadam.Adam(0.1, sparse_update=mode) for mode in ("dense", "deferred")]
    for step in range(12):
        ids = np.random.RandomState(step).randint(0, 20, 4)
        for optimizer, table in zip(optimizers, tables, strict=True):
            optimizer.minimize(lambda: (table.gather(ids) ** 2).sum(), [table], gradient=provider)  # noqa: B023
    assert (tables[0].value != tables[1].value).any()
    for optimizer, table in zip(optimizers, tables, strict=True):
        optimizer.minimize(lambda: (table.value**2).sum(), [table], gradient=provider)  # noqa: B023
    np.testing.assert_array_equal(bits(tables[0].value), bits(tables[1].value))


def test_a_history_and_a_table_of_different_times_are_not_put_together():
    """A copy of the state from before rows were read, and the table from after it."""
    pair = Pair()
    table, optimizer = pair.tables[1], pair.optimizers[1]
    pair.step([1, 2])
    pair.rest(5)
    copies = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)]
    optimizer.gather(table, [1])
    for again in copies:
        with pytest.raises(ValueError, match="changed since the state was copied, while rows lagged behind"):
            again.apply_gradients([(IndexedSlices(np.ones((1, 5), F32), [3]), table)])
    together = copy.deepcopy({"table": table, "optimizer": optimizer})
    together["optimizer"].build([together["table"]])
    together["optimizer"].sync()
    optimizer.sync()
    np.testing.assert_array_equal(bits(together["table"]), bits(table))


def test_a_deep_copy_is_read_with_the_variable_it_was_copied_from():
    pair = Pair()
    pair.step([1, 2])
    pair.rest(5)
    copied = copy.deepcopy(pair.optimizers[1])
    copied.build([pair.tables[1]])
    weights = copied.get_weights()
    for a, b in zip(weights, pair.optimizers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_view_of_a_table_is_not_read_as_it_lies():
    pair = Pair()
    pair.step([1, 2])
    pair.rest(5)
    table, optimizer = pair.tables[1], pair.optimizers[1]
    for read in (lambda: optimizer.gather(table[1:], [0]), lambda: optimizer.sync(table.reshape(-1))):
        with pytest.raises(ValueError, match="overlaps a variable of this optimizer"):
            read()
    np.testing.assert_array_equal(optimizer.add_slot(table, "m"), pair.optimizers[0].get_slot(pair.tables[0], "m"))
    with pytest.raises(ValueError, match="out: shares memory"):
        optimizer.gather(table, [2, 1], out=table[:2])


def test_an_interrupt_at_any_moment_leaves_a_whole_history():
    """The last step before the history is full, and sync, interrupted by signals at random moments."""
    result = run_python(
        """
import random, signal, numpy as np, fastadam
class Stop(Exception): pass
armed = False
def stop(*_):
    if armed: raise Stop
signal.signal(signal.SIGALRM, stop)
rng = random.Random(0)
tables = [np.ones((20000, 16), np.float32) for _ in range(2)]
dense, deferred = fastadam.Adam(0.01), fastadam.Adam(0.01, sparse_update="deferred")
stopped = 0
for step in range(1200):
    slices = fastadam.IndexedSlices(np.full((40, 16), 0.5, np.float32), np.arange(40) * 7 + step)
    dense.apply_gradients([(slices, tables[0])])
    before = deferred.iterations
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-4))
        deferred.apply_gradients([(slices, tables[1])])
        if step % 50 == 0:
            deferred.sync()
        armed = False
    except Stop:
        stopped += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    if deferred.iterations == before:
        deferred.apply_gradients([(slices, tables[1])])
deferred.sync()
assert stopped > 20, stopped
assert (tables[0].view(np.uint32) == tables[1].view(np.uint32)).all()
print("whole")
"""
    )
    assert result.stdout.split() == ["whole"], result.stderr
