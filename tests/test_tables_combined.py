"""Tables with gradient accumulation, moving averages, clipping and summed gradients: deferred has the bits of dense."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from pathlib import Path

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from fastadam import IndexedSlices
from fastadam._core.parts import parts_of
from helpers import assert_same, history_of, slow
from hypothesis import given, settings
from hypothesis import strategies as st

F32 = np.float32
pytestmark = pytest.mark.usefixtures("rows_wait")

OPTIONS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "average": {"use_ema": True, "ema_momentum": 0.9},
    "both": {"gradient_accumulation_steps": 3, "use_ema": True, "ema_momentum": 0.75},
    "overwrite": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 5},
    "all": {
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_overwrite_frequency": 7,
        "amsgrad": True,
        "weight_decay": 0.1,
        "clipvalue": 0.5,
        "global_clipnorm": 0.3,
    },
}
CLIPS = [{}, {"clipvalue": 0.01}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1}]


class Twins:
    """Two optimizers of equal options on copies of a table and a small weight, the first dense."""

    def __init__(self, rows=700, width=(3,), dtype=F32, mode="deferred", wrap=lambda optimizer: optimizer, **options):
        self.rng = np.random.RandomState(rows)
        table = random_array(self.rng, (rows, *width), -6, 0).astype(dtype)
        self.tables = [table.copy(), table.copy()]
        self.weights = [np.ones(4, F32), np.ones(4, F32)]
        self.start = table
        self.optimizers = [
            wrap(fastadam.Adam(**{"learning_rate": 0.01, **options}, sparse_update=name)) for name in ("dense", mode)
        ]

    def slices(self, ids, low=-6, high=0):
        ids = np.asarray(ids, np.int64)
        values = random_array(self.rng, (len(ids), *self.start.shape[1:]), low, high)
        return IndexedSlices(values.astype(self.start.dtype), ids)

    def dense(self):
        return random_array(self.rng, self.start.shape, -6, 0).astype(self.start.dtype)

    def apply(self, *gradients, weight=True):
        """A call with these gradients of the table, and one of the weight."""
        gradient = random_array(self.rng, 4, -3, 0)
        for optimizer, table, other in zip(self.optimizers, self.tables, self.weights, strict=True):
            pairs = [(g, table) for g in gradients] + ([(gradient, other)] if weight else [])
            optimizer.apply_gradients(pairs)

    def rest(self, calls):
        for _ in range(calls):
            self.apply(self.slices([]))

    def gather(self, ids):
        dense, deferred = (o.gather(t, ids) for o, t in zip(self.optimizers, self.tables, strict=True))
        np.testing.assert_array_equal(bits(dense), bits(self.tables[0][ids]))
        np.testing.assert_array_equal(bits(deferred), bits(dense))

    def lags(self):
        return bool(history_of(self.optimizers[1]).behind().any())

    def compare(self):
        dense, deferred = (optimizer.get_weights() for optimizer in self.optimizers)
        assert len(dense) == len(deferred)
        pairs = zip(
            [self.tables[0], self.weights[0], *dense], [self.tables[1], self.weights[1], *deferred], strict=True
        )
        for i, (a, b) in enumerate(pairs):
            np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(b)), err_msg=str(i))


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_bits_of_dense(name, clip, isa):
    options = {**OPTIONS[name], **clip}
    if "clipnorm" in clip:
        options.pop("global_clipnorm", None)
    twins = Twins(**options)
    lagged = False
    for call in range(60):
        twins.apply(twins.slices(twins.rng.randint(0, 30, call % 4)))
        lagged = lagged or twins.lags()
        if call % 7 == 6:
            twins.gather(twins.rng.randint(0, 700, 5))
        if call % 20 == 19:
            twins.compare()
    twins.compare()
    assert lagged
    assert (twins.tables[0] != twins.start).any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("width", [(), (130,), *slow((1,), (64,))])
@pytest.mark.parametrize("name", ["both", "all"])
def test_every_dtype_and_width(dtype, width, name, isa):
    twins = Twins(width=width, dtype=dtype, **OPTIONS[name])
    for call in range(24):
        twins.apply(twins.slices(twins.rng.randint(0, 60, 5)))
        if call % 5 == 4:
            twins.gather([3, 3, 41])
    twins.compare()


@pytest.mark.parametrize("gap", [1, 8, 9, 130, *slow(2500)])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"beta_1": 0.999}], ids=str)
@pytest.mark.parametrize("name", ["accumulation", "average"])
def test_every_length_of_gap(name, options, gap):
    """Moments that fall by what is subtracted stop above zero; averages stop beside their variables."""
    twins = Twins(**{"learning_rate": 0.01, **OPTIONS[name], **options})
    twins.apply(twins.slices(range(8), -60, 60))
    twins.apply(twins.slices(range(8), -60, 60))
    twins.rest(gap)
    twins.gather([3, 3, 41, 699])
    twins.apply(twins.slices([7, 7, 45]))
    twins.compare()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 1e10])
def test_moments_that_are_stuck_still_move_a_tiny_variable(rate):
    """m stops falling near the smallest normal number, while v falls for thousands of steps more."""
    twins = Twins(rows=70, learning_rate=rate, epsilon=1e-12, beta_2=0.99, gradient_accumulation_steps=2)
    for table in twins.tables:
        table[...] *= F32(1e-30)
    big = IndexedSlices(np.full((1, 3), 1e-37, F32), [3])
    first = IndexedSlices(np.full((1, 3), 1e15, F32), [3])
    for gradient in (first, IndexedSlices(-first.values, [3]), big, big):
        twins.apply(gradient)
    for optimizer, table in zip(twins.optimizers, twins.tables, strict=True):
        optimizer.get_slot(table, "v")[3] = F32(1e30)
        optimizer.get_slot(table, "m")[3] = F32(5e-38)
    twins.rest(8000)
    twins.compare()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-40, 1e19, 3e38, -0.0])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("name", ["accumulation", "both"])
def test_odd_gradients(name, clip, value):
    """A norm that is not a number makes NaN of every element, also of rows without a gradient."""
    twins = Twins(**OPTIONS[name], **clip)
    twins.apply(twins.slices([1, 2]))
    twins.rest(11)
    twins.apply(IndexedSlices(np.full((2, 3), value, F32), [0, 3]))
    twins.rest(8)
    twins.compare()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 2.0**-126, 1e-40, np.inf, np.nan, 1.0000001])
def test_odd_variables(value):
    twins = Twins(use_ema=True, ema_momentum=0.99)
    for table in twins.tables:
        table[...] = value
        table[1] *= -1
    twins.apply(twins.slices([0, 1, 2]))
    twins.rest(300)
    twins.compare()


@pytest.mark.parametrize("momentum", [0.0, 0.99, 1.0, *slow(0.5, 0.9999)])
def test_every_momentum(momentum):
    twins = Twins(use_ema=True, ema_momentum=momentum)
    for _ in range(2):
        twins.apply(twins.slices([1, 2, 3, 2]))
        twins.rest(700)
        twins.gather([2, 60])
    twins.compare()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_call_that_touches_much_of_the_table_passes_over_it(name):
    twins = Twins(**OPTIONS[name])
    for call in range(24):
        twins.apply(twins.slices(twins.rng.permutation(700)[: 40 if call % 5 == 1 else 2]))
    twins.compare()


@pytest.mark.parametrize("name", OPTIONS)
def test_dense_gradients_and_calls_without_the_table(name):
    twins = Twins(**OPTIONS[name])
    for call in range(30):
        kind = call % 7
        if kind == 6:
            twins.apply(weight=True)
        elif kind == 3:
            twins.apply(twins.dense())
        else:
            twins.apply(twins.slices([call, 3]), weight=kind != 2)
        if call % 10 == 9:
            twins.gather([call, 500])
    twins.compare()


@pytest.mark.parametrize("name", ["accumulation", "both"])
def test_a_table_given_twice_gathers_both_gradients(name):
    twins = Twins(**OPTIONS[name])
    for call in range(12):
        twins.apply(twins.slices([1, 2]), twins.dense() if call % 5 == 4 else twins.slices([2, 3]))
    twins.compare()


def test_what_changes_in_mid_run_takes_effect_from_then_on():
    twins = Twins(use_ema=True)
    changes = [
        ("ema_momentum", 0.5),
        ("beta_1", 0.5),
        ("use_ema", False),
        ("amsgrad", True),
        ("use_ema", True),
        ("ema_overwrite_frequency", 4),
        ("weight_decay", 0.1),
    ]
    for name, value in changes:
        twins.apply(twins.slices([1, 2, 3]))
        twins.rest(5)
        for optimizer in twins.optimizers:
            setattr(optimizer, name, value)
        twins.apply(twins.slices([2]))
        twins.rest(5)
    twins.compare()


@pytest.mark.parametrize("mode", ["dense", "deferred", "lazy"])
def test_the_mode_may_change_in_the_middle_of_a_cycle(mode):
    twins = Twins(gradient_accumulation_steps=3)
    for later in (mode, "deferred"):
        for _ in range(4):
            twins.apply(twins.slices([1, 2, 5]))
        twins.optimizers[1].sparse_update = later
        if later == "lazy":
            twins.optimizers[1].sparse_update = "deferred"
        twins.apply(twins.slices([2, 6]))
        twins.apply(twins.slices([2, 6]))
    twins.compare()


def pickled(twins):
    return pickle.loads(pickle.dumps(twins.optimizers[1]))


def from_a_file(twins):
    with tempfile.TemporaryDirectory() as folder:
        twins.optimizers[1].save(Path(folder) / "state")
        return type(twins.optimizers[1]).load(Path(folder) / "state", [twins.tables[1], twins.weights[1]])


def by_weights(twins):
    config, weights = twins.optimizers[1].get_config(), twins.optimizers[1].get_weights()
    optimizer = type(twins.optimizers[1]).from_config(config)
    optimizer.build([twins.tables[1], twins.weights[1]])
    optimizer.set_weights(weights)
    return optimizer


COPIES = {
    "pickle": pickled,
    "deepcopy": lambda twins: copy.deepcopy(twins.optimizers[1]),
    "file": from_a_file,
    "weights": by_weights,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("calls", [6, 7])
def test_copies_go_on_with_the_bits_of_dense(calls, name, how):
    twins = Twins(**OPTIONS[name])
    for _ in range(calls):
        twins.apply(twins.slices([1, 2, 3]))
    twins.optimizers[1] = COPIES[how](twins)
    for ids in ([1, 2], [], [4], [1], [2]):
        twins.apply(twins.slices(ids))
    twins.gather([1, 2, 3, 4, 600])
    twins.compare()


def test_setting_iterations_drops_the_gradients_of_the_cycle():
    twins = Twins(gradient_accumulation_steps=3)
    for call in range(8):
        twins.apply(twins.slices([call, 3]))
    for optimizer in twins.optimizers:
        optimizer.iterations = 5
    for call in range(4):
        twins.apply(twins.slices([call + 20]))
    twins.compare()


@pytest.mark.parametrize("name", ["accumulation", "overwrite", "all"])
def test_a_loss_scale_that_skips(name):
    twins = Twins(wrap=lambda o: fastadam.LossScaleOptimizer(o, 1024.0, 3), **OPTIONS[name])
    for call in range(20):
        gradient = twins.slices([call % 5, 9])
        if call % 6 == 4:
            gradient.values[0] = np.inf
        twins.apply(gradient)
    assert twins.optimizers[0].dynamic_scale == twins.optimizers[1].dynamic_scale
    assert twins.optimizers[0].iterations == twins.optimizers[1].iterations > 0
    twins.compare()


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_averages_are_those_of_every_row(mode):
    twins = Twins(mode=mode, use_ema=True, ema_momentum=0.9)
    for _ in range(3):
        twins.apply(twins.slices([1, 2, 3]))
        twins.rest(20)
    with twins.optimizers[0].averages([twins.tables[0]]), twins.optimizers[1].averages([twins.tables[1]]):
        assert_same([twins.tables[0]], [twins.tables[1]])
        np.testing.assert_array_equal(twins.optimizers[1].gather(twins.tables[1], [3]), twins.tables[0][[3]])
    twins.apply(twins.slices([2]))
    twins.rest(4)
    for optimizer, table in zip(twins.optimizers, twins.tables, strict=True):
        optimizer.finalize_variable_values([table])
    twins.compare()


def test_deferred_fast_is_as_close_with_accumulation_as_without():
    """Closed forms of the steps that rows missed: see tests/test_deferred_fast.py."""
    twins = Twins(mode="deferred_fast", gradient_accumulation_steps=2)
    for _ in range(5):
        twins.apply(twins.slices(range(8)))
        twins.apply(twins.slices(range(8)))
        twins.rest(60)
    twins.optimizers[1].sync()
    moved = np.abs(twins.tables[0] - twins.start)[:8]
    error = np.abs(twins.tables[1].astype(float) - twins.tables[0])[:8]
    assert (error <= 1e-5 * moved + np.spacing(np.abs(twins.tables[0][:8])) * 8).all()
    assert moved.min() > 0


def test_deferred_fast_replays_what_has_no_closed_form():
    twins = Twins(mode="deferred_fast", use_ema=True)
    for _ in range(5):
        twins.apply(twins.slices(range(8)))
        twins.rest(60)
    twins.compare()


@pytest.mark.parametrize("max_staleness", [1, 7, 64])
def test_a_sweep_bounds_gaps_and_changes_no_bit(max_staleness):
    twins = Twins(rows=100, gradient_accumulation_steps=2, use_ema=True)
    twins.optimizers[1].max_staleness = max_staleness
    for call in range(200):
        twins.apply(twins.slices([call % 20] if call % 17 == 0 else []))
        history = history_of(twins.optimizers[1])
        had = np.maximum(history.rates.last, history.rates.counts[2])
        assert call < 2 * max_staleness + 2 or (history.steps - had).max() <= max_staleness
    twins.compare()


# ---- an independent definition ---------------------------------------------------------------------------------------


class ByHand:
    """Adam on one float32 table in NumPy: accumulation, the norm of the mean, decay and the average of every step."""

    def __init__(self, table, steps, clipnorm, decay, momentum):
        self.w, self.average = table.copy(), table.copy()
        self.m, self.v, self.sum = (np.zeros_like(table) for _ in range(3))
        self.steps, self.clipnorm, self.decay, self.momentum, self.calls = steps, clipnorm, decay, momentum, 0

    def apply(self, ids, values):
        rows = np.zeros_like(self.w)
        for row, value in zip(ids, values, strict=True):
            rows[row] += value
        self.sum += rows
        self.calls += 1
        if self.calls % self.steps:
            return
        t, rate = F32(self.calls // self.steps), F32(0.01)
        norm = np.sqrt((self.sum.astype(float) ** 2).sum()) / self.steps
        g = self.sum * F32((self.clipnorm / norm if norm > self.clipnorm else 1.0) / self.steps)
        one, b1, b2 = F32(1), F32(0.9), F32(0.999)
        alpha = rate * np.sqrt(one - b2**t) / (one - b1**t)
        self.m += (g - self.m) * (one - b1)
        self.v += (g * g - self.v) * (one - b2)
        self.w = self.w * (one - F32(self.decay) * rate) - self.m * alpha / (np.sqrt(self.v) + F32(1e-7))
        momentum = F32(self.momentum if t > 1 else 0)
        self.average = momentum * self.average + (one - momentum) * self.w
        self.sum[...] = 0


@pytest.mark.parametrize("mode", ["dense", "deferred"])
def test_the_bits_of_numpy(mode):
    rng = np.random.RandomState(0)
    table = random_array(rng, (500, 4), -3, 0)
    expected = ByHand(table, 4, 0.25, 0.1, 0.9)
    optimizer = fastadam.Adam(
        0.01, gradient_accumulation_steps=4, clipnorm=0.25, weight_decay=0.1, use_ema=True, ema_momentum=0.9,
        sparse_update=mode,
    )  # fmt: skip
    for _ in range(40):
        ids, values = rng.randint(0, 40, 6), random_array(rng, (6, 4), -3, 0)
        expected.apply(ids, values)
        optimizer.apply_gradients([(IndexedSlices(values, ids), table)])
    optimizer.sync()
    for name, array in (("m", expected.m), ("v", expected.v), ("average", expected.average)):
        np.testing.assert_array_equal(optimizer.get_slot(table, name), array, err_msg=name)
    np.testing.assert_array_equal(table, expected.w)


# ---- lazy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["accumulation", "average", "both"])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("dtype", [F32, np.float16])
def test_lazy_steps_are_dense_steps_of_the_rows_of_a_cycle(name, clip, dtype, isa):
    """In every cycle the same rows: the table that consists of them, stepped densely."""
    rng = np.random.RandomState(0)
    table = random_array(rng, (400, 3), -3, 0).astype(dtype)
    rows = np.array([3, 4, 5, 390])
    part, start = table[rows].copy(), table.copy()
    whole, small = (fastadam.Adam(0.01, **OPTIONS[name], **clip, sparse_update=m) for m in ("lazy", "dense"))
    for _ in range(12):
        places = np.concatenate([np.arange(4), rng.randint(0, 4, 3)])
        values = random_array(rng, (7, 3), -3, 0).astype(dtype)
        whole.apply_gradients([(IndexedSlices(values, rows[places]), table)])
        small.apply_gradients([(IndexedSlices(values, places), part)])
    if name == "average" or not clip:  # else norms are added up in another order
        assert_same([table[rows]], [part])
        for slot in whole.get_slot_names():
            assert_same([whole.get_slot(table, slot)[rows]], [small.get_slot(part, slot)])
    np.testing.assert_allclose(table[rows].astype(F32), part.astype(F32), rtol=1e-5 if dtype == F32 else 1e-2)
    others = np.delete(np.arange(400), rows)
    assert_same([table[others]], [start[others]])
    assert not whole.get_slot(table, "m")[others].any()


def test_lazy_rows_wait_for_the_end_of_their_cycle_and_no_longer():
    table = np.ones((50, 2), F32)
    optimizer = fastadam.Adam(0.1, sparse_update="lazy", gradient_accumulation_steps=2)
    moved = []
    for ids in ([1], [2, 3], [3], [], [4], [1]):
        optimizer.apply_gradients([(IndexedSlices(np.ones((len(ids), 2), F32), np.array(ids, np.int64)), table)])
        moved.append(np.flatnonzero((table != 1).any(1)).tolist())
    assert moved == [[], [1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]
    assert table[3, 0] < table[2, 0]


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "file"])
def test_lazy_copies_know_the_rows_of_the_cycle(how):
    """Also a row whose gradients add up to zero: it moves along its moments."""
    twins = Twins(gradient_accumulation_steps=3)
    twins.optimizers = [
        fastadam.Adam(0.01, sparse_update="lazy", gradient_accumulation_steps=3) for _ in twins.optimizers
    ]
    for _ in range(3):
        twins.apply(twins.slices([1, 2, 5]))
    values = np.ones((1, 3), F32)
    twins.apply(IndexedSlices(values, [1]))
    twins.apply(IndexedSlices(-values, [1]))
    twins.optimizers[1] = COPIES[how](twins)
    before = twins.tables[0].copy()
    twins.apply(twins.slices([7]))
    assert np.flatnonzero((twins.tables[0] != before).any(1)).tolist() == [1, 7]
    twins.compare()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_lazy_averages_cannot_overwrite_their_variables():
    message = re.escape("ema_overwrite_frequency: 3 with sparse_update='lazy', expected None")
    with pytest.raises(ValueError, match=message):
        fastadam.Adam(sparse_update="lazy", use_ema=True, ema_overwrite_frequency=3)
    optimizer = fastadam.Adam(sparse_update="lazy", use_ema=True)
    with pytest.raises(ValueError, match=message):
        optimizer.ema_overwrite_frequency = 3
    assert optimizer.ema_overwrite_frequency is None
    optimizer = fastadam.Adam(use_ema=True, ema_overwrite_frequency=3)
    with pytest.raises(ValueError, match=message):
        optimizer.sparse_update = "lazy"
    assert optimizer.sparse_update == "dense"


REFUSED = {
    "row": lambda: [IndexedSlices(np.ones((1, 3), F32), [700])],
    "values": lambda: [IndexedSlices(np.ones((1, 4), F32), [7])],
    "dense_shape": lambda: [IndexedSlices(np.ones((1, 3), F32), [7], (4, 3))],
    "dense": lambda: [np.ones((4, 4), F32)],
    "text": lambda: [IndexedSlices(np.full((1, 3), "a"), [7])],
}


@pytest.mark.parametrize("calls", [3, 4, 5])
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["accumulation", "both"])
def test_a_call_that_is_refused_changes_nothing(name, case, calls):
    twins = Twins(**OPTIONS[name])
    for _ in range(calls):
        twins.apply(twins.slices([1, 2]))
    optimizer, table = twins.optimizers[1], twins.tables[1]
    beta, before = optimizer.beta_1, pickle.dumps(parts_of(optimizer).state)
    waiting = table.copy()
    for new_beta in (beta, 0.5):
        optimizer.beta_1 = new_beta
        with pytest.raises((TypeError, ValueError), match=r"grads\[0\]"):
            optimizer.apply_gradients([(REFUSED[case]()[0], table)])
        assert_same([table], [waiting])
    optimizer.beta_1 = beta
    assert pickle.dumps(parts_of(optimizer).state) == before
    for _ in range(3):
        twins.apply(twins.slices([3]))
    twins.compare()


# ---- any program -----------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 11), max_size=6)
OPERATIONS = st.one_of(
    st.tuples(st.just("step"), IDS),
    st.tuples(st.just("step"), IDS),
    st.tuples(st.just("twice"), IDS),
    st.tuples(st.just("rest"), st.integers(1, 30)),
    st.tuples(st.just("dense"), st.none()),
    st.tuples(st.just("mixed"), IDS),
    st.tuples(st.just("absent"), st.none()),
    st.tuples(st.just("not finite"), IDS),
    st.tuples(st.just("gather"), IDS),
    st.tuples(st.just("sync"), st.none()),
    st.tuples(st.just("compare"), st.none()),
    st.tuples(st.just("averages"), st.none()),
    st.tuples(st.sampled_from(list(COPIES)), st.none()),
    st.tuples(st.just("iterations"), st.integers(0, 50)),
    st.tuples(st.just("learning_rate"), st.sampled_from([0.0, 1e-6, 0.01, 3.0, -0.01])),
    st.tuples(st.just("beta_1"), st.sampled_from([0.5, 0.9, 0.99])),
    st.tuples(st.just("amsgrad"), st.booleans()),
    st.tuples(st.just("weight_decay"), st.sampled_from([None, 0.1])),
)


@settings(max_examples=150, deadline=None)
@given(
    program=st.lists(OPERATIONS, max_size=20),
    accumulation=st.sampled_from([None, 2, 3]),
    average=st.sampled_from([{}, {"use_ema": True}, {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3}]),
    clip=st.sampled_from([*CLIPS, {"clipnorm": 0.1, "clip_after_dedupe": True}]),
    decay=st.sampled_from([None, 0.1]),
    amsgrad=st.booleans(),
    scaled=st.booleans(),
    dtype=st.sampled_from([F32, F32, np.float16, np.float64]),
    threads=st.integers(1, 2),
)  # fmt: skip
def test_any_program_is_the_dense_oracle(program, accumulation, average, clip, decay, amsgrad, scaled, dtype, threads):
    fastadam.set_num_threads(threads)
    wrap = (lambda o: fastadam.LossScaleOptimizer(o, 8.0, 5)) if scaled else (lambda o: o)
    options = {
        "gradient_accumulation_steps": accumulation,
        "weight_decay": decay,
        "amsgrad": amsgrad,
        **average,
        **clip,
    }
    twins = Twins(rows=500, dtype=dtype, wrap=wrap, sum_repeated=True, **options)
    twins.apply(twins.slices([0, 5]))
    for name, argument in program:
        if name == "step":
            twins.apply(twins.slices(argument))
        elif name == "twice":
            twins.apply(twins.slices(argument), twins.slices([3]))
        elif name == "mixed":
            twins.apply(twins.slices(argument), twins.dense())
        elif name == "not finite":
            gradient = twins.slices([*argument, 2])
            gradient.values[-1] = np.inf
            twins.apply(gradient)
        elif name == "dense":
            twins.apply(twins.dense())
        elif name == "absent":
            twins.apply()
        elif name in ("rest", "gather"):
            getattr(twins, name)(argument)
        elif name == "sync":
            twins.optimizers[1].sync()
        elif name == "compare":
            twins.compare()
        elif name == "averages":
            if "use_ema" in average:
                with twins.optimizers[0].averages(twins.tables[:1]), twins.optimizers[1].averages(twins.tables[1:]):
                    assert_same(twins.tables[:1], twins.tables[1:])
        elif name in COPIES:
            if name != "weights" or not (scaled or "amsgrad" in dict(program)):  # no scale there, other slots
                twins.optimizers[1] = COPIES[name](twins)
                twins.apply(twins.slices([1]))
        else:
            for optimizer in twins.optimizers:
                setattr(optimizer, name, argument)
    twins.compare()
