"""LossScaleOptimizer: a step with a gradient that is not finite is left out whole, and the scale follows."""

from __future__ import annotations

import json
import pickle
import re

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from helpers import warned

F32 = np.float32


def gradient(seed, size=5, dtype=F32):
    return np.asarray(random_array(np.random.RandomState(seed), (size,)), dtype)


def make(scale=1024.0, growth=3, **options):
    return fastadam.LossScaleOptimizer(fastadam.Adam(0.1, **options), scale, growth)


@pytest.mark.parametrize("options", [{}, {"clipvalue": 0.01}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, F32, np.float64])
def test_finite_step(options, dtype):
    w, plain = np.ones(5, dtype), np.ones(5, dtype)
    optimizer, expected = make(**options), fastadam.Adam(0.1, **options)
    for seed in range(2):
        g = gradient(seed).astype(dtype).astype(F32)
        assert optimizer.apply_gradients([(optimizer.scale_loss(g), w)]) == seed + 1
        expected.apply_gradients([(g, plain)])
    np.testing.assert_array_equal(bits(w), bits(plain))
    assert (w != 1).any()
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (1024, 2)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("options", [{}, {"clipvalue": 0.01}, {"global_clipnorm": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, F32, np.float64])
def test_infinite_step(bad, options, dtype, isa):
    variables = [np.ones(4099, dtype), np.ones(3, dtype)]
    optimizer = make(**options)
    good = [np.full(4099, 0.5, dtype), np.full(3, 0.5, dtype)]
    optimizer.apply_gradients(zip(good, variables, strict=True))
    before = [np.array(x) for x in (*variables, *optimizer.get_weights())]
    for place, at in ((0, 0), (0, 4096), (0, 4098), (1, 2)):
        broken = [g.copy() for g in good]
        broken[place][at] = bad
        assert optimizer.apply_gradients(zip(broken, variables, strict=True)) == 1
        for a, b in zip(before, (*variables, *optimizer.get_weights()), strict=True):
            np.testing.assert_array_equal(bits(a), bits(np.asarray(b)))
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (1024 / 16, 0)


def test_large_finite_squares_are_no_reason_to_skip():
    w = np.ones(3)
    optimizer = make(scale=1.0)
    assert optimizer.apply_gradients([(np.array([1.2e154, -1.2e154, 1.2e154]), w)]) == 1
    assert w.round(5).tolist() == [0.9, 1.1, 0.9]


def test_upscaling_after_growth_steps_in_a_row():
    w, optimizer = np.ones(5, F32), make(scale=8.0, growth=3)
    scales = []
    for step in range(8):
        g = np.full(5, np.inf, F32) if step == 4 else gradient(step)
        optimizer.apply_gradients([(g, w)])
        scales.append(optimizer.dynamic_scale)
    assert scales == [8, 8, 16, 16, 8, 8, 8, 16]
    assert optimizer.iterations == 7


def test_the_scale_stays_in_its_bounds():
    w, optimizer = np.ones(5, F32), make(scale=2.0, growth=1)
    for _ in range(3):
        optimizer.apply_gradients([(np.full(5, np.nan, F32), w)])
    assert optimizer.dynamic_scale == 1
    optimizer = make(scale=2.0**126, growth=1)
    optimizer.apply_gradients([(np.full(5, 2.0**127, F32), w)])
    assert optimizer.dynamic_scale == 2.0**126
    np.testing.assert_allclose(w, 0.9, rtol=1e-6)  # the gradient was 2


def test_a_call_that_is_not_finite_gathers_nothing():
    w, plain = np.ones(5, F32), np.ones(5, F32)
    optimizer = make(gradient_accumulation_steps=2)
    for g in (gradient(1), np.full(5, np.inf, F32), gradient(2)):
        optimizer.apply_gradients([(g * F32(optimizer.dynamic_scale), w)])
    assert (optimizer.iterations, optimizer.dynamic_scale) == (1, 512)
    fastadam.Adam(0.1).apply_gradients([((gradient(1) + gradient(2)) / 2, plain)])
    np.testing.assert_array_equal(bits(w), bits(plain))


def test_a_refused_step_leaves_the_scale_alone():
    optimizer, w = make(), np.ones(5, F32)
    with pytest.raises(ValueError, match="shape"):
        optimizer.apply_gradients([(np.full(4, np.inf, F32), w)])
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (1024, 0)
    assert optimizer.apply_gradients([]) is None


def test_everything_else_is_the_inner_optimizers():
    optimizer, w = make(), np.ones(5, F32)
    optimizer.learning_rate = 0.5
    assert optimizer.inner_optimizer.learning_rate == 0.5
    optimizer.apply_gradients([(gradient(1), w)])
    assert optimizer.get_slot(w, "m") is optimizer.inner_optimizer.get_slot(w, "m")
    assert optimizer.iterations == 1
    optimizer.loss_scale_factor = 2.0
    with pytest.raises(ValueError, match="inner_optimizer: has a loss_scale_factor, expected None"):
        optimizer.apply_gradients([(gradient(1), w)])
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = optimizer.no_such_name


@pytest.mark.parametrize("provider", ["autograd", "jax", "torch"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_minimize_scales_the_loss_it_differentiates(provider, dynamic):
    pytest.importorskip(provider)
    w, plain = fastadam.Variable([1.0, -2.0]), fastadam.Variable([1.0, -2.0])
    optimizer = make() if dynamic else fastadam.Adam(0.1, loss_scale_factor=1024.0)
    for _ in range(3):
        optimizer.minimize(lambda: (w * w).sum(), [w], gradient=provider)
        fastadam.Adam.minimize(
            expected := fastadam.Adam(0.1), lambda: (plain * plain).sum(), [plain], gradient=provider
        )
        expected.iterations = 0
    assert optimizer.iterations == 3
    assert optimizer.get_gradients(lambda: (w * w).sum(), [w], gradient=provider)[0].tolist() == (2 * w.value).tolist()
    slot = optimizer.get_slot(w, "m")
    assert 0 < np.abs(slot).max() < 3


def test_minimize_refuses_a_function_that_the_scale_cannot_reach():
    w = fastadam.Variable([1.0, -2.0])
    for optimizer in (make(), fastadam.Adam(loss_scale_factor=2.0)):
        with pytest.raises(ValueError, match="gradient: a function, to which a loss scale does not apply"):
            optimizer.minimize(lambda: 0.0, [w], gradient=lambda loss, variables: [w.value])
    assert w.value.tolist() == [1, -2]


def test_config_files_and_pickles_keep_scale_and_count(tmp_path):
    w, optimizer = np.ones(5, F32), make(scale=8.0, growth=3)
    for g in (np.full(5, np.inf, F32), gradient(1), gradient(2)):
        optimizer.apply_gradients([(g, w)])
    assert (optimizer.dynamic_scale, optimizer.step_counter) == (4, 2)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert fastadam.LossScaleOptimizer.from_config(config).get_config() == config
    optimizer.save(tmp_path / "state")
    with pytest.raises(ValueError, match="state of LossScaleOptimizer, expected Adam"):
        fastadam.Adam.load(tmp_path / "state", [w])
    copies = [w.copy(), w.copy()]
    again = [fastadam.LossScaleOptimizer.load(tmp_path / "state", copies[:1]), pickle.loads(pickle.dumps(optimizer))]
    optimizer.apply_gradients([(gradient(3), w)])
    for other, copy in zip(again, copies, strict=True):
        other.apply_gradients([(gradient(3), copy)])
        np.testing.assert_array_equal(bits(w), bits(copy))
        assert (other.dynamic_scale, other.step_counter, other.iterations) == (8, 0, 3)
    fastadam.Adam().save(tmp_path / "plain")
    with pytest.raises(ValueError, match="state of Adam, expected LossScaleOptimizer"):
        fastadam.LossScaleOptimizer.load(tmp_path / "plain", [])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("adam",), TypeError, "inner_optimizer: str, expected a fastadam.Adam"),
        (
            (fastadam.Adam(loss_scale_factor=2.0),),
            ValueError,
            "inner_optimizer: has a loss_scale_factor, expected None",
        ),
        ((fastadam.Adam(), 0.5), ValueError, "initial_scale: 0.5, expected 1 <= initial_scale"),
        ((fastadam.Adam(), 2.0**127), ValueError, "initial_scale: "),
        ((fastadam.Adam(), 0.0), ValueError, "initial_scale: 0.0, expected 1 <= initial_scale"),
        ((fastadam.Adam(), 2.0, 0), ValueError, "dynamic_growth_steps: 0, expected an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastadam.LossScaleOptimizer(*arguments)


def test_a_scale_whose_inverse_is_infinite_in_float32_is_refused():
    w = np.ones(3, F32)
    with pytest.raises(ValueError, match="infinite in float32"):
        fastadam.Adam(loss_scale_factor=1e-39).apply_gradients([(np.ones(3, F32), w)])
    assert w.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dynamic_scale", -5.0, "dynamic_scale: -5.0, expected 1 <= dynamic_scale"),
        ("dynamic_scale", np.nan, "dynamic_scale: nan, expected a finite number"),
        ("dynamic_growth_steps", "x", "dynamic_growth_steps: 'x', expected an integer"),
        ("step_counter", -1, "Expected step_counter >= 0"),
        ("inner_optimizer", None, "inner_optimizer: NoneType, expected a fastadam.Adam"),
    ],
)
def test_what_is_set_later_is_checked(name, value, message):
    optimizer, w = make(), np.ones(2, F32)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        setattr(optimizer, name, value)
    optimizer.apply_gradients([(np.ones(2, F32), w)])
    assert optimizer.dynamic_scale == 1024
    with pytest.raises(ValueError, match="inner_optimizer: None, expected a dict"):
        fastadam.LossScaleOptimizer.from_config({})


INF, SKIPPED = np.full(2, np.inf, F32), np.ones(2, F32)


def skip(optimizer, steps, w=SKIPPED):
    """Steps that change nothing."""
    for _ in range(steps):
        optimizer.apply_gradients([(INF, w)])


@pytest.mark.parametrize("least", [2.0**-126, 0.25, 1.0, 4.0, 3.0])
def test_min_scale_is_as_far_as_the_scale_falls(least):
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1), 8.0, min_scale=least)
    scales = []
    for _ in range(9):
        skip(optimizer, 1)
        scales.append(optimizer.dynamic_scale)
    expected = [max(8.0 / 2**i, least) for i in range(1, 10)]
    assert scales == expected
    w, plain = np.ones(2, F32), np.ones(2, F32)
    g = np.array([0.5, -2.0], F32)
    if least != 3:
        optimizer.apply_gradients([(optimizer.scale_loss(g), w)])
        fastadam.Adam(0.1).apply_gradients([(g, plain)])
        np.testing.assert_array_equal(bits(w), bits(plain))


