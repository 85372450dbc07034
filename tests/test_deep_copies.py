"""A deep copy goes on with the variables of the original, or with copies of them, which it tells apart by values and names."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import fastadam
import numpy as np
import pytest
from helpers import assert_same

F32 = np.float32


def stepped(optimizer, *variables):
    optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])


def test_a_deep_copy_gives_a_variable_that_is_no_copy_moments_of_its_own():
    w, other = np.ones(3, np.float32), np.full(3, 2, np.float32)
    optimizer = fastadam.Adam(0.1)
    for _ in range(3):
        stepped(optimizer, w)
    copied, twin = copy.deepcopy(optimizer), w.copy()
    with pytest.warns(UserWarning, match=r"vars\[0\]: neither a variable of the optimizer .* moments of zero"):
        stepped(copied, other)
    stepped(copied, w)  # goes on
    stepped(optimizer, twin)  # a new variable of the first one
    assert copied.get_slot(w, "m")[0] > 3 * copied.get_slot(other, "m")[0]


def test_a_deep_copy_goes_on_with_copies_of_its_variables_in_any_order():
    rng = np.random.RandomState(0)
    variables = [rng.rand(3).astype(np.float32) for _ in range(3)]
    optimizer = fastadam.Adam(0.1)
    for scale in range(3):
        optimizer.apply_gradients([(np.full_like(w, scale + i), w) for i, w in enumerate(variables)])
    copied, twins = copy.deepcopy(optimizer), [w.copy() for w in variables]
    stepped(optimizer, *variables)
    stepped(copied, *twins[::-1])
    assert all(np.array_equal(w, twin) for w, twin in zip(variables, twins, strict=True))


def test_a_deep_copy_that_follows_copies_never_updates_a_variable_of_the_original():
    w, x = np.ones(3, np.float32), np.ones(2, np.float32)
    optimizer = fastadam.Adam(0.1, gradient_accumulation_steps=2)
    for _ in range(2):
        stepped(optimizer, w, x)
    stepped(optimizer, x)
    copied, (twin, _) = copy.deepcopy((optimizer, (w, x)))
    before = x.copy()
    with pytest.raises(
        ValueError, match=r"accumulated for float32 \(2,\), whose variable a restored or copied .* build"
    ):
        stepped(copied, twin)
    assert np.array_equal(x, before)


def test_a_deep_copy_that_follows_copies_never_writes_to_a_table_of_the_original():
    w, table = np.ones(3, np.float32), np.ones((50_000, 2), np.float32)
    optimizer = fastadam.Adam(0.1, sparse_update="deferred")
    slices = fastadam.IndexedSlices(np.ones((1, 2), np.float32), [7])
    for _ in range(3):
        optimizer.apply_gradients([(slices, table), (np.ones(3, np.float32), w)])
    optimizer.apply_gradients([(fastadam.IndexedSlices(np.ones((1, 2), np.float32), [3]), table)])
    copied, (twin, other) = copy.deepcopy((optimizer, (w, table)))
    before = table.copy()
    stepped(copied, twin)
    with pytest.raises(ValueError, match=r"rows of the table float32 \(50000, 2\) waited .* call build\(\)"):
        copied.sync()
    assert np.array_equal(table, before)
    copied.build([other])
    copied.sync()
    optimizer.sync()
    assert np.array_equal(table[:, 0], other[:, 0])


def test_a_deep_copy_finds_the_copy_of_a_variable_that_was_renamed():
    v = fastadam.Variable([1.0, 2.0], name="a")
    optimizer = fastadam.Adam(0.1)
    for _ in range(3):
        optimizer.apply_gradients([(np.ones(2), v)])
    v.name = "b"
    copied, twin = copy.deepcopy((optimizer, v))
    for o, w in ((optimizer, v), (copied, twin)):
        o.apply_gradients([(-np.ones(2), w)])
    assert np.array_equal(v.value, twin.value)
    assert len(copied.weights) == 3


@pytest.mark.parametrize("before", ["a", None])
@pytest.mark.parametrize("after", ["b", None])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "save", "a copy of a copy"])
def test_an_optimizer_follows_the_name_of_a_renamed_variable(before, after, way, tmp_path):
    def step(optimizer, variable):
        optimizer.apply_gradients([(np.ones(2), variable)])

    v = fastadam.Variable([1.0, 2.0], name=before)
    optimizer = fastadam.Adam(0.1)
    step(optimizer, v)
    v.name = after
    twin = fastadam.Variable(v.value.copy(), name=after)
    if way == "save":
        optimizer.save(tmp_path / "state.safetensors")
        again = fastadam.Adam.load(tmp_path / "state.safetensors", [twin])
    elif way == "deepcopy":
        again, twin = copy.deepcopy((optimizer, v))
    else:
        again = pickle.loads(pickle.dumps(optimizer))
        if way == "a copy of a copy":
            again = pickle.loads(pickle.dumps(again))
    for o, w in ((optimizer, v), (again, twin)):
        step(o, w)
    assert np.array_equal(v.value, twin.value)
    assert len(again.weights) == 3
    other = fastadam.Variable(twin.value.copy(), name="another")
    if after is not None:
        with pytest.raises(ValueError, match="named 'b'"):
            pickle.loads(pickle.dumps(optimizer)).build([other])


def test_a_pattern_finds_a_renamed_variable_that_comes_as_an_array():
    v = fastadam.Variable([1.0, 2.0], name="a")
    optimizer = fastadam.Adam(0.1, weight_decay=0.5)
    optimizer.apply_gradients([(np.ones(2), v)])
    v.name = "bias"
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    before = v.value.copy()
    optimizer.apply_gradients([(np.ones(2), v.value)])
    np.testing.assert_allclose(v.value, before - 0.1, rtol=1e-5)


def test_a_name_that_is_no_string_is_refused():
    v = fastadam.Variable([1.0], name="a")
    with pytest.raises(TypeError, match="name: 3, expected a string"):
        v.name = 3
    assert v.name == "a"


def with_equal_values(names, count=2):
    """An optimizer, its variables, all zeros, and moments that differ."""
    variables = [fastadam.Variable(np.zeros(3, F32), name) if name else np.zeros(3, F32) for name in names]
    optimizer = fastadam.Adam(0.1)
    for _ in range(count):
        optimizer.apply_gradients([(np.full(3, i + 1, F32), w) for i, w in enumerate(variables)])
    for w in variables:
        (w.value if isinstance(w, fastadam.Variable) else w)[...] = 0
    return optimizer, variables


def moments(optimizer, variables):
    return [float(optimizer.get_slot(w, "m")[0]) for w in variables]


def copied_variables(variables):
    return [copy.deepcopy(w) for w in variables]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_names_tell_copies_with_equal_values_apart(order, one_by_one):
    optimizer, variables = with_equal_values("abc")
    expected = moments(optimizer, variables)
    again, twins = copy.deepcopy(optimizer), copied_variables(variables)
    for group in [[i] for i in order] if one_by_one else [order]:
        again.build([twins[i] for i in group])
    assert moments(again, twins) == expected


def test_a_variable_of_another_name_takes_no_moments_of_an_equal_one():
    optimizer, (a,) = with_equal_values("a")
    again, z = copy.deepcopy(optimizer), fastadam.Variable(np.zeros(3, F32), "z")
    with pytest.warns(UserWarning, match="variable 'z': neither a variable .* with its name and values"):
        again.build([z])
    again.build([a])
    assert moments(again, [z, a]) == [0, *moments(optimizer, [a])]


def test_copies_with_equal_values_and_no_names_are_told_apart_by_their_order_if_all_come():
    optimizer, variables = with_equal_values([None, None, None])
    again, twins = copy.deepcopy((optimizer, variables))
    again.build(twins)
    assert moments(again, twins) == moments(optimizer, variables)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("call", ["build", "apply_gradients"])
def test_copies_that_could_be_of_several_variables_are_refused(count, call):
    optimizer, variables = with_equal_values([None, None, None])
    again = copy.deepcopy(optimizer)
    strangers = [np.zeros(3, F32) for _ in range(count)]
    argument = strangers if call == "build" else [(np.ones(3, F32), w) for w in strangers]
    message = rf"vars\[0\]: {count} such variables have the values that 3 had .* expected build\(\) first"
    with pytest.raises(ValueError, match=message):
        getattr(again, call)(argument)
    assert not any(w.any() for w in strangers)
    assert_same(again.get_weights(), optimizer.get_weights())
    again.build(variables)  # nothing was adopted
    assert moments(again, variables) == moments(optimizer, variables)


def test_two_arrays_that_could_each_be_the_copy_of_one_are_refused_until_build_tells():
    optimizer, (w,) = with_equal_values([None])
    again, twin, other = copy.deepcopy(optimizer), w.copy(), w.copy()
    with pytest.raises(ValueError, match="2 such variables have the values that 1 had"):
        stepped(again, other, twin)
    again.build([twin])
    again.build([other])
    assert moments(again, [twin, other]) == [*moments(optimizer, [w]), 0]


def test_equal_variables_with_equal_moments_need_no_order():
    optimizer, variables = fastadam.Adam(0.1), [np.zeros(3, F32) for _ in range(3)]
    for _ in range(2):
        stepped(optimizer, *variables)
    again, twins = copy.deepcopy((optimizer, variables))
    for w in twins[::-1]:
        again.build([w])
    assert moments(again, twins) == moments(optimizer, variables)


def test_an_original_whose_moments_went_to_an_array_of_the_same_values_is_refused():
    optimizer, (a,) = with_equal_values([None])
    again, z = copy.deepcopy(optimizer), np.zeros(3, F32)
    stepped(again, z)
    with pytest.raises(ValueError, match=r"vars\[0\]: its moments in this deep copy went to another variable"):
        stepped(again, a)
    assert not a.any()
    stepped(optimizer, a)  # the original is not concerned
    again = copy.deepcopy(optimizer)
    again.build([a])
    stepped(again, a)


def test_a_copy_lets_go_of_the_originals_when_copies_have_taken_their_place():
    optimizer, (w,) = with_equal_values([None])
    again, twin = copy.deepcopy((optimizer, w))
    stepped(again, twin)
    original = weakref.ref(w)
    del optimizer, w
    gc.collect()
    assert original() is None
    stepped(again, twin)
