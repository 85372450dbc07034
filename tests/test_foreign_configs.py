"""Configurations that TensorFlow and Keras wrote (tests/data/make_configs.py) are read, with every option in them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import fastadam
import numpy as np
import pytest

FILES = sorted((Path(__file__).parent / "data").glob("configs_*.json"))
CASES = [
    pytest.param(case, id=f"{path.stem.removeprefix('configs_')}: {name}")
    for path in FILES
    for name, case in json.loads(path.read_text())["cases"].items()
]
WITHOUT_EFFECT = ("jit_compile",)


def expected(case):
    """The same optimizer, made by the constructor."""
    options = {key: value for key, value in case["options"].items() if key not in WITHOUT_EFFECT}
    if case["class"] == "LossScaleOptimizer":
        return fastadam.LossScaleOptimizer(fastadam.Adam(0.5), **options)
    if isinstance(rate := options.get("learning_rate"), list):
        options["learning_rate"] = getattr(fastadam.schedules, rate[0])(**rate[1])
    if not options.get("use_ema"):
        options.pop("ema_overwrite_frequency", None)
    return getattr(fastadam, case["class"])(**options)


def plain(optimizer, name=True):
    """Its configuration, numbers rounded as variables of Keras round them; names of schedules are not compared."""
    config = optimizer.get_config()
    if "inner_optimizer" in config:
        return {**config, "inner_optimizer": plain(optimizer.inner_optimizer, name=False)}
    if isinstance(rate := config["learning_rate"], dict):
        rate["config"].pop("name", None)
    else:
        config["learning_rate"] = float(np.float32(rate))
    return config if name else {key: value for key, value in config.items() if key != "name"}


def test_there_is_a_file_of_every_version():
    assert [path.stem for path in FILES] == ["configs_keras3.15.1", "configs_tf2.15.1", "configs_tf2.20.0"]


@pytest.mark.parametrize("case", CASES)
def test_from_config_reads_what_keras_writes(case):
    cls = getattr(fastadam, case["class"])
    has_name = "name" in case["options"]  # by default a version of Keras counts: adam_12
    for config in (case["get_config"], *case["serialized"]):
        before = copy.deepcopy(config)
        optimizer = cls.from_config(config)
        assert config == before
        assert type(optimizer) is cls
        assert plain(optimizer, has_name) == plain(expected(case), has_name)
        if cls is fastadam.AdamW or case["get_config"].get("weight_decay"):
            assert fastadam.Adam.from_config(config).weight_decay == optimizer.weight_decay


SERIALIZED = {"class_name": "Adam", "config": {"learning_rate": 0.5}}


class Own(fastadam.Adam):
    pass


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Custom>Adam", "fastadam>AdamW", "Own", "my>Own"])
def test_a_registered_class_is_read_by_its_name(name):
    assert Own.from_config({**SERIALIZED, "class_name": name}).learning_rate == 0.5


@pytest.mark.parametrize(
    ("cls", "config", "error", "message"),
    [
        ("Adam", {**SERIALIZED, "class_name": "SGD"}, ValueError, "config: of SGD, expected Adam or AdamW"),
        ("Adam", {**SERIALIZED, "class_name": ["Adam"]}, ValueError, "config: of ['Adam'], expected Adam or AdamW"),
        ("Adam", {"momentum": 0.9}, TypeError, "Unexpected keyword argument passed to optimizer: momentum"),
        ("AdamW", SERIALIZED, None, ""),
        ("AdamW", {"weight_decay": None}, ValueError, "Argument `weight_decay` must be a float."),
        ("LossScaleOptimizer", None, TypeError, "config: NoneType, expected a dict as get_config gives it"),
        ("LossScaleOptimizer", SERIALIZED, ValueError, "config: of Adam, expected LossScaleOptimizer"),
        ("LossScaleOptimizer", {"inner_optimizer": SERIALIZED, "dynamic": False}, ValueError, "dynamic: not True, "),
        (
            "LossScaleOptimizer",
            {"inner_optimizer": SERIALIZED, "clipnorm": 1.0},
            ValueError,
            "clipnorm: 1.0 on the LossScaleOptimizer, expected it on its inner_optimizer",
        ),
        (
            "LossScaleOptimizer",
            {"inner_optimizer": {**SERIALIZED, "class_name": "SGD"}},
            ValueError,
            "inner_optimizer: 'SGD', expected one of ['Adam', 'AdamW']",
        ),
    ],
)
def test_a_config_that_means_something_else_is_refused(cls, config, error, message):
    if error is None:
        assert getattr(fastadam, cls).from_config(config).learning_rate == 0.5
        return
    with pytest.raises(error, match=re.escape(message)):
        getattr(fastadam, cls).from_config(config)
