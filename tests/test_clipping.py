"""Clipping in TF's order (2.4 and later), its norms, and the numbers TF computes in float32 in an order of its own."""

from __future__ import annotations

import math
import re

import fastadam
import numpy as np
import pytest
from cases import GOLDEN, NEAR_CASES, aligned, bits, random_array
from fastadam import schedules
from helpers import assert_moved, first_step_gradients

F32 = np.float32


@pytest.mark.parametrize("case", NEAR_CASES, ids=str)
def test_trajectory_is_near_that_of_tensorflow(case):
    """Norms and schedules are float32 sums and powers in TF: a rounding in the rate or the factor of every step."""
    with np.load(GOLDEN) as file:
        stored = {key: file[key] for key in file.files if key.startswith(f"{case.name}/")}
    options = dict(case.options)
    if isinstance(options["learning_rate"], tuple):
        name, arguments = options["learning_rate"]
        options["learning_rate"] = getattr(schedules, name)(**arguments)
    variables, gradients = case.arrays()
    start = [w.copy() for w in variables]
    optimizer = fastadam.Adam(**options)
    travelled = [np.zeros_like(w, dtype=np.float64) for w in variables]
    for step in gradients:
        before = [w.copy() for w in variables]
        optimizer.apply_gradients(zip(step, variables, strict=True))
        for path, b, w in zip(travelled, before, variables, strict=True):
            path += np.abs(w.astype(np.float64) - b)
    for i, (w, s, path) in enumerate(zip(variables, start, travelled, strict=True)):
        tolerance = 2e-6 * path + 8 * np.spacing(np.abs(s) + path)
        assert (np.abs(w - stored[f"{case.name}/{i}"]) <= tolerance).all()
    for i, slot in enumerate(optimizer.weights[1:], start=len(variables)):
        np.testing.assert_allclose(slot, stored[f"{case.name}/{i}"], rtol=2e-5, atol=1e-7 * np.abs(slot).max(initial=0))


def test_clipvalue_comes_before_the_norms():
    """g = [30, 40]: the note's example for TF 2.6."""
    (m,) = first_step_gradients([np.array([30.0, 40.0])], clipvalue=3.5, clipnorm=5.0)
    assert m.tolist() == [3.5, 3.5]
    (m,) = first_step_gradients([np.array([30.0, 40.0])], clipvalue=3.5, global_clipnorm=3.5)
    np.testing.assert_allclose(m, [3.5 / math.sqrt(2)] * 2, rtol=1e-15)


def test_norms_under_the_bound_change_no_bit():
    rng = np.random.RandomState(0)
    gradients = [random_array(rng, n) for n in (5, 100, 5000)]
    for options in ({"clipnorm": 1e9}, {"global_clipnorm": 1e9}, {"clipvalue": 1e9}):
        for m, g in zip(first_step_gradients(gradients, **options), gradients, strict=True):
            np.testing.assert_array_equal(bits(m), bits(g))


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm"])
def test_a_zero_gradient_stays_zero(name):
    for bound in (0.0, 1.0):
        (m,) = first_step_gradients([np.zeros(5)], **{name: bound})
        assert m.tolist() == [0] * 5
    (m,) = first_step_gradients([np.array([3.0, 4.0])], **{name: 0.0})
    assert m.tolist() == [0, 0]


def test_norms_that_are_not_finite():
    infinite, bad = np.array([1.0, np.inf]), np.array([1.0, np.nan])
    finite = np.array([3.0, 4.0])
    a, b, c = first_step_gradients([infinite, bad, finite], clipnorm=1.0)
    np.testing.assert_array_equal(a, [0, np.nan])
    np.testing.assert_array_equal(b, [np.nan, np.nan])
    np.testing.assert_allclose(c, [0.6, 0.8], rtol=1e-15)
    for gradients in ([infinite, finite], [bad, finite]):
        for m in first_step_gradients(gradients, global_clipnorm=1.0):
            assert np.isnan(m).all()


