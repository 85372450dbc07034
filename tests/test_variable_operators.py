"""A Variable in expressions: the array outside of a loss, the provider's array inside."""

from __future__ import annotations

import importlib

import fastadam
import numpy as np
import pytest
from providers import Provider


def test_operators_outside_a_loss_are_those_of_the_array():
    a = np.arange(1.0, 5).reshape(2, 2)
    v, w = fastadam.Variable(a.copy()), fastadam.Variable(2 * a)
    for found, expected in [
        (v + w, 3 * a),
        (v - 1, a - 1),
        (1 - v, 1 - a),
        (v * w, 2 * a * a),
        (w / v, a / a * 2),
        (1 / v, 1 / a),
        (v @ a, a @ a),
        (a @ v, a @ a),
        (v**2, a**2),
        (2**v, 2**a),
        (-v, -a),
        (v[1], a[1]),
        (a + v, 2 * a),
        (np.tanh(v), np.tanh(a)),
        (np.maximum(v, w), 2 * a),
        (np.add(v, w, dtype=np.float32), 3 * a),
        (np.add.reduce(v), a.sum(0)),
    ]:
        assert type(found) is np.ndarray
        assert (found == expected).all()
    assert np.asarray(v) is v.value
    np.multiply(v, 2, out=v)
    assert (v.value == 2 * a).all()
    assert len({v, w}) == 2
    with pytest.raises(TypeError, match="not iterable"):
        list(v)


class _OwnVariable(fastadam.Variable):
    pass


def test_operators_inside_a_loss(provider):
    v, w = fastadam.Variable(np.array([2.0, 3.0])), _OwnVariable(np.array([4.0, 5.0]))
    found = fastadam.Adam().get_gradients(
        lambda: ((-v + 1) * (2 - w) + v / w + 6 / v + v**2 + w[0] * v[1] - v @ w).sum(), [v, w], gradient=provider.name
    )
    a, b = v.value, w.value
    # The dot product and w[0] * v[1] are added to both elements of the sum.
    expected = [b - 2 + 1 / b - 6 / a**2 + 2 * a - 2 * b, a - 1 - a / b**2 - 2 * a]
    expected[0][1] += 2 * b[0]
    expected[1][0] += 2 * a[1]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)


@pytest.mark.parametrize("name", ["autograd", "torch"])
def test_functions_take_bare_variables(name):
    lib = Provider(name).np
    v, w = fastadam.Variable(np.array([2.0, 3.0])), fastadam.Variable(np.array([4.0]))
    concatenate = lib.cat if name == "torch" else lib.concatenate
    found = fastadam.Adam().get_gradients(
        lambda: lib.sum(concatenate([lib.exp(v), w]) ** 2) + lib.sum(v) * lib.sum(v + w), [v, w], gradient=name
    )
    np.testing.assert_allclose(found[0], 2 * np.exp([4.0, 6.0]) + 13 + 5, rtol=1e-12)
    np.testing.assert_allclose(found[1], [8 + 2 * 5], rtol=1e-12)


def test_numpy_functions_work_in_a_loss_of_autograd():
    Provider("autograd")
    w, b = fastadam.Variable(np.array([[0.5], [-0.5]])), fastadam.Variable(np.array([0.1]))
    x = np.arange(4.0).reshape(2, 2)
    found = fastadam.Adam().get_gradients(lambda: (np.tanh(x @ w + b) ** 2).sum(), [w, b], gradient="autograd")
    t = np.tanh(x @ w.value + b.value)
    np.testing.assert_allclose(found[0], x.T @ (2 * t * (1 - t * t)), rtol=1e-12)
    np.testing.assert_allclose(found[1], (2 * t * (1 - t * t)).sum(0), rtol=1e-12)


def test_a_conversion_that_loses_the_gradient_is_refused(provider):
    w = fastadam.Variable([1.0], name="w")
    with pytest.raises(TypeError, match="'w': converted to an array inside a loss"):
        fastadam.Adam().minimize(lambda: np.asarray(w).sum() * w.value.sum(), w, gradient=provider.name)


def test_autograd_itself_still_takes_variables_for_constants():
    Provider("autograd")
    autograd = importlib.import_module("autograd")
    w = fastadam.Variable(np.array([2.0, 3.0]))
    fastadam.Adam().get_gradients(lambda: w.value.sum(), w, gradient="autograd")  # autograd learns of Variables
    assert (autograd.grad(lambda x: autograd.numpy.sum(x * w + autograd.numpy.exp(w)))(np.ones(2)) == w.value).all()
