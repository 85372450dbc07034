"""State from and to optax: its epsilon and its AMSGrad are not TF's, and nothing becomes so silently."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict, namedtuple

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import random_array
from fastadam import exchange
from helpers import assert_same

F32 = np.float32
SHAPES = {"b": (), "a": {"w": (3, 2), "bias": (2,)}}  # JAX's order: a.bias, a.w, b
BETAS = {"b1": 0.875, "b2": 0.96875}  # float32 holds them, and 1 - beta

ScaleByAdamState = namedtuple("ScaleByAdamState", "count mu nu")
ScaleByAmsgradState = namedtuple("ScaleByAmsgradState", "count mu nu nu_max")
ScaleByScheduleState = namedtuple("ScaleByScheduleState", "count")
EmptyState = namedtuple("EmptyState", "")
MaskedState = namedtuple("MaskedState", "inner_state")
TraceState = namedtuple("TraceState", "trace")


@pytest.fixture(scope="module")
def optax():
    return pytest.importorskip("optax")


def tree(seed, shapes=SHAPES):
    if isinstance(shapes, dict):
        return {key: tree(seed + i, shape) for i, (key, shape) in enumerate(shapes.items())}
    return np.asarray(random_array(np.random.RandomState(seed), shapes, -4, 1), F32)


def leaves(params):
    return [params["a"]["bias"], params["a"]["w"], params["b"]]


def step_here(optimizer, params, seed):
    optimizer.apply_gradients(zip(leaves(tree(seed)), leaves(params), strict=True))


def step_there(optax, transformation, state, params, seed):
    updates, state = transformation.update(tree(seed), state, params)
    return optax.apply_updates(params, updates), state


def trained(optax, transformation, steps):
    params = tree(0)
    state = transformation.init(params)
    for step in range(steps):
        params, state = step_there(optax, transformation, state, params, 10 * step + 5)
    return params, state


def copied(params):
    return {"a": {key: np.array(value) for key, value in params["a"].items()}, "b": np.array(params["b"])}


def assert_near(mine, theirs, learning_rate, steps):
    """Both round each of some ten operations of an update once, of at most 4 learning rates, and the variable once."""
    for a, b in zip(leaves(mine), leaves(theirs), strict=True):
        bound = steps * (10 * 2.0**-24 * 4 * learning_rate + np.spacing(np.abs(a).max()))
        np.testing.assert_allclose(a, np.asarray(b), rtol=0, atol=bound)


def state_of(count=3, kind=ScaleByAdamState, seed=1):
    moments = [tree(seed + 10 * i) for i in range(len(kind._fields) - 1)]
    return kind(count, *moments)


# ---- optax itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "schedule", "adamw", "masked"])
def test_training_goes_on_from_optax_and_back(optax, name):
    rate, options = 0.0625, {}
    transformation = optax.adam(rate, **BETAS, eps=1e-30)
    if name == "schedule":
        options["lr"] = fastadam.schedules.ExponentialDecay(rate, 4, 0.5, staircase=True)
        transformation = optax.adam(optax.exponential_decay(rate, 4, 0.5, staircase=True), **BETAS, eps=1e-30)
    elif name == "adamw":
        options["weight_decay"] = 0.125
        transformation = optax.adamw(rate, **BETAS, eps=1e-30, weight_decay=0.125)
    elif name == "masked":
        transformation = optax.masked(transformation, {"a": True, "b": True})
    params, state = trained(optax, transformation, 3)
    mine = copied(params)
    optimizer = fastadam.Adam(options.pop("lr", rate), beta_1=0.875, beta_2=0.96875, **options)
    exchange.from_optax_state(optimizer, state, mine, epsilon=1e-30)
    assert (optimizer.iterations, optimizer.epsilon, optimizer.amsgrad) == (3, 1e-30, False)
    adam = next(s for s in (state, *state, *state[0]) if type(s).__name__ == "ScaleByAdamState")
    exported = exchange.to_optax_state(optimizer, mine)
    assert type(exported) is optax.ScaleByAdamState
    assert_same([exported.count, *leaves(exported.mu), *leaves(exported.nu)],
                     [adam.count, *leaves(adam.mu), *leaves(adam.nu)])  # fmt: skip
    for step in range(3):
        params, state = step_there(optax, transformation, state, params, 100 + 10 * step)
        step_here(optimizer, mine, 100 + 10 * step)
    assert_near(mine, params, rate, 3)
    if name == "adam":
        params, state = mine, (exchange.to_optax_state(optimizer, mine), *transformation.init(mine)[1:])
        mine = copied(mine)
        exchange.from_optax_state(optimizer, state, mine, epsilon=1e-30)
        params, state = step_there(optax, transformation, state, params, 200)
        step_here(optimizer, mine, 200)
        assert_near(mine, params, rate, 1)
        assert int(state[0].count) == 7


def test_the_equation_of_epsilon_does_the_same_at_the_next_step(optax):
    transformation = optax.adam(0.0625, **BETAS, eps=0.5)
    params, state = trained(optax, transformation, 3)
    after, _ = step_there(optax, transformation, state, params, 100)
    converted, taken_over = copied(params), copied(params)
    for mine, epsilon in ((converted, 0.5 * (1 - 0.96875**4) ** 0.5), (taken_over, 0.5)):
        optimizer = fastadam.Adam(0.0625, beta_1=0.875, beta_2=0.96875)
        exchange.from_optax_state(optimizer, state, mine, epsilon=epsilon)
        step_here(optimizer, mine, 100)
    assert_near(converted, after, 0.0625, 1)
    with pytest.raises(AssertionError):
        assert_near(taken_over, after, 0.0625, 1)


def test_moments_of_amsgrad_go_to_optax_and_come_back_without_the_maximum(optax):
    """What the refusals advise."""
    params, (state, *_) = trained(optax, optax.amsgrad(0.0625, **BETAS, eps=1e-30), 3)
    mine, optimizer = copied(params), fastadam.Adam(0.0625, beta_1=0.875, beta_2=0.96875)
    moments = optax.ScaleByAdamState(state.count, state.mu, state.nu)
    exchange.from_optax_state(optimizer, moments, mine, epsilon=1e-30)
    optimizer.amsgrad = True
    twin, variables = copy.deepcopy(optimizer), copied(mine)
    step_here(optimizer, mine, 100)
    assert_same(
        [optimizer.get_slot(w, "vhat") for w in leaves(mine)], [optimizer.get_slot(w, "v") for w in leaves(mine)]
    )
    twin.amsgrad = False
    twin.build(leaves(variables))
    exported = exchange.to_optax_state(twin, variables)
    assert type(exported) is optax.ScaleByAdamState
    assert_same([exported.count, *leaves(exported.mu), *leaves(exported.nu)],
                     [state.count, *leaves(state.mu), *leaves(state.nu)])  # fmt: skip


def test_the_maximum_of_optax_is_another_quantity(optax):
    """What the refusal is for: nu_max taken for vhat, corrected or not, would give another step."""
    transformation = optax.amsgrad(0.0625, **BETAS, eps=1e-30)
    params, state = trained(optax, transformation, 3)
    after, _ = step_there(optax, transformation, state, params, 100)
    adam = state[0]
    for factor in (1.0, 1 - 0.96875**3):
        mine, optimizer = (
            copied(params),
            fastadam.Adam(0.0625, beta_1=0.875, beta_2=0.96875, epsilon=1e-30, amsgrad=True),
        )
        moments = [*leaves(adam.mu), *leaves(adam.nu), *(F32(factor) * np.asarray(x) for x in leaves(adam.nu_max))]
        exchange.from_keras_weights(optimizer, [3, *moments], leaves(mine))
        step_here(optimizer, mine, 100)
        with pytest.raises(AssertionError):
            assert_near(mine, after, 0.0625, 1)


def test_float64_that_jax_would_make_float32_is_refused(optax):
    optimizer, w = fastadam.Adam(), np.ones(2)
    optimizer.build([w])
    with pytest.raises(ValueError, match="variables: float64, expected jax_enable_x64 to be on"):
        exchange.to_optax_state(optimizer, [w])


def test_what_optax_has_no_place_for_is_refused(optax):
    w = np.ones(2, F32)
    optimizer = fastadam.Adam(use_ema=True)
    optimizer.build([w])
    with pytest.raises(ValueError, match="use_ema=True, expected False: a state of optax cannot hold"):
        exchange.to_optax_state(optimizer, [w])
    optimizer = fastadam.Adam(amsgrad=True)
    optimizer.build([w])
    for optimizer.iterations in (0, 10**6):
        with pytest.raises(ValueError, match="optimizer: amsgrad=True, expected False: the AMSGrad of optax keeps the"):
            exchange.to_optax_state(optimizer, [w])
    optimizer = fastadam.Adam()
    optimizer.build([w])
    optimizer.iterations = 2**31 - 1
    with pytest.raises(ValueError, match="iterations: 2147483647, expected less than"):
        exchange.to_optax_state(optimizer, [w])


# ---- without optax ---------------------------------------------------------------------------------------------------


def test_trees_lists_and_chains():
    state = state_of()
    for given in (
        state,
        (state, EmptyState()),
        ((EmptyState(), (state, ScaleByScheduleState(3))), MaskedState(EmptyState())),
    ):
        for variables in (tree(0), leaves(tree(0))):
            optimizer = fastadam.Adam()
            exchange.from_optax_state(optimizer, given, variables, epsilon=1e-8)
            assert (optimizer.iterations, optimizer.epsilon) == (3, 1e-8)
            listed = variables if isinstance(variables, list) else leaves(variables)
            assert_same([optimizer.get_slot(w, "m") for w in listed], leaves(state.mu))
            assert_same([optimizer.get_slot(w, "v") for w in listed], leaves(state.nu))


def test_a_none_is_no_leaf_and_an_ordered_dict_keeps_its_order():
    first, second = np.full(2, 0.5, F32), np.full(2, 0.25, F32)
    moments = OrderedDict(z=first, empty=None, a=second)
    variables = [np.zeros(2, F32), np.ones(2, F32)]
    optimizer = fastadam.Adam()
    exchange.from_optax_state(optimizer, ScaleByAdamState(1, moments, moments), variables, epsilon=1e-8)
    assert_same([optimizer.get_slot(w, "m") for w in variables], [first, second])


def test_bfloat16_moments_are_widened():
    moments = [np.array([0.5, -1.25], ml_dtypes.bfloat16)]
    w, optimizer = np.ones(2, F32), fastadam.Adam()
    exchange.from_optax_state(optimizer, ScaleByAdamState(1, moments, moments), [w], epsilon=1e-8)
    assert_same([optimizer.get_slot(w, "m")], [np.array([0.5, -1.25], F32)])


def refused(optimizer, state, variables, match, error=ValueError, **options):
    before, config = optimizer.get_weights(), optimizer.get_config()
    with pytest.raises(error, match=match):
        exchange.from_optax_state(optimizer, state, variables, **{"epsilon": 1e-8, **options})
    assert optimizer.get_config() == config
    assert_same(optimizer.get_weights(), before)


def test_what_is_no_state_of_adam_is_refused():
    optimizer, params = fastadam.Adam(0.1), tree(0)
    step_here(optimizer, params, 1)
    good = state_of()
    refused(optimizer, (EmptyState(),), params, re.escape("state: [] and [], expected one ScaleByAdamState"))
    refused(optimizer, (good, good), params, "expected one ScaleByAdamState")
    refused(optimizer, (good, TraceState(params)), params, re.escape("['ScaleByAdamState'] and ['TraceState']"))
    refused(optimizer, {"count": 3}, params, re.escape("[] and ['dict']"))
    refused(optimizer, (good, ScaleByScheduleState(2)), params, re.escape("schedules at [2], expected the count 3"))
    refused(optimizer, good._replace(count=-1), params, "count")
    with pytest.raises(TypeError, match="epsilon"):
        exchange.from_optax_state(optimizer, good, params)
    refused(optimizer, good, params, "epsilon: 0, expected epsilon > 0", epsilon=0)


@pytest.mark.parametrize("count", [0, 3, 10**6])
@pytest.mark.parametrize(
    "where", [lambda adam: adam, lambda adam: (adam, EmptyState()), lambda adam: (state_of(), adam)]
)
def test_the_state_of_amsgrad_is_refused_whatever_its_count(count, where):
    optimizer, params = fastadam.Adam(0.1), tree(0)
    step_here(optimizer, params, 1)
    state = where(state_of(kind=ScaleByAmsgradState, count=count))
    text = "state: ScaleByAmsgradState, expected ScaleByAdamState: the AMSGrad of optax keeps the maximum of bias-corrected"
    refused(optimizer, state, params, text)


def test_trees_of_another_form_are_refused():
    optimizer, params, good = fastadam.Adam(), tree(0), state_of()
    refused(optimizer, good._replace(nu={}), params, "nu: 0 arrays, expected 3 like variables")
    refused(
        optimizer, good._replace(mu=leaves(good.mu)), params, re.escape("mu: an array at [0], expected one at ['a']")
    )
    other = {"a": good.mu["a"], "c": good.mu["b"]}
    refused(optimizer, good._replace(mu=other), params, re.escape("mu: an array at ['c'], expected one at ['b']"))
    refused(optimizer, good, leaves(params)[::-1], re.escape("m[0]: float32 (2,), expected floats ()"))
    text = {**good.mu, "b": "text"}
    refused(optimizer, good._replace(mu=text), params, re.escape("m[2]"), (TypeError, ValueError))
