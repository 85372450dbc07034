"""The bookkeeping of the Adam class: what TF users expect of it."""

from __future__ import annotations

import re
import threading
import warnings

import fastadam
import numpy as np
import pytest
from cases import bits, random_array

F32 = np.float32


def pairs_of(*shapes, dtype=F32):
    rng = np.random.RandomState(0)
    return [(random_array(rng, shape, dtype=dtype), random_array(rng, shape, dtype=dtype)) for shape in shapes]


def assert_close(actual, expected):
    """For float64 arrays: a few ulps of the step that was made."""
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-14, atol=1e-15)


def trained(shapes=((3,), (2, 2)), steps=3, **options):
    pairs = pairs_of(*shapes)
    optimizer = fastadam.Adam(0.1, **options)
    for _ in range(steps):
        optimizer.apply_gradients(pairs)
    return optimizer, pairs


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


def test_weights_are_live_and_get_weights_copies():
    optimizer, pairs = trained()
    live, copied = optimizer.weights[1], optimizer.get_weights()[1]
    before = copied.copy()
    optimizer.apply_gradients(pairs)
    assert (live != before).any()
    np.testing.assert_array_equal(copied, before)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_resumes_to_the_bit_from_weights_set_before_the_first_step(amsgrad):
    first, pairs = trained(amsgrad=amsgrad)
    copies = [(g, w.copy()) for g, w in pairs]
    second = fastadam.Adam(0.1, amsgrad=amsgrad)
    second.build([w for _, w in copies])
    second.set_weights(first.get_weights())
    assert second.iterations == 3
    for _ in range(3):
        first.apply_gradients(pairs)
        second.apply_gradients(copies)
    for (_, w), (_, c) in zip(pairs, copies, strict=True):
        np.testing.assert_array_equal(bits(w), bits(c))


def test_build_creates_slots_once():
    optimizer, pairs = trained()
    weights = optimizer.weights
    optimizer.build([w for _, w in pairs])
    assert all(a is b for a, b in zip(weights, optimizer.weights, strict=True))


def test_set_weights_casts_and_keeps_the_arrays():
    optimizer, pairs = trained()
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
    optimizer, _ = trained()
    weights = optimizer.get_weights()
    optimizer.set_weights([*weights, np.zeros(1, F32), np.zeros(1, F32)])
    with_vhat, _ = trained(amsgrad=True)
    with pytest.raises(ValueError, match="length 7, but the optimizer was expecting 5"):
        optimizer.set_weights(with_vhat.get_weights())


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
    optimizer = fastadam.Adam(0.1)
    other = np.ones(3, F32)
    assert optimizer.apply_gradients([(g1, w), (np.ones(3, F32), other), (g2, w[:])]) == 1
    np.testing.assert_array_equal(bits(w), bits(expected))
    np.testing.assert_array_equal(bits(optimizer.get_slot(w, "v")), bits(v))


def test_the_optimizer_keeps_its_variables_alive_so_that_no_address_is_reused():
    optimizer = fastadam.Adam(0.1)
    for i in range(50):
        w = np.ones(1000, F32)
        optimizer.apply_gradients([(np.full(1000, 0.5, F32), w)])
        assert len(optimizer.weights) == 3 + 2 * i


def test_an_amsgrad_flag_set_later_creates_vhat_at_the_end():
    optimizer, pairs = trained()
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
    optimizer, [(_, w), _] = trained()
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


def test_hyperparameters_can_be_read_and_set_at_any_time():
    optimizer, pairs = trained()
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
    for (_, a), (_, b) in zip(pairs, others, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


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
    shared, alone = fastadam.Adam(0.1), fastadam.Adam(0.1)
    threads = [threading.Thread(target=lambda: [shared.apply_gradients(pairs) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(40):
        alone.apply_gradients(expected)
    assert shared.iterations == 40
    for (_, w), (_, e) in zip(pairs, expected, strict=True):
        np.testing.assert_array_equal(bits(w), bits(e))


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


def test_a_thousand_small_variables_are_one_step():
    pairs = [(np.full(3, i, F32), np.ones(3, F32)) for i in range(1000)]
    optimizer = fastadam.Adam(0.5)
    assert optimizer.apply_gradients(pairs) == 1
    assert pairs[0][1].tolist() == [1, 1, 1]
    np.testing.assert_allclose([w[0] for _, w in pairs[1:]], 0.5, rtol=1e-5)
