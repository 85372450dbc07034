"""Steps of ``DeepSpeedCPUAdam`` that are made whole, and that can be undone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastadam._core.common.types import AnyGradient
from fastadam._core.native.backend import _cpu
from fastadam._core.native.plan import Factors, StepHyper
from fastadam._core.native.worker import Handle, Worker
from fastadam.torch._checks import ParamState
from fastadam.torch._parameter_set import ParameterSet

__all__ = ["NO_FACTORS", "UNCORRECTED", "Part", "Record", "without_signals"]

Result = TypeVar("Result")

UNCORRECTED = 2**62  # the number of a step whose bias corrections are 1
NO_FACTORS: Factors = np.empty((0, 2))


class Part(NamedTuple):
    """A part of a step, checked: parameters of one group whose states are stored alike."""

    chosen: ParameterSet
    gradients: list[AnyGradient]
    hyper: StepHyper
    counts: list[int]  # after the step
    kept: list[tuple[Hashable, ParamState]]  # the states of the optimizer and their keys

    def make(self) -> None:
        """Make the native step and count it."""
        steps = self.counts if len(set(self.counts)) > 1 and self.hyper.step != UNCORRECTED else None
        self.chosen.step(self.gradients, self.hyper, [], steps)
        self.note(self.counts)

    def note(self, counts: list[int]) -> None:
        """Note the count of each parameter, and that its tensors were written."""
        self.chosen.finish(counts)
        for (_, state), count in zip(self.kept, counts, strict=True):
            state["step"] = count

    @property
    def written(self) -> list[Tensor]:
        """The parameters and their moments."""
        counts = {id(tensor) for tensor in self.chosen.counts.written}
        return [tensor for tensor in self.chosen.written if id(tensor) not in counts]


class Record(NamedTuple):
    """What undoes a step of a subgroup."""

    number: int  # of the step
    hyper: StepHyper
    log: _cpu.StepLog | None
    before: list[Tensor]  # without a log
    gradient: Tensor | None  # without a log
    after: list[Tensor]  # some elements of what the step wrote

    @classmethod
    def of(cls, part: Part, log: _cpu.StepLog | None, before: list[Tensor], gradient: Tensor | None) -> Record:
        """The record of a step that was just made."""
        after = [_sample(tensor).clone() for tensor in part.written]
        return cls(part.counts[0], part.hyper, log, before, gradient, after)

    def undo(self, part: Part) -> None:
        """Undo the step, or raise RuntimeError and change nothing."""
        label = part.chosen.labels[0]
        if self._is_other_gradient(part):
            raise RuntimeError(
                f"gradient of {label}: changed since step_subgroup(), expected that of the step that is rolled back"
            )
        found = [_sample(tensor) for tensor in part.written]
        if len(found) != len(self.after) or not all(map(_have_same_bits, found, self.after)):
            raise RuntimeError(
                f"{label}: it or its state has changed since step_subgroup(), expected both as the step that is rolled "
                "back left them"
            )
        if self.log is None:
            for tensor, value in zip(part.written, self.before, strict=True):
                tensor.copy_(value)
        else:
            part.chosen.plan.undo(part.gradients, self.hyper, [], NO_FACTORS, self.log)
        part.note([self.number - 1])

    def _is_other_gradient(self, part: Part) -> bool:
        if self.log is not None:
            return len(part.chosen.plan.changed_since(part.gradients, self.hyper, [], self.log)) > 0
        found, expected = part.chosen.params[0].grad, self.gradient
        if found is None or expected is None or found.layout != expected.layout:
            return True
        if found.is_sparse:
            return not all(map(_have_same_bits, _parts_of(found), _parts_of(expected)))
        return not _have_same_bits(found, expected)


def _parts_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The indices and values of a sparse tensor."""
    return gradient._indices(), gradient._values()


def _sample(tensor: Tensor) -> Tensor:
    """Up to 256 elements from all over a tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-len(flat) // 256) or 1]


def _have_same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = (each.detach().resolve_conj().resolve_neg().reshape(-1).contiguous() for each in (a, b))
    return bool(torch.equal(first.view(torch.uint8), second.view(torch.uint8)))


def without_signals(work: Callable[[], Result]) -> Result:
    """Do this on a thread of its own, so that a signal handler that raises cannot cut it off."""
    worker = Worker.take()

    def guarded() -> Result:
        try:
            _cpu.set_thread_budget(0)
            with torch.no_grad():
                return work()
        finally:
            worker.give_back()

    return worker.complete(Handle(guarded))
