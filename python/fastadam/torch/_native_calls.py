"""The native calls of a step: all of them are made, or none, whatever a signal handler raises in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadam._core.common.types import AnyGradient
from fastadam._core.native.plan import Factors, StepHyper
from fastadam.torch._checks import States
from fastadam.torch._deferred import Tables
from fastadam.torch._parameter_set import ParameterSet
from fastadam.torch._partition import Partitions

__all__ = ["Call", "NativeCalls"]


class Call(NamedTuple):
    """A native step that is ready to be made."""

    group: int  # its place
    chosen: ParameterSet
    gradients: list[AnyGradient]
    hyper: StepHyper
    factors: list[float]
    steps: list[int] | None  # one for each parameter if they differ
    found_inf: Tensor | None  # on the GPU, which skips the step unless it is 0
    clip_factors: Factors | None = None  # of norms that were joined


class Begun(NamedTuple):
    """A call of a step that is being made."""

    call: Call
    counter: int  # before the step

    @property
    def is_made(self) -> bool:
        """Whether the native step was made."""
        return int(self.call.chosen.counter) > self.counter


class Pending(NamedTuple):
    """A native step that may have been made, but was not noted yet."""

    call: Call
    counter: int  # before the step
    after: int | list[int] | Tensor  # the step count after it


class NativeCalls:
    """Makes the native calls of an optimizer, and notes in its state those that were made.

    Args:
        partitions: The sets of the optimizer.
        tables: Its deferred tables.
    """

    def __init__(self, partitions: Partitions, tables: Tables) -> None:
        self._partitions, self._tables = partitions, tables
        self._captured: Sequence[ParameterSet] = ()  # CUDA graphs write to their memory
        self._pending: Pending | None = None
        self._begun: Sequence[Begun] = ()  # of a step that is being made

    @property
    def are_captured(self) -> bool:
        """Whether a CUDA graph holds some of them, which may be replayed at any time."""
        return bool(self._captured)

    def make_all(self, calls: list[Call], state: States) -> bool:
        """Make the calls of a step: all or none, even if a signal handler raises in between.

        Returns False, with nothing changed, if the gradients of the only call had to be finite and are not.
        """
        begun = [Begun(call, int(call.chosen.counter)) for call in calls]
        if any(call.chosen.context is not None for call in calls):
            for each in begun:
                self._make(each.call, state)
            return True
        try:
            self._begun = begun
            return self._work_off(state)
        except BaseException:
            if not any(each.is_made for each in begun):
                self._begun = ()
                raise
            self.finish(state)
            raise

    def _work_off(self, state: States) -> bool:
        """Make the calls of the step that has begun, as far as they have not been made; see :meth:`_make`."""
        was_made = True
        for each in self._begun:
            self._note(state)
            if not each.is_made:
                was_made = self._make(each.call, state)
        self._note(state)
        self._begun = ()
        return was_made

    def _make(self, call: Call, state: States) -> bool:
        """Returns False, with nothing changed, if the gradients had to be finite and are not."""
        chosen = call.chosen
        if chosen.is_capturing:
            chosen.step(call.gradients, call.hyper, call.factors)
            chosen.finish_in_graph(call.found_inf)
            self._captured = (*self._captured, chosen)
            return True
        after = chosen.count_after(call.found_inf)
        self._pending = Pending(
            call, int(chosen.counter), after if after is not None else call.steps or call.hyper.step
        )
        try:
            return chosen.step(call.gradients, call.hyper, call.factors, call.steps, call.clip_factors)
        finally:
            self._note(state)

    def finish(self, state: States) -> None:
        """Make the rest of a step that signals have cut off; call it again if one cut this off."""
        if self._begun:
            try:
                with torch.no_grad():
                    self._work_off(state)
            except Exception:  # not from a signal handler: trying again would raise it again
                self._begun = ()
                raise
        self._note(state)

    def _note(self, state: States) -> None:
        """Note the native step that was made, even if a signal came after it; call it again if one cut this off."""
        if self._pending is None:
            return
        call, counter, after = self._pending
        if int(call.chosen.counter) > counter:
            self.note_made(call, state, after)
        else:
            call.chosen.counts.forget()
        self._pending = None

    def note_made(self, call: Call, state: States, after: int | list[int] | Tensor | None = None) -> None:
        """Note that a call was made; ``after``: the step count then, if it is not that of the call."""
        chosen = call.chosen
        chosen.finish(after if after is not None else call.steps or call.hyper.step)
        if chosen.is_new:
            for param, named in zip(chosen.params, chosen.states, strict=True):
                state[param] = named
            self._partitions.known = None
            self._tables.keep(chosen.tables)
            chosen.is_new = False
