"""Ask a version of Keras for what it writes of Adam, AdamW and LossScaleOptimizer: `get_config` and `serialize`.

In an environment of its own, which has one of

    tensorflow-cpu==2.15.1 'numpy<2'           Keras 2.15, also its legacy Adam
    tensorflow-cpu==2.20.0 keras==3.11.3       the Keras 3 of its time
    keras==3.15.1 jax                          with KERAS_BACKEND=jax

run `python tests/data/make_configs.py`. It writes `configs_<name and version>.json` beside this file: for every case the
class, the arguments, and the dicts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

try:
    import tensorflow as tf
except ModuleNotFoundError:
    tf = None

SCHEDULES = {
    "ExponentialDecay": {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5, "staircase": True},
    "PiecewiseConstantDecay": {"boundaries": [2, 5], "values": [0.3, 0.2, 0.1]},
    "PolynomialDecay": {"initial_learning_rate": 0.1, "decay_steps": 10, "power": 2.0, "cycle": True},
    "InverseTimeDecay": {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5},
    "CosineDecay": {"initial_learning_rate": 0.01, "decay_steps": 10, "warmup_target": 0.1, "warmup_steps": 3},
    "CosineDecayRestarts": {"initial_learning_rate": 0.1, "first_decay_steps": 4, "t_mul": 1.5, "m_mul": 0.5},
}
OPTIONS = {
    "default": {},
    "numbers": {"learning_rate": 0.25, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-4, "name": "other"},
    "amsgrad": {"amsgrad": True},
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "weight_decay": {"weight_decay": 0.125},
    "use_ema": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 3},
    "ema of nothing": {"use_ema": False, "ema_momentum": 0.75, "ema_overwrite_frequency": 3},
    **{name: {"learning_rate": [name, arguments]} for name, arguments in SCHEDULES.items()},
}
OF_KERAS_2 = {"jit_compile": {"jit_compile": True}, "not compiled": {"jit_compile": False}}
OF_KERAS_3 = {
    "loss_scale_factor": {"loss_scale_factor": 8.0},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
}
NOT_LEGACY = ("weight_decay", "use_ema", "ema of nothing")
SCALES = {"default": {}, "numbers": {"initial_scale": 64.0, "dynamic_growth_steps": 7}}


def made(cls, options):
    rate = options.get("learning_rate")
    if isinstance(rate, list):
        options = {**options, "learning_rate": getattr(keras.optimizers.schedules, rate[0])(**rate[1])}
    return cls(**options)


def record(kind, options, optimizer, serializers):
    """Keras writes `options` and more; a number may have become one of float32."""
    found = {"class": kind, "options": options, "get_config": optimizer.get_config()}
    return {**found, "serialized": [serialize(optimizer) for serialize in serializers]}


def plain(value):
    """What JSON has no type for."""
    return value.item() if hasattr(value, "item") else value.numpy().item()


def main():
    is_old = keras.__version__.startswith("2.")
    serializers = [keras.optimizers.serialize]
    if is_old:
        serializers.append(lambda optimizer: keras.optimizers.serialize(optimizer, use_legacy_format=True))
    cases = {}
    for kind in ("Adam", "AdamW"):
        for name, options in {**OPTIONS, **(OF_KERAS_2 if is_old else OF_KERAS_3)}.items():
            optimizer = made(getattr(keras.optimizers, kind), options)
            cases[f"{kind} {name}"] = record(kind, options, optimizer, serializers)
    scaling = keras.mixed_precision.LossScaleOptimizer if is_old else keras.optimizers.LossScaleOptimizer
    for name, options in SCALES.items():
        cases[f"LossScaleOptimizer {name}"] = record(
            "LossScaleOptimizer", options, scaling(keras.optimizers.Adam(0.5), **options), serializers[:1]
        )
    if is_old:
        legacy = keras.optimizers.legacy.Adam
        for name, options in {**OPTIONS, "decay": {"decay": 0.01}}.items():
            if name not in NOT_LEGACY:
                cases[f"legacy {name}"] = record("Adam", options, made(legacy, options), serializers)
    versions = f"keras {keras.__version__}" + (f", tensorflow {tf.__version__}" if tf else "")
    stem = f"tf{tf.__version__}" if tf else f"keras{keras.__version__}"
    lines = [f"{json.dumps(name)}: {json.dumps(case, default=plain)}" for name, case in cases.items()]
    text = f'{{"versions": "{versions}", "cases": {{\n' + ",\n".join(lines) + "\n}}\n"
    Path(__file__).with_name(f"configs_{stem}.json").write_text(text)
    print(len(cases), "cases,", len(text), "bytes")


if __name__ == "__main__":
    main()
