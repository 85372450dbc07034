"""What Keras 3 added: decoupled weight decay and AdamW, moving averages, loss scale. How options are kept."""

from __future__ import annotations

import json
import pickle
import re

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from helpers import assert_moved

F32 = np.float32


def problem(n=1001, steps=6, dtype=np.float64, seed=0):
    rng = np.random.RandomState(seed)
    return random_array(rng, n, dtype=dtype), [random_array(rng, n, dtype=dtype) for _ in range(steps)]


def run(optimizer, value, gradients):
    value = value.copy()
    for gradient in gradients:
        optimizer.apply_gradients([(gradient, value)])
    return value


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_is_the_reference_with_decay(amsgrad):
    value, gradients = problem()
    expected, m, v, vhat = value, np.zeros(1001), np.zeros(1001), np.zeros(1001) if amsgrad else None
    for t, gradient in enumerate(gradients, start=1):
        expected, m, v, vhat = fastadam.reference.adam_step(
            expected, gradient, m, v, vhat, step=t, learning_rate=0.1, weight_decay=0.3, decay=0.1
        )
    actual = run(fastadam.AdamW(0.1, 0.3, amsgrad=amsgrad, decay=0.1), value, gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-15)
    w, m, v = value.copy(), np.zeros(1001), np.zeros(1001)
    fastadam.adam_step(w, gradients[0], m, v, step=1, learning_rate=0.1, weight_decay=0.3)
    expected, *_ = fastadam.reference.adam_step(
        value, gradients[0], 0 * m, 0 * v, step=1, learning_rate=0.1, weight_decay=0.3
    )
    np.testing.assert_allclose(w, expected, rtol=1e-13, atol=1e-15)


def test_adamw_agrees_with_torch():
    torch = pytest.importorskip("torch")
    value, gradients = problem(steps=30)
    theirs = torch.from_numpy(value.copy())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, eps=1e-300, weight_decay=0.2)
    for gradient in gradients:
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
    actual = run(fastadam.AdamW(0.01, 0.2, epsilon=1e-300), value, gradients)
    moved = np.abs(gradients).max(axis=0) > 0
    np.testing.assert_allclose(actual[moved], theirs.numpy()[moved], rtol=1e-11, atol=1e-14)


def test_only_variables_with_a_gradient_decay():
    w, idle = np.array([2.0]), np.array([2.0])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        fastadam.AdamW(0.1, 0.5).apply_gradients([(np.zeros(1), w), (None, idle)])
    assert (w[0], idle[0]) == (1.9, 2.0)


