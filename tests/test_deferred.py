"""sparse_update="deferred" against "dense", to the bit: variables, moments, and every row that is read."""

from __future__ import annotations

import copy
import pickle

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from fastadam import IndexedSlices
from helpers import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

F32 = np.float32


class Pair:
    """Two optimizers of equal options on copies of one table, the second deferred."""

    def __init__(self, rows=3000, width=(5,), dtype=F32, **options):
        self.rng = np.random.RandomState(rows)
        self.tables = [random_array(self.rng, (rows, *width), low=-6, high=0).astype(dtype) for _ in range(2)]
        self.tables[1][...] = self.tables[0]
        self.start = self.tables[0].copy()
        self.optimizers = [
            fastadam.Adam(**{"learning_rate": 0.01, **options}, sparse_update=mode) for mode in ("dense", "deferred")
        ]

    def step(self, ids, low=-20, high=2, values=None):
        dtype, shape = self.tables[0].dtype, (len(ids), *self.tables[0].shape[1:])
        values = random_array(self.rng, shape, low, high).astype(dtype) if values is None else values
        for optimizer, table in zip(self.optimizers, self.tables, strict=True):
            optimizer.apply_gradients([(IndexedSlices(values, np.asarray(ids, np.int64)), table)])

    def rest(self, steps):
        for _ in range(steps):
            self.step([])

    def gather(self, ids):
        dense, deferred = (o.gather(t, ids) for o, t in zip(self.optimizers, self.tables, strict=True))
        np.testing.assert_array_equal(bits(dense), bits(self.tables[0][ids]))
        np.testing.assert_array_equal(bits(deferred), bits(dense))

    def lags(self):
        entry = self.optimizers[1]._slots.entries[0]
        return entry.staleness is not None and bool((entry.staleness.last < entry.staleness.steps).any())

    def compare(self):
        dense, deferred = (optimizer.get_weights() for optimizer in self.optimizers)
        assert len(dense) == len(deferred)
        for a, b in zip([self.tables[0], *dense], [self.tables[1], *deferred], strict=True):
            np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(b)))
        assert not self.lags()


def schedule(kind):
    """Rates that kill a naive early exit: a restart a thousand times higher after a long quiet stretch, zeros, warm-up."""
    schedules = fastadam.schedules
    return {
        "constant": 0.01,
        "warm-up from zero": schedules.PolynomialDecay(0.0, 400, 0.01),
        "restart": schedules.PiecewiseConstantDecay([20, 700], [0.01, 1e-5, 0.01]),
        "zeros between": schedules.PiecewiseConstantDecay([20, 300], [0.01, 0.0, 0.01]),
        "cosine": schedules.CosineDecayRestarts(0.01, 100),
        "negative": -0.01,
    }[kind]


@pytest.mark.parametrize("gap", [0, 1, 2, 3, 5, 8, 9, 134, 170, 171, 172, 247, 2000])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_every_length_of_gap(gap, amsgrad):
    pair = Pair(amsgrad=amsgrad)
    pair.step(range(40))
    pair.rest(gap)
    pair.gather([3, 3, 41])
    pair.step([7, 7, 45])
    pair.compare()


@pytest.mark.parametrize("kind", ["constant", "warm-up from zero", "restart", "zeros between", "cosine", "negative"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"decay": 0.01}, {"weight_decay": 0.1}], ids=str)
def test_every_schedule(kind, options, isa):
    pair = Pair(learning_rate=schedule(kind), **options)
    for step in range(900):
        pair.step([step % 50, 49] if step < 30 or step % 200 == 0 else [])
        if step % 150 == 149:
            pair.gather([step % 50, 2])
    pair.compare()
    assert (pair.tables[0] != pair.start).any()


@pytest.mark.parametrize("beta_1", [0.0, 0.9, 0.95, 0.98, 0.99])
@pytest.mark.parametrize("beta_2", [0.0, 0.95, 0.999, 0.9999])
@pytest.mark.parametrize("epsilon", [1e-30, 1e-8, 1e-3, 1.0])
def test_every_beta_and_epsilon(beta_1, beta_2, epsilon):
    """With beta_1 over the root of beta_2 steps grow while a row waits: nothing may be left out."""
    pair = Pair(beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
    for _ in range(3):
        pair.step([1, 2, 3, 2, 30], low=-30)
        pair.rest(300)
        pair.gather([2])
    pair.compare()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, F32, np.float64])
