"""Where gradients come from: forms of var_list, choice of the provider, losses inside losses and threads."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import threading

import fastadam
import numpy as np
import pytest
from providers import NAMES, Provider


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
    with pytest.raises(TypeError, match="var_list: a dict whose keys cannot be sorted"):
        fastadam.Adam().minimize(lambda: 1.0, {"w": 1, 2: 2}, gradient=provider.name)


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
        ({"gradient": lambda *_: [1], "grad_loss": 1.0}, ValueError, "grad_loss: passed with a function"),
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
    text = f"{provider.name!r} is not installed, `pip install {provider.name}` does it; "
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


def test_a_step_inside_a_loss(provider):
    outer, inner, runs = fastadam.Variable([3.0]), fastadam.Variable([1.0]), []
    optimizer = fastadam.Adam(0.5)

    def loss():
        runs.append(0)
        before = outer.value
        made = optimizer.minimize(lambda: (inner.value * inner.value).sum(), inner, gradient=provider.name)
        assert made == len(runs)
        with pytest.raises(_LossError):
            optimizer.minimize(_fail, inner, gradient=provider.name)
        found = optimizer.get_gradients(len, [outer], gradient=lambda *_: [outer.value])
        assert type(found[0]) is np.ndarray
        assert outer.value is before
        return (outer.value * outer.value).sum()

    (found,) = fastadam.Adam().get_gradients(loss, outer, gradient=provider.name)
    assert found.tolist() == [6.0]
    assert len(runs) == (2 if provider.name == "jax" else 1)
    twin, plain = np.float32([1.0]), fastadam.Adam(0.5)
    for _ in runs:
        plain.apply_gradients([(2 * twin, twin)])
    assert inner.value.tolist() == twin.tolist()


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