def test_a_name_is_remembered_when_the_bare_array_comes():
    named, other = fastadam.Variable(np.array([2.0]), name="bias"), np.array([2.0])
    optimizer = fastadam.Adam(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.apply_gradients([(np.zeros(1), named)])
    optimizer.apply_gradients([(np.zeros(1), named.value), (np.zeros(1), other)])
    assert (named.value[0], other[0]) == (2.0, 1.9)


def test_exclusions_may_change_between_steps():
    w = np.array([2.0])
    optimizer = fastadam.Adam(0.1, weight_decay=0.5)
    optimizer.apply_gradients([(np.zeros(1), w)])
    optimizer.exclude_from_weight_decay(var_list=[w])
    optimizer.apply_gradients([(np.zeros(1), w)])
    assert w[0] == 1.9
    optimizer.exclude_from_weight_decay()
    optimizer.weight_decay = 1.0
    optimizer.apply_gradients([(np.zeros(1), w)])
    assert w[0] == pytest.approx(1.9 * 0.9, rel=1e-15)
    with pytest.raises(TypeError, match="var_names: 'bias', expected a list of patterns"):
        optimizer.exclude_from_weight_decay(var_names="bias")


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("frequency", [None, 1, 3])
def test_averages_follow_the_formula(dtype, frequency, isa):
    value, gradients = problem(1001, 8, dtype=np.float64)
    var = value.astype(dtype)
    plain = var.copy()
    optimizer = fastadam.Adam(0.1, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=frequency)
    same_without = fastadam.Adam(0.1)
    average = None
    for t, gradient in enumerate(gradients):
        gradient = gradient.astype(dtype)
        optimizer.apply_gradients([(gradient, var)])
        same_without.apply_gradients([(gradient, plain)])
        state = np.float64 if dtype == np.float64 else F32
        now = plain.astype(state)
        average = now if t == 0 else state(0.75) * average + state(0.25) * now
        tiny = np.abs(average) < np.finfo(state).tiny
        average = np.where(tiny, state(0), average)
        slot = optimizer.get_slot(var, "average")
        np.testing.assert_array_equal(slot, average)
        if frequency and (t + 1) % frequency == 0:
            plain[...] = average.astype(dtype)
        np.testing.assert_array_equal(bits(var), bits(plain))
    assert_moved(var, value.astype(dtype))
    assert optimizer.get_slot_names() == ["m", "v", "average"]
    optimizer.finalize_variable_values([var])
    np.testing.assert_array_equal(bits(var), bits(average.astype(dtype)))


def test_a_variable_that_comes_later_starts_its_average_at_itself():
    first, later = np.ones(3), np.full(3, 5.0)
    optimizer = fastadam.Adam(0.1, use_ema=True, ema_momentum=0.5)
    optimizer.apply_gradients([(np.ones(3), first)])
    once = first.copy()
    optimizer.apply_gradients([(np.ones(3), first), (np.ones(3), later)])
    assert (first < once).all()
    assert (once < 1).all()
    assert (later < 5).all()
    assert optimizer.get_slot(first, "average").tolist() == ((once + first) / 2).tolist()
    assert optimizer.get_slot(later, "average").tolist() == ((5 + later) / 2).tolist()


def test_finalize_needs_averages():
    w = np.ones(3)
    optimizer = fastadam.Adam()
    optimizer.apply_gradients([(np.ones(3), w)])
    with pytest.raises(KeyError, match="no moving average with use_ema=False"):
        optimizer.finalize_variable_values([w])


@pytest.mark.parametrize("options", [{}, {"clipvalue": 0.25}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}], ids=str)
def test_a_loss_scale_of_a_power_of_two_changes_no_bit(options):
    value, gradients = problem(1001, 5, F32)
    expected = run(fastadam.Adam(0.1, **options), value, gradients)
    scaled = fastadam.Adam(0.1, loss_scale_factor=1024.0, **options)
    assert scaled.scale_loss(2.0) == 2048.0
    assert fastadam.Adam().scale_loss(2.0) == 2.0
    actual = run(scaled, value, [scaled.scale_loss(g) for g in gradients])
    assert_moved(actual, value)
    np.testing.assert_array_equal(bits(actual), bits(expected))


def test_finalize_changes_no_variable_if_one_is_bad():
    w, fixed = np.ones(3), np.ones(3)
    optimizer = fastadam.Adam(use_ema=True)
    optimizer.apply_gradients([(np.ones(3), w), (np.ones(3), fixed)])
    before = w.copy()
    optimizer.get_slot(w, "average")[...] = 5
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match=re.escape("vars[1]: read-only")):
        optimizer.finalize_variable_values([w, fixed])
    np.testing.assert_array_equal(w, before)
    optimizer.finalize_variable_values([w])
    assert w.tolist() == [5.0] * 3


def test_numbers_of_numpy_are_plain_in_the_config():
    options = {"weight_decay": F32(0.5), "ema_momentum": F32(0.5), "loss_scale_factor": np.int64(8)}
    optimizer = fastadam.Adam(use_ema=np.bool_(True), ema_overwrite_frequency=np.int64(7), **options)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert {key: config[key] for key in options} == {"weight_decay": 0.5, "ema_momentum": 0.5, "loss_scale_factor": 8.0}
    assert (config["use_ema"], config["ema_overwrite_frequency"]) == (True, 7)


def test_options_are_in_the_config_where_they_are_not_at_their_default():
    options = {
        "weight_decay": 0.1,
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 7,
        "loss_scale_factor": 8.0,
    }
    config = json.loads(json.dumps(fastadam.Adam(**options).get_config()))
    assert {key: config[key] for key in options} == options
    assert fastadam.Adam.from_config(config).get_config() == config
    assert not set(options) & set(fastadam.Adam().get_config())
    assert fastadam.AdamW.from_config(fastadam.AdamW(weight_decay=0.5).get_config()).weight_decay == 0.5