@pytest.mark.parametrize("width", [(), (1,), (5,), (64,), (3, 50)])
def test_every_dtype_and_width(dtype, width, isa):
    pair = Pair(rows=7000, width=width, dtype=dtype)
    for _ in range(4):
        pair.step(pair.rng.randint(0, 300, 100))
        pair.rest(60)
        pair.gather(pair.rng.randint(0, 300, (2, 5)))
    pair.compare()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_rows(threads):
    fastadam.set_num_threads(threads)
    pair = Pair(rows=20_000, width=(200,))
    for _ in range(3):
        pair.step(pair.rng.randint(0, 3000, 800))
        pair.rest(20)
    pair.gather(np.arange(2000))
    pair.compare()


def test_more_than_ten_thousand_missed_steps():
    pair = Pair(rows=4)
    pair.step([0, 1, 2])
    pair.rest(10_100)
    pair.gather([1])
    pair.compare()


@pytest.mark.parametrize("value", [0.0, 2.0**-24, 1.0, -0.5, 2.0**-126, 1e30, np.nan, np.inf])
def test_odd_variables(value):
    """At a power of two the numbers below lie closer than those above."""
    pair = Pair(rows=300)
    for table in pair.tables:
        table[...] = value
        table[1] *= -1
    pair.step([0, 1, 2, 3])
    pair.rest(400)
    pair.compare()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-40, 1e-30, 1e19, 3e38, 0.0, -0.0])
def test_odd_gradients(value):
    pair = Pair(rows=300)
    pair.step([0, 3], values=np.full((2, 5), value, F32))
    pair.rest(30)
    pair.step([3, 1], values=np.ones((2, 5), F32))
    pair.rest(1000)
    pair.compare()


def test_one_hot_row_and_only_duplicates():
    pair = Pair()
    for _ in range(20):
        pair.step([7] * 30)
    pair.compare()
    assert (pair.tables[0][7] != pair.start[7]).all()
    np.testing.assert_array_equal(np.delete(pair.tables[1], 7, 0), np.delete(pair.start, 7, 0))


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


def test_what_changes_in_mid_run_takes_effect_from_then_on():
    pair = Pair()
    changes = [("beta_1", 0.5), ("beta_2", 0.9), ("epsilon", 1e-3), ("amsgrad", True), ("learning_rate", 0.5)]
    for name, value in changes:
        pair.step([1, 2, 3])
        pair.rest(5)
        for optimizer in pair.optimizers:
            setattr(optimizer, name, value)
        pair.step([2])
        pair.rest(5)
    pair.compare()


def test_callable_betas_of_every_step():
    counts = [0, 0]

    def beta(which):
        counts[which] += 1
        return 0.9 if counts[which] % 3 else 0.8

    pair = Pair()
    for which, optimizer in enumerate(pair.optimizers):
        optimizer.beta_1 = lambda which=which: beta(which)
    for step in range(20):
        pair.step([step % 7])
    for optimizer in pair.optimizers:
        optimizer.beta_1 = 0.9
    pair.compare()


def test_dense_gradients_and_changes_of_mode_find_every_row_up_to_date():
    pair = Pair()
    gradient = random_array(pair.rng, pair.tables[0].shape)
    for _ in range(3):
        pair.step([1, 2, 3])
        pair.rest(5)
        for optimizer, table in zip(pair.optimizers, pair.tables, strict=True):
            optimizer.apply_gradients([(gradient, table)])
    pair.step([4])
    pair.optimizers[1].sparse_update = "lazy"
    np.testing.assert_array_equal(pair.tables[1], pair.tables[0])
    pair.optimizers[1].sparse_update = "deferred"
    pair.step([5])
    pair.rest(3)
    pair.compare()


def test_a_history_of_many_steps_is_grown():
    pair = Pair(rows=100, width=(2,))
    for step in range(2500):
        pair.step([step % 4] if step % 97 == 0 else [])
    assert len(pair.optimizers[1]._slots.entries[0].staleness.arrays[1]) == 4096
    pair.compare()


@pytest.mark.parametrize(("max_staleness", "options"), [(1, {}), (7, {"weight_decay": 0.1}), (64, {}), (1000, {})])
def test_a_sweep_bounds_gaps_and_history_and_changes_no_bit(max_staleness, options):
    pair = Pair(rows=100, width=(2,), **options)
    pair.optimizers[1].max_staleness = max_staleness
    for step in range(2200):
        pair.step([step % 20] if step % 97 == 0 else [])
        staleness = pair.optimizers[1]._slots.entries[0].staleness
        assert step < max_staleness or (staleness.steps - staleness.last).max() <= max_staleness
    assert staleness.room <= (2048 if max_staleness < 1000 else 4096)
    pair.compare()


