"""TensorFlow's keras/optimizer_v2/optimizer_v2_test.py: what OptimizerTest asks of options and of the configuration.

The other cases, and what stands for SGD, are in test_tf_optimizer_v2.py.
"""

from __future__ import annotations

import json
import re

import fastadam
import numpy as np
import pytest
from fastadam.schedules import CosineDecay, InverseTimeDecay, PiecewiseConstantDecay
from helpers import first_step_gradients

F32 = np.float32


def test_config():
    """Round trips, before and after use; TensorFlow's hold float32 scalars afterwards, which are not JSON."""
    optimizer = fastadam.Adam(0.1, 0.8, 0.95, 1e-5, True, "mine", decay=0.5, clipvalue=2)
    expected = {"name": "mine", "clipvalue": 2.0, "learning_rate": 0.1, "decay": 0.5, "beta_1": 0.8, "beta_2": 0.95,
                "epsilon": 1e-5, "amsgrad": True}  # fmt: skip
    assert optimizer.get_config() == expected
    optimizer.apply_gradients([(np.ones(3, F32), np.ones(3, F32))])
    config = json.loads(json.dumps(optimizer.get_config()))
    assert config == expected
    assert list(config) == list(expected)
    assert fastadam.Adam.from_config(config).get_config() == expected
    assert fastadam.Adam().get_config() == {"name": "Adam", "learning_rate": 0.001, "decay": 0.0, "beta_1": 0.9,
                                            "beta_2": 0.999, "epsilon": 1e-7, "amsgrad": False}  # fmt: skip


@pytest.mark.parametrize(
    "schedule", [InverseTimeDecay(0.5, 1.0, 0.1), PiecewiseConstantDecay([5], [1.0, 0.5]), CosineDecay(0.1, 10)],
    ids=lambda schedule: type(schedule).__name__,
)  # fmt: skip
def test_config_with_learning_rate_decay(schedule):
    optimizer = fastadam.Adam(schedule)
    variable = np.array([[1.0], [2.0]])
    for _ in ("before use", "after"):
        config = json.loads(json.dumps(optimizer.get_config()))
        assert config["learning_rate"] == {"class_name": type(schedule).__name__, "config": schedule.get_config()}
        again = fastadam.Adam.from_config(config)
        assert config == optimizer.get_config()  # not modified, as in TF
        assert again.lr == again.learning_rate == optimizer.lr == schedule
        assert again.lr(10) == schedule(10)
        optimizer.apply_gradients([(np.full((2, 1), 3.0), variable)])


def test_grad_clip_value():
    (m,) = first_step_gradients([np.array([3.0, -4.0, 0.5])], clipvalue=1.0)
    assert m.tolist() == [1.0, -1.0, 0.5]


def test_grad_clip_norm():
    """The norm is that of each gradient alone."""
    a, b = first_step_gradients([np.array([3.0, 4.0]), np.array([0.3])], clipnorm=1.0)
    np.testing.assert_allclose(a, [0.6, 0.8], rtol=1e-15)
    assert b.tolist() == [0.3]


def test_grad_global_clip_norm():
    a, b = first_step_gradients([np.array([3.0]), np.array([4.0])], global_clipnorm=2.0)
    np.testing.assert_allclose([a[0], b[0]], [1.2, 1.6], rtol=1e-15)


def test_invalid_clip_norm():
    with pytest.raises(ValueError, match=re.escape("Expected clipnorm >= 0, received: -1.0")):
        fastadam.Adam(clipnorm=-1.0)


def test_config_with_cliping():
    optimizer = fastadam.Adam(clipnorm=10.0, clipvalue=0.5)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert list(config)[:3] == ["name", "clipnorm", "clipvalue"]
    assert "global_clipnorm" not in config
    again = fastadam.Adam.from_config(config)
    assert (again.clipnorm, again.clipvalue, again.global_clipnorm) == (10.0, 0.5, None)
    assert again.get_config() == config


def test_invalid_kwargs():
    with pytest.raises(TypeError, match="Unexpected keyword argument passed to optimizer: invalidkwargs"):
        fastadam.Adam(invalidkwargs=1.0)


@pytest.mark.parametrize("argument", ["learning_rate", "lr"])
def test_getting_hyper_parameters(argument):
    """testGettingHyperParametersWithLrInConstructor too. A number is read as a float, not as a variable to assign to."""
    optimizer = fastadam.Adam(**{argument: 3.0})
    optimizer.apply_gradients([(np.full(2, 3.0), np.ones(2))])
    assert optimizer.lr == optimizer.learning_rate == 3.0
    optimizer.lr = 2.0
    assert optimizer.lr == optimizer.learning_rate == 2.0
    optimizer.learning_rate = np.float32(0.5)
    assert optimizer.lr == 0.5
    assert type(optimizer.lr) is float
    with pytest.raises(AttributeError, match="'Adam' object has no attribute 'not_an_attr'"):
        optimizer.not_an_attr += 3


def test_dir():
    assert {"learning_rate", "lr", "beta_1", "beta_2", "decay", "epsilon", "amsgrad"} <= set(dir(fastadam.Adam()))