def test_options_are_attributes_that_the_next_step_uses():
    w, alone = np.ones(3), np.ones(3)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.ones(3), w)])
    later = {"weight_decay": 0.25, "use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    for name, value in {**later, "loss_scale_factor": 8.0}.items():
        setattr(optimizer, name, value)
        assert getattr(optimizer, name) == optimizer.get_config()[name] == value
    same = fastadam.Adam(0.1)
    same.apply_gradients([(np.ones(3), alone)])
    same.weight_decay = 0.25
    same.apply_gradients([(np.full(3, 0.125), alone)])
    before = w.copy()
    optimizer.apply_gradients([(np.ones(3), w)])
    assert (before < 1).all()
    assert (alone < 0.975 * before).all()  # the decay alone takes 0.025 of it
    np.testing.assert_array_equal(optimizer.get_slot(w, "average"), (before + alone) / 2)
    np.testing.assert_array_equal(w, (before + alone) / 2)
    with pytest.raises(ValueError, match="loss_scale_factor: 0, expected loss_scale_factor > 0"):
        optimizer.loss_scale_factor = 0
    assert optimizer.loss_scale_factor == 8.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fastadam.Adam(weight_decay=-1), ValueError, "Expected weight_decay >= 0, received: -1"),
        (lambda: fastadam.AdamW(weight_decay=None), ValueError, "Argument `weight_decay` must be a float. Received: weight_decay=None"),
        (lambda: fastadam.Adam(use_ema=1), TypeError, "use_ema: 1, expected True or False"),
        (lambda: fastadam.Adam(use_ema=True, ema_momentum=1.5), ValueError, "ema_momentum: 1.5, expected 0 <= ema_momentum <= 1"),
        (lambda: fastadam.Adam(use_ema=True, ema_overwrite_frequency=0), ValueError, "ema_overwrite_frequency: 0, expected an integer"),
        (lambda: fastadam.Adam(ema_overwrite_frequency=2), ValueError, "ema_overwrite_frequency: given without use_ema=True"),
        (lambda: fastadam.Adam(loss_scale_factor=0), ValueError, "loss_scale_factor: 0, expected loss_scale_factor > 0"),
        (lambda: fastadam.Adam(loss_scale_factor=np.nan), ValueError, "loss_scale_factor: nan, expected a finite number"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize("cls", [fastadam.Adam, fastadam.AdamW])
def test_clip_after_dedupe_is_kept(cls, tmp_path):
    assert cls().clip_after_dedupe is False
    assert "clip_after_dedupe" not in cls(clip_after_dedupe=False).get_config()
    optimizer = cls(clipnorm=0.5, clip_after_dedupe=np.bool_(True))
    assert optimizer.clip_after_dedupe is True
    config = json.loads(json.dumps(optimizer.get_config()))
    assert config["clip_after_dedupe"] is True
    w = np.ones(3, F32)
    optimizer.apply_gradients([(np.ones(3, F32), w)])
    pytest.importorskip("safetensors")
    optimizer.save(tmp_path / "state")
    loaded = cls.load(tmp_path / "state", [w.copy()])
    for again in (cls.from_config(config), pickle.loads(pickle.dumps(optimizer)), loaded):
        assert again.clip_after_dedupe is True
        assert again.get_config() == config
    optimizer.clip_after_dedupe = False
    assert "clip_after_dedupe" not in optimizer.get_config()
    scaled = fastadam.LossScaleOptimizer(cls(clip_after_dedupe=True))
    assert fastadam.LossScaleOptimizer.from_config(scaled.get_config()).inner_optimizer.clip_after_dedupe


@pytest.mark.parametrize("value", [1, 0, None, "True", [], np.array([True])], ids=repr)
def test_bad_values_of_clip_after_dedupe_are_refused(value):
    message = re.escape(f"clip_after_dedupe: {value!r}, expected True or False")
    with pytest.raises(TypeError, match=message):
        fastadam.Adam(clip_after_dedupe=value)
    optimizer = fastadam.Adam(clip_after_dedupe=True)
    with pytest.raises(TypeError, match=message):
        optimizer.clip_after_dedupe = value
    assert optimizer.clip_after_dedupe is True


def test_a_torch_state_dict_does_not_mind_clip_after_dedupe_without_a_clip():
    pytest.importorskip("torch")
    w, optimizer = np.ones(3, F32), fastadam.Adam(clip_after_dedupe=True)
    optimizer.apply_gradients([(np.ones(3, F32), w)])
    assert fastadam.exchange.to_torch_state_dict(optimizer, [w], epsilon=1e-8)["param_groups"][0]["amsgrad"] is False
