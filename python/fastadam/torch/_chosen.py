"""Parameters that were chosen to step together, and a step of theirs that is ready to be made."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastadam._core.native.gpu import late_error
from fastadam._core.native.plan import StepHyper
from fastadam.torch._sets import ParameterSet
from fastadam.torch._tables import Table

__all__ = ["ON_HOST", "Call", "Chosen", "Key", "OnGpu"]


class Key(NamedTuple):
    """What a set is made of beside tensors."""

    group: int  # its place
    mask: bytes  # kinds of its parameters
    amsgrad: bool
    decays: bool


class OnGpu(NamedTuple):
    """What the GPU of a set is to read for itself in a step."""

    grad_scale: Tensor | None
    found_inf: Tensor | None  # it skips the step unless this is 0
    counts: bool  # the number of the step, too


ON_HOST = OnGpu(None, None, counts=False)


class Chosen:
    """A set, and what tells that it still is the one of its key."""

    def __init__(self, params: list[Tensor], together: ParameterSet, tables: list[Table], epoch: int) -> None:
        self.params = params  # of the whole group
        self.together = together
        self.tables = tables
        self.epoch = epoch  # of `optimizer.state`, when the states were last compared
        self.is_new = True  # no step was made yet
        self.parts: list[bytes] = []  # masks of its parameters that step apart: their counts on a GPU have differed
        self.is_scaled = False  # of some step the GPU alone knows whether it was skipped
        # Of native steps, which goes up where no signal can come between; a GPU says later which one failed.
        self.counter = np.zeros((), np.int64)

    def raise_late(self) -> None:
        """Raise what a GPU found wrong with a step after it had returned."""
        context, counts = self.together.context, self.together.counts
        failure = None if context is None or self.together.is_capturing() else context.take_failure()
        if failure is None:
            return
        calls, message = failure
        if self.is_scaled or context.is_captured:  # the host does not know how many steps were made since
            counts.set(context.step())
        else:
            counts.take_back(int(self.counter) - calls)
            self.counter[...] = calls
        raise late_error(message, "that step")


class Call(NamedTuple):
    """A native step that is ready to be made."""

    chosen: Chosen
    gradients: list[Any]
    hyper: StepHyper
    factors: list[float]
    found_inf: Tensor | None  # on the GPU, which skips the step unless it is 0
