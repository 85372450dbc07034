"""Keras 3's optimizers/optimizer_test.py and optimizers/adam_test.py: the same cases under the same names.

Where the original takes SGD, Adam is used with a gradient that makes its step the learning rate. float32 values are
those of tensorflow-cpu 2.15.1 (legacy.Adam, asked once), to the bit; Keras compares to 1e-6 at best.
"""

from __future__ import annotations

import json
import math
import pickle
import re

import fastadam
import numpy as np
import pytest
from checked import Checked
from fastadam.schedules import PolynomialDecay
from helpers import DTYPES, first_step_gradients

F32 = np.float32
ONES = np.ones((2, 2))


# optimizer_test.py


def test_iterations_counter():
    w = np.array([[1.0, 2.0], [3.0, 4.0]])
    optimizer = fastadam.Adam(1.0)
    assert optimizer.iterations == 0
    for count in (1, 2):
        assert optimizer.apply_gradients([(ONES, w)]) == count
        assert optimizer.iterations == count


def test_empty_gradients():
    """All None is refused, see test_tf_optimizer_v2.py; some None are left out with a warning, and get no slots."""
    w, idle = np.array([[3.0, 4.0], [5.0, 6.0]]), np.array([[3.0, 4.0], [5.0, 6.0]])
    named = fastadam.Variable([1.0], name="bias")
    optimizer = fastadam.Adam(1.0)
    message = re.escape("Gradients do not exist for variables ['bias', 'vars[2]'] when minimizing the loss.")
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer.apply_gradients([(ONES, w), (None, named), (None, idle)])
    assert caught[0].filename == __file__
    assert idle.tolist() == [[3.0, 4.0], [5.0, 6.0]]
    # 1e-5: epsilon is added to the square root of the first step's v, 0.001.
    np.testing.assert_allclose(w, [[2.0, 3.0], [4.0, 5.0]], atol=1e-5)
    assert len(optimizer.weights) == 3
    with pytest.raises(KeyError):
        optimizer.get_slot(idle, "m")


def test_clip_args():
    """Keras 3 takes one of the three bounds; here, as in TF 2.x, only the two norms exclude each other."""
    for name in ("clipnorm", "clipvalue", "global_clipnorm"):
        assert getattr(fastadam.Adam(1.0, **{name: 0.1}), name) == 0.1
    with pytest.raises(ValueError, match=re.escape("Cannot accept both `clipnorm` and `global_clipnorm`")):
        fastadam.Adam(1.0, clipnorm=0.1, global_clipnorm=0.1)
    optimizer = fastadam.Adam(clipnorm=2)
    with pytest.raises(ValueError, match="Cannot accept both"):
        optimizer.global_clipnorm = 1.0
    assert optimizer.global_clipnorm is None
    optimizer.clipnorm = None
    optimizer.global_clipnorm = 1.0
    assert "clipnorm" not in optimizer.get_config()
    assert optimizer.get_config()["global_clipnorm"] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "gradient", "expected"),
    [
        ("clipnorm", [100.0, 100.0], [math.sqrt(0.5)] * 2),
        ("clipvalue", [100.0, 100.0], [1.0, 1.0]),
        ("global_clipnorm", [50.0, 100.0], [math.sqrt(0.2), 2 * math.sqrt(0.2)]),
    ],
)
def test_clip(name, gradient, expected, dtype):
    """test_clip_norm, test_clip_value, test_global_clip_norm; those of adam_test.py are the same."""
    (m,) = first_step_gradients([np.array(gradient, dtype)], **{name: 1})
    # The moments of float16 variables are float32: the factor and the product are rounded.
    np.testing.assert_allclose(m, expected, rtol=2 * np.finfo(m.dtype).eps)


def test_ema():
    """Keras's golden numbers, by an epsilon that vanishes in double: every step is 1."""
    w = np.array([[3.0, 4.0], [5.0, 6.0]])
    optimizer = fastadam.Adam(1.0, epsilon=1e-300, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)
    corner = np.array([[0.0, 1.0], [2.0, 3.0]])
    for value, average in [(2.0, 2.0), (1.0, 1.9), (1.71, 1.71)]:
        optimizer.apply_gradients([(ONES, w)])
        np.testing.assert_allclose(w, value + corner, rtol=1e-12)
        np.testing.assert_allclose(optimizer.get_slot(w, "average"), average + corner, rtol=1e-12)


def test_static_loss_scaling():
    w, gradient = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [3.0, 4.0]])
    optimizer = fastadam.Adam(1.0, beta_1=0.0, loss_scale_factor=1024.0)
    assert optimizer.scale_loss(1.0) == 1024.0
    optimizer.apply_gradients([(gradient * 1024.0, w)])
    np.testing.assert_array_equal(optimizer.get_slot(w, "m"), gradient)