def test_a_batch_that_touches_much_of_the_table_takes_the_full_pass():
    pair = Pair(rows=400)
    pair.step([1, 2, 3])
    assert pair.lags()
    pair.step(pair.rng.permutation(400)[:30])
    assert not pair.lags()
    np.testing.assert_array_equal(bits(pair.tables[0]), bits(pair.tables[1]))
    pair.step([4])
    pair.step([5])
    assert pair.lags()
    pair.compare()


def test_a_refused_step_leaves_history_and_rows_as_they_were():
    pair = Pair()
    pair.step([1, 2])
    pair.rest(3)
    table, optimizer = pair.tables[1], pair.optimizers[1]
    before, staleness = table.copy(), optimizer._slots.entries[0].staleness
    steps, last = staleness.steps, staleness.last.copy()
    for bad in (IndexedSlices(np.ones((1, 5), F32), [3000]), IndexedSlices(np.ones((1, 4), F32), [0])):
        with pytest.raises(ValueError, match="grads"):
            optimizer.apply_gradients([(bad, table)])
    with pytest.raises(ValueError, match="ids: 3000 is no row of"):
        optimizer.gather(table, [3, 3000])
    with pytest.raises(ValueError, match="out: float64"):
        optimizer.gather(table, [3], out=np.ones((1, 5)))
    np.testing.assert_array_equal(before, table)
    np.testing.assert_array_equal(last, staleness.last)
    assert (staleness.steps, optimizer.iterations) == (steps, 4)
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


def test_clipping_and_lists_of_tables():
    tables = [[np.ones((400, 3), F32), np.ones((100, 2), F32), np.ones(4, F32)] for _ in range(2)]
    optimizers = [fastadam.Adam(0.1, global_clipnorm=0.5, sparse_update=mode) for mode in ("dense", "deferred")]
    for step in range(40):
        rng = np.random.RandomState(step)
        gradients = [
            IndexedSlices(rng.standard_normal((4, 3)).astype(F32), rng.randint(0, 20, 4)),
            IndexedSlices(rng.standard_normal((1, 2)).astype(F32), rng.randint(0, 9, 1)),
            rng.standard_normal(4).astype(F32),
        ]
        chosen = [0, 2] if step % 3 == 0 else [1, 2] if step % 3 == 1 else [0, 1, 2]
        for optimizer, mine in zip(optimizers, tables, strict=True):
            optimizer.apply_gradients([(gradients[i], mine[i]) for i in chosen])
    optimizers[1].sync()
    for a, b in zip(*tables, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    assert (tables[0][0] != 1).any()


OPERATIONS = st.one_of(
    st.tuples(st.just("step"), st.lists(st.integers(0, 11), max_size=6)),
    st.tuples(st.just("rest"), st.integers(1, 40)),
    st.tuples(st.just("gather"), st.lists(st.integers(0, 11), max_size=4)),
    st.tuples(st.just("sync"), st.none()),
    st.tuples(st.just("pickle"), st.none()),
    st.tuples(st.just("rate"), st.sampled_from([0.0, 1e-6, 0.01, 3.0])),
    st.tuples(st.just("beta_1"), st.sampled_from([0.5, 0.9, 0.99])),
    st.tuples(st.just("dense"), st.none()),
)


@settings(max_examples=120, deadline=None)
@given(program=st.lists(OPERATIONS, max_size=25), amsgrad=st.booleans(), threads=st.integers(1, 3))
def test_any_program_is_the_dense_oracle(program, amsgrad, threads):
    fastadam.set_num_threads(threads)
    pair = Pair(rows=500, width=(3,), amsgrad=amsgrad)
    pair.step([0, 5])
    for name, argument in program:
        if name in ("step", "rest", "gather"):
            getattr(pair, name)(argument)
        elif name == "sync":
            pair.optimizers[1].sync()
        elif name == "pickle":
            pair.optimizers[1] = pickle.loads(pickle.dumps(pair.optimizers[1]))
            pair.step([1])
        elif name == "dense":
            gradient = random_array(pair.rng, pair.tables[0].shape)
            for optimizer, table in zip(pair.optimizers, pair.tables, strict=True):
                optimizer.apply_gradients([(gradient, table)])
        else:
            for optimizer in pair.optimizers:
                setattr(optimizer, "learning_rate" if name == "rate" else name, argument)
    pair.compare()


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
    weights = copy.deepcopy(pair.optimizers[1]).get_weights()
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


@pytest.mark.slow
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
