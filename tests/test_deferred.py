"""sparse_update="deferred" against "dense", to the bit: variables, moments, and every row that is read."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from fastadam import IndexedSlices
from fastadam._core.deferred.rates import crossover
from helpers import Pair, history_of, slow, weekly
from hypothesis import given, settings
from hypothesis import strategies as st

F32 = np.float32
pytestmark = pytest.mark.usefixtures("rows_wait")


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
@pytest.mark.parametrize("options", [{}, *slow({"amsgrad": True}, {"decay": 0.01}, {"weight_decay": 0.1})], ids=str)
def test_every_schedule(kind, options, isa):
    pair = Pair(learning_rate=schedule(kind), **options)
    for step in range(900):
        pair.step([step % 50, 49] if step < 30 or step % 200 == 0 else [])
        if step % 150 == 149:
            pair.gather([step % 50, 2])
    pair.compare()
    assert (pair.tables[0] != pair.start).any()


@pytest.mark.parametrize("beta_1", [0.0, 0.9, *slow(0.95, 0.98, 0.99)])
@pytest.mark.parametrize("beta_2", [0.0, 0.95, 0.999, 0.9999])
@pytest.mark.parametrize("epsilon", [1e-8, *slow(1e-3), *weekly(1e-30, 1.0)])
def test_every_beta_and_epsilon(beta_1, beta_2, epsilon):
    """With beta_1 over the root of beta_2 steps grow while a row waits: nothing may be left out."""
    pair = Pair(beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
    for _ in range(3):
        pair.step([1, 2, 3, 2, 30], low=-30)
        pair.rest(300)
        pair.gather([2])
    pair.compare()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, F32, np.float64])
@pytest.mark.parametrize("width", [(), (5,), *slow((1,), (64,), (3, 50))])
def test_every_dtype_and_width(dtype, width, isa):
    pair = Pair(rows=7000, width=width, dtype=dtype)
    for _ in range(4):
        pair.step(pair.rng.randint(0, 300, 100))
        pair.rest(60)
        pair.gather(pair.rng.randint(0, 300, (2, 5)))
    pair.compare()


@pytest.mark.parametrize("threads", [3, *slow(1, 2)])
def test_threads_share_rows(threads):
    fastadam.set_num_threads(threads)
    pair = Pair(rows=20_000, width=(200,))
    for _ in range(3):
        pair.step(pair.rng.randint(0, 3000, 800))
        pair.rest(20)
    pair.gather(np.arange(2000))
    pair.compare()


@pytest.mark.slow
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
    pair.step([50])
    for step in range(2500):
        pair.step([step % 4] if step % 97 == 0 else [])
    assert history_of(pair.optimizers[1]).room == 4096
    pair.compare()


def test_rows_that_were_never_touched_keep_no_history():
    pair = Pair(rows=100, width=(2,))
    for step in range(2500):
        pair.step([step % 4])
    assert history_of(pair.optimizers[1]).room == 1024
    pair.compare()


@pytest.mark.parametrize("sweep", [(7, {"weight_decay": 0.1}), *slow((1, {}), (64, {}), (1000, {}))], ids=str)
def test_a_sweep_bounds_gaps_and_history_and_changes_no_bit(sweep):
    max_staleness, options = sweep
    pair = Pair(rows=100, width=(2,), **options)
    pair.optimizers[1].max_staleness = max_staleness
    for step in range(2200):
        pair.step([step % 20] if step % 97 == 0 else [])
        history = history_of(pair.optimizers[1])
        assert not history.behind(steps=history.steps - max_staleness).any()
    assert history.room <= (2048 if max_staleness < 1000 else 4096)
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
    st.tuples(st.just("file"), st.none()),
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
        elif name == "file":
            with tempfile.TemporaryDirectory() as folder:
                pair.optimizers[1].save(Path(folder) / "state")
                pair.optimizers[1] = fastadam.Adam.load(Path(folder) / "state", [pair.tables[1]])
        elif name == "dense":
            gradient = random_array(pair.rng, pair.tables[0].shape)
            for optimizer, table in zip(pair.optimizers, pair.tables, strict=True):
                optimizer.apply_gradients([(gradient, table)])
        else:
            for optimizer in pair.optimizers:
                setattr(optimizer, "learning_rate" if name == "rate" else name, argument)
    pair.compare()


@pytest.mark.parametrize("replays", [True, False])
def test_the_crossover_to_a_full_pass(replays):
    def of(rows, width):
        return crossover((rows, *width), 4, replays)

    assert of(20_000, (64,)) == of(20_000, (8, 8))
    assert 1 < of(20_000, (64,)) < of(20_000, ()) < 10_000
    assert (of(2_000_000, (64,)) < of(20_000, (64,))) == replays
