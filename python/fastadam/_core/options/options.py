"""What a user sets on an optimizer: the part that knows when something has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastadam._core.common.checks import check_one_norm
from fastadam._core.native.arrays import on_gpu, to_host
from fastadam._core.native.backend import _cpu
from fastadam._core.native.slices import DEFERRED
from fastadam._core.options.exclusions import Exclusions
from fastadam._core.options.keras3 import ACCUMULATOR, Keras3Options
from fastadam._core.options.small_states import SmallStates
from fastadam._core.options.state_format import StateFormat

if TYPE_CHECKING:
    from fastadam._core.common.types import Config, SparseUpdate

__all__ = ["CLIP_NAMES", "Options", "refuse_lazy_overwrites"]

CLIP_NAMES = ("clipnorm", "clipvalue", "global_clipnorm")

_OF_PLANS = ("amsgrad", "exclusions", "keras3", "small", "sparse_update", "sum_repeated", "telemetry")


class Options:
    """Checked options. Every assignment raises ``version``; those that plans are made of raise ``plan_version`` too.

    The dicts are replaced, never changed in place.
    """

    version: int
    plan_version: int
    numbers: dict[str, object]  # learning_rate, beta_1, ... as they were set: floats, callables, schedules
    clips: dict[str, float | None]  # clipnorm, clipvalue, global_clipnorm
    amsgrad: bool
    keras3: Keras3Options
    exclusions: Exclusions  # from weight decay
    clip_after_dedupe: bool
    sparse_update: SparseUpdate
    max_staleness: int | None
    sum_repeated: bool  # the gradients of a variable that is given twice are summed
    telemetry: bool  # steps report what they do
    small: SmallStates

    def __init__(self) -> None:
        self._reset_versions()
        self.numbers = {}
        self.clips = dict.fromkeys(CLIP_NAMES)
        self.amsgrad = False
        self.keras3 = Keras3Options()
        self.exclusions = Exclusions()
        self.clip_after_dedupe = False
        self.sparse_update = "dense"
        self.max_staleness = None
        self.sum_repeated = False
        self.telemetry = False
        self.small = SmallStates()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        super().__setattr__("version", self.version + 1)
        if name in _OF_PLANS:
            super().__setattr__("plan_version", self.plan_version + 1)

    def _reset_versions(self) -> None:
        vars(self).update(version=0, plan_version=0)

    def set_number(self, name: str, value: object) -> None:
        """Set a hyperparameter that has been checked."""
        self.numbers = {**self.numbers, name: value}

    def set_clip(self, name: str, bound: float | None) -> None:
        """Set a bound; raises if both kinds of norm would be clipped."""
        clips = {**self.clips, name: bound}
        check_one_norm(clips["clipnorm"], clips["global_clipnorm"])
        self.clips = clips

    def set_keras3(self, name: str, value: Any) -> None:
        """Check and set one of Keras 3's options."""
        if name == "use_ema" and value:
            self.refuse_with_small_states(use_ema=True)
        keras3 = dataclasses.replace(self.keras3, **{name: value})
        refuse_lazy_overwrites(self.sparse_update, keras3)
        self.keras3 = keras3

    def refuse_with_small_states(self, *, amsgrad: bool = False, use_ema: bool = False) -> None:
        """Raise if these options are on and the formats of the state do not allow them."""
        if amsgrad and self.small.moments == "8bit":
            raise ValueError(
                "amsgrad: True with moments='8bit', expected False: the maximum of v would rise with its rounding noise"
            )
        if use_ema and self.small.master == "split":
            raise ValueError("use_ema: True with master='split', expected False")

    # ---- what follows from them ------------------------------------------------------------------------------------

    @property
    def accumulation(self) -> int | None:
        """Calls of ``apply_gradients`` in a step; None without accumulation."""
        return self.keras3.gradient_accumulation_steps

    @property
    def calls_per_step(self) -> int:
        """Calls of ``apply_gradients`` in a step."""
        return self.keras3.gradient_accumulation_steps or 1

    @property
    def is_deferred(self) -> bool:
        """Whether rows of tables may wait."""
        return self.sparse_update in DEFERRED

    def decays(self, names: Sequence[str | None], buffers: Sequence[_cpu.Buffer]) -> list[bool]:
        """For each variable whether it decays."""
        return [bool(self.keras3.weight_decay) and spared for spared in self.exclusions.spare(names, buffers)]

    @property
    def state_format(self) -> StateFormat:
        """What a step keeps for each variable."""
        needed = {"vhat": self.amsgrad, "average": self.keras3.use_ema, ACCUMULATOR: self.accumulation}
        names = ("m", "v", *(name for name, is_needed in needed.items() if is_needed))
        return StateFormat(names, self.small, moves_rows_alone=self.sparse_update != "dense")

    # ---- copies ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> Config:
        """A learning rate on a GPU becomes a number of the host."""
        if self.exclusions.keys:
            raise ValueError(
                "exclude_from_weight_decay: var_list names variables by their memory, which a copy of the optimizer "
                "does not share; expected var_names, to copy or pickle it"
            )
        numbers = {name: float(to_host(x)) if on_gpu(x) else x for name, x in self.numbers.items()}
        return {**vars(self), "numbers": numbers}

    def __setstate__(self, state: Config) -> None:
        # missing in pickles of fastadam 0.1
        vars(self).update({"small": SmallStates(), "sum_repeated": False, **state})
        self._reset_versions()


def refuse_lazy_overwrites(sparse_update: str, keras3: Keras3Options) -> None:
    """Raise if averages that move with their rows alone were to overwrite whole variables."""
    frequency = keras3.ema_overwrite_frequency
    if sparse_update == "lazy" and frequency is not None:
        raise ValueError(f"ema_overwrite_frequency: {frequency} with sparse_update='lazy', expected None")
