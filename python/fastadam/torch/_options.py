"""What the constructor was given beside parameters and options of groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastadam._core.common.types import SparseUpdate
from fastadam.torch._checks import Group
from fastadam.torch._clipping import Clipping
from fastadam.torch._formats import Float32Rule, StateFormat, asked_of, given_formats

__all__ = ["Options"]


@dataclass(eq=False)
class Options:
    """It is copied and pickled with the optimizer, and not part of state dicts."""

    sparse_update: SparseUpdate
    attached: list[Tensor]  # weights of attached modules
    clipping: Clipping = field(default_factory=Clipping)
    telemetry: bool = False
    float32_rule: Float32Rule = field(default_factory=lambda: Float32Rule(None))

    def __post_init__(self) -> None:
        if not isinstance(self.telemetry, bool):
            raise TypeError(f"telemetry: {type(self.telemetry).__name__}, expected a bool")

    def __setstate__(self, state: dict[str, object]) -> None:
        of_older: dict[str, object] = {"clipping": Clipping(), "float32_rule": Float32Rule(None)}
        vars(self).update({**of_older, **state})

    def state_format(self, group: Group) -> StateFormat:
        """What the states of the parameters of a group consist of."""
        return StateFormat(group, self.float32_rule, moves_rows_alone=self.sparse_update != "dense")

    def defaults_of_groups(self) -> Group:
        """The options of groups that older versions had here."""
        of_older = vars(self)
        moments = "float32" if of_older.get("moments_dtype") == torch.float32 else None
        return given_formats(moments, "float32" if of_older.get("master_weights") else None, False, 0)

    def given(self) -> dict[str, object]:
        """Those that differ from their defaults, by name."""
        clipping, rule = self.clipping, self.float32_rule
        options = {
            "sparse_update": (self.sparse_update, "dense"),
            "float32_for": (rule.shown, None),
            "clipvalue": (clipping.clipvalue, None),
            "clipnorm": (clipping.clipnorm, None),
            "global_clipnorm": (clipping.global_clipnorm, None),
            "skip_nonfinite": (clipping.skip_nonfinite, False),
            "telemetry": (self.telemetry, False),
        }
        return {name: value for name, (value, default) in options.items() if value != default}

    def need_eager(self, groups: list[Group]) -> bool:
        """Whether ``torch.compile`` cannot trace a step with these options."""
        return self.clipping.is_on or self.telemetry or any(map(_needs_eager, groups))


def _needs_eager(group: Group) -> bool:
    asked = asked_of(group)
    return asked.is_random or asked.master is not None or group.get("compute_params") is not None
