"""A copied or pickled optimizer goes on to the bit, and its state finds the variables it belongs to."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import fastadam
import numpy as np
import pytest
from helpers import (
    DTYPES,
    OPTIONS,
    assert_goes_on_alike,
    assert_same,
    gradients_of,
    make_variables,
    slow,
    train,
    trained,
)

F32 = np.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_pickled_optimizer_goes_on_to_the_bit(options, order, dtype):
    optimizer, variables = trained(options, order, dtype)
    again, others = pickle.loads(pickle.dumps((optimizer, variables)))
    assert_goes_on_alike(optimizer, variables, again, others)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_deep_copy_with_its_variables_goes_on_to_the_bit(options, order):
    optimizer, variables = trained(options, order)
    again, others = copy.deepcopy((optimizer, variables))
    assert not any(np.shares_memory(a, b) for a in again.weights for b in optimizer.weights)
    assert_goes_on_alike(optimizer, variables, again, others)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_goes_on_with_the_same_variables_in_any_order(copied):
    shapes = ((4,), (4,), (4,))
    optimizer, variables = trained(shapes=shapes)
    before = [w.copy() for w in variables]
    again = copied(optimizer)
    assert_same([again.get_slot(w, "m") for w in variables], [optimizer.get_slot(w, "m") for w in variables])
    gradients = gradients_of(3, variables)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    after = [w.copy() for w in variables]
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    for w, b in zip(variables, before, strict=True):
        w[...] = b
    again.apply_gradients(list(zip(gradients, variables, strict=True))[::-1])
    assert_same(variables, after)
    assert_same(again.get_weights(), optimizer.get_weights())


def test_a_copy_is_independent():
    optimizer, variables = trained()
    again = copy.deepcopy(optimizer)
    before = again.get_weights()
    train(optimizer, variables, range(3, 5))
    optimizer.learning_rate = 0.5
    assert_same(again.get_weights(), before)
    assert again.learning_rate == 0.1
    assert again.iterations == 3


def test_a_fresh_optimizer_can_be_copied_and_pickled():
    for again in (copy.deepcopy(fastadam.Adam(0.1)), pickle.loads(pickle.dumps(fastadam.Adam(0.1)))):
        variables, expected = make_variables(), make_variables()
        train(again, variables, range(2))
        train(fastadam.Adam(0.1), expected, range(2))
        assert_same(variables, expected)


@pytest.mark.parametrize("again_and_again", [1, 3])
def test_the_order_of_weights_is_kept_when_variables_came_in_two_calls(again_and_again):
    optimizer = fastadam.Adam(0.1, amsgrad=True)
    variables = make_variables()
    train(optimizer, variables[:2], range(2))
    optimizer.add_slot(variables[0], "extra", "ones")
    train(optimizer, variables, range(2, 3))
    again, others = optimizer, variables
    for _ in range(again_and_again):
        again, others = pickle.loads(pickle.dumps((again, others)))
    assert again.get_slot_names() == ["m", "v", "vhat", "extra"]
    assert [w.shape for w in again.weights] == [w.shape for w in optimizer.weights]
    assert_goes_on_alike(optimizer, variables, again, others)


def test_restored_weights_can_be_set_before_the_variables_come():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    other, _ = trained({"learning_rate": 0.3})
    again.set_weights(other.get_weights())
    again.build(make_variables())
    assert_same(again.get_weights(), other.get_weights())
    del variables


def test_variables_may_come_back_in_several_calls_and_new_ones_after_them():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    others = [w.copy() for w in variables]
    again.build(others[:1])
    again.build(others[1:3])
    new = np.ones(7, F32)
    again.build([others[3], new])
    assert_same(again.get_weights()[:9], optimizer.get_weights())
    assert_same([again.get_slot(w, "v") for w in others], [optimizer.get_slot(w, "v") for w in variables])
    assert not again.get_slot(new, "m").any()


def test_a_slot_can_be_added_to_a_restored_variable():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.add_slot(variables[0], "m", "ones").tolist() == optimizer.get_slot(variables[0], "m").tolist()
    again.add_slot(variables[1], "extra")
    assert len(again.weights) == len(optimizer.weights) + 1
    assert again.get_slot(variables[1], "m").shape == (2, 2)


def test_the_layout_of_the_slots_follows_the_variable():
    optimizer, variables = trained(order="F")
    again = pickle.loads(pickle.dumps(optimizer))
    others = [np.array(w, order="C") for w in variables]
    assert_goes_on_alike(optimizer, variables, again, others)
    assert again.get_slot(others[3], "m").flags.c_contiguous


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ([np.ones(3, F32)], "vars[0]: float32 (3,), expected float32 (2, 2) named 'a': the state restored for variable 0 waits for it"),
        ([np.ones((2, 2))], "vars[0]: float64 (2, 2), expected float32 (2, 2) named 'a': the state restored for variable 0"),
        ([fastadam.Variable(np.ones((2, 2), F32), "b")], "variable 'b': float32 (2, 2), expected float32 (2, 2) named 'a': the"),
        ([np.ones((2, 2), F32), np.ones(4, F32)], "vars[1]: float32 (4,), expected float32 (3,): the state restored for variable 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", ["build", "apply_gradients"])
def test_a_variable_unlike_the_one_that_was_saved_is_refused(variables, message, call):
    optimizer = fastadam.Adam(0.1)
    named = fastadam.Variable(np.full((2, 2), 2, F32), name="a")
    optimizer.apply_gradients([(np.ones((2, 2), F32), named), (np.ones(3, F32), np.ones(3, F32))])
    again = pickle.loads(pickle.dumps(optimizer))
    before = [np.array(w) for w in variables]
    argument = variables if call == "build" else [(np.ones(w.shape, F32), w) for w in variables]
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(again, call)(argument)
    assert_same([np.array(w) for w in variables], before)
    again.build([fastadam.Variable(np.ones((2, 2), F32), "a"), np.ones(3, F32)])  # nothing was adopted
    assert_same(again.get_weights(), optimizer.get_weights())


def test_a_slot_of_a_variable_unlike_the_one_that_was_saved_is_refused():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    with pytest.raises(ValueError, match=re.escape("vars[0]: float32 (2, 2), expected float32 (3,): the state")):
        again.add_slot(variables[1], "m")
    assert_same(again.get_weights(), optimizer.get_weights())


@pytest.mark.filterwarnings("ignore:exclude_from_weight_decay. var_names.0. 'bias' excludes none")
def test_exclusions_by_memory_are_not_copied_to_other_memory():
    optimizer, variables = trained({"weight_decay": 0.1})
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    again, others = pickle.loads(pickle.dumps((optimizer, variables)))
    assert_goes_on_alike(optimizer, variables, again, others)
    optimizer.exclude_from_weight_decay([variables[0]])
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="exclude_from_weight_decay: var_list names variables by their memory"):
            copied(optimizer)


def test_a_refused_step_adopts_nothing():
    optimizer, variables = trained()
    again = pickle.loads(pickle.dumps(optimizer))
    wrong = [*gradients_of(3, variables)[:-1], np.ones(5, F32)]
    with pytest.raises(ValueError, match=re.escape("grads[3]: shape (5,)")):
        again.apply_gradients(zip(wrong, [w.copy() for w in variables], strict=True))
    assert_goes_on_alike(optimizer, variables, again, [w.copy() for w in variables])


def test_code_that_adds_slots_while_a_step_is_prepared_is_noticed():
    optimizer, w = fastadam.Adam(0.1), np.ones(3, F32)

    class Gradient:
        def __array__(self, dtype=None, copy=None):
            optimizer.build([w])
            return np.ones(3, F32)

    with pytest.raises(RuntimeError, match="the optimizer's slots were changed"):
        optimizer.apply_gradients([(Gradient(), w)])
    assert len(optimizer.weights) == 3
    assert (w == 1).all()

    def initializer(shape, dtype):
        optimizer.add_slot(w, "extra")
        return np.ones(shape, dtype)

    with pytest.raises(RuntimeError, match="the optimizer's slots were changed"):
        optimizer.add_slot(w, "extra", initializer)
    assert len(optimizer.weights) == 4


def test_a_pickle_with_buffers_outside_of_it_is_writable_again():
    optimizer, variables = trained()
    outside = []
    data = pickle.dumps(optimizer, protocol=5, buffer_callback=outside.append)
    again = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in outside])
    assert_goes_on_alike(optimizer, variables, again, [w.copy() for w in variables])


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL, *slow(*range(3, pickle.HIGHEST_PROTOCOL))])
def test_a_pickle_goes_on_in_another_process(protocol, tmp_path):
    optimizer, variables = trained({"amsgrad": True}, order="F")
    (tmp_path / "in").write_bytes(pickle.dumps((optimizer, variables, gradients_of(3, variables)), protocol))
    program = (
        "import pickle, sys; from pathlib import Path; where = Path(sys.argv[1])\n"
        "optimizer, variables, gradients = pickle.loads((where / 'in').read_bytes())\n"
        "optimizer.apply_gradients(zip(gradients, variables, strict=True))\n"
        "(where / 'out').write_bytes(pickle.dumps((optimizer, variables)))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    train(optimizer, variables, [3])
    again, others = pickle.loads((tmp_path / "out").read_bytes())
    assert_same(others, variables)
    assert_goes_on_alike(optimizer, variables, again, others)


# ---- tables whose rows wait ------------------------------------------------------------------------------------------


def step_row(optimizer, table, row):
    slices = fastadam.IndexedSlices(np.ones((1, table.shape[1]), F32), [row])
    optimizer.apply_gradients([(slices, table)])


def waiting(tables=1):
    """A deferred optimizer with rows that wait, its tables, and what they would be without waiting."""
    tables, dense = [np.ones((1000, 64), F32) for _ in range(tables)], np.ones((1000, 64), F32)
    optimizer, reference = fastadam.Adam(0.1, sparse_update="deferred"), fastadam.Adam(0.1)
    for row in range(4):
        slices = fastadam.IndexedSlices(np.ones((1, 64), F32), [row])
        optimizer.apply_gradients([(slices, table) for table in tables])
        step_row(reference, dense, row)
    return optimizer, tables, dense


MOVES = {
    "sync": lambda optimizer, table, path: optimizer.sync(),
    "sync of the table": lambda optimizer, table, path: optimizer.sync(table),
    "get_weights": lambda optimizer, table, path: optimizer.get_weights(),
    "weights": lambda optimizer, table, path: optimizer.weights,
    "get_slot": lambda optimizer, table, path: optimizer.get_slot(table, "m"),
    "save": lambda optimizer, table, path: optimizer.save(path),
    "gather": lambda optimizer, table, path: optimizer.gather(table, [1, 2]),
    "step": lambda optimizer, table, path: step_row(optimizer, table, 1),
    "mode": lambda optimizer, table, path: setattr(optimizer, "sparse_update", "dense"),
    "reset": lambda optimizer, table, path: optimizer.reset(table, [7]),
}


WHOLE = ["sync", "get_weights", "weights", "save", "mode"]  # calls that name no variable


@pytest.mark.parametrize("call", WHOLE)
@pytest.mark.parametrize("together", [False, True])
def test_a_copy_that_has_not_seen_its_variables_moves_none_of_the_originals(together, call, tmp_path):
    """It may get copies of them, whose rows wait, too."""
    optimizer, (table,), dense = waiting()
    copied, twin = copy.deepcopy((optimizer, table)) if together else (copy.deepcopy(optimizer), table.copy())
    before = table.copy()
    with pytest.raises(ValueError, match=r"rows of the table float32 \(1000, 64\) waited .* call build\(\)"):
        MOVES[call](copied, table, tmp_path / "adam")
    np.testing.assert_array_equal(table, before)
    copied.build([twin])
    for each in (copied, optimizer):
        each.sync()
    np.testing.assert_array_equal([twin, table], [dense, dense])


@pytest.mark.parametrize("first", MOVES)
@pytest.mark.parametrize("begins", ["copy", "original"])
@pytest.mark.parametrize(
    "call", ["resize", "resize in place", "save_delta", "pickle", "deepcopy", "deepcopy with the table"]
)
@pytest.mark.filterwarnings("ignore:.* a gradient for rows that wait")
def test_no_call_takes_rows_that_another_optimizer_has_moved_for_its_own(call, begins, first, tmp_path):
    """Steps that rows wait for would be made twice, at once or by whoever goes on from a file or a copy."""
    optimizer, (table,), _ = waiting()
    optimizer.save(tmp_path / "base", values=True)
    for row in range(3):
        step_row(optimizer, table, row)
    copied = copy.deepcopy(optimizer)
    copied.build([table])
    one, two = (copied, optimizer) if begins == "copy" else (optimizer, copied)
    MOVES[first](one, table, tmp_path / "adam")
    calls = {
        "resize": lambda: two.resize(table, table.copy()),
        "resize in place": lambda: two.resize(table, table),
        "save_delta": lambda: two.save_delta(tmp_path / "delta"),
        "pickle": lambda: pickle.dumps(two),
        "deepcopy": lambda: copy.deepcopy(two),
        "deepcopy with the table": lambda: copy.deepcopy((two, table)),
    }
    message = "the other one has moved them since"
    if call == "save_delta" and two is copied:
        message = "saved no base"  # a copy does not go on with the chain
    before = table.copy()
    with pytest.raises(ValueError, match=message):
        calls[call]()
    np.testing.assert_array_equal(table, before)
    assert not (tmp_path / "delta").exists()


@pytest.mark.filterwarnings("ignore:.* a gradient for rows that wait")
@pytest.mark.parametrize("second", MOVES)
@pytest.mark.parametrize("first", MOVES)
@pytest.mark.parametrize("begins", ["copy", "original"])
def test_rows_that_waited_when_a_copy_was_made_move_through_one_of_both(begins, first, second, tmp_path):
    optimizer, (table,), _ = waiting()
    other = copy.deepcopy(optimizer)
    other.build([table])  # both have seen the table
    one, two = (other, optimizer) if begins == "copy" else (optimizer, other)
    MOVES[first](one, table, tmp_path / "adam")
    before = table.copy()
    with pytest.raises(ValueError, match="the other one has moved them since"):
        MOVES[second](two, table, tmp_path / "adam")
    np.testing.assert_array_equal(table, before)
    one.sync()
    MOVES[second](one, table, tmp_path / "adam")


@pytest.mark.parametrize("first", ["sync of the table", "get_slot", "gather", "sync", "get_weights", "save"])
def test_the_one_that_moved_the_rows_goes_on_to_the_bit(first, tmp_path):
    optimizer, (table,), dense = waiting()
    copied = copy.deepcopy(copy.deepcopy(optimizer))  # also of a copy
    if first in WHOLE:
        copied.build([table])
    MOVES[first](copied, table, tmp_path / "adam")
    with pytest.raises(ValueError, match="the other one has moved them since"):
        optimizer.sync()
    copied.sync()
    np.testing.assert_array_equal(table, dense)


def test_the_one_that_moved_a_table_moves_the_others_too():
    optimizer, (a, b), dense = waiting(2)
    copied = copy.deepcopy(optimizer)
    copied.gather(a, [1])
    for table in (a, b):
        with pytest.raises(ValueError, match="the other one has moved them since"):
            optimizer.gather(table, [1])
    copied.sync()
    np.testing.assert_array_equal([a, b], [dense, dense])


@pytest.mark.parametrize("how", ["sync before", "own variables", "again and again"])
def test_the_original_and_a_copy_go_on_apart(how):
    optimizer, (table,), dense = waiting()
    if how == "sync before":
        optimizer.sync()
        copied = copy.deepcopy(optimizer)
        copied.get_weights()
    elif how == "own variables":
        copied, twin = copy.deepcopy((optimizer, table))
        copied.build([twin])
        copied.sync()
        np.testing.assert_array_equal(twin, dense)
    else:
        for _ in range(3):
            copy.deepcopy(optimizer)
            optimizer.gather(table, [0])
    optimizer.sync()
    np.testing.assert_array_equal(table, dense)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: counts pages in /proc")
@pytest.mark.parametrize("mode", ["deferred", "lazy"])
def test_a_deep_copy_of_a_table_makes_only_moments_of_touched_rows_resident(mode, tmp_path):
    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    table = np.memmap(tmp_path / "table", F32, "w+", shape=(400_000, 64))
    optimizer = fastadam.Adam(0.1, sparse_update=mode)
    rows = np.arange(7, 400_000, 4999)
    optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((len(rows), 64), F32), rows), table)])
    optimizer.sync()
    before = resident()
    copied = copy.deepcopy(optimizer)
    assert resident() - before < 30 * 1024  # m and v have 200 MB; numbers and flags of 400000 rows
    for name in ("m", "v"):
        np.testing.assert_array_equal(copied.get_slot(table, name), optimizer.get_slot(table, name))
