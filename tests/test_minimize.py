"""minimize, get_gradients and get_updates: each provider against gradients by hand, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import threading
import warnings

import fastadam
import numpy as np
import pytest
from providers import NAMES, Provider


@pytest.fixture(autouse=True)
def _no_default():
    yield
    fastadam.set_gradient_provider(None)


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
    dtype = np.dtype(dtype) if dtype == "float16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
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
    assert seen == [np.float64]
    assert jax.numpy.ones(2).dtype == np.float32
    with pytest.raises(ZeroDivisionError):
        fastadam.Adam().minimize(lambda: 1 / 0, w, gradient="jax")
    assert jax.numpy.ones(2).dtype == np.float32


# ---- operators of Variable ------------------------------------------------------------------------------------------


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


# ---- what the loss depends on ---------------------------------------------------------------------------------------


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
        with pytest.raises(ValueError, match=r"\['w'\]\. The loss depends on none of them; inside it read"):
            fastadam.Adam().minimize(loss, w, gradient=provider.name)
    assert (array == 1).all()


def test_variables_outside_the_list_are_constants(provider):
    w, constant = fastadam.Variable([1.0, 2.0]), fastadam.Variable([3.0, 4.0])
    loss = lambda: (w.value * constant.value * constant).sum()  # noqa: E731
    (found,) = fastadam.Adam().get_gradients(loss, w, gradient=provider.name)
    assert found.tolist() == [9.0, 16.0]


def test_a_loss_that_is_a_variable_itself(provider):
    w = fastadam.Variable([1.0, 2.0])
    (found,) = fastadam.Adam().get_gradients(lambda: w, w, gradient=provider.name)
    assert found.tolist() == [1.0, 1.0]


# ---- the value of the loss ------------------------------------------------------------------------------------------


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


class _LossError(Exception):
    pass


def test_what_the_loss_raises_comes_through(provider):
    w = fastadam.Variable([1.0])
    optimizer = fastadam.Adam()
    error = _LossError("text")

    def loss():
        assert not isinstance(w.value, np.ndarray)
        raise error

    with pytest.raises(_LossError) as caught:
        optimizer.minimize(loss, w, gradient=provider.name)
    assert caught.value is error
    assert type(w.value) is np.ndarray
    assert (w.value[0], optimizer.iterations, len(optimizer.weights)) == (1.0, 0, 1)


# ---- var_list -------------------------------------------------------------------------------------------------------


def test_forms_of_var_list(provider):
    a, b, c = (fastadam.Variable([float(i)], name=str(i)) for i in range(3))
    optimizer = fastadam.Adam()
    for tree, order in [
        ([a, b, c], [1, 2, 3]),
        ((c, b), [3, 2]),
        (b, [2]),
        ({"z": a, "a": [c, {"y": b}]}, [3, 2, 1]),
        (iter([a, b]), [1, 2]),
        ({"x": b, "a": a}.values(), [2, 1]),
        ([a, (), a], [1, 1]),
        (lambda: {"z": a, "a": c}, [3, 1]),
        (lambda: b, [2]),
        ([], []),
    ]:
        loss = lambda: (a.value + 2 * b.value + 3 * c.value).sum()  # noqa: E731
        found = optimizer.get_gradients(loss, tree, gradient=provider.name)
        assert [float(g[0]) for g in found] == order


def test_arrays_are_refused_by_providers(provider):
    with pytest.raises(TypeError, match=r"var_list\['w'\]\[1\]: ndarray, expected a fastadam\.Variable"):
        fastadam.Adam().minimize(lambda: 1.0, {"w": [fastadam.Variable([1.0]), np.ones(2)]}, gradient=provider.name)
    with pytest.raises(TypeError, match="params: int, expected"):
        fastadam.Adam().get_gradients(lambda: 1.0, lambda: 3, gradient=provider.name)
    with pytest.raises(TypeError, match="var_list: a dict with keys that have no order"):
        fastadam.Adam().minimize(lambda: 1.0, {"w": 1, 2: 2}, gradient=provider.name)


# ---- where gradients come from --------------------------------------------------------------------------------------


def test_a_function_of_the_user():
    w, array = fastadam.Variable([1.0, 2.0]), np.float32([3.0])
    seen = []

    def gradient(loss, variables):
        seen.append((loss, variables))
        return [2 * w.value, None]

    optimizer = fastadam.Adam(0.5)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        assert optimizer.minimize(len, {"b": array, "a": w}, gradient=gradient) == 1
    assert seen[0][0] is len
    assert seen[0][1][0] is w
    assert seen[0][1][1] is array
    assert w.value.round(4).tolist() == [0.5, 1.5]
    assert optimizer.get_updates(len, [array], gradient=lambda *_: (np.ones(1),)) == [2]
    with pytest.raises(ValueError, match=r"Variable params\[1\] has `None` for gradient"):
        optimizer.get_gradients(len, [w, array], gradient=gradient)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"gradient": lambda *_: np.ones(2)}, TypeError, "gradient: returned ndarray, expected a list"),
        ({"gradient": lambda *_: []}, ValueError, "gradient: returned 0 gradients, expected 1"),
        ({"gradient": lambda *_: [1], "grad_loss": 1.0}, ValueError, "grad_loss: given with a function"),
        ({"gradient": 3}, TypeError, "gradient: int, expected the name of a provider or a function"),
        ({"gradient": "tensorflow"}, ValueError, "gradient: 'tensorflow', expected one of 'autograd', 'jax', 'torch'"),
        ({}, ValueError, "gradient: None, expected where to get gradients from: `gradient=` or fastadam.set_gradient_"),
    ],
)
def test_wrong_gradient_arguments(options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        fastadam.Adam().minimize(lambda: 1.0, [fastadam.Variable([1.0, 2.0])], **options)


def test_the_default_provider(provider):
    w = fastadam.Variable([1.0])
    loss = lambda: (w.value * w.value).sum()  # noqa: E731
    fastadam.set_gradient_provider(provider.name)
    assert fastadam.Adam(0.5).get_gradients(loss, w)[0].tolist() == [2.0]
    assert fastadam.Adam(0.5).get_gradients(loss, w, gradient=lambda *_: [[7.0]]) == [[7.0]]
    fastadam.set_gradient_provider(lambda *_: [[5.0]])
    assert fastadam.Adam(0.5).get_gradients(loss, w) == [[5.0]]
    for wrong, kind in (("numpy", ValueError), (1.0, TypeError)):
        with pytest.raises(kind, match="provider: "):
            fastadam.set_gradient_provider(wrong)
    assert fastadam.Adam(0.5).get_gradients(loss, w) == [[5.0]]


def test_a_missing_provider_is_said_with_what_is_there(provider, monkeypatch):
    monkeypatch.setitem(sys.modules, provider.name, None)
    others = [name for name in NAMES if name != provider.name and importlib.util.find_spec(name)]
    text = f"{provider.name!r} is not installed, `pip install 'fastadam[{provider.name}]'` does it; "
    with pytest.raises(ModuleNotFoundError, match=re.escape("gradient: " + text)) as caught:
        fastadam.Adam().minimize(lambda: 1.0, fastadam.Variable([1.0]), gradient=provider.name)
    assert all(repr(name) in str(caught.value).split("installed here")[-1] for name in others)
    with pytest.raises(ModuleNotFoundError, match=re.escape("provider: " + text)):
        fastadam.set_gradient_provider(provider.name)


def test_no_provider_at_all(monkeypatch):
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="none of autograd, jax, torch is installed here"):
        fastadam.Adam().minimize(lambda: 1.0, fastadam.Variable([1.0]))


# ---- nesting, threads -----------------------------------------------------------------------------------------------


def test_a_step_inside_a_loss(provider):
    outer, inner = fastadam.Variable([3.0]), fastadam.Variable([1.0])
    optimizer = fastadam.Adam(0.5)

    def loss():
        before = outer.value
        assert optimizer.minimize(lambda: (inner.value * inner.value).sum(), inner, gradient=provider.name) == 1
        with pytest.raises(_LossError):
            optimizer.minimize(_fail, inner, gradient=provider.name)
        found = optimizer.get_gradients(len, [outer], gradient=lambda *_: [outer.value])
        assert type(found[0]) is np.ndarray
        assert outer.value is before
        return (outer.value * outer.value).sum()

    (found,) = fastadam.Adam().get_gradients(loss, outer, gradient=provider.name)
    assert found.tolist() == [6.0]
    assert inner.value.round(4).tolist() == [0.5]


def _fail():
    raise _LossError


@pytest.mark.parametrize("name", ["autograd", "jax"])
def test_a_gradient_inside_a_loss(name):
    provider = Provider(name)
    grad = importlib.import_module(name).grad
    w = fastadam.Variable(np.array([2.0, 3.0]))
    (found,) = fastadam.Adam().get_gradients(
        lambda: (grad(lambda x: (x**3 * w.value).sum())(w.value) ** 2).sum(), w, gradient=provider.name
    )
    np.testing.assert_allclose(found, 54 * w.value**5, rtol=1e-12)


def test_threads_do_not_see_each_other(provider):
    """Each thread trains; meanwhile ``value`` of one thread's variable is an array for the others."""
    barrier, results = threading.Barrier(4), {}

    def train(number):
        w = fastadam.Variable(np.full(3, float(number)))
        optimizer = fastadam.Adam(0.1)

        def loss():
            barrier.wait(60)
            return ((w.value - number - 1) ** 2).sum()

        for _ in range(5):
            optimizer.minimize(loss, w, gradient=provider.name)
            assert type(w.value) is np.ndarray
        results[number] = w.value - number

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results.values():
        np.testing.assert_allclose(result, results[0], rtol=1e-9)


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
