"""What the constructor was given beside parameters and options of groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastadam._core.common.types import SparseUpdate
from fastadam._core.native.slices import DEFERRED
from fastadam.torch._checks import Group
from fastadam.torch._clipping import Clipping
from fastadam.torch._deferred import Reader
from fastadam.torch._state import StateFormat

__all__ = ["Options"]


@dataclass(eq=False)
class Options:
    """It is copied and pickled with the optimizer, and not part of state dicts."""

    sparse_update: SparseUpdate
    moments_dtype: torch.dtype | None
    readers: list[Reader]  # of attached modules
    clipping: Clipping = field(default_factory=Clipping)
    master_weights: bool = False
    telemetry: bool = False

    def __post_init__(self) -> None:
        if self.moments_dtype not in (None, torch.float32):
            raise ValueError(f"moments_dtype: {self.moments_dtype}, expected None or torch.float32")
        for name in ("master_weights", "telemetry"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: {type(value).__name__}, expected a bool")
        if self.master_weights and self.sparse_update in DEFERRED:
            raise ValueError(
                f"master_weights: True with sparse_update={self.sparse_update!r}, whose rows wait in memory, expected "
                "sparse_update='dense' or 'lazy'"
            )

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update({"clipping": Clipping(), **state})  # older versions had none

    @property
    def state_format(self) -> StateFormat:
        """What the states of parameters consist of."""
        return StateFormat(torch.float32 if self.master_weights else self.moments_dtype, self.master_weights)

    def need_eager(self, groups: list[Group]) -> bool:
        """Whether ``torch.compile`` cannot trace a step with these options."""
        has_own = self.clipping.is_on or self.master_weights or self.telemetry
        return has_own or any(group.get("compute_params") is not None for group in groups)
