"""``resize``, ``forget`` and ``reset``, against an optimizer that is built anew from permuted weights, to the bit."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from pathlib import Path

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from fastadam import IndexedSlices
from fastadam._core.parts import parts_of
from helpers import F32, history_of, ones, step_by_half
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module", autouse=True)
def rows_wait():
    """A step that touches fewer than all rows lets the others wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadam._core.deferred.history.crossover", lambda shape, item_size, replays: 1.0)
        yield


DEFERRED = {"sparse_update": "deferred"}
MODES = {
    "dense": {},
    "lazy": {"sparse_update": "lazy"},
    "deferred": DEFERRED,
    "amsgrad": {**DEFERRED, "amsgrad": True},
    "decay": {**DEFERRED, "weight_decay": 0.1},
    "staleness": {**DEFERRED, "max_staleness": 3},
    "averages": {"use_ema": True, "ema_momentum": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2},
    "deferred averages": {**DEFERRED, "use_ema": True, "ema_momentum": 0.5},
    "deferred accumulation": {**DEFERRED, "gradient_accumulation_steps": 3, "weight_decay": 0.1},
}


def mapped(rows, old, fresh):
    """Rows of an old array in new places; -1 is one of ``fresh``."""
    new = np.array(fresh, old.dtype, order="C" if old.flags.c_contiguous else "F")
    rows = np.asarray(rows, np.int64)
    new[rows >= 0] = old[rows[rows >= 0]]
    return new


class Twins:
    """An optimizer that is told to resize, and one on a table of its own that is made anew from its weights."""

    def __init__(self, rows=6, width=(3,), dtype=F32, order="C", learning_rate=0.1, **options):
        self.rng = np.random.RandomState(0)
        self.table = np.asarray(random_array(self.rng, (rows, *width), -3, 2).astype(dtype), order=order)
        self.twin_table = self.table.copy(order="K")
        exact = "dense" if options.get("sparse_update") == "deferred" else options.get("sparse_update", "dense")
        self.optimizer = fastadam.Adam(learning_rate, **options)
        self.twin = fastadam.Adam(learning_rate, **{**options, "sparse_update": exact, "max_staleness": None})

    def step(self, ids=None):
        shape = (len(self.table if ids is None else ids), *self.table.shape[1:])
        values = random_array(self.rng, shape, -6, 2).astype(self.table.dtype)
        gradient = values if ids is None else IndexedSlices(values, np.asarray(ids, np.int64))
        self.optimizer.apply_gradients([(gradient, self.table)])
        self.twin.apply_gradients([(gradient, self.twin_table)])

    def resize(self, rows, new_rows=None):
        """With rows None the table becomes this long."""
        given = rows
        if rows is None:
            rows = [i if i < len(self.table) else -1 for i in range(new_rows)]
        fresh = random_array(self.rng, (len(rows), *self.table.shape[1:]), -3, 2).astype(self.table.dtype)
        old, old_twin = self.table, self.twin_table
        self.table, self.twin_table = mapped(rows, old, fresh), mapped(rows, old_twin, fresh)
        self.optimizer.resize(old, self.table, given)
        self._rebuild(lambda name, slot: mapped(rows, slot, self._start(name, self.twin_table)))

    def forget(self):
        self.optimizer.forget(self.table)
        self._rebuild(lambda name, slot: self._start(name, self.twin_table), knows=False)

    def reset(self, ids):
        self.optimizer.reset(self.table, ids)

        def reset(name, slot):
            start = self._start(name, self.twin_table)
            slot[slice(None) if ids is None else ids] = start[slice(None) if ids is None else ids]
            return slot

        self._rebuild(reset)

    def _start(self, name, table):
        return table.astype(F32) if name == "average" and table.dtype != np.float64 else (
            table if name == "average" else np.zeros(table.shape)
        )  # fmt: skip

    def _rebuild(self, change, *, knows=True):
        iterations, *slots = self.twin.get_weights()
        names = self.twin.get_slot_names()
        self.twin = type(self.twin).from_config(self.twin.get_config())
        if knows:
            self.twin.build([self.twin_table])
            self.twin.set_weights([iterations, *map(change, names, slots)])
        else:
            self.twin.weights[0][...] = iterations

    def compare(self):
        found, expected = self.optimizer.get_weights(), self.twin.get_weights()
        for a, b in zip([*found, self.table], [*expected, self.twin_table], strict=True):
            np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(b)))
            assert np.shape(a) == np.shape(b)


