"""minimize, get_gradients and get_updates: each provider against gradients by hand, and what a loss may be."""

from __future__ import annotations

import re
import warnings

import fastadam
import ml_dtypes
import numpy as np
import pytest


def variables_of_a_network(dtype, rng):
    shapes = {"w1": (3, 8), "b1": (8,), "w2": (8, 1), "b2": (1,)}
    return [fastadam.Variable(rng.normal(0, 0.5, shape).astype(dtype), name) for name, shape in shapes.items()]


def network_loss(provider, variables, x, y, bare):
    def loss():
        w1, b1, w2, b2 = variables if bare else [v.value for v in variables]
        error = provider.np.tanh(provider(x) @ w1 + b1) @ w2 + b2 - provider(y)
        return (error * error).mean()

    return loss


def network_gradients(variables, x, y):
    w1, b1, w2, b2 = [v.value for v in variables]
    hidden = np.tanh(x @ w1 + b1)
    d_out = 2 * (hidden @ w2 + b2 - y) / y.size
    d_hidden = d_out @ w2.T * (1 - hidden * hidden)
    return [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_out, d_out.sum(0)]


def data(dtype, rng):
    x = rng.normal(size=(64, 3)).astype(dtype)
    return x, np.sin(x[:, :1]) + 0.5 * x[:, 1:2]


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_gradients_are_those_by_hand(provider, dtype, rtol, bare):
    rng = np.random.default_rng(0)
    x, y = data(dtype, rng)
    variables = variables_of_a_network(dtype, rng)
    expected = network_gradients(variables, x, y)
    # JAX takes Variables in its operators, not in its functions; in this loss they are only in operators.
    loss = network_loss(provider, variables, x, y, bare)
    found = fastadam.Adam().get_gradients(loss, variables, gradient=provider.name)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is np.ndarray
        assert one.dtype == dtype
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * abs(other).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_network_learns(provider, dtype):
    rng = np.random.default_rng(1)
    x, y = data(dtype, rng)
    variables = variables_of_a_network(dtype, rng)
    arrays = [v.value for v in variables]
    loss = network_loss(provider, variables, x, y, bare=False)
    optimizer = fastadam.Adam(0.03)
    for step in range(1, 201):
        assert optimizer.minimize(loss, variables, gradient=provider.name) == step
    w1, b1, w2, b2 = arrays
    assert np.mean((np.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2) < 0.01
    assert all(v.value is array and array.dtype == dtype for v, array in zip(variables, arrays, strict=True))


def test_dtypes_may_be_mixed(provider):
    single, double = fastadam.Variable(np.float32([1.5])), fastadam.Variable(np.array([1 / 3]))
    found = fastadam.Adam().get_gradients(
        lambda: (single.value * double.value).sum(), [single, double], gradient=provider.name
    )
    assert [g.dtype for g in found] == [np.float32, np.float64]
    assert (found[0], found[1]) == (np.float32(1 / 3), 1.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(provider, dtype):
    autograd_lacks_it = dtype == "bfloat16" and provider.name == "autograd"
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    w = fastadam.Variable(np.array([1.0, -2.0]).astype(dtype))
    if autograd_lacks_it:
        with pytest.raises(TypeError, match="Can't differentiate w.r.t. type .*bfloat16"):
            fastadam.Adam().get_gradients(lambda: (w.value * w.value).sum(), w, gradient=provider.name)
        return
    (found,) = fastadam.Adam().get_gradients(lambda: (w.value * w.value).sum(), w, gradient=provider.name)
    assert found.dtype == dtype
    assert found.astype(float).tolist() == [2.0, -4.0]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 1, 2)])
def test_any_shape(provider, shape):
    w = fastadam.Variable(np.full(shape, 3.0))
    (found,) = fastadam.Adam().get_gradients(lambda: (w.value * w.value).sum(), w, gradient=provider.name)
    assert found.shape == shape
    assert (found == 6).all()


def test_double_precision_of_jax_is_left_as_it_was():
    jax = pytest.importorskip("jax")
    w = fastadam.Variable(np.ones(2))
    seen = []
    fastadam.Adam().minimize(lambda: seen.append(w.value.dtype) or w.value.sum(), w, gradient="jax")
    assert seen == [np.float64, np.float64]
    assert jax.numpy.ones(2).dtype == np.float32
    with pytest.raises(ZeroDivisionError):
        fastadam.Adam().minimize(lambda: 1 / 0, w, gradient="jax")
    assert jax.numpy.ones(2).dtype == np.float32


