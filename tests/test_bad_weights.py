"""State that must be refused: weights, slots and variables to build; a message, and nothing changed."""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest

F32 = np.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w[:-1], ValueError, "weight list of length 6, but the optimizer was expecting 7 weights"),
        (lambda w: [*w, w[-1]], ValueError, "weight list of length 8, but the optimizer was expecting 7 weights"),
        (lambda w: [], ValueError, "weight list of length 0, but the optimizer was expecting 7 weights"),
        (lambda w: [*w[:-1], np.ones(3, F32)], ValueError,
         "weights[6]: Optimizer weight shape (2, 2) not compatible with provided weight shape (3,)"),
        (lambda w: [w[0], w[1][:1], *w[2:]], ValueError, "weights[1]: Optimizer weight shape (3,) not compatible"),
        (lambda w: [-1, *w[1:]], ValueError, "Expected weights[0] >= 0, received: -1"),
        (lambda w: [7.5, *w[1:]], ValueError, "weights[0]: 7.5, expected a whole number of steps"),
        (lambda w: [*w[:-1], np.full((2, 2), "x")], TypeError, "weights[6]: dtype <U1, expected float32"),
        (lambda w: [*w[:-1], np.zeros((2, 2), "V4")], TypeError, "weights[6]: dtype |V4, expected float32"),
    ],
)  # fmt: skip
def test_bad_weights_are_refused(change, error, message, snapshot):
    weights = change([w + 1 for w in snapshot.optimizer.get_weights()])
    with pytest.raises(error, match=re.escape(message)):
        snapshot.optimizer.set_weights(weights)
    snapshot.assert_unchanged()


def test_a_slot_made_read_only_is_not_written(snapshot):
    snapshot.optimizer.weights[-1].flags.writeable = False
    weights = [w + 1 for w in snapshot.optimizer.get_weights()]
    with pytest.raises(ValueError, match=re.escape("vhat[1]: was made read-only, expected a writable array")):
        snapshot.optimizer.apply_gradients(snapshot.good_pairs())
    with pytest.raises(ValueError, match=re.escape("weights[6]: was made read-only, expected a writable array")):
        snapshot.optimizer.set_weights(weights)
    snapshot.assert_unchanged()


def test_slots_ask_for_known_names(snapshot):
    with pytest.raises(KeyError, match="velocity: not a slot of vars"):
        snapshot.optimizer.get_slot(snapshot.variables[0], "velocity")
    with pytest.raises(KeyError, match="not a variable of this optimizer"):
        snapshot.optimizer.get_slot(np.ones(3, F32), "m")
    with pytest.raises(ValueError, match="initializer: 'glorot', expected 'zeros', 'ones', a callable or an array"):
        snapshot.optimizer.add_slot(snapshot.variables[0], "extra", "glorot")
    with pytest.raises(ValueError, match=re.escape("initializer: shape (4,), expected (3,)")):
        snapshot.optimizer.add_slot(snapshot.variables[0], "extra", np.zeros(4))
    snapshot.assert_unchanged()


def test_build_refuses_what_a_step_would_refuse(snapshot):
    shared = np.zeros(10, F32)
    with pytest.raises(ValueError, match=re.escape("vars[1]: overlaps vars[0] in memory")):
        snapshot.optimizer.build([shared[:6], shared[4:]])
    with pytest.raises(TypeError, match="var_list: NoneType, expected a list"):
        snapshot.optimizer.build(None)
    with pytest.raises(TypeError, match="weights: int, expected a list"):
        snapshot.optimizer.set_weights(5)
    with pytest.raises(TypeError, match="config: NoneType, expected a dict"):
        fastadam.Adam.from_config(None)
    with pytest.raises(TypeError, match="slot_name: 5, expected a string"):
        snapshot.optimizer.add_slot(snapshot.variables[0], 5)
    snapshot.assert_unchanged()
