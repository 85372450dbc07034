"""Options that store the state in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastadam._core.common.checks import check_bool, check_choice, check_integer, shown
from fastadam._core.common.frameworks import require
from fastadam._core.common.patterns import check_pattern, found

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastadam._core.common.types import Config

__all__ = ["FLOAT32_BELOW", "Float32For", "SmallStates", "check_changes"]

FLOAT32_BELOW = 4096  # elements; smaller variables keep float32 moments by default
_MOMENTS = ("float32", "bfloat16", "8bit")

Float32For: TypeAlias = "int | Sequence[str] | Callable[[str, tuple[int, ...]], bool] | None"


@dataclass(frozen=True)
class SmallStates:
    """The checked options; the defaults are TensorFlow's formats. Every field is an argument of Adam."""

    moments: str | None = None
    master: str | None = None
    stochastic_rounding: bool = False
    float32_for: Float32For = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every option, and make it what a JSON configuration can hold."""
        check_choice("moments", self.moments, _MOMENTS)
        if self.moments == "bfloat16":
            require("ml_dtypes", "moments='bfloat16'")
        if isinstance(self.master, str) and self.master == "float32":
            raise ValueError(
                "master: 'float32', expected 'split' or None; for float32 masters pass float32 variables, and the "
                "half-precision weights of the model as copies= of apply_gradients"
            )
        check_choice("master", self.master, ("split",))
        rounding = check_bool("stochastic_rounding", self.stochastic_rounding)
        if rounding and self.master:
            raise ValueError("stochastic_rounding: True with master='split', whose masters are exact, expected False")
        seed = check_integer("seed", self.seed)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: {shown(seed)}, expected 0 <= seed < 2**64")
        checked = {"stochastic_rounding": rounding, "seed": seed, "float32_for": _check_float32_for(self.float32_for)}
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.float32_for is not None and not self.has_small_moments:
            raise ValueError(
                f"float32_for: {shown(self.float32_for, 60)} with moments={self.moments!r}, expected None: it names "
                "the exceptions from moments='bfloat16' or '8bit'"
            )

    @property
    def has_small_moments(self) -> bool:
        """Whether moments are stored in fewer bits than float32."""
        return self.moments in ("bfloat16", "8bit")

    @property
    def asked(self) -> str | None:
        """The first option that makes something smaller, as a user writes it; None if none does."""
        if self.has_small_moments:
            return f"moments={self.moments!r}"
        if self.master:
            return f"master={self.master!r}"
        return "stochastic_rounding=True" if self.stochastic_rounding else None

    @property
    def rounding(self) -> Config:
        """What a plan rounds at random."""
        return {
            "stochastic_moments": self.moments == "bfloat16",
            "stochastic_variables": self.stochastic_rounding,
        }

    def keeps_float32(self, name: str, shape: tuple[int, ...], size: int) -> bool:
        """Whether ``float32_for`` exempts a variable from small moments; ``name``: "" if it has none."""
        rule = self.float32_for
        if rule is None or isinstance(rule, int):
            return size < (FLOAT32_BELOW if rule is None else rule)
        if callable(rule):
            return check_bool("float32_for", rule(name, shape))
        return bool(name) and any(found(pattern, name) for pattern in rule)

    def config(self) -> Config:
        """The options that are not at their default."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(SmallStates, name)}


def check_changes(changes: object) -> Config:
    """Some of the options by name; None for none."""
    if changes is None:
        return {}
    if not isinstance(changes, Mapping):
        raise TypeError(f"changes: {type(changes).__name__}, expected a dict such as {{'moments': '8bit'}}")
    names = [option.name for option in fields(SmallStates)]
    if unknown := [name for name in changes if name not in names]:
        raise ValueError(f"changes: {shown(unknown[0], 60)}, expected some of {names}")
    return dict(changes)


def _check_float32_for(value: object) -> object:
    """None, a size, a callable, or a list of patterns."""
    expected = "a size, a list of patterns of names, or a function of name and shape"
    if value is None or (callable(value) and not isinstance(value, type)):
        return value
    if isinstance(value, (list, tuple)):
        for i, pattern in enumerate(value):
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"float32_for[{i}]: {error}") from None
        return list(value)
    if isinstance(value, (str, float, np.ndarray, type)):
        raise TypeError(f"float32_for: {shown(value, 60)}, expected {expected}")
    size = check_integer("float32_for", value, expected)
    if size < 0:
        raise ValueError(f"float32_for: {size}, expected a size of at least 0")
    return size