def test_gradients_are_not_modified():
    gradients = [np.array([3.0, 4.0]), np.array([5.0])]
    clipped = first_step_gradients(gradients, clipvalue=2.0, clipnorm=1.0)
    np.testing.assert_allclose(np.concatenate(clipped), [0.5**0.5, 0.5**0.5, 1.0], rtol=1e-15)
    assert [g.tolist() for g in gradients] == [[3.0, 4.0], [5.0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_global_norm_is_right_and_takes_any_gradients(dtype):
    rng = np.random.RandomState(0)
    gradients = [random_array(rng, shape, -5, 2).astype(dtype) for shape in ((), (0,), (7, 3), (4096,), (100_003,))]
    expected = math.sqrt(math.fsum(float(x) ** 2 for g in gradients for x in g.ravel()))
    assert fastadam.global_norm(gradients) == pytest.approx(expected, rel=1e-14)
    forms = [gradients[0], None, gradients[2].T, gradients[2][:, :0], np.repeat(gradients[3], 2)[::2], gradients[4]]
    assert fastadam.global_norm(forms) == pytest.approx(expected, rel=1e-14)
    assert fastadam.global_norm(g for g in ([3, 4],)) == 5.0
    assert fastadam.global_norm([]) == 0.0
    assert fastadam.global_norm([fastadam.Variable([3.0]), np.array([4], np.int32)]) == 5.0
    assert math.isnan(fastadam.global_norm([np.array([1.0, np.nan])]))
    assert fastadam.global_norm([np.array([1.0, -np.inf])]) == math.inf
    assert fastadam.global_norm([np.full(3, 1e38, F32)]) == pytest.approx(math.sqrt(3) * 1e38, rel=1e-7)
    with pytest.raises(TypeError, match=re.escape("grads[1]: dtype complex128, expected real numbers")):
        fastadam.global_norm([[1.0], [1j]])


def test_norms_have_the_same_bits_for_any_isa_thread_count_and_alignment():
    rng = np.random.RandomState(0)
    value = random_array(rng, 300_007)
    expected = math.sqrt(math.fsum(float(x) ** 2 for part in (value, value[:100], value[:65_000]) for x in part))
    results = set()
    for isa in fastadam.isas():
        fastadam.set_isa(isa)
        for threads in (1, 2, 3, 5):
            fastadam.set_num_threads(threads)
            for offset in (0, 1, 7):
                copy = aligned(value.shape, F32, offset)
                copy[...] = value
                results.add(fastadam.global_norm([copy, copy[:100], copy[:65_000]]))
    assert len(results) == 1
    assert results.pop() == pytest.approx(expected, rel=1e-14)


CLIPPINGS = {"clipvalue": 1.0, "clipnorm": 0.5, "global_clipnorm": 0.5}


def clipped_step(name, value, gradient, isa, threads):
    """The variables and first moments of a step with two variables."""
    fastadam.set_isa(isa)
    fastadam.set_num_threads(threads)
    variables = [value.copy(), np.ones_like(value)]
    optimizer = fastadam.Adam(0.1, beta_1=0.0, **{name: CLIPPINGS[name]})
    optimizer.apply_gradients([(gradient, variables[0]), (2 * gradient, variables[1])])
    return [*variables, *(optimizer.get_slot(w, "m") for w in variables)]


@pytest.mark.parametrize("name", CLIPPINGS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_clipped_steps_have_the_same_bits_for_any_isa_and_thread_count(threads, name, isa):
    rng = np.random.RandomState(0)
    value, gradient = random_array(rng, 300_007), random_array(rng, 300_007)
    actual = clipped_step(name, value, gradient, isa, threads)
    expected = clipped_step(name, value, gradient, fastadam.isas()[0], 1)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(bits(a), bits(e))
    assert_moved(actual[0], value)
    norm = np.linalg.norm(gradient.astype(np.float64))
    clipped = {
        "clipvalue": (gradient.clip(-1, 1), (2 * gradient).clip(-1, 1)),
        "clipnorm": (gradient * F32(0.5 / norm), gradient * F32(0.5 / norm)),
        "global_clipnorm": (gradient * F32(0.5 / norm / 5**0.5), 2 * gradient * F32(0.5 / norm / 5**0.5)),
    }
    for m, g in zip(actual[2:], clipped[name], strict=True):
        np.testing.assert_allclose(m, g, rtol=1e-6)  # the factor is rounded to float32 from another sum


def test_adam_step_clips_too():
    for name, expected in (("clipnorm", [0.6, 0.8]), ("global_clipnorm", [0.6, 0.8]), ("clipvalue", [1.0, 1.0])):
        w, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
        fastadam.adam_step(w, np.array([3.0, 4.0]), m, v, step=1, beta_1=0.0, **{name: 1.0})
        np.testing.assert_allclose(m, expected, rtol=1e-15)
    with pytest.raises(ValueError, match="Cannot accept both"):
        fastadam.adam_step(w, np.ones(2), m, v, step=1, clipnorm=1, global_clipnorm=1)
