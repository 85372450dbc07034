"""Configurations of optimizers as TensorFlow 2.x, Keras 2 and Keras 3 write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastadam._core.common.checks import shown
from fastadam._core.common.types import Config

__all__ = ["adam_arguments", "class_of", "loss_scale_arguments"]

# Keras 2 writes them; they say how a step is run and change no number.
_WITHOUT_EFFECT = ("jit_compile", "is_legacy_optimizer")


def adam_arguments(config: object, kinds: Iterable[str]) -> Config:
    """The constructor's arguments from what ``get_config`` or ``keras.optimizers.serialize`` gave.

    Args:
        config: The dict, which is not modified.
        kinds: Names of the classes whose dicts are read.

    Raises:
        TypeError: ``config`` is not a dict.
        ValueError: It is the dict of another class.
    """
    arguments = {key: value for key, value in _unwrapped(config, kinds).items() if key not in _WITHOUT_EFFECT}
    if "lr" in arguments:
        arguments["learning_rate"] = arguments.pop("lr")
    if not arguments.get("use_ema", False):
        arguments.pop("ema_overwrite_frequency", None)  # Keras keeps it, without effect
    return arguments


def loss_scale_arguments(config: object) -> Config:
    """Likewise, for LossScaleOptimizer."""
    arguments = _unwrapped(config, ["LossScaleOptimizer", "LossScaleOptimizerV3"])
    if arguments.pop("dynamic", True) is not True:
        raise ValueError("dynamic: not True, expected a dynamic scale; a fixed one is Adam(loss_scale_factor=...)")
    for name in ("name", "ema_momentum", *_WITHOUT_EFFECT):
        arguments.pop(name, None)
    for name in _OF_INNER:
        value = arguments.pop(name, None)
        if value is not None and value is not False:
            raise ValueError(f"{name}: {shown(value)} on the LossScaleOptimizer, expected it on its inner_optimizer")
    return arguments


# Keras 3 writes them for LossScaleOptimizer too, since every optimizer has them.
_OF_INNER = (
    *("weight_decay", "clipnorm", "global_clipnorm", "clipvalue"),
    *("use_ema", "ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps"),
)


def class_of(serialized: Mapping[str, Any]) -> str:
    """The class's name in the result of ``serialize``, without the package it is registered for: "Custom>Adam"."""
    return str(serialized["class_name"]).rpartition(">")[2]


def _unwrapped(config: object, kinds: Iterable[str]) -> Config:
    """A copy of the arguments in the result of ``get_config`` or ``serialize``."""
    if not isinstance(config, dict):
        raise TypeError(f"config: {type(config).__name__}, expected a dict as get_config gives it")
    if "class_name" not in config or not isinstance(config.get("config"), Mapping):
        return dict(config)
    names = sorted(set(kinds))
    if class_of(config) not in names:
        raise ValueError(f"config: of {config['class_name']}, expected {' or '.join(names)}")
    return dict(config["config"])
