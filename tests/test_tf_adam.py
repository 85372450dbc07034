"""AdamOptimizerTest of TensorFlow's keras/optimizer_v2/adam_test.py: the same cases under the same names.

TensorFlow compares with NumPy to 1e-6. Here float32 has the bits of tensorflow-cpu 2.15.1 (legacy.Adam, asked once),
float64 agrees with the reference to 1e-12, float16 is rounded once.
"""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from checked import Checked
from fastadam.schedules import InverseTimeDecay
from helpers import DTYPES

GRADIENTS = ([0.1, 0.1], [0.01, 0.01])
# What TensorFlow has after each of three steps from [1, 2] and [3, 4], with the default epsilon and with 1e-8.
DEFAULT = [
    ([0.999, 1.9990001], [2.9990003, 3.9990003]),
    ([0.998, 1.9980001], [2.9980006, 3.9980006]),
    ([0.99700004, 1.9970002], [2.9970007, 3.9970007]),
]
EPSILON_1E_8 = [
    ([0.999, 1.999], [2.999, 3.999]),
    ([0.998, 1.9979999], [2.9980001, 3.9980001]),
    ([0.99700004, 1.9969999], [2.9970002, 3.9970002]),
]
DECAYED = [
    ([0.999, 1.9990001], [2.9990003, 3.9990003]),
    ([0.99833333, 1.9983335], [2.9983337, 3.9983337]),
    ([0.9978334, 1.9978335], [2.9978337, 3.9978337]),
]


def check_three_steps(optimizer, dtype, golden, amsgrad=False, **arguments):
    checked = Checked([1.0, 2.0], [3.0, 4.0], dtype=dtype, amsgrad=amsgrad)
    for step, values in enumerate(golden, start=1):
        assert optimizer.apply_gradients(checked.pairs(*GRADIENTS)) == step
        checked.check(GRADIENTS, values, step=step, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_resource_basic(dtype):
    check_three_steps(fastadam.Adam(0.001, epsilon=1e-8), dtype, EPSILON_1E_8, epsilon=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_basic_callable_params(dtype):
    optimizer = fastadam.Adam(lambda: 0.001, beta_1=lambda: 0.9, beta_2=lambda: 0.999, epsilon=1e-8)
    check_three_steps(optimizer, dtype, EPSILON_1E_8, epsilon=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_basic_with_amsgrad(dtype):
    """The gradients are constant, so vhat is v."""
    check_three_steps(fastadam.Adam(amsgrad=True), dtype, DEFAULT, amsgrad=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_basic_with_learning_rate_decay(dtype):
    check_three_steps(fastadam.Adam(0.001, decay=0.5), dtype, DECAYED, decay=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_basic_with_learning_rate_inverse_time_decay(dtype):
    schedule = InverseTimeDecay(0.001, decay_steps=1.0, decay_rate=0.5)
    check_three_steps(fastadam.Adam(schedule), dtype, DECAYED, decay=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_tensor_learning_rate(dtype, kind):
    rate = np.array(0.001, kind)
    check_three_steps(fastadam.Adam(rate), dtype, DEFAULT, learning_rate=float(rate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharing(dtype):
    """Two lists of the same variables, used in turn, share slots and the count."""
    checked = Checked([1.0, 2.0], [3.0, 4.0], dtype=dtype)
    optimizer = fastadam.Adam()
    first = checked.pairs(*GRADIENTS)
    second = [(g, w[:]) for g, w in checked.pairs(*GRADIENTS)[::-1]]
    for step, (pairs, values) in enumerate(zip((first, second, first), DEFAULT, strict=True), start=1):
        assert optimizer.apply_gradients(pairs) == step
        checked.check(GRADIENTS, values, step=step)
    assert len(optimizer.weights) == 5


def test_slots_unique_eager():
    variables = [fastadam.Variable(1.0), fastadam.Variable(1.0)]
    optimizer = fastadam.Adam(1.0)
    optimizer.minimize(lambda: None, variables, gradient=lambda *_: [1.0, 1.0])
    assert len({id(w) for w in optimizer.weights}) == 5
    assert optimizer.weights[0] == optimizer.iterations == 1


def test_set_weights_from_v1_adam_without_minimize():
    """The list of an optimizer that has made no step."""
    optimizer = fastadam.Adam()
    optimizer.set_weights([np.int64(0)])
    optimizer.set_weights(fastadam.Adam().get_weights())
    assert optimizer.iterations == 0
    assert len(optimizer.weights) == 1


def test_construct_adam_with_lr():
    optimizers = [fastadam.Adam(lr=1.0), fastadam.Adam(learning_rate=0.1, lr=1.0), fastadam.Adam(learning_rate=0.1)]
    assert [o.lr for o in optimizers] == [o.learning_rate for o in optimizers] == [1.0, 1.0, 0.1]