def test_a_scale_below_one_lets_gradients_be_finite_that_overflow():
    """float16 gradients of about 1e5, whose largest number is 65504."""
    w, optimizer = np.ones(2, F32), fastadam.LossScaleOptimizer(fastadam.Adam(0.1), 1.0, min_scale=2.0**-10)
    for _ in range(3):
        with np.errstate(over="ignore"):
            optimizer.apply_gradients([(np.float16(np.array([1e5, -1e5]) * optimizer.dynamic_scale), w)])
    assert (optimizer.iterations, optimizer.dynamic_scale) == (2, 0.5)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "min_scale: 0.0, expected 1.17549e-38 <= min_scale"),
        (-1.0, ValueError, "min_scale: -1.0, expected"),
        (2.0**-127, ValueError, "min_scale: "),
        (2.0**127, ValueError, "min_scale: "),
        (np.nan, ValueError, "min_scale: nan, expected a finite number"),
        (None, TypeError, "min_scale: None, expected a number"),
        ("1", TypeError, "min_scale: '1', expected a number"),
    ],
)
def test_a_bad_min_scale_is_refused(value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastadam.LossScaleOptimizer(fastadam.Adam(), min_scale=value)
    optimizer = make()
    with pytest.raises(error, match=re.escape(message)):
        optimizer.min_scale = value
    assert optimizer.min_scale == 1


def test_the_scales_stay_in_order():
    with pytest.raises(ValueError, match=re.escape("initial_scale: 2.0, expected 4 <= initial_scale")):
        fastadam.LossScaleOptimizer(fastadam.Adam(), 2.0, min_scale=4.0)
    optimizer = make(scale=8.0)
    with pytest.raises(ValueError, match=re.escape("min_scale: 16.0, expected at most dynamic_scale, which is 8.0")):
        optimizer.min_scale = 16.0
    with pytest.raises(ValueError, match=re.escape("dynamic_scale: 0.5, expected 1 <= dynamic_scale")):
        optimizer.dynamic_scale = 0.5
    optimizer.min_scale = 0.25
    optimizer.dynamic_scale = 0.5
    assert (optimizer.min_scale, optimizer.dynamic_scale) == (0.25, 0.5)
    assert "min_scale=0.25" in repr(optimizer)
    assert "min_scale" not in repr(make())


def test_configs_files_and_pickles_keep_min_scale(tmp_path):
    w, optimizer = np.ones(2, F32), fastadam.LossScaleOptimizer(fastadam.Adam(0.1), 0.5, min_scale=0.25)
    skip(optimizer, 1, w)
    config = json.loads(json.dumps(optimizer.get_config()))
    optimizer.save(tmp_path / "state")
    others = [
        fastadam.LossScaleOptimizer.from_config(config),
        fastadam.LossScaleOptimizer.load(tmp_path / "state", [w]),
        pickle.loads(pickle.dumps(optimizer)),
    ]
    assert [other.min_scale for other in others] == [0.25] * 3
    assert [other.dynamic_scale for other in others] == [0.5, 0.25, 0.25]
    assert "min_scale" not in make().get_config()  # which Keras would not know


@pytest.mark.parametrize("least", [1.0, 0.25])
def test_a_scale_that_is_stuck_is_warned_of_once(least):
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1), 4 * least, min_scale=least)
    skip(optimizer, 2 + 9)  # two halve the scale
    message = warned(lambda: skip(optimizer, 1), "dynamic_scale: 10 steps in a row were skipped at min_scale")
    assert "set min_scale lower" in message
    skip(optimizer, 50)


