"""What an optimizer keeps between steps changes their time and nothing else."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
import weakref

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import random_array
from fastadam import _cpu
from fastadam._core.native.plan import BoundedCache, StepHyper
from fastadam._core.parts import parts_of
from fastadam._core.step import Stepper
from helpers import bits

RNG = np.random.RandomState(0)


def arrays(*shapes):
    return [random_array(RNG, shape) for shape in shapes]


@pytest.fixture
def made(monkeypatch):
    """Grows by one with every plan that is made."""
    plans, make = [], Stepper.make_plan

    def counting(self, *arguments, **options):
        plans.append(self)
        return make(self, *arguments, **options)

    monkeypatch.setattr(Stepper, "make_plan", counting)
    return plans


def test_sets_of_variables_seen_before_cost_no_new_plan(made):
    optimizer = fastadam.Adam(0.1)
    first, second, third = arrays((3,), (2, 2)), arrays((5,)), arrays((3,), (2, 2), (7,))
    for _ in range(2):  # a set that comes later brings slots, with which the plans of the others are out of date
        for variables in (first, second, third):
            optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])
    del made[:]
    for variables in (first, second, third, second, first, first):
        optimizer.apply_gradients([(np.ones_like(w), w[:]) for w in variables])
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


@pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array has been deprecated:DeprecationWarning")
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


class Asking:
    """A gradient of ones that runs code when it is read."""

    def __init__(self, run):
        self.run = run

    def __array__(self, dtype=None, copy=None):
        self.run()
        return np.ones(3, np.float32)


def replaced_by(optimizer):
    def rate():
        optimizer.learning_rate = 0.5
        return 0.1

    return rate


@pytest.mark.parametrize("name", ["amsgrad", "weight_decay"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_an_option_set_by_code_that_a_step_runs_counts_from_the_next_step_on(name, first):
    w = np.ones(3, np.float32)
    optimizer = fastadam.Adam(0.1)
    if not first:
        optimizer.apply_gradients([(np.ones(3, np.float32), w)])
    optimizer.apply_gradients([(Asking(lambda: setattr(optimizer, name, CHANGES[name])), w)])
    twin, fresh = w.copy(), copy.deepcopy(optimizer)
    for _ in range(2):
        optimizer.apply_gradients([(np.ones(3, np.float32), w)])
        fresh.apply_gradients([(np.ones(3, np.float32), twin)])
    assert np.array_equal(bits(w), bits(twin))
    assert ("vhat" in optimizer.get_slot_names()) == (name == "amsgrad")


def test_a_callable_that_sets_a_number_in_its_own_place_is_not_asked_again():
    w = np.zeros(3, np.float32)
    optimizer = fastadam.Adam(0.1)
    optimizer.learning_rate = replaced_by(optimizer)
    optimizer.apply_gradients([(np.ones(3, np.float32), w)])
    np.testing.assert_allclose(w, -0.1, rtol=1e-5)
    optimizer.apply_gradients([(np.ones(3, np.float32), w)])
    np.testing.assert_allclose(w, -0.6, rtol=1e-5)


def test_a_subclass_may_compute_a_number_when_it_is_read():
    class Falling(fastadam.Adam):
        @property
        def learning_rate(self):
            return 0.1 / (int(self.iterations) + 1)

        @learning_rate.setter
        def learning_rate(self, value):
            fastadam.Adam.learning_rate.__set__(self, value)

    w = np.zeros(3, np.float32)
    optimizer = Falling(0.1)
    for _ in range(3):
        optimizer.apply_gradients([(np.ones(3, np.float32), w)])
    np.testing.assert_allclose(w, -0.1 * (1 + 1 / 2 + 1 / 3), rtol=1e-5)


def test_amsgrad_set_while_a_table_gets_its_history():
    table, w = random_array(RNG, (50, 2)), np.ones(3, np.float32)
    twin, other = table.copy(), w.copy()
    waiting, dense = fastadam.Adam(0.1, sparse_update="deferred"), fastadam.Adam(0.1)
    slices = fastadam.IndexedSlices(np.ones((1, 2), np.float32), [4])
    for optimizer, t, u in ((waiting, table, w), (dense, twin, other)):
        change = Asking(lambda optimizer=optimizer: setattr(optimizer, "amsgrad", True))
        optimizer.apply_gradients([(slices, t), (change, u)])
        for _ in range(3):
            optimizer.apply_gradients([(slices, t), (np.ones(3, np.float32), u)])
        optimizer.sync()
    assert np.array_equal(bits(table), bits(twin))
    assert np.array_equal(bits(w), bits(other))


def test_sparse_update_is_not_set_within_a_step():
    table, w = np.ones((50, 2), np.float32), np.ones(3, np.float32)
    optimizer = fastadam.Adam(0.1, sparse_update="deferred")
    slices = fastadam.IndexedSlices(np.ones((1, 2), np.float32), [4])
    optimizer.apply_gradients([(slices, table), (np.ones(3, np.float32), w)])
    with pytest.raises(RuntimeError, match="sparse_update: used in code that a step runs"):
        optimizer.apply_gradients([(slices, table), (Asking(lambda: setattr(optimizer, "sparse_update", "dense")), w)])
    assert int(optimizer.iterations) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1, 5, 40, 2000])
def test_half_variables_may_start_at_any_element(dtype, size):
    flat = np.zeros(size + 9, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for start in range(9):
        w, before = flat[start : start + size], fastadam.Adam(0.25)
        before.apply_gradients([(np.ones_like(w), w)])
        assert (w < 0).all()
        assert before.get_slot(w, "m").flags.aligned
        flat[:] = 0


def test_a_byte_swapped_view_is_another_array_and_is_refused():
    w, g = np.ones(4, np.float32), np.ones(4, np.float32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(g, w)])
    before = w.copy()
    with pytest.raises(ValueError, match="byte-swapped"):
        optimizer.apply_gradients([(g, w.view(w.dtype.newbyteorder()))])
    assert np.array_equal(w, before)


def test_a_name_that_is_excluded_counts_whatever_form_the_variable_came_in_first():
    v = fastadam.Variable(np.ones(3, np.float32), name="bias")
    optimizer = fastadam.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    zeros = np.zeros(3, np.float32)
    optimizer.apply_gradients([(zeros, v.value)])
    np.testing.assert_allclose(v.value, 0.95)
    optimizer.apply_gradients([(zeros, v)])
    np.testing.assert_allclose(v.value, 0.95)


@pytest.mark.parametrize("bad", ["gradient", "scale"])
def test_a_refused_call_leaves_what_was_accumulated(bad):
    a, b, g = np.ones(3, np.float32), np.ones(3, np.float32), np.ones(3, np.float32)
    optimizer = fastadam.Adam(0.1, gradient_accumulation_steps=2)
    for _ in range(2):
        optimizer.apply_gradients([(g, a), (g, b)])
    optimizer.apply_gradients([(g, b)])
    before = [np.array(array) for array in optimizer.get_weights()]
    if bad == "scale":
        optimizer.loss_scale_factor = 1e-39
    with pytest.raises(ValueError, match=r"grads\[0\]: shape \(4,\)|grad_factor\[0\]: infinite in float32"):
        optimizer.apply_gradients([(g if bad == "scale" else np.ones(4, np.float32), a), (g, b)])
    assert all(map(np.array_equal, before, optimizer.get_weights()))


@pytest.mark.parametrize(
    "refused",
    [
        lambda w: (fastadam.Adam(0.1, gradient_accumulation_steps=2, loss_scale_factor=1e-39), np.ones(3, np.float32)),
        lambda w: (fastadam.Adam(0.1), Asking(lambda: w.setflags(write=False))),
    ],
    ids=["scale", "read-only"],
)
def test_a_refused_first_step_leaves_no_slots(refused):
    w = np.ones(3, np.float32)
    optimizer, gradient = refused(w)
    with pytest.raises(ValueError, match=r"grad_factor\[0\]: infinite in float32|read-only"):
        optimizer.apply_gradients([(gradient, w)])
    assert len(optimizer.weights) == 1
    assert (w == 1).all()


class Exporter:
    """An array that is not an ndarray, so that a plan has to keep it alive while it reads it."""

    def __init__(self, values):
        self.__array_interface__ = values.__array_interface__
        self.values = values


@pytest.mark.parametrize("size", [3, 4], ids=["a step", "a refused gradient"])
@pytest.mark.parametrize("call", ["check", "step"])
def test_a_plan_keeps_no_gradient_after_a_call(call, size):
    variables = [np.zeros(3, np.float32), np.zeros(3, np.float32)]
    slots = {name: [np.zeros(3, np.float32) for _ in variables] for name in ("m", "v")}
    buffers = [_cpu.Buffer(w, f"vars[{i}]") for i, w in enumerate(variables)]
    plan = _cpu.Plan(buffers, slots, [True, True], [0, 1], False, [None, None])
    first = Exporter(np.ones(3, np.float32))
    alive = weakref.ref(first)
    numbers = () if call == "check" else (StepHyper(1, 0.1, 0.9, 0.999, 1e-7), [], None)
    refusal = pytest.raises(ValueError, match=r"grads\[1\]: shape \(4,\)") if size == 4 else contextlib.nullcontext()
    with refusal:
        getattr(plan, call)([first, np.ones(size, np.float32)], *numbers)
    del first
    gc.collect()
    assert alive() is None


def test_a_cache_keeps_what_was_used_last_and_no_more():
    cache = BoundedCache(3)
    for key in "abc":
        cache.put(key, key.upper())
    assert cache.get("a") == "A"
    cache.put("d", "D")
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert sorted(cache) == ["A", "C", "D"]
    cache.remove(cache.get("c"))
    assert (len(cache), cache.get("c")) == (2, None)


@pytest.mark.slow
def test_memory_stays_bounded_when_every_step_is_for_other_variables():
    """Layer drop: a random half of the variables has gradients."""
    variables = [np.ones(2, np.float32) for _ in range(40)]
    optimizer = fastadam.Adam(0.1)
    for _ in range(400):
        optimizer.apply_gradients([(np.ones_like(w), w) for w in variables if RNG.rand() < 0.5])
    assert len(list(parts_of(optimizer).runtime.plans)) <= 257