ROWS = {
    "grown": (None, 9),
    "shrunk": (None, 4),
    "as long": (None, 6),
    "removed": ([0, 2, 5], None),
    "permuted": ([5, 3, 1, 0, 2, 4], None),
    "repeated": ([1, 1, 3, -1, 3], None),
    "all fresh": ([-1, -1], None),
    "none left": ([], None),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_keep_their_moments_and_fresh_rows_have_none(mode, rows):
    twins = Twins(**MODES[mode])
    for ids in ([0, 1, 2], [2, 3], [5, 5], [1]):
        twins.step(ids)
    twins.resize(*ROWS[rows])
    twins.compare()
    for ids in ([0, 1], [1]) if len(twins.table) else ():
        twins.step(ids)
    twins.compare()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("width", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("mode", ["dense", "deferred"])
def test_every_dtype_shape_and_order(dtype, width, order, mode):
    twins = Twins(width=width, dtype=dtype, order=order, **MODES[mode])
    is_whole = order == "F" and len(width) > 0  # rows of such a table are not side by side, so no slices of it
    for ids in ([0, 1, 2], [2, 3], [5, 5]):
        twins.step(None if is_whole else ids)
    twins.resize(None, 9)
    twins.step(None if is_whole else [8, 2, 4])
    twins.resize([8, 0, -1, 2, 4, 5], None)
    twins.step(None if is_whole else [1, 0])
    twins.compare()


def test_a_table_that_had_its_final_length_from_the_start_has_the_same_bits():
    """Rows without a gradient do not move, so that it makes no difference when they come."""
    rng, whole = np.random.RandomState(0), random_array(np.random.RandomState(1), (40, 4), -3, 2)
    table, optimizers = whole[:5].copy(), [fastadam.Adam(0.1, sparse_update=mode) for mode in ("deferred", "dense")]
    for step in range(70):
        if step % 7 == 6:
            longer = np.concatenate([table, whole[len(table) : len(table) + 3]])
            optimizers[0].resize(table, longer)
            table = longer
        ids = rng.randint(0, len(table), 2)
        gradient = IndexedSlices(random_array(rng, (2, 4), -6, 2), ids)
        for optimizer, each in zip(optimizers, [table, whole], strict=True):
            optimizer.apply_gradients([(gradient, each)])
    for optimizer in optimizers:
        optimizer.sync()
    np.testing.assert_array_equal(bits(table), bits(whole[: len(table)]))
    for name in ("m", "v"):
        of_both = [optimizer.get_slot(each, name) for optimizer, each in zip(optimizers, [table, whole], strict=True)]
        np.testing.assert_array_equal(bits(of_both[0]), bits(of_both[1][: len(table)]))
        assert not of_both[1][len(table) :].any()


@pytest.mark.parametrize("rows", [None, [4, 3, 2, 1, 0, -1, -1, -1]], ids=["grown", "permuted"])
@pytest.mark.parametrize("mode", ["lazy", "deferred", "dense"])
def test_rows_that_accumulate_gradients_go_on_in_the_middle_of_a_cycle(mode, rows):
    """Compared with a table that had all rows from the start; a lazy step moves the rows of the cycle alone."""
    whole = random_array(np.random.RandomState(1), (8, 2), -3, 2)
    options = {"sparse_update": mode, "gradient_accumulation_steps": 3}
    optimizers = [fastadam.Adam(0.1, **options) for _ in range(2)]
    place = np.arange(8) if rows is None else np.array([4, 3, 2, 1, 0, 5, 6, 7])  # of each row, after the resize
    table, ids_of = whole[:5].copy(), [np.array([i]) for i in (0, 1, 2, 3, 0, 2, 4, 0, 1)]
    for step, ids in enumerate(ids_of):
        if step == 4:
            new = np.concatenate([table, whole[5:]])[np.argsort(place)]
            optimizers[0].resize(table, new, rows)
            table = new
        values = np.full((1, 2), step + 1, F32)
        optimizers[0].apply_gradients([(IndexedSlices(values, place[ids] if step >= 4 else ids), table)])
        optimizers[1].apply_gradients([(IndexedSlices(values, ids), whole)])
    for optimizer in optimizers:
        optimizer.sync()
    np.testing.assert_array_equal(bits(table[place]), bits(whole))
    for name in ("m", "v"):
        found, expected = optimizers[0].get_slot(table, name)[place], optimizers[1].get_slot(whole, name)
        np.testing.assert_array_equal(bits(found), bits(expected))


PROGRAM = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.lists(st.integers(0, 99), max_size=3)),
        st.tuples(st.just("rest"), st.integers(1, 40)),
        st.tuples(st.just("gather"), st.lists(st.integers(0, 99), max_size=3)),
        st.tuples(st.just("dense step")),
        st.tuples(st.just("sync")),
        st.tuples(st.just("lengthen"), st.integers(0, 9)),
        st.tuples(st.just("rows"), st.lists(st.integers(-1, 99), min_size=1, max_size=9)),
        st.tuples(st.just("forget")),
        st.tuples(st.just("reset"), st.one_of(st.none(), st.lists(st.integers(0, 99), max_size=3))),
        st.tuples(st.just("copy")),
    ),
    max_size=12,
)