def test_a_scale_that_recovers_is_not_warned_of():
    optimizer, w = make(scale=1.0), np.ones(2, F32)
    for _ in range(5):
        skip(optimizer, 9, w)
        optimizer.apply_gradients([(np.ones(2, F32), w)])
    assert (optimizer.iterations, optimizer.dynamic_scale) == (5, 1)


def test_a_warning_that_raises_leaves_the_scale_adjusted():
    optimizer, w = make(scale=1.0), np.ones(2, F32)
    skip(optimizer, 9, w)
    with pytest.raises(UserWarning, match="10 steps in a row"):
        skip(optimizer, 1, w)
    assert (optimizer.dynamic_scale, optimizer.step_counter, optimizer.iterations) == (1, 0, 0)
    skip(optimizer, 20, w)
    assert w.tolist() == [1, 1]


@pytest.mark.parametrize("what", ["save", "save_delta"])
def test_a_step_that_a_rate_makes_while_it_is_saved_is_in_the_file_with_its_scale(what, tmp_path):
    w, makes_step = np.ones(4, F32), []

    def rate():
        if makes_step:
            makes_step.clear()
            step()
        return 0.1

    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(rate), initial_scale=8.0, dynamic_growth_steps=2)

    def step():
        optimizer.apply_gradients([(np.full(4, optimizer.dynamic_scale, F32), w)])

    step()
    if what == "save_delta":
        optimizer.save(tmp_path / "base", values=True)
    makes_step.append(True)
    if what == "save":
        optimizer.save(tmp_path / "base", values=True)
    else:
        optimizer.save_delta(tmp_path / "delta")
    deltas = [tmp_path / "delta"] if what == "save_delta" else []
    found = fastadam.LossScaleOptimizer.load(tmp_path / "base", [np.zeros(4, F32)], deltas=deltas)
    assert (int(optimizer.iterations), float(optimizer.dynamic_scale), int(optimizer.step_counter)) == (2, 16, 0)
    assert (int(found.iterations), float(found.dynamic_scale), int(found.step_counter)) == (2, 16, 0)