def test_set_weights():
    w = np.array([[1.0, 2.0], [3.0, 4.0]], F32)
    first, second = fastadam.Adam(), fastadam.Adam()
    first.apply_gradients([(w.copy(), w)])
    with pytest.raises(ValueError, match="length 3, but the optimizer was expecting 1 weights"):
        second.set_weights(first.variables())
    second.build([w])
    second.set_weights(first.variables())
    for a, b in zip(first.variables(), second.variables(), strict=True):
        assert a is not b
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_callable_learning_rate(dtype):
    checked = Checked([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
    optimizer = fastadam.Adam(learning_rate=lambda: 0.1)
    assert optimizer.iterations == 0
    assert optimizer.apply_gradients(checked.pairs(ONES)) == 1
    checked.check([ONES], [[[0.90000033, 1.9000003], [2.9000003, 3.9000003]]], step=1, learning_rate=0.1)


def test_setting_lr_to_callable_untracks_lr_var():
    """The rate is never among the weights, as in TF 2.x."""
    optimizer = fastadam.Adam(learning_rate=0.001)
    assert len(optimizer.variables()) == 1
    optimizer.learning_rate = PolynomialDecay(optimizer.learning_rate, 4)
    assert len(optimizer.variables()) == 1
    assert optimizer.learning_rate(0) == 0.001


@pytest.mark.parametrize("kind", [fastadam.Adam, fastadam.AdamW])
def test_pickleable_optimizers(kind):
    optimizer = kind(PolynomialDecay(0.1, 4), beta_1=0.8)
    again = pickle.loads(pickle.dumps(optimizer))
    assert type(again) is kind
    assert again.get_config() == optimizer.get_config()


# adam_test.py


@pytest.mark.parametrize("kind", [fastadam.Adam, fastadam.AdamW])
def test_config(kind):
    """Keras 3 writes every option, used or not: None and defaults are read."""
    options = {"learning_rate": 0.5, "beta_1": 0.5, "beta_2": 0.67, "epsilon": 1e-5, "amsgrad": True}
    optimizer = kind(**options)
    assert kind.from_config(json.loads(json.dumps(optimizer.get_config()))).get_config() == optimizer.get_config()
    unused = {"weight_decay": optimizer.weight_decay, "clipnorm": None, "global_clipnorm": None, "clipvalue": None,
              "use_ema": False, "ema_momentum": 0.99, "ema_overwrite_frequency": None, "loss_scale_factor": None,
              "gradient_accumulation_steps": None}  # fmt: skip
    of_keras = {"name": optimizer.name, **unused, **options}
    assert kind.from_config(of_keras).get_config() == optimizer.get_config()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_single_step(dtype):
    checked = Checked([1.0, 2.0, 3.0, 4.0], dtype=dtype)
    gradient = [1.0, 6.0, 7.0, 2.0]
    fastadam.Adam(learning_rate=0.5).apply_gradients(checked.pairs(gradient))
    checked.check([gradient], [[0.50000155, 1.5000004, 2.5000002, 3.5000007]], step=1, learning_rate=0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weight_decay(dtype):
    """Three optimizers in turn decay one variable; the others are excluded by name and by memory."""
    w, excluded = np.array(2.0, dtype), np.array(2.0, dtype)
    named, zero = fastadam.Variable(np.array(2.0, dtype), name="exclude_me"), np.zeros((), dtype)
    for choice in ({}, {"var_names": ["exclude"]}, {"var_list": [excluded]}):
        optimizer = fastadam.Adam(1.0, weight_decay=0.004)
        optimizer.exclude_from_weight_decay(**choice)
        other = {"var_names": [named], "var_list": [excluded]}.get(next(iter(choice), ""), [])
        optimizer.apply_gradients([(zero, w), *((zero, v) for v in other)])
    # Keras 3 subtracts a product where here the variable is multiplied: one rounding of float32 apart.
    assert w == (pytest.approx(1.9760959, rel=1.2e-7) if dtype == F32 else pytest.approx(2 * 0.996**3, rel=1e-15))
    assert excluded == named.value == 2.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_correctness_with_golden(dtype):
    """AMSGrad, a small gradient first. Keras's numbers have four digits."""
    checked = Checked(np.ones(10), dtype=dtype, amsgrad=True)
    (w,) = checked.variables
    first, later = np.full(10, 0.01, F32), np.arange(0.1, 1.05, 0.1, dtype=F32)
    optimizer = fastadam.Adam(amsgrad=True)
    for step, (keras, golden) in enumerate(zip([0.999, 0.9982, 0.9974, 0.9965, 0.9955], GOLDEN, strict=True), start=1):
        gradient = (first if step == 1 else later).astype(dtype)
        optimizer.apply_gradients([(gradient, w)])
        np.testing.assert_allclose(w, keras, rtol=5e-4, atol=5e-4)  # the original's tolerance
        checked.check([gradient], [golden], step=step)


GOLDEN = [
    [0.9990003] * 10,
    [0.99819326, 0.99822366, 0.9982343, 0.9982397, 0.9982429, 0.9982451, 0.99824667, 0.99824786, 0.99824876, 0.99824953],
    [0.99730045, 0.9973475, 0.99736387, 0.9973722, 0.9973772, 0.9973806, 0.997383, 0.99738485, 0.9973863, 0.9973874],
    [0.9963679, 0.9964259, 0.9964462, 0.9964565, 0.9964627, 0.9964669, 0.99646986, 0.9964721, 0.9964739, 0.9964753],
    [0.9954125, 0.99547863, 0.9955017, 0.99551344, 0.9955205, 0.99552524, 0.99552864, 0.99553126, 0.9955333, 0.99553484],
]  # fmt: skip


def test_ema_overwrite_frequency():
    """The values of Keras 3 for steps of 0.1."""
    w = np.ones(3)
    optimizer = fastadam.Adam(0.1, epsilon=1e-300, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    for value, average in [(0.9, 0.9), (0.85, 0.85), (0.75, 0.8), (0.725, 0.725)]:
        optimizer.apply_gradients([(np.ones(3), w)])
        np.testing.assert_allclose(w, value, rtol=1e-12)
        np.testing.assert_allclose(optimizer.get_slot(w, "average"), average, rtol=1e-12)
    optimizer.apply_gradients([(np.ones(3), w)])
    optimizer.finalize_variable_values([w])
    np.testing.assert_allclose(w, (0.725 + 0.625) / 2, rtol=1e-12)
