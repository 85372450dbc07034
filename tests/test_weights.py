"""Weights and slots: their order, their setting, and what the next step makes of them."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from cases import bits
from helpers import assert_close, assert_moved, pairs_of, trained_on_pairs

F32 = np.float32


def test_weights_are_live_and_get_weights_copies():
    optimizer, pairs = trained_on_pairs()
    live, copied = optimizer.weights[1], optimizer.get_weights()[1]
    before = copied.copy()
    optimizer.apply_gradients(pairs)
    assert (live != before).any()
    np.testing.assert_array_equal(copied, before)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_resumes_to_the_bit_from_weights_set_before_the_first_step(amsgrad):
    first, pairs = trained_on_pairs(amsgrad=amsgrad)
    copies = [(g, w.copy()) for g, w in pairs]
    second = fastadam.Adam(0.1, amsgrad=amsgrad)
    second.build([w for _, w in copies])
    second.set_weights(first.get_weights())
    assert second.iterations == 3
    before = [c.copy() for _, c in copies]
    for _ in range(3):
        first.apply_gradients(pairs)
        second.apply_gradients(copies)
    for (_, w), (_, c), b in zip(pairs, copies, before, strict=True):
        np.testing.assert_array_equal(bits(w), bits(c))
        assert_moved(c, b)


def test_build_creates_slots_once():
    optimizer, pairs = trained_on_pairs()
    weights = optimizer.weights
    optimizer.build([w for _, w in pairs])
    assert all(a is b for a, b in zip(weights, optimizer.weights, strict=True))


def test_set_weights_casts_and_keeps_the_arrays():
    optimizer, pairs = trained_on_pairs()
    arrays = optimizer.weights
    optimizer.set_weights([7, *(np.full(w.shape, 0.5, np.float64) for w in arrays[1:])])
    assert all(a is b for a, b in zip(arrays, optimizer.weights, strict=True))
    assert optimizer.iterations == 7
    assert (optimizer.get_slot(pairs[0][1], "m") == 0.5).all()


def test_live_weights_may_be_set_in_another_order():
    optimizer = fastadam.Adam()
    optimizer.build([np.zeros(3, F32), np.zeros(3, F32)])
    for i, weight in enumerate(optimizer.weights[1:]):
        weight[...] = i
    iterations, a, b, c, d = optimizer.weights
    optimizer.set_weights([iterations, b, a, d, c])
    assert [int(w[0]) for w in optimizer.weights[1:]] == [1, 0, 3, 2]


def test_the_list_of_a_keras_1_adam_is_accepted_but_no_amsgrad_state_is_dropped():
    optimizer, _ = trained_on_pairs()
    weights = optimizer.get_weights()
    optimizer.set_weights([*weights, np.zeros(1, F32), np.zeros(1, F32)])
    with_vhat, _ = trained_on_pairs(amsgrad=True)
    with pytest.raises(ValueError, match="length 7, but the optimizer was expecting 5"):
        optimizer.set_weights(with_vhat.get_weights())


def test_an_amsgrad_flag_set_later_creates_vhat_at_the_end():
    optimizer, pairs = trained_on_pairs()
    optimizer.amsgrad = True
    optimizer.apply_gradients(pairs)
    assert [w.shape for w in optimizer.weights] == [(), (3,), (2, 2), (3,), (2, 2), (3,), (2, 2)]
    np.testing.assert_array_equal(optimizer.get_slot(pairs[0][1], "vhat"), optimizer.get_slot(pairs[0][1], "v"))


def test_a_slot_added_before_is_used_by_the_step():
    (g, w), = pairs_of((5,), dtype=np.float64)  # fmt: skip
    optimizer = fastadam.Adam(0.1)
    added = optimizer.add_slot(w, "m", initializer=np.full(5, 0.25))
    assert optimizer.add_slot(w, "m", initializer="ones") is added
    expected, m, *_ = fastadam.reference.adam_step(w, g, added, np.zeros(5), step=1, learning_rate=0.1)
    optimizer.apply_gradients([(g, w)])
    assert_close(w, expected)
    assert_close(added, m)
    assert optimizer.weights[1] is added


def test_add_slot_takes_initializers_and_is_listed():
    optimizer, [(_, w), _] = trained_on_pairs()
    extra = optimizer.add_slot(w, "extra", initializer=lambda shape, dtype: np.full(shape, 3, dtype))
    assert extra.tolist() == [3, 3, 3]
    assert optimizer.weights[-1] is extra
    assert optimizer.get_slot_names() == ["m", "v", "extra"]
    assert optimizer.add_slot(w, "more", "ones").tolist() == [1, 1, 1]


def test_add_weight_is_not_part_of_the_weights():
    optimizer = fastadam.Adam()
    weight = optimizer.add_weight("counter", (2, 3), initializer="ones")
    assert weight.dtype == np.float32
    assert weight.shape == (2, 3)
    assert len(optimizer.weights) == 1
