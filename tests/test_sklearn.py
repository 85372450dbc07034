"""scikit-learn's multilayer perceptrons, trained by fastadam.adam_step in the state that scikit-learn keeps."""

from __future__ import annotations

import pickle

import fastadam
import numpy as np
import pytest

neural_network = pytest.importorskip("sklearn.neural_network")
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer  # noqa: E402

THEIRS = AdamOptimizer.update_params
FLOATS = [np.float32, np.float64]


def update_params(self, params, grads):
    """What the guide assigns to AdamOptimizer.update_params."""
    self.t += 1
    fastadam.adam_step(
        params,
        grads,
        self.ms,
        self.vs,
        step=self.t,
        learning_rate=self.learning_rate_init,
        beta_1=self.beta_1,
        beta_2=self.beta_2,
        epsilon=self.epsilon,
    )


@pytest.fixture
def native(monkeypatch):
    monkeypatch.setattr(AdamOptimizer, "update_params", update_params)


def perceptron(kind, **options):
    options = {"hidden_layer_sizes": (7, 5), "max_iter": 3, "batch_size": 8, "tol": 0.0, **options}
    return getattr(neural_network, kind)(random_state=0, learning_rate_init=0.01, n_iter_no_change=100, **options)


def data(kind, dtype=np.float64):
    rng = np.random.RandomState(0)
    x = rng.uniform(-1, 1, (64, 4)).astype(dtype)
    return x, (x.sum(1) > 0).astype(int) if kind == "MLPClassifier" else x.sum(1)


def weights(model):
    return [*model.coefs_, *model.intercepts_]


@pytest.mark.parametrize("dtype", FLOATS)
def test_ten_steps_are_those_of_scikit_learn(dtype, native):
    """The same gradients: the difference is rounding, relative to the learning rate."""
    rng = np.random.RandomState(0)
    params = [rng.uniform(-1, 1, shape).astype(dtype) for shape in ((5, 3), (3,), ())]
    twins = [param.copy() for param in params]
    ours, theirs = (AdamOptimizer(each, 0.01, 0.8, 0.99, 1e-8) for each in (params, twins))
    for _ in range(10):
        grads = [np.asarray(rng.uniform(-1, 1, param.shape), dtype) for param in params]
        ours.update_params(params, grads)
        THEIRS(theirs, twins, grads)
    bound = 1e-15 if dtype == np.float64 else 1e-6
    for found, expected in zip([*params, *ours.ms, *ours.vs], [*twins, *theirs.ms, *theirs.vs], strict=True):
        np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)
    assert ours.t == 10


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer. Maximum iterations")
@pytest.mark.parametrize("kind", ["MLPClassifier", "MLPRegressor"])
@pytest.mark.parametrize(
    "options", [{}, {"early_stopping": True, "alpha": 0.1}, {"beta_1": 0.5, "epsilon": 1e-5}], ids=str
)
def test_a_perceptron_reaches_the_weights_of_scikit_learn(kind, options, native, monkeypatch):
    """Rounding comes back in the gradients, and grows: hence 1e-12 after 24 steps."""
    found = perceptron(kind, **options).fit(*data(kind))
    monkeypatch.setattr(AdamOptimizer, "update_params", THEIRS)
    expected = perceptron(kind, **options).fit(*data(kind))
    for a, b in zip(weights(found), weights(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_, rtol=1e-12)
    assert found._optimizer.t == expected._optimizer.t > 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["MLPClassifier", "MLPRegressor"])
def test_a_pickled_perceptron_resumes_with_the_same_bits(kind, dtype, native):
    x, y = data(kind, dtype)
    model = perceptron(kind)
    first = {"classes": [0, 1]} if kind == "MLPClassifier" else {}
    model.partial_fit(x, y, **first)
    resumed = pickle.loads(pickle.dumps(model))
    for each in (model, resumed):
        each.partial_fit(x, y).partial_fit(x, y)
    for a, b in zip(weights(resumed), weights(model), strict=True):
        assert a.dtype == dtype
        assert np.array_equal(a, b)
