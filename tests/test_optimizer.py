"""The bookkeeping of the Adam class: what TF users expect of it."""

from __future__ import annotations

import re
import threading

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from helpers import assert_moved, pairs_of, trained_on_pairs

F32 = np.float32


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, lambda pairs: (pair for pair in pairs), lambda pairs: map(list, pairs)]
)
def test_pairs_may_come_from_any_iterable(kind):
    pairs = pairs_of((3,), (2, 2))
    before = [w.copy() for _, w in pairs]
    assert fastadam.Adam(0.1).apply_gradients(kind(pairs)) == 1
    assert all((w != b).any() for (_, w), b in zip(pairs, before, strict=True))


def test_messages_count_the_pairs_of_the_caller_when_none_gradients_are_left_out():
    (g, w), (_, idle) = pairs_of((3,), (2,))
    with (
        pytest.warns(UserWarning, match="idle|vars"),
        pytest.raises(ValueError, match=re.escape("grads[1]: shape (2,)")),
    ):
        fastadam.Adam().apply_gradients([(None, idle), (g[:2], w)])


def test_a_new_view_of_a_buffer_is_the_same_variable():
    (g, w), = pairs_of((4, 3))  # fmt: skip
    optimizer = fastadam.Adam(0.1)
    for view in (w, w[:], w.view(), w.reshape(12).reshape(4, 3), fastadam.Variable(w)):
        optimizer.apply_gradients([(g, view)])
    assert optimizer.iterations == 5
    assert len(optimizer.weights) == 3
    assert optimizer.get_slot(w[:], "m") is optimizer.get_slot(w, "m")


def test_a_variable_given_twice_is_updated_twice_with_the_same_t():
    rng = np.random.RandomState(0)
    w, g1, g2 = (random_array(rng, 40001) for _ in range(3))
    expected, m, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    for g in (g1, g2):
        fastadam.adam_step(expected, g, m, v, step=1, learning_rate=0.1)
    assert_moved(expected, w)
    optimizer = fastadam.Adam(0.1)
    other = np.ones(3, F32)
    assert optimizer.apply_gradients([(g1, w), (np.ones(3, F32), other), (g2, w[:])]) == 1
    np.testing.assert_array_equal(bits(w), bits(expected))
    np.testing.assert_array_equal(bits(optimizer.get_slot(w, "v")), bits(v))


@pytest.mark.filterwarnings("ignore:.*a new array in each of the last steps")
@pytest.mark.filterwarnings("ignore:.*a new array")
def test_the_optimizer_keeps_its_variables_alive_so_that_no_address_is_reused():
    optimizer = fastadam.Adam(0.1)
    for i in range(50):
        w = np.ones(1000, F32)
        optimizer.apply_gradients([(np.full(1000, 0.5, F32), w)])
        assert len(optimizer.weights) == 3 + 2 * i


def test_hyperparameters_can_be_read_and_set_at_any_time():
    optimizer, pairs = trained_on_pairs()
    optimizer.lr = 1
    assert optimizer.learning_rate == optimizer.lr == 1.0
    optimizer.learning_rate = np.float32(0.5)
    assert optimizer.lr == 0.5
    optimizer.beta_1, optimizer.beta_2, optimizer.epsilon, optimizer.decay = 0.5, 0.75, 1e-3, 0.125
    slots = [optimizer.get_slot(pairs[0][1], name).copy() for name in ("m", "v")]
    g, w = pairs[0]
    expected, *_ = fastadam.reference.adam_step(
        w, g, *slots, step=4, learning_rate=0.5, beta_1=0.5, beta_2=0.75, epsilon=1e-3, decay=0.125
    )
    optimizer.apply_gradients(pairs)
    np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_an_int_is_a_float():
    optimizer = fastadam.Adam(learning_rate=1)
    optimizer.lr = 0.5
    assert optimizer.lr == 0.5


@pytest.mark.parametrize("epsilon", [0, 0.0, None])
def test_epsilon_zero_and_none_mean_the_default_of_keras(epsilon):
    assert fastadam.Adam(epsilon=epsilon).epsilon == 1e-7


def test_callables_are_called_once_per_step():
    calls = []

    def rate():
        calls.append(0)
        return 0.1

    pairs, others = pairs_of((3,), (2, 2), (4,)), pairs_of((3,), (2, 2), (4,))
    optimizer = fastadam.Adam(learning_rate=rate, beta_1=lambda: 0.8, epsilon=lambda: 1e-5)
    same = fastadam.Adam(0.1, beta_1=0.8, epsilon=1e-5)
    for step in range(3):
        optimizer.apply_gradients(pairs)
        same.apply_gradients(others)
        assert len(calls) == step + 1
    for (_, a), (_, b), (_, start) in zip(pairs, others, pairs_of((3,), (2, 2), (4,)), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
        assert_moved(a, start)


def test_from_config_reads_lr_and_leaves_the_dict_alone():
    config = {"lr": 0.25}
    assert fastadam.Adam.from_config(config).lr == 0.25
    assert config == {"lr": 0.25}


def test_names_left_out_are_made_unique():
    first, second = fastadam.Adam(name=None).name, fastadam.Adam(name="").name
    assert first.startswith("adam")
    assert first != second
    assert fastadam.Adam().name == fastadam.Adam().name == "Adam"


def test_threads_that_share_an_optimizer_take_turns():
    pairs = pairs_of((200_000,), (7,))
    expected = [(g, w.copy()) for g, w in pairs]
    start = pairs[0][1].copy()
    shared, alone = fastadam.Adam(0.1), fastadam.Adam(0.1)
    threads = [threading.Thread(target=lambda: [shared.apply_gradients(pairs) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(40):
        alone.apply_gradients(expected)
    assert_moved(expected[0][1], start)
    assert shared.iterations == 40
    for (_, w), (_, e) in zip(pairs, expected, strict=True):
        np.testing.assert_array_equal(bits(w), bits(e))


def test_a_thousand_small_variables_are_one_step():
    pairs = [(np.full(3, i, F32), np.ones(3, F32)) for i in range(1000)]
    optimizer = fastadam.Adam(0.5)
    assert optimizer.apply_gradients(pairs) == 1
    assert pairs[0][1].tolist() == [1, 1, 1]
    np.testing.assert_allclose([w[0] for _, w in pairs[1:]], 0.5, rtol=1e-5)