def run(program, mode):
    twins = Twins(**MODES[mode])
    twins.step([0])
    for command, *arguments in program:
        length = len(twins.table)
        if command == "step":
            twins.step([i % length for i in arguments[0]])
        elif command == "rest":
            for _ in range(arguments[0]):
                twins.step([])
        elif command == "dense step":
            twins.step()
        elif command == "gather":
            ids = [i % length for i in arguments[0]]
            rows = twins.optimizer.gather(twins.table, ids)
            np.testing.assert_array_equal(bits(rows), bits(twins.twin_table[ids]))
        elif command == "sync":
            twins.optimizer.sync()
        elif command == "lengthen":
            twins.resize(None, 1 + arguments[0])
        elif command == "rows":
            twins.resize([i if i < 0 else i % length for i in arguments[0]])
        elif command == "forget":
            twins.forget()
            twins.step([0])  # it is known again
        elif command == "reset":
            twins.reset(None if arguments[0] is None else [i % length for i in arguments[0]])
        elif command == "copy":
            twins.optimizer, twins.table = copy.deepcopy((twins.optimizer, twins.table))
            twins.optimizer.build([twins.table])
    twins.compare()


@given(program=PROGRAM, mode=st.sampled_from(sorted(MODES)))
def test_any_program_ends_as_that_of_optimizers_that_are_made_anew(program, mode):
    run(program, mode)


# ---- several variables -----------------------------------------------------------------------------------------------


def three(**options):
    names = ["first", "table", "last"]
    variables = [
        fastadam.Variable(np.arange(n * 2, dtype=F32).reshape(n, 2) + 1, name) for n, name in enumerate(names, 2)
    ]
    optimizer = fastadam.Adam(0.1, **options)
    step_by_half(optimizer, *variables)
    return optimizer, variables


def longer_than(variable, rows=2, name=None):
    values = np.asarray(variable)
    return fastadam.Variable(np.concatenate([values, np.zeros((rows, *values.shape[1:]), F32)]), name)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.5}, {"gradient_accumulation_steps": 3}], ids=str)
def test_the_other_variables_and_the_order_of_weights_stay(options):
    optimizer, (first, table, last) = three(**options)
    before = optimizer.get_weights()
    new = longer_than(table)
    optimizer.resize(table, new)
    after = optimizer.get_weights()
    shapes = [np.shape(w) for w in before]
    assert [np.shape(w) for w in after] == [(5, 2) if shape == (3, 2) else shape for shape in shapes]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a[:3] if np.shape(b) == (3, 2) else a, b)
    step_by_half(optimizer, first, new, last)


