"""The stateless step: its forms, and what it refuses."""

from __future__ import annotations

import re
import warnings

import fastadam
import numpy as np
import pytest
from helpers import assert_close, pairs_of

F32 = np.float32


def test_adam_step_takes_one_array_or_a_list_and_a_factor_for_each():
    pairs = pairs_of((3,), (2, 2), dtype=np.float64)
    for factor, factors in ((None, (1.0, 1.0)), (0.5, (0.5, 0.5)), ([2.0, 0.25], (2.0, 0.25))):
        variables = [w.copy() for _, w in pairs]
        state = [[np.zeros_like(w) for w in variables] for _ in range(3)]
        expected = [
            fastadam.reference.adam_step(w, g, m, v, vhat, step=3, clipvalue=1.0, grad_factor=f, learning_rate=0.1)
            for (g, w), m, v, vhat, f in zip(pairs, *state, factors, strict=True)
        ]
        fastadam.adam_step(
            variables, [g for g, _ in pairs], *state, step=3, clipvalue=1.0, grad_factor=factor, learning_rate=0.1
        )
        for i, (w, m, v, vhat) in enumerate(expected):
            for actual, wanted in zip((variables[i], *(s[i] for s in state)), (w, m, v, vhat), strict=True):
                assert_close(actual, wanted)
    one = pairs[0][1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadam.adam_step(one, [0.5, 0.5, 0.5], np.zeros(3), np.zeros(3), step=1)
    assert (one != pairs[0][1]).all()


STEP_ARGUMENTS = {
    "step bool": ({"step": True}, TypeError, "step: True, expected an integer of at least 1"),
    "step zero": ({"step": 0}, ValueError, "step: 0, expected an integer of at least 1"),
    "step negative": ({"step": -3}, ValueError, "step: -3, expected an integer of at least 1"),
    "step float": ({"step": 1.0}, TypeError, "step: 1.0, expected an integer of at least 1"),
    "step huge": ({"step": 2**63}, ValueError, "step: 9223372036854775808, expected"),
    "rate": ({"learning_rate": np.inf}, ValueError, "learning_rate: inf"),
    "clip": ({"clipvalue": -1}, ValueError, "Expected clipvalue >= 0, received: -1"),
    "decay": ({"decay": -1}, ValueError, "Expected decay >= 0, received: -1"),
    "epsilon": ({"epsilon": -1}, ValueError, "Expected epsilon >= 0, received: -1"),
    "factor": ({"grad_factor": np.nan}, ValueError, "grad_factor: nan, expected a finite number"),
    "factors": ({"grad_factor": [1.0, 2.0]}, ValueError, "grad_factor: 2 numbers, expected 1, one for each variable"),
    "m shape": ({"m": np.zeros(4, F32)}, ValueError, "m[0]: shape (4,), expected (5,) like vars[0]"),
    "m dtype": ({"m": np.zeros(5)}, TypeError, "m[0]: float64, expected float32 for float32 vars[0]"),
    "v list": ({"v": [0.0] * 5}, ValueError, "v: 5 arrays, expected 1, one for each variable"),
    "v strided": ({"v": np.zeros(10, F32)[::2]}, ValueError, "v[0]: strides (8,) for shape (5,), expected a contiguous array"),
    "vhat length": ({"vhat": []}, ValueError, "vhat: 0 arrays, expected 1, one for each variable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEP_ARGUMENTS)
def test_adam_step_refuses_bad_arguments(kind):
    change, error, message = STEP_ARGUMENTS[kind]
    arrays = {"vars": np.ones(5, F32), "m": np.zeros(5, F32), "v": np.zeros(5, F32)}
    arguments = {**arrays, "grads": np.ones(5, F32), "step": 1, **change}
    with pytest.raises(error, match=re.escape(message)):
        fastadam.adam_step(**arguments)
    np.testing.assert_array_equal(arrays["vars"], np.ones(5, F32))
    np.testing.assert_array_equal(arrays["m"], np.zeros(5, F32))


def test_adam_step_refuses_state_that_overlaps():
    state = np.zeros(8, F32)
    with pytest.raises(ValueError, match=re.escape("v[0]: overlaps m[0] in memory")):
        fastadam.adam_step(np.ones(5, F32), np.ones(5, F32), state[:5], state[3:], step=1)
    assert not state.any()


def test_adam_step_refuses_one_variable_with_two_states():
    var, gradient = np.ones(5, F32), np.ones(5, F32)
    states = [np.zeros(5, F32) for _ in range(4)]
    with pytest.raises(ValueError, match=re.escape("overlaps")):
        fastadam.adam_step([var, var], [gradient, gradient], states[:2], states[2:], step=1)
    np.testing.assert_array_equal(var, np.ones(5, F32))


def test_a_factor_that_float32_cannot_hold_is_refused():
    w = np.ones(5, F32)
    with pytest.raises(ValueError, match=re.escape("grad_factor[0]: infinite in float32, expected a finite number")):
        fastadam.adam_step(w, np.ones(5, F32), np.zeros(5, F32), np.zeros(5, F32), step=1, grad_factor=1e308)
    assert w.tolist() == [1] * 5


@pytest.mark.slow
def test_a_step_of_many_elements_has_the_bits_of_steps_of_pieces(isa):
    """Large ones prefetch, in blocks of their own."""
    size, piece = 2**22 + 1000, 1000
    gradient = np.random.RandomState(0).standard_normal(size).astype(np.float32)
    arrays = [np.ones(size, np.float32), *(np.zeros(size, np.float32) for _ in range(2))]
    pieces = [array.copy() for array in arrays]
    for step in (1, 2):
        fastadam.adam_step(arrays[0], gradient, *arrays[1:], step=step)
        for at in range(0, size, piece):
            part = slice(at, at + piece)
            fastadam.adam_step(pieces[0][part], gradient[part], *(array[part] for array in pieces[1:]), step=step)
    for whole, found in zip(arrays, pieces, strict=True):
        np.testing.assert_array_equal(whole.view(np.uint32), found.view(np.uint32))
