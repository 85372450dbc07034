"""``resize``, ``forget`` and ``reset``, against an optimizer that is built anew from permuted weights, to the bit."""

from __future__ import annotations

import copy
import pickle

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from fastadam import IndexedSlices
from fastadam._core.parts import parts_of
from helpers import F32, ones, step_by_half
from hypothesis import given
from hypothesis import strategies as st
from resize_cases import DEFERRED, MODES, Twins, mapped, used

pytestmark = pytest.mark.usefixtures("passes_touch_all_rows")


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