def test_names_and_exclusions_from_weight_decay_go_to_the_new_array():
    for name in (None, "other"):
        optimizer, variables = three(weight_decay=0.5)
        table = variables[1]
        optimizer.exclude_from_weight_decay(var_list=[table])
        new = longer_than(table, name=name)
        optimizer.resize(table, new)
        before = np.array(new)
        optimizer.apply_gradients([(np.zeros((5, 2), F32), new)])
        assert parts_of(optimizer).state.entries[1].spec.name == (name or "table")
        np.testing.assert_array_equal(np.asarray(new)[3:], before[3:])  # it has no moments and does not decay
        optimizer.forget(new)
        optimizer.apply_gradients([(np.ones((5, 2), F32), new)])
        assert not parts_of(optimizer).options.exclusions


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_variable_that_is_forgotten_leaves_the_others_in_their_order(place):
    optimizer, variables = three(gradient_accumulation_steps=2)
    expected = [optimizer.get_slot(v, name).copy() for name in ("m", "v", "gradient_accumulator")
                for k, v in enumerate(variables) if k != place]  # fmt: skip
    optimizer.forget(variables.pop(place))
    for a, b in zip(optimizer.get_weights()[1:], expected, strict=True):
        np.testing.assert_array_equal(a, b)
    step_by_half(optimizer, *variables)  # the second call of the cycle: both have had gradients in it
    again = three(gradient_accumulation_steps=2)[1]
    again.pop(place)
    twin = fastadam.Adam(0.1, gradient_accumulation_steps=2)
    step_by_half(twin, *again)
    step_by_half(twin, *again)
    for a, b in zip(variables, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_forgotten_variable_starts_anew_and_others_go_on():
    optimizer, (first, table, last) = three()
    optimizer.forget(table)
    with pytest.raises(KeyError):
        optimizer.get_slot(table, "m")
    assert optimizer.iterations == 1
    step_by_half(optimizer, first, table, last)
    np.testing.assert_allclose(optimizer.get_slot(table, "m"), 0.05, rtol=1e-6)
    assert (optimizer.get_slot(first, "m") > 0.09).all()
    assert [w.shape for w in optimizer.weights[1:]] == [(2, 2), (4, 2), (2, 2), (4, 2), (3, 2), (3, 2)]


def test_reset_of_all_variables_makes_a_new_optimizer_but_for_the_count():
    optimizer, variables = three(amsgrad=True, sparse_update="lazy")
    slots = [optimizer.get_slot(v, "m") for v in variables]
    optimizer.reset()
    assert optimizer.iterations == 1
    assert not any(w.any() for w in optimizer.weights[1:])
    assert all(optimizer.get_slot(v, "m") is slot for v, slot in zip(variables, slots, strict=True))


def test_slots_of_ones_own_stay_when_moments_are_reset_and_get_zeros_for_fresh_rows():
    optimizer, table = fastadam.Adam(0.1), ones(2, 2)
    step_by_half(optimizer, table)
    optimizer.add_slot(table, "trust", "ones")
    optimizer.reset(table)
    new = np.concatenate([table, ones(1, 2)])
    optimizer.resize(table, new)
    assert optimizer.get_slot(new, "trust").tolist() == [[1, 1], [1, 1], [0, 0]]


def test_a_variable_without_axes_can_be_replaced():
    optimizer, old, new = fastadam.Adam(0.1), np.array(1.0), np.array(1.0)
    step_by_half(optimizer, old)
    optimizer.resize(old, new)
    assert optimizer.get_slot(new, "m").round(9) == 0.05
    optimizer.reset(new)
    assert optimizer.get_slot(new, "m") == 0


# ---- small states ----------------------------------------------------------------------------------------------------

SMALL = {
    "bfloat16": {"moments": "bfloat16"},
    "8bit": {"moments": "8bit"},
    "split": {"moments": "8bit", "master": "split"},
}


def small(kind, width):
    rng, dtype = np.random.RandomState(0), ml_dtypes.bfloat16 if kind == "split" else F32
    optimizer, table = (
        fastadam.Adam(0.1, float32_for=1, **SMALL[kind]),
        random_array(rng, (16, width), -3, 2).astype(dtype),
    )
    for _ in range(3):
        optimizer.apply_gradients([(random_array(rng, (16, width), -3, 2).astype(dtype), table)])
    return optimizer, table


def values_of(optimizer, table, name):
    return np.array(optimizer.get_slot(table, name)).astype(F32)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("width", [128, 256, 30])
def test_small_moments_move_exactly_where_rows_have_blocks_of_their_own(kind, width):
    optimizer, table = small(kind, width)
    rows = np.array([3, 15, -1, 0, 7])
    before = {name: values_of(optimizer, table, name) for name in ("m", "v")}
    low = optimizer.get_slot(table, "low").copy() if kind == "split" else None
    new = mapped(rows, table, np.zeros((5, width)))
    optimizer.resize(table, new, rows)
    for name, values in before.items():
        found = values_of(optimizer, new, name)
        expected = mapped(rows, values, np.zeros((5, width)))
        if kind == "bfloat16" or width != 30:
            np.testing.assert_array_equal(bits(found), bits(expected))
        else:  # a code has 3 bits of mantissa, and its exponent reaches 2**-16 or less below that of its block's largest
            np.testing.assert_allclose(found, expected, rtol=0.13, atol=np.abs(expected).max() * 2.0**-10)
    if low is not None:
        np.testing.assert_array_equal(optimizer.get_slot(new, "low"), mapped(rows, low, np.zeros((5, width))))
    optimizer.apply_gradients([(np.ones((5, width), new.dtype), new)])


@pytest.mark.parametrize("kind", SMALL)
def test_rows_of_small_moments_are_reset_and_the_others_stay(kind):
    optimizer, table = small(kind, 30)
    before = {name: values_of(optimizer, table, name) for name in ("m", "v")}
    low = optimizer.get_slot(table, "low").copy() if kind == "split" else None
    optimizer.reset(table, [3, 4])
    for name, values in before.items():
        values[[3, 4]] = 0
        np.testing.assert_array_equal(bits(values_of(optimizer, table, name)), bits(values))
    optimizer.reset(table)
    assert not values_of(optimizer, table, "m").any()
    if low is not None:  # it is part of the value
        np.testing.assert_array_equal(optimizer.get_slot(table, "low"), low)


# ---- memory ----------------------------------------------------------------------------------------------------------


def used(**options):
    optimizer, table = fastadam.Adam(0.1, **options), np.arange(12, dtype=F32).reshape(6, 2)
    for ids in ([0, 1], [1, 2], [0]):
        optimizer.apply_gradients([(IndexedSlices(np.ones((len(ids), 2), F32), ids), table)])
    return optimizer, table


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


def rss_anon():
    """KiB of anonymous memory that are resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


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


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: counts pages in /proc")
@pytest.mark.parametrize("mode", ["lazy", "deferred"])
@pytest.mark.parametrize("after", ["steps", "get_slot", "load"])
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


# ---- views, copies, restored optimizers --------------------------------------------------------------------------------


def test_a_view_of_a_larger_array_grows_without_a_copy():
    twins = Twins(rows=20, **DEFERRED)
    whole = twins.table
    twins.table, twins.twin_table = whole[:6], twins.twin_table[:6].copy()
    for ids in ([0, 5], [1], [2]):
        twins.step(ids)
    twins.optimizer.resize(twins.table, whole[:9])
    twins.table, old = whole[:9], twins.twin_table
    twins.twin_table = np.concatenate([old, whole[6:9]])
    twins._rebuild(lambda name, slot: np.concatenate([slot, np.zeros((3, 3))]))
    twins.step([8, 0])
    twins.compare()


def test_rows_can_be_permuted_in_place_once_they_are_up_to_date():
    optimizer, table = used(**DEFERRED)
    order = np.array([5, 4, 3, 2, 1, 0])
    before = optimizer.get_slot(table, "m").copy()
    optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [0]), table)])
    stale = table.copy()
    with pytest.raises(ValueError, match=r"^new: in the memory of old, whose rows wait for their steps; expected sync"):
        optimizer.resize(table, table, order)
    np.testing.assert_array_equal(table, stale)
    optimizer.sync()
    before = optimizer.get_slot(table, "m").copy()
    table[...] = table[order]
    optimizer.resize(table, table, order)
    np.testing.assert_array_equal(optimizer.get_slot(table, "m"), before[order])


def test_a_deep_copy_goes_on_with_the_variable_and_resizes_it_apart():
    optimizer, table = used(**DEFERRED)
    twin = copy.deepcopy(optimizer)
    new = np.concatenate([table, ones(1, 2)])
    twin.resize(table, new)
    assert optimizer.get_slot(table, "m").shape == (6, 2)
    twin.sync()
    optimizer.sync()
    np.testing.assert_array_equal(new[:6], table)


def test_an_unpickled_optimizer_has_to_see_its_variables_first():
    optimizer, table = used()
    again = pickle.loads(pickle.dumps(optimizer))
    for call in (lambda: again.resize(table, table.copy()), lambda: again.forget(table), lambda: again.reset(table)):
        with pytest.raises(
            ValueError, match=r"not a variable of this optimizer, expected one that a step or build\(\)"
        ):
            call()
    again.reset()
    again.build([table])
    assert not again.get_slot(table, "m").any()


def test_a_resized_optimizer_is_saved_and_goes_on(tmp_path):
    optimizer, table = used(**DEFERRED)
    new = np.concatenate([table, ones(3, 2)])
    optimizer.resize(table, new)
    optimizer.save(tmp_path / "adam")
    other = new.copy()
    again = fastadam.Adam.load(tmp_path / "adam", [other])
    for each, target in ((optimizer, new), (again, other)):
        each.apply_gradients([(IndexedSlices(ones(1, 2), [8]), target)])
        each.sync()
    np.testing.assert_array_equal(bits(new), bits(other))


def test_a_loss_scale_optimizer_forwards_all_three():
    table = ones(2, 2)
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1), initial_scale=1.0)
    step_by_half(optimizer, table)
    new = np.concatenate([table, table])
    optimizer.resize(table, new)
    assert optimizer.get_slot(new, "m").shape == (4, 2)
    optimizer.reset(new)
    assert not optimizer.get_slot(new, "m").any()
    optimizer.forget(new)
    assert len(optimizer.weights) == 1


@pytest.mark.parametrize("how", ["permuted in place", "reset", "rows reset", "forgotten"])
@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred", "averages", "deferred averages"])
def test_a_delta_has_what_was_changed(mode, how, tmp_path):
    optimizer, table = used(**MODES[mode])
    optimizer.save(tmp_path / "base", values=True)
    if how == "permuted in place":
        optimizer.sync()
        table[...] = table[::-1].copy()
        optimizer.resize(table, table, [5, 4, 3, 2, 1, 0])
    elif how == "forgotten":
        optimizer.forget(table)
        optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [5]), table)])
    else:
        optimizer.reset(table, [0, 1] if how == "rows reset" else None)
    deltas = [tmp_path / "delta 1", tmp_path / "delta 2"]
    for path, row in zip(deltas, (2, 3), strict=True):
        optimizer.save_delta(path)
        optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [row]), table)])
    optimizer.save_delta(tmp_path / "delta 3")
    other = np.zeros_like(table)
    again = fastadam.Adam.load(tmp_path / "base", [other], deltas=[*deltas, tmp_path / "delta 3"])
    again.sync()
    optimizer.sync()
    for a, b in zip([other, *again.get_weights()], [table, *optimizer.get_weights()], strict=True):
        np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(b)))


def test_a_delta_after_another_array_asks_for_a_new_base(tmp_path):
    optimizer, table = used(**DEFERRED)
    optimizer.save(tmp_path / "base", values=True)
    optimizer.resize(table, np.concatenate([table, ones(1, 2)]))
    with pytest.raises(ValueError, match=r"^save_delta: variable 0 is another array.*expected a new base"):
        optimizer.save_delta(tmp_path / "delta")


# ---- refusals --------------------------------------------------------------------------------------------------------

NEW = np.zeros((3, 2), F32)
REFUSED = {
    "unknown": (lambda o, t: o.resize(NEW, t), ValueError, "^old: not a variable of this optimizer"),
    "unknown to forget": (lambda o, t: o.forget(NEW), ValueError, "^var: not a variable of this optimizer"),
    "unknown to reset": (lambda o, t: o.reset(NEW), ValueError, "^var: not a variable of this optimizer"),
    "dtype": (lambda o, t: o.resize(t, np.zeros((3, 2))), ValueError, r"^new: float64 \(3, 2\), expected float32 \(n, 2\) "),
    "width": (lambda o, t: o.resize(t, ones(3, 3)), ValueError, r"^new: float32 \(3, 3\), expected float32 \(n, 2\) like"),
    "axes": (lambda o, t: o.resize(t, ones(6)), ValueError, r"^new: float32 \(6,\), expected float32 \(n, 2\) like old"),
    "list": (lambda o, t: o.resize(t, [[1.0, 2.0]]), TypeError, "^new: list, expected"),
    "integers": (lambda o, t: o.resize(t, np.zeros((3, 2), int)), TypeError, "^new: "),
    "read-only": (lambda o, t: o.resize(t, np.broadcast_to(F32(0), (3, 2))), ValueError, "^new: "),
    "float rows": (lambda o, t: o.resize(t, NEW, [0.0, 1.0, 2.0]), TypeError, "^rows: dtype float64, expected integers"),
    "mask": (lambda o, t: o.resize(t, NEW, [True] * 3), TypeError, "^rows: dtype bool, expected integers"),
    "too few rows": (lambda o, t: o.resize(t, NEW, [0, 1]), ValueError, r"^rows: shape \(2,\), expected \(3,\)"),
    "a row too high": (lambda o, t: o.resize(t, NEW, [0, 1, 6]), ValueError, "^rows: 6 is not a row of old, expected 0 <="),
    "-2": (lambda o, t: o.resize(t, NEW, [0, 1, -2]), ValueError, "^rows: -2 is not a row of old"),
    "rows alone": (lambda o, t: o.reset(rows=[1]), ValueError, "^rows: given without var"),
    "reset row": (lambda o, t: o.reset(t, [6]), ValueError, "^rows: 6 is not a row of var, expected 0 <= row < 6"),
    "reset -1": (lambda o, t: o.reset(t, [-1]), ValueError, "^rows: -1 is not a row of var"),
}  # fmt: skip


def state_of(optimizer, table):
    """What a refused call must not have changed, rows that wait included."""
    history = history_of(optimizer)
    behind = history.behind().copy() if history else None
    return pickle.dumps([table, parts_of(optimizer).state.copies(), behind])


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("mode", ["dense", "deferred"])
def test_a_call_that_is_refused_changes_nothing(case, mode):
    call, error, message = REFUSED[case]
    optimizer, table = used(**MODES[mode])
    before = state_of(optimizer, table)
    with pytest.raises(error, match=message):
        call(optimizer, table)
    assert state_of(optimizer, table) == before


@pytest.mark.parametrize("row", [0, 1])
def test_values_that_were_copied_before_rows_were_brought_up_to_date_are_refused(row):
    optimizer, table = used(**DEFERRED)
    for _ in range(3):
        optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [5]), table)])
    optimizer.gather(table, [row])
    before = state_of(optimizer, table)
    changed = table.copy()
    other = 1 - row
    changed[other, 1] += 1
    with pytest.raises(ValueError, match=rf"^new: row {other} is not the one of old as it is now, so that steps of"):
        optimizer.resize(table, changed)
    assert state_of(optimizer, table) == before
    stale = table.copy()
    optimizer.sync()
    with pytest.raises(ValueError, match=rf"^new: row {other} is not the one of old as it is now, so that steps of"):
        optimizer.resize(table, stale)  # no row waits any more, but these values lack steps
    optimizer.resize(table, table.copy())


def test_an_array_that_the_optimizer_knows_or_that_overlaps_one_is_refused():
    optimizer, table, other = fastadam.Adam(0.1), ones(4, 2), ones(8, 2)
    step_by_half(optimizer, table, other)
    for new, message in ((other, "a variable of this optimizer already"), (other[:5], "overlaps a variable of this")):
        with pytest.raises(ValueError, match=f"^new: {message}"):
            optimizer.resize(table, new)
    assert len(optimizer.weights) == 5
    step_by_half(optimizer, table, other)


@pytest.mark.parametrize("call", ["resize", "forget", "reset"])
@pytest.mark.parametrize("when", ["open step", "averages"])
def test_none_can_be_called_in_the_middle_of_something(call, when):
    optimizer, table = fastadam.Adam(0.1, use_ema=when == "averages"), ones(4, 2)
    step_by_half(optimizer, table)
    calls = {"resize": lambda: optimizer.resize(table, ones(5, 2)), "forget": lambda: optimizer.forget(table),
             "reset": lambda: optimizer.reset()}  # fmt: skip
    if when == "averages":
        with optimizer.averages([table]), pytest.raises(RuntimeError, match=f"^{call}: inside of"):
            calls[call]()
    else:
        optimizer.begin_step()
        with pytest.raises(RuntimeError, match=f"^{call}: a step is open"):
            calls[call]()
        optimizer.abort_step()
    calls[call]()


@pytest.mark.parametrize("call", ["resize", "forget", "reset"])
def test_code_that_a_step_runs_cannot_call_them(call):
    table = ones(4, 2)
    calls = {
        "resize": lambda o: o.resize(table, ones(5, 2)),
        "forget": lambda o: o.forget(table),
        "reset": lambda o: o.reset(),
    }

    def rate():
        if optimizer.iterations:
            calls[call](optimizer)
        return 0.1

    optimizer = fastadam.Adam(rate)
    step_by_half(optimizer, table)
    with pytest.raises(RuntimeError, match=f"^{call}: called by code that a step runs"):
        step_by_half(optimizer, table)
    assert optimizer.get_slot(table, "m").shape == (4, 2)


def test_gather_of_the_old_array_is_plain_indexing_and_a_gradient_starts_it_anew():
    optimizer, table = used(**DEFERRED)
    optimizer.resize(table, table.copy())
    np.testing.assert_array_equal(optimizer.gather(table, [0]), table[[0]])
    with pytest.warns(
        UserWarning, match=r"^grads_and_vars\[0\]: resize\(\) gave its moments to another array, which is"
    ):
        optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [0]), table)])
    optimizer.apply_gradients([(IndexedSlices(ones(1, 2), [0]), table)])
    assert len(parts_of(optimizer).state.entries) == 2


# ---- a hash table: the recipe of the guide ---------------------------------------------------------------------------


class Keyed:
    """Rows by key, in a table that doubles."""

    def __init__(self, optimizer, width):
        self.optimizer, self.row_of = optimizer, {}
        self.table = np.zeros((4, width), F32)

    def rows(self, keys):
        new = [key for key in dict.fromkeys(keys) if key not in self.row_of]
        self.row_of.update({key: row for row, key in enumerate(new, len(self.row_of))})
        while len(self.row_of) > len(self.table):
            longer = np.concatenate([self.table, np.zeros_like(self.table)])
            if self.optimizer.iterations:
                self.optimizer.resize(self.table, longer)
            self.table = longer
        return np.array([self.row_of[key] for key in keys])


def test_a_table_by_key_that_doubles_has_the_bits_of_one_that_was_long_enough():
    rng = np.random.RandomState(0)
    tables = [Keyed(fastadam.Adam(0.1, sparse_update=mode), 3) for mode in ("deferred", "dense")]
    tables[1].table = np.zeros((64, 3), F32)
    for _ in range(60):
        keys = [f"word {n}" for n in rng.zipf(1.5, 3) % 50]
        values = random_array(rng, (3, 3), -6, 2)
        for keyed in tables:
            rows = keyed.rows(keys)
            keyed.optimizer.apply_gradients([(IndexedSlices(values, rows), keyed.table)])
    assert len(tables[0].table) >= len(tables[0].row_of) > 16
    for keyed in tables:
        keyed.optimizer.sync()
    used_rows = len(tables[0].row_of)
    np.testing.assert_array_equal(bits(tables[0].table[:used_rows]), bits(tables[1].table[:used_rows]))
