"""README's table "You use | Write this line": every line has a test, and those for NumPy, JAX, Keras and scikit-learn.

More is tested in test_jax_libraries.py, test_keras_adam.py and test_sklearn.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fastadam
import numpy as np
import pytest
from absent import need
from readme_lines import GUIDE, LINES, ROOT, TABLE, line, slow, written
from test_repo import DOCUMENTS


def test_every_line_is_run_by_a_test():
    assert len(LINES) == len(TABLE.splitlines()) >= 20
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_readme_*.py"))
    assert set(re.findall(r'(?:written|line)\("([^"]+)"', sources)) == set(LINES)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_there_is_one_table(document):
    """No test runs a line that another document has."""
    heads = re.findall(r"^\|.*write this line", (ROOT / document).read_text(), re.MULTILINE | re.IGNORECASE)
    assert len(heads) == (document == "README.md")


def test_numpy():
    opt = written("NumPy")
    w = np.ones(3, np.float32)
    opt.apply_gradients([(np.ones(3, np.float32), w)])
    np.testing.assert_allclose(w, 1 - 1e-3, rtol=1e-6)


# ---- JAX -------------------------------------------------------------------------------------------------------------


def parameters():
    return {"w": np.linspace(-1, 1, 6, dtype=np.float32), "b": np.ones(2, np.float32)}


def updated(transformation, made=parameters, count=8):
    """What becomes of parameters that are their own gradients."""
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")

    @jax.jit
    def step(params, state):
        updates, state = transformation.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = made()
    state = transformation.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return params


def assert_near(found, expected):
    import jax

    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_jax():
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    params = parameters()
    state = fastadam.jax.init(params)

    @jax.jit
    def step(params, state):
        return written("JAX", params=params, grads=params, state=state)

    for _ in range(8):
        params, state = step(params, state)
    assert_near(params, updated(optax.adam(1e-3)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_optax(wrapped):
    optax = pytest.importorskip("optax")
    theirs = optax.adamw(1e-3)
    if wrapped:
        found = updated(written("optax, its wrappers", optax=optax))
        assert_near(found, updated(optax.MultiSteps(theirs, 4)))
    else:
        found = updated(written("optax, Equinox"))
        assert_near(found, updated(theirs))
    assert np.abs(found["w"] - parameters()["w"]).max() > 1e-3


def test_equinox():
    eqx, jax = pytest.importorskip("equinox"), pytest.importorskip("jax")
    tx, model = written("optax, Equinox"), eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    grads = eqx.filter_grad(lambda model: (model(jax.numpy.ones(2)) ** 2).sum())(model)
    updates, _ = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    after = eqx.apply_updates(model, updates)
    assert not np.array_equal(after.layers[-1].weight, model.layers[-1].weight)


@slow
def test_flax_train_state():
    train_state, nn = pytest.importorskip("flax.training.train_state"), pytest.importorskip("flax.linen")
    import optax

    model, params = nn.Dense(2), parameters()
    state = written("Flax, `TrainState`", TrainState=train_state.TrainState, model=model, params=params)
    for _ in range(8):
        state = state.apply_gradients(grads=state.params)
    assert_near(state.params, updated(optax.adamw(1e-3)))


@slow
def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    import jax
    import optax

    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = written("Flax, `nnx`", nnx=nnx, model=model)
    for _ in range(8):
        optimizer.update(model, nnx.state(model, nnx.Param))
    expected = updated(optax.adamw(1e-3), lambda: start)
    assert_near(nnx.to_pure_dict(nnx.state(model, nnx.Param)), jax.tree.map(np.asarray, expected))


# ---- Keras and scikit-learn ------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras(backend):
    """In a process of its own: this one has chosen a backend, or must not."""
    need("keras", backend)
    code = f"""
import fastadam, keras, numpy as np

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
{line("Keras 3")}
assert type(model.optimizer) is fastadam.keras.Adam
x = np.ones((64, 4), np.float32)
losses = model.fit(x, x.sum(1), 8, 5, verbose=0).history["loss"]
assert losses[-1] < losses[0]
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer. Maximum iterations")
def test_sklearn(monkeypatch):
    """With the function that the guide has."""
    pytest.importorskip("sklearn")
    from sklearn.neural_network import MLPRegressor
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer

    x = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    names = {"fastadam": fastadam}
    exec(re.search(r"def update_params.*?\n(?=\n\n)", GUIDE, re.DOTALL)[0], names)

    def coefficients():
        return MLPRegressor(random_state=0, max_iter=5, tol=0.0, n_iter_no_change=9).fit(x, x.sum(1)).coefs_

    expected = coefficients()
    monkeypatch.setattr(AdamOptimizer, "update_params", AdamOptimizer.update_params)  # which puts it back
    written("scikit-learn", AdamOptimizer=AdamOptimizer, update_params=names["update_params"])
    assert AdamOptimizer.update_params is names["update_params"]
    for a, b in zip(coefficients(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