def test_jax_runs_the_loss_first_without_numbers():
    jax = pytest.importorskip("jax")
    w, constant, runs = fastadam.Variable([3.0]), fastadam.Variable([2.0]), []

    def loss():
        runs.append(w.value.shape)
        scale = float(jax.numpy.exp(constant.value * 0).sum())  # what is not differentiated has its numbers
        return (w.value * w.value).sum() * scale

    (found,) = fastadam.Adam().get_gradients(loss, w, gradient="jax")
    assert (runs, found.tolist()) == ([(1,), (1,)], [6.0])
    with pytest.raises(jax.errors.ConcretizationTypeError):
        fastadam.Adam().minimize(lambda: w.value.sum() if w.value.sum() > 0 else -w.value.sum(), w, gradient="jax")
    assert w.value.tolist() == [3.0]


def test_a_variable_that_is_not_used_has_no_gradient(provider):
    used, unused = fastadam.Variable([1.0], name="used"), fastadam.Variable([1.0], name="unused")
    optimizer = fastadam.Adam(0.5)
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['unused'\]"):
        optimizer.minimize(lambda: used.value.sum(), [used, unused], gradient=provider.name)
    assert used.value[0] < 0.51
    assert unused.value[0] == 1.0
    for call in (optimizer.get_gradients, optimizer.get_updates):
        with pytest.raises(ValueError, match="Variable unused has `None` for gradient"):
            call(lambda: used.value.sum(), [used, unused], gradient=provider.name)


def test_a_captured_buffer_is_detected(provider):
    array = np.ones(2, np.float32)
    w, other = fastadam.Variable(array, name="w"), fastadam.Variable([1.0])
    for loss in (
        lambda: provider(array).sum(),
        lambda: provider(array).sum() * other.value.sum(),
        lambda: provider(w.numpy()).sum(),
    ):
        with pytest.raises(ValueError, match=r"\['w'\]\. The loss depends on none of them; inside the loss read"):
            fastadam.Adam().minimize(loss, w, gradient=provider.name)
    assert (array == 1).all()


def test_variables_outside_the_list_are_constants(provider):
    w, constant = fastadam.Variable([1.0, 2.0]), fastadam.Variable([3.0, 4.0])
    loss = lambda: (w.value * constant.value * constant).sum()  # noqa: E731
    (found,) = fastadam.Adam().get_gradients(loss, w, gradient=provider.name)
    assert found.tolist() == [9.0, 16.0]


def test_a_loss_that_is_a_variable_itself(provider):
    w = fastadam.Variable([1.0, 2.0])
    with pytest.warns(UserWarning, match="loss: returned an array of shape"):
        (found,) = fastadam.Adam().get_gradients(lambda: w, w, gradient=provider.name)
    assert found.tolist() == [1.0, 1.0]


def test_grad_loss_is_not_written_to_nor_kept(provider):
    w, upstream = fastadam.Variable([1.0, 2.0]), np.float32([3.0, 4.0])
    (found,) = fastadam.Adam().get_gradients(lambda: w.value, w, grad_loss=upstream, gradient=provider.name)
    assert not np.shares_memory(found, upstream)
    assert upstream.tolist() == found.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("upstream", "kind", "message"),
    [
        (1.0, ValueError, "grad_loss: shape (), expected (2,) like the loss"),
        ([[1.0, 2.0]], ValueError, "grad_loss: shape (1, 2), expected (2,)"),
        ("many", TypeError, "grad_loss: "),
    ],
)
def test_a_wrong_grad_loss_is_refused(provider, upstream, kind, message):
    w = fastadam.Variable([1.0, 2.0])
    with pytest.raises(kind, match=re.escape(message)):
        fastadam.Adam().minimize(lambda: w.value * 2, w, upstream, gradient=provider.name)
    assert w.value.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("result", [None, "text", 3, [1.0], np.arange(2)])
def test_a_loss_that_is_no_float_array_is_refused(provider, result):
    w = fastadam.Variable([1.0])
    with pytest.raises(TypeError, match=f"loss: returned {type(result).__name__}"):
        fastadam.Adam().minimize(lambda: (w.value, result)[1], w, gradient=provider.name)


def test_a_loss_that_is_no_function_is_refused(provider):
    with pytest.raises(TypeError, match="loss: float, expected a function without arguments"):
        fastadam.Adam().minimize(3.0, fastadam.Variable([1.0]), gradient=provider.name)


def test_a_loss_may_be_computed_where_torch_makes_no_graph():
    torch = pytest.importorskip("torch")
    w = fastadam.Variable([1.0])
    with torch.no_grad():
        found = fastadam.Adam().get_gradients(lambda: (w.value * 3).sum(), w, gradient="torch")
    assert found[0].tolist() == [3.0]


def test_nothing_warns(provider):
    w = fastadam.Variable([1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadam.Adam().minimize(lambda: w.value[1:].sum(), w, gradient=provider.name)
