"""Options that Keras 3 added to the optimizer: weight decay, averages, a loss scale, accumulation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from fastadam._core.common.checks import (
    check_bool,
    check_count,
    check_integer,
    check_non_negative,
    check_number,
)

if TYPE_CHECKING:
    from fastadam._core.common.types import Config

__all__ = ["ACCUMULATOR", "Keras3Options"]

ACCUMULATOR = "gradient_accumulator"  # the slot of gradient_accumulation_steps


@dataclass(frozen=True)
class Keras3Options:
    """The checked options; the defaults switch everything off. Every field is an argument of Adam and in its config."""

    weight_decay: float | None = None
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale_factor: float | None = None
    gradient_accumulation_steps: int | None = None

    def __post_init__(self) -> None:
        """Check every option and make it a plain bool, int or float, as a JSON configuration needs."""
        plain: Config = {"use_ema": check_bool("use_ema", self.use_ema)}
        if self.weight_decay is not None:
            plain["weight_decay"] = check_non_negative("weight_decay", self.weight_decay)
        plain["ema_momentum"] = check_number("ema_momentum", self.ema_momentum)
        if not 0 <= plain["ema_momentum"] <= 1:
            raise ValueError(f"ema_momentum: {self.ema_momentum}, expected 0 <= ema_momentum <= 1")
        if self.ema_overwrite_frequency is not None:
            plain["ema_overwrite_frequency"] = check_count("ema_overwrite_frequency", self.ema_overwrite_frequency)
            if not self.use_ema:
                raise ValueError("ema_overwrite_frequency: given without use_ema=True, expected None")
        if self.loss_scale_factor is not None:
            plain["loss_scale_factor"] = check_number("loss_scale_factor", self.loss_scale_factor)
            if plain["loss_scale_factor"] <= 0:
                raise ValueError(f"loss_scale_factor: {self.loss_scale_factor}, expected loss_scale_factor > 0")
        if self.gradient_accumulation_steps is not None:
            plain["gradient_accumulation_steps"] = _accumulation_steps(self.gradient_accumulation_steps)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def step_numbers(self, step: int) -> Config:
        """Fields of StepHyper for step t, from 1. The first average is the variable itself: a momentum of 0."""
        frequency = self.ema_overwrite_frequency
        return {
            "weight_decay": self.weight_decay or 0.0,
            "ema_momentum": self.ema_momentum if step > 1 else 0.0,
            "ema_overwrite": frequency is not None and step % frequency == 0,
        }

    def config(self) -> Config:
        """The options that are not at their default."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(Keras3Options, name)}


def _accumulation_steps(value: int) -> int | None:
    """As in Keras, 0 switches it off and 1 is invalid."""
    name, expected = "gradient_accumulation_steps", "an integer of at least 2, or None"
    steps = check_integer(name, value, expected)
    if steps == 0:
        return None
    if not 2 <= steps < 2**63 - 1:
        raise ValueError(f"{name}: {steps}, expected {expected}")
    return steps
