"""What an optimizer keeps between steps changes their time and nothing else."""

from __future__ import annotations

import copy
import warnings

import fastadam
import numpy as np
import pytest
from cases import random_array
from helpers import bits

RNG = np.random.RandomState(0)


def arrays(*shapes):
    return [random_array(RNG, shape) for shape in shapes]


@pytest.fixture
def made(monkeypatch):
    """Grows by one with every plan that is made."""
    plans, make = [], fastadam.Adam._make_plan

    def counting(self, *arguments):
        plans.append(self)
        return make(self, *arguments)

    monkeypatch.setattr(fastadam.Adam, "_make_plan", counting)
    return plans


def test_sets_of_variables_seen_before_cost_no_new_plan(made):
    optimizer = fastadam.Adam(0.1)
    first, second, third = arrays((3,), (2, 2)), arrays((5,)), arrays((3,), (2, 2), (7,))
    for _ in range(2):  # a set that comes later brings slots, with which the plans of the others are out of date
        for variables in (first, second, third):
            optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])
    del made[:]
    for variables in (first, second, third, second, first, first):
        optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])
    assert not made


@pytest.mark.parametrize("form", ["views", "lists", "Variable", "generator", "zip"])
def test_what_names_the_same_memory_costs_no_new_plan(made, form):
    w = random_array(RNG, (4, 3))
    holder = fastadam.Variable(w, name="w")
    give = {
        "views": lambda g: [(g, w[:])],
        "lists": lambda g: [[g, w]],
        "Variable": lambda g: [(fastadam.Variable(g), holder)],
        "generator": lambda g: (pair for pair in [(g, w)]),
        "zip": lambda g: zip([g], [w], strict=True),
    }[form]
    optimizer = fastadam.Adam(0.1)
    for _ in range(4):
        optimizer.apply_gradients(give(random_array(RNG, (4, 3))))
    assert len(made) == 1


def test_gradients_that_are_none_are_warned_of_in_every_step_and_cost_no_new_plan(made):
    a, b, c = arrays((3,), (2,), (4,))
    optimizer = fastadam.Adam(0.1)
    for _ in range(3):
        with pytest.warns(UserWarning, match=r"variables \['vars\[1\]'\]") as caught:
            optimizer.apply_gradients([(np.ones_like(a), a), (None, b), (np.ones_like(c), c)])
        assert caught[0].filename == __file__
    assert len(made) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.apply_gradients([(np.ones_like(a), a), (np.ones_like(b), b), (np.ones_like(c), c)])
    assert len(made) == 2


def test_an_optimizer_called_layer_by_layer_has_the_bits_of_one_called_for_all():
    """More layers than plans are kept."""
    layers = arrays(*[(n % 7 + 1,) for n in range(300)])
    twins = [w.copy() for w in layers]
    one, many = fastadam.Adam(0.1), [fastadam.Adam(0.1) for _ in layers]
    for _ in range(3):
        gradients = [random_array(RNG, w.shape) for w in layers]
        for i, (g, w, twin) in enumerate(zip(gradients, layers, twins, strict=True)):
            one.iterations = many[i].iterations
            one.apply_gradients([(g, w)])
            many[i].apply_gradients([(g, twin)])
    assert all(np.array_equal(bits(w), bits(twin)) for w, twin in zip(layers, twins, strict=True))


def test_a_variable_whose_shape_or_dtype_was_set_in_place_is_another_one():
    w = np.zeros((2, 3), np.float32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.ones((2, 3), np.float32), w)])
    w.shape = (3, 2)
    with pytest.raises(ValueError, match=r"known as float32 \(2, 3\)"):
        optimizer.apply_gradients([(np.ones((3, 2), np.float32), w)])
    w.shape = (2, 3)
    optimizer.apply_gradients([(np.ones((2, 3), np.float32), w)])
    assert (w < 0).all()


def test_a_gradient_that_moves_onto_a_variable_is_refused_though_others_were_good():
    w, g = arrays((64,), (64,))
    optimizer = fastadam.Adam(0.1)
    for _ in range(2):
        optimizer.apply_gradients([(g, w)])
    before = w.copy()
    for bad in (w, optimizer.get_slot(w, "m")):
        with pytest.raises(ValueError, match=r"grads\[0\]: shares memory"):
            optimizer.apply_gradients([(bad, w)])
    assert np.array_equal(w, before)


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_a_table_that_gets_a_history_in_one_set_has_it_in_all(mode):
    """The set with the dense gradient was seen before the table had rows that wait."""
    table, w = random_array(RNG, (50, 2)), random_array(RNG, (3,))
    twins = [table.copy(), w.copy()]
    waiting, dense = fastadam.Adam(0.1, sparse_update=mode), fastadam.Adam(0.1)
    dense_gradient, w_gradient = random_array(RNG, table.shape), random_array(RNG, (3,))
    for row in (None, 4, None, 7, 7, None):
        if row is None:
            waiting.apply_gradients([(dense_gradient, table)])
            dense.apply_gradients([(dense_gradient, twins[0])])
            continue
        slices = fastadam.IndexedSlices(np.ones((1, 2), np.float32), [row])
        waiting.apply_gradients([(slices, table), (w_gradient, w)])
        dense.apply_gradients([(slices, twins[0]), (w_gradient, twins[1])])
    waiting.sync()
    assert np.array_equal(bits(table), bits(twins[0]))  # gaps of at most two steps: exact in both modes


CHANGES = {
    "learning_rate": 0.5,
    "lr": lambda: 0.25,
    "beta_1": 0.5,
    "beta_2": 0.9,
    "epsilon": 1e-3,
    "decay": 0.5,
    "clipvalue": 0.01,
    "clipnorm": 0.01,
    "global_clipnorm": 0.01,
    "weight_decay": 0.5,
    "use_ema": True,
    "loss_scale_factor": 8.0,
    "amsgrad": True,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_number_that_is_set_counts_from_the_next_step_on(name):
    """A copy has kept nothing between steps."""
    w = random_array(RNG, (9,))
    optimizer = fastadam.Adam(0.1)
    for step in range(3):
        optimizer.apply_gradients([(random_array(RNG, (9,)), w)])
        if step == 1:
            setattr(optimizer, name, CHANGES[name])
    twin, other, fresh = w.copy(), w.copy(), copy.deepcopy(optimizer)
    setattr(optimizer, name, getattr(fastadam.Adam(0.1), name))
    unchanged = copy.deepcopy(optimizer)
    setattr(optimizer, name, CHANGES[name])
    gradient = random_array(RNG, (9,))
    unchanged.apply_gradients([(gradient, other)])
    optimizer.apply_gradients([(gradient, w)])
    fresh.apply_gradients([(gradient, twin)])
    assert np.array_equal(bits(w), bits(twin))
    assert name in ("use_ema", "amsgrad") or not np.array_equal(w, other)
