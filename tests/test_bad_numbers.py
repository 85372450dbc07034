"""Hyperparameters and step counts that must be refused: a message that names the number, and nothing changed."""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest

F32 = np.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amsgrad": "False"}, TypeError, "amsgrad: 'False', expected True or False"),
        ({"amsgrad": 1}, TypeError, "amsgrad: 1, expected True or False"),
        ({"name": 5}, TypeError, "name: 5, expected a string"),
        ({"decay": None}, TypeError, "decay: None, expected a number"),
        ({"learning_rate": 10**400}, ValueError, "learning_rate: int too large for a float, expected a finite number"),
        ({"clipvalue": -1.0}, ValueError, "Expected clipvalue >= 0, received: -1.0"),
        ({"global_clipnorm": -1.0}, ValueError, "Expected global_clipnorm >= 0, received: -1.0"),
        ({"decay": -0.1}, ValueError, "Expected decay >= 0, received: -0.1"),
        ({"lr": -0.1}, ValueError, "Expected lr >= 0, received: -0.1"),
        ({"clipvalue": np.nan}, ValueError, "clipvalue: nan, expected a finite number"),
        ({"decay": np.inf}, ValueError, "decay: inf, expected a finite number"),
        ({"learning_rate": np.inf}, ValueError, "learning_rate: inf, expected a finite number"),
        ({"learning_rate": np.nan}, ValueError, "learning_rate: nan, expected a finite number"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate: '0.1', expected a number"),
        ({"learning_rate": None}, TypeError, "learning_rate: None, expected a number"),
        ({"learning_rate": [0.1]}, TypeError, "learning_rate: [0.1], expected a number"),
        ({"learning_rate": True}, TypeError, "learning_rate: True, expected a number"),
        ({"learning_rate": 1j}, TypeError, "learning_rate: complex, expected a number"),
        ({"beta_1": 1.0}, ValueError, "beta_1: 1.0, expected 0 <= beta_1 < 1"),
        ({"beta_2": -0.1}, ValueError, "beta_2: -0.1, expected 0 <= beta_2 < 1"),
        ({"beta_2": np.nan}, ValueError, "beta_2: nan, expected a finite number"),
        ({"epsilon": -1e-7}, ValueError, "Expected epsilon >= 0, received: -1e-07"),
        ({"epsilon": np.inf}, ValueError, "epsilon: inf, expected a finite number"),
        (
            {"sparse_update": "sometimes"},
            ValueError,
            "sparse_update: 'sometimes', expected one of 'dense', 'deferred', 'deferred_fast', 'lazy'",
        ),
    ],
    ids=str,
)
def test_bad_constructor_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastadam.Adam(**arguments)


@pytest.mark.parametrize("name", ["learning_rate", "lr", "beta_1", "beta_2", "decay", "epsilon", "clipvalue"])
def test_a_bad_value_set_later_is_refused_and_the_old_one_kept(name, snapshot):
    with pytest.raises(ValueError, match="nan"):
        setattr(snapshot.optimizer, name, np.nan)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "beta_2", "epsilon", "decay"])
def test_a_callable_that_returns_nonsense_changes_nothing(name, snapshot):
    setattr(snapshot.optimizer, name, lambda: np.nan)
    with pytest.raises(ValueError, match="nan"):
        snapshot.optimizer.apply_gradients(snapshot.good_pairs())
    setattr(snapshot.optimizer, name, snapshot.before[3][name])
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("arguments", "dtype", "message"),
    [
        ({"beta_1": 1 - 1e-10}, F32, "beta_1: 1.000000 is 1 in float32, expected less"),
        ({"beta_2": 1 - 1e-10}, np.float16, "beta_2: 1.000000 is 1 in float32, expected less"),
        ({"epsilon": 1e-40}, F32, "epsilon: so small that it is flushed to zero in float32, expected at least 1.2e-38"),
        ({"epsilon": 1e-310}, np.float64, "epsilon: so small that it is flushed to zero in float64"),
        ({"epsilon": 1e39}, F32, "epsilon: infinite in float32"),
        ({"learning_rate": 1e39}, F32, "learning_rate: with this decay the step size is not finite in float32"),
        ({"decay": 1e39}, F32, "learning_rate: with this decay the step size is not finite in float32"),
    ],
)
def test_a_number_that_the_dtype_cannot_hold_changes_nothing(arguments, dtype, message):
    w = np.ones(5, dtype)
    optimizer = fastadam.Adam(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.apply_gradients([(np.ones(5, dtype), w)])
    np.testing.assert_array_equal(w, np.ones(5, dtype))
    assert len(optimizer.weights) == 1
    assert optimizer.iterations == 0
    if dtype != np.float64:  # in double the same numbers are good
        fastadam.Adam(**arguments).apply_gradients([(np.ones(5), np.ones(5))])


@pytest.mark.parametrize("value", [-1, 2.5, np.nan, "3", None, True, 2**63 - 1, 2**70])
def test_bad_iterations_are_refused(value, snapshot):
    with pytest.raises((TypeError, ValueError), match="iterations"):
        snapshot.optimizer.iterations = value
    snapshot.assert_unchanged()


def test_iterations_written_through_the_live_array_are_checked_at_the_step(snapshot):
    for value in (-5, 2**63 - 1):
        snapshot.optimizer.weights[0][...] = value
        with pytest.raises(ValueError, match="iterations"):
            snapshot.optimizer.apply_gradients(snapshot.good_pairs())
    snapshot.optimizer.weights[0][...] = 2
    snapshot.assert_unchanged()
