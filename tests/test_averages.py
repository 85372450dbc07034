"""Moving averages on several threads and of variables that come twice, against the formula of Keras 3."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from helpers import assert_moved

F32 = np.float32
SIZE = 200_003  # enough for several threads


def problem():
    rng = np.random.RandomState(0)
    return random_array(rng, SIZE), [random_array(rng, SIZE) for _ in range(3)]


def pairs(gradient, variable):
    return [(gradient, variable), (gradient[::-1].copy(), variable)]


def flushed(array):
    return np.where(np.abs(array) < np.finfo(F32).tiny, F32(0), array)


@pytest.fixture(scope="module")
def expected():
    """The variable and its average, averaged by hand after every step and written back after the second."""
    value, gradients = problem()
    optimizer, average = fastadam.AdamW(0.1, 0.01), value
    for t, gradient in enumerate(gradients, start=1):
        optimizer.apply_gradients(pairs(gradient, value))
        average = value.copy() if t == 1 else flushed(F32(0.75) * average + F32(0.25) * value)
        if t == 2:
            value[...] = average
    return value, average


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_variable_that_comes_twice_is_averaged_once_on_any_number_of_threads(threads, isa, expected):
    fastadam.set_num_threads(threads)
    value, gradients = problem()
    w = value.copy()
    optimizer = fastadam.AdamW(0.1, 0.01, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=2)
    for gradient in gradients:
        optimizer.apply_gradients(pairs(gradient, w))
    assert_moved(w, value)
    np.testing.assert_array_equal(bits(w), bits(expected[0]))
    np.testing.assert_array_equal(bits(optimizer.get_slot(w, "average")), bits(expected[1]))
