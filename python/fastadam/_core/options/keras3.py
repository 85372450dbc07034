"""Options that Keras 3 added to the optimizer: weight decay, averages, a loss scale, accumulation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastadam._core.common.checks import (
    check_bool,
    check_count,
    check_integer,
    check_list,
    check_non_negative,
    check_number,
)
from fastadam._core.common.patterns import check_pattern, found
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import Key, buffers_of, key_of

if TYPE_CHECKING:
    from fastadam._core.common.types import Config, VariableLike

__all__ = ["ACCUMULATOR", "EXTRA_NAMES", "Extras", "excluded"]

ACCUMULATOR = "gradient_accumulator"  # the slot of gradient_accumulation_steps

EXTRA_NAMES = (
    "weight_decay",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "clip_after_dedupe",  # not of Keras
)


@dataclass(frozen=True)
class Extras:
    """The checked options; the defaults switch everything off."""

    weight_decay: float | None = None
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale_factor: float | None = None
    gradient_accumulation_steps: int | None = None
    clip_after_dedupe: bool = False
    excluded_keys: frozenset[Key] = field(default=frozenset())
    excluded_names: tuple[str, ...] = ()
    kept_alive: tuple[_cpu.Buffer, ...] = field(default=(), compare=False)  # so that no excluded address is reused

    def __post_init__(self) -> None:
        """Check every option and make it a plain bool, int or float, as a JSON configuration needs."""
        plain: Config = {"use_ema": check_bool("use_ema", self.use_ema)}
        plain["clip_after_dedupe"] = check_bool("clip_after_dedupe", self.clip_after_dedupe)
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

    def step_numbers(self, iterations: int) -> Config:
        """Fields of StepHyper. The first average is the variable itself."""
        frequency = self.ema_overwrite_frequency
        return {
            "weight_decay": self.weight_decay or 0.0,
            "ema_momentum": self.ema_momentum if iterations else 0.0,
            "ema_overwrite": frequency is not None and (iterations + 1) % frequency == 0,
            "clip_after_dedupe": self.clip_after_dedupe,
        }

    def decays(self, names: Sequence[str | None], buffers: Sequence[_cpu.Buffer]) -> list[bool]:
        """Whether weight decay applies, for each variable."""
        return [
            bool(self.weight_decay) and key_of(buffer) not in self.excluded_keys and not self._excludes(name or "")
            for name, buffer in zip(names, buffers, strict=True)
        ]

    def _excludes(self, name: str) -> bool:
        return any(found(pattern, name) for pattern in self.excluded_names) if name else False

    @property
    def excludes(self) -> bool:
        """Whether something is excluded from weight decay."""
        return bool(self.excluded_names or self.excluded_keys)

    def missing(self, names: Iterable[str], met: Set[Key] | None) -> list[str]:
        """Everything that was named, if none of it excludes a variable; else nothing.

        A list of usual patterns often matches only in part, which is fine. ``met``: keys of the variables met so far;
        None if others may still come.
        """
        patterns = [
            f"var_names[{i}] {pattern!r}"
            for i, pattern in enumerate(self.excluded_names)
            if not any(found(pattern, name) for name in names)
        ]
        listed = enumerate(map(key_of, self.kept_alive))
        absent = [f"var_list[{i}]" for i, key in listed if met is not None and key not in met]
        is_complete = len(patterns) + len(absent) == len(self.excluded_names) + len(self.kept_alive)
        return patterns + absent if is_complete else []

    def config(self) -> Config:
        """The options that are not at their default."""
        return {name: getattr(self, name) for name in EXTRA_NAMES if getattr(self, name) != getattr(Extras, name)}


def _accumulation_steps(value: int) -> int | None:
    """As in Keras, 0 switches it off and 1 is invalid."""
    name, expected = "gradient_accumulation_steps", "an integer of at least 2, or None"
    steps = check_integer(name, value, expected)
    if steps == 0:
        return None
    if not 2 <= steps < 2**63 - 1:
        raise ValueError(f"{name}: {steps}, expected {expected}")
    return steps


def excluded(var_list: Iterable[VariableLike] | None, var_names: Iterable[str] | None) -> Config:
    """Fields of Extras for ``exclude_from_weight_decay``."""
    variables = (
        [] if var_list is None else [var_list] if isinstance(var_list, str) else check_list("var_list", var_list)
    )
    if any(isinstance(variable, str) for variable in variables):
        raise TypeError(f"var_list: {variables!r:.60}, expected variables; patterns of names go to var_names=[...]")
    if isinstance(var_names, str):
        raise TypeError(f"var_names: {var_names!r}, expected a list of patterns")
    names = [] if var_names is None else check_list("var_names", var_names)
    for i, name in enumerate(names):
        try:
            check_pattern(name)
        except ValueError as error:
            raise ValueError(f"var_names[{i}]: {error}") from None
    buffers = buffers_of(variables, range(len(variables)))
    keys = frozenset(map(key_of, buffers))
    return {"excluded_keys": keys, "excluded_names": tuple(names), "kept_alive": tuple(buffers)}
