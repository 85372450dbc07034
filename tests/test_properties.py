"""What must hold for any numbers: hypothesis looks for a counterexample."""

from __future__ import annotations

import fastadam
import numpy as np
from cases import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
VECTORS = hnp.arrays(np.float32, st.integers(1, 70), elements=FINITE)
OPTIONS = st.fixed_dictionaries(
    {
        "learning_rate": st.floats(1e-6, 10),
        "beta_1": st.floats(0, 0.99),
        "beta_2": st.floats(0, 0.9999),
        "epsilon": st.floats(1e-8, 1),
        "amsgrad": st.booleans(),
        "decay": st.floats(0, 1),
        "clipvalue": st.none() | st.just(0.0) | st.floats(1e-6, 10),
    }
)
quick = settings(max_examples=60, deadline=None)


def gradients_like(var, seed, steps=3):
    rng = np.random.RandomState(seed)
    return [np.ldexp(rng.randint(-100, 101, var.shape).astype(np.float32), rng.randint(-30, 5)) for _ in range(steps)]


def run(var, gradients, options):
    var, optimizer = var.copy(), fastadam.Adam(**options)
    for gradient in gradients:
        optimizer.apply_gradients([(gradient, var)])
    return [var, *optimizer.weights[1:]]


def assert_near_reference(after, var, gradients, options):
    """`after`: the variable and its m. The rate differs by 2e-3 at most, for float32 rounds beta_2**t."""
    options = {**options, "beta_2": float(np.float32(options["beta_2"]))}
    amsgrad = options.pop("amsgrad", False)
    expected, zeros = var.astype(np.float64), np.zeros(var.shape)
    m, v, vhat, travelled, largest = zeros, zeros, zeros if amsgrad else None, zeros, zeros
    for t, gradient in enumerate(gradients, start=1):
        before = expected
        expected, m, v, vhat = fastadam.reference.adam_step(before, gradient, m, v, vhat, step=t, **options)
        largest = np.maximum(largest, np.abs(m))
        travelled = travelled + np.abs(expected - before)
    assert (np.abs(after[1] - m) <= 1e-5 * largest).all()
    if options["beta_2"] >= 0.5:  # else a small v after a large one is lost in the rounding of g * g - v
        tolerance = 2e-3 * travelled + 4 * np.spacing(np.abs(var) + travelled.astype(np.float32))
        flushed = np.finfo(np.float32).tiny
        assert (np.abs(after[0] - expected) <= tolerance + flushed).all()


@quick
@given(var=VECTORS, options=OPTIONS)
def test_a_zero_gradient_leaves_a_fresh_variable_alone(var, options):
    """Denormal elements are flushed to zero, as everywhere in the kernels."""
    after, *slots = run(var, [np.zeros_like(var)] * 3, options)
    tiny = np.abs(var) < np.finfo(np.float32).tiny
    np.testing.assert_array_equal(after[~tiny], var[~tiny])
    assert not after[tiny].any()
    assert not any(slot.any() for slot in slots)


@quick
@given(var=VECTORS, options=OPTIONS, seed=st.integers(0, 1000))
def test_steps_are_near_those_of_the_reference(var, options, seed):
    gradients = gradients_like(var, seed)
    assert_near_reference(run(var, gradients, options), var, gradients, options)


@quick
@given(var=VECTORS, options=OPTIONS, cut=st.integers(0, 70), seed=st.integers(0, 1000))
def test_splitting_a_buffer_changes_no_bit(var, options, cut, seed):
    cut = min(cut, var.size)
    gradients = gradients_like(var, seed)
    whole = run(var, gradients, options)
    split, optimizer = var.copy(), fastadam.Adam(**options)
    for gradient in gradients:
        optimizer.apply_gradients([(gradient[:cut], split[:cut]), (gradient[cut:], split[cut:])])
    np.testing.assert_array_equal(bits(whole[0]), bits(split))
    assert_near_reference(whole, var, gradients, options)


@quick
@given(
    sizes=st.lists(st.integers(0, 40), min_size=2, max_size=6),
    options=OPTIONS,
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_the_order_of_pairs_changes_no_bit(sizes, options, seed, data):
    order = data.draw(st.permutations(range(len(sizes))))
    rng = np.random.RandomState(seed)
    values = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    gradients = [[rng.standard_normal(n).astype(np.float32) for n in sizes] for _ in range(3)]
    results = []
    for places in (range(len(sizes)), order):
        variables, optimizer = [v.copy() for v in values], fastadam.Adam(**options)
        for step in gradients:
            optimizer.apply_gradients([(step[i], variables[i]) for i in places])
        results.append(variables)
        for i, (after, before) in enumerate(zip(variables, values, strict=True)):
            moments = optimizer.get_slot(after, "m")
            assert_near_reference([after, moments], before, [step[i] for step in gradients], options)
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(bits(first), bits(second))


@quick
@given(var=VECTORS, options=OPTIONS, seed=st.integers(0, 1000))
def test_negated_gradients_of_a_negated_variable_give_the_negated_result(var, options, seed):
    gradients = gradients_like(var, seed)
    var_a, m_a, *rest_a = run(var, gradients, options)
    var_b, m_b, *rest_b = run(-var, [-g for g in gradients], options)
    assert_near_reference([var_a, m_a], var, gradients, options)
    np.testing.assert_array_equal(var_a, -var_b)
    np.testing.assert_array_equal(m_a, -m_b)
    for a, b in zip(rest_a, rest_b, strict=True):
        np.testing.assert_array_equal(a, b)


@quick
@given(var=VECTORS, options=OPTIONS, seed=st.integers(0, 1000), power=st.integers(-10, 10))
def test_a_power_of_two_as_grad_factor_is_the_same_as_scaled_gradients(var, options, seed, power):
    (gradient,) = gradients_like(var, seed, steps=1)
    options = {k: v for k, v in options.items() if k not in ("amsgrad", "clipvalue")}
    results = []
    for scaled, factor in ((gradient, 2.0**power), (np.ldexp(gradient, power), None)):
        arrays = [var.copy(), np.zeros_like(var), np.zeros_like(var)]
        fastadam.adam_step(arrays[0], scaled, *arrays[1:], step=1, grad_factor=factor, **options)
        results.append(arrays)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    assert_near_reference(results[0], var, [np.ldexp(gradient, power)], options)
