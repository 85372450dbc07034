"""What the last step did to each parameter: the measures of all sets, in the order of the groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fastadam._core.common.telemetry import Telemetry
from fastadam.torch._checks import Group, label_of

if TYPE_CHECKING:
    from fastadam.torch._parameter_set import ParameterSet

__all__ = ["joined", "require_dense"]


def require_dense(index: int, group: Group, gradients: list[Tensor | None]) -> None:
    """Raise ValueError if a gradient is sparse: the kernels of rows measure nothing."""
    for place, gradient in enumerate(gradients):
        if gradient is not None and gradient.is_sparse:
            raise ValueError(
                f"telemetry: True with a sparse gradient of {label_of(group, index, place)}, expected dense gradients"
            )


def joined(measured: list[tuple[int, ParameterSet]], groups: list[Group]) -> Telemetry:
    """The report of a step of these sets, each with the place of its group."""
    rows = {
        (index, place): row
        for index, each in measured
        for place, row in zip(each.positions, each.plan.telemetry(), strict=True)
    }
    order = sorted(rows)
    names = [_name_of(groups, *key) for key in order]
    return Telemetry(names, np.array([rows[key] for key in order], np.float64).reshape(-1, 6))


def _name_of(groups: list[Group], index: int, place: int) -> str:
    names = groups[index].get("param_names") if index < len(groups) else None
    return str(names[place]) if names and place < len(names) else f"{index}.{place}"
