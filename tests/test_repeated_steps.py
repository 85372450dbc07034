"""A step like the last one is one native call, with the bits of the long way."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from cases import random_array
from fastadam._core.step import Stepper
from helpers import bits

RNG = np.random.RandomState(0)


@pytest.fixture
def long_ways(monkeypatch):
    """Grows by one with every step that is more than one native call."""
    steps, make = [], Stepper._step

    def counting(self, *arguments):
        steps.append(self)
        return make(self, *arguments)

    monkeypatch.setattr(Stepper, "_step", counting)
    return steps


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"clipnorm": 1.0}, {"weight_decay": 0.1}, {"decay": 0.5}])
def test_a_step_that_was_made_before_is_one_native_call_with_the_same_bits(long_ways, options):
    w, twin = (np.ones(40, np.float32) for _ in range(2))
    one, other = fastadam.Adam(0.1, **options), fastadam.Adam(0.1, **options)
    for step in range(6):
        gradient = random_array(RNG, (40,))
        one.apply_gradients([(gradient, w)])
        other.learning_rate = 0.1  # the long way in every step
        other.apply_gradients([(gradient, twin)])
        assert one.iterations == step + 1
    assert [stepper is one._stepper for stepper in long_ways].count(True) == 1
    assert len(long_ways) == 7
    assert np.array_equal(bits(w), bits(twin))


def test_what_is_written_to_the_count_counts_in_a_repeated_step(long_ways):
    w, twin = (np.ones(3, np.float32) for _ in range(2))
    one, other = fastadam.Adam(0.1), fastadam.Adam(lambda: 0.1)
    for step in range(6):
        for optimizer, variable in ((one, w), (other, twin)):
            if step == 3:
                optimizer.weights[0][...] = 100
            optimizer.apply_gradients([(np.ones(3, np.float32), variable)])
    assert one.iterations == other.iterations == 103
    assert np.array_equal(bits(w), bits(twin))
    assert [stepper is one._stepper for stepper in long_ways].count(True) == 1


@pytest.mark.parametrize(
    "changed",
    [
        lambda g, w: [(g, w[::-1].copy())],
        lambda g, w: [(g.astype(np.float64), w)],
        lambda g, w: [(g.tolist(), w)],
        lambda g, w: [(g, w), (g, np.ones(4, np.float32))],
        lambda g, w: [(fastadam.IndexedSlices(g, range(4)), w)],
    ],
    ids=["variable", "dtype", "list", "more", "slices"],
)
def test_a_step_that_is_unlike_the_last_one_takes_the_long_way(long_ways, changed):
    w = np.ones(4, np.float32)
    optimizer = fastadam.Adam(0.1)
    gradient = random_array(RNG, (4,))
    for _ in range(3):
        optimizer.apply_gradients([(gradient, w)])
    assert len(long_ways) == 1
    optimizer.apply_gradients(changed(gradient, w))
    assert (len(long_ways), int(optimizer.iterations)) == (2, 4)


def test_a_step_from_within_a_repeated_step_is_refused():
    class Nested:
        """An array that steps the optimizer when it is read."""

        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **kwargs):
            optimizer.apply_gradients([(self.array, w)])

        def __dlpack_device__(self):
            return (1, 0)

    w, g = (np.ones(3, np.float32) for _ in range(2))
    optimizer = fastadam.Adam(0.1)
    for _ in range(3):
        optimizer.apply_gradients([(g, w)])
    before = w.copy()
    with pytest.raises(ValueError, match="Nested.*called from within itself"):
        optimizer.apply_gradients([(Nested(g), w)])
    assert np.array_equal(w, before)
    optimizer.apply_gradients([(g, w)])
    assert optimizer.iterations == 4
