"""Step counts, of which torch has a tensor for each parameter, perhaps on its GPU."""

from __future__ import annotations

import math
from operator import is_
from typing import Any

import torch
from torch import Tensor

__all__ = ["StepCounts", "lies_on_gpu", "whole_count"]


class StepCounts:
    """The ``step`` tensors of some parameters. Those that are neighbours in one tensor are read and raised at once.

    Of counts on a GPU, for which a reader waits, is remembered what was last read or written here, until another
    writes to them. A write through ``.data``, and one by a CUDA graph, goes unnoticed.
    """

    def __init__(self, steps: list[Tensor]) -> None:
        self.steps = steps
        self.device = steps[0].device if all(step.device == steps[0].device for step in steps) else None
        self._whole = _whole_of(steps)
        self._remembers = any(map(lies_on_gpu, steps))
        self._versions: list[int] | None = None  # when they were last read or written; None: nothing is remembered
        self._count: float | None = None  # that all of them had then; None: the GPU alone knows

    def are(self, states: list[dict[str, Any]]) -> bool:
        """Whether these are still the tensors in the parameters' states."""
        return all(map(is_, [state.get("step") for state in states], self.steps))

    # ---- what they are ---------------------------------------------------------------------------------------------

    def read(self) -> list[float]:
        """One count for each parameter; waits for a GPU that holds them, unless they are remembered."""
        if not self._remembers:
            return self._wait()
        if self._count is not None and self._are_untouched():
            return [self._count] * len(self.steps)
        versions = self._versions_now()
        counts = self._wait()
        if counts.count(counts[0]) == len(counts):
            self._count, self._versions = counts[0], versions
        return counts

    def _wait(self) -> list[float]:
        if self._whole is None:
            return [float(step) for step in self.steps]
        counts: list[float] = self._whole.tolist()
        return counts

    def are_followed(self) -> bool:
        """Whether they are what :meth:`follow` last wrote: one count, which the GPU alone knows."""
        return self._count is None and self._are_untouched()

    def forget(self) -> None:
        """They may have been written to without notice."""
        self._versions = None

    def after(self, found_inf: Tensor) -> Tensor:
        """On their GPU: the one count that they have after a step that is skipped unless ``found_inf`` is 0."""
        return self.steps[0] + (found_inf.reshape(()) == 0)

    # ---- what they become ------------------------------------------------------------------------------------------

    def take_back(self, count: int) -> None:
        """Steps that turned out to have done nothing."""
        torch._foreach_sub_(self.steps, float(count))

    def set(self, count: int) -> None:
        """After a step; once more does no harm."""
        self.forget()
        if self._whole is not None:
            self._whole.fill_(count)
        else:
            first = self.steps[0]
            self._copy(torch.full((), float(count), dtype=first.dtype, device=first.device))
        self._remember(count)

    def follow(self, after: Tensor) -> None:
        """After a step of which the GPU knows whether it was made; once more does no harm."""
        self.forget()
        if self._whole is not None:
            self._whole.copy_(after)
        else:
            self._copy(after)
        self._remember(None)

    def raise_in_graph(self, found_inf: Tensor | None) -> None:
        """After a step that a CUDA graph captures."""
        self.forget()
        if found_inf is None:
            torch._foreach_add_(self.steps, 1)
        else:
            by = (found_inf.reshape(()) == 0).to(self.steps[0].dtype)
            torch._foreach_add_(self.steps, [by] * len(self.steps))

    def _copy(self, count: Tensor) -> None:
        torch._foreach_copy_(self.steps, [count] * len(self.steps))

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _remember(self, count: float | None) -> None:
        if not self._remembers or self._versions_now() is None:
            return
        if self._whole is not None:  # written through a tensor of our own, which need not share its version with all
            torch.autograd.graph.increment_version(self.steps)
        self._count, self._versions = count, self._versions_now()

    def _are_untouched(self) -> bool:
        return self._versions is not None and self._versions == self._versions_now()

    def _versions_now(self) -> list[int] | None:
        """How often each was written to; None where that is not worth a look or, of inference tensors, not known."""
        if not self._remembers:
            return None
        try:
            return [step._version for step in self.steps]
        except RuntimeError:
            return None


def lies_on_gpu(number: Any) -> bool:
    """Whether the host would wait for a GPU to read it."""
    return isinstance(number, Tensor) and number.is_cuda


def whole_count(count: float, label: str) -> int:
    """The number of the step after ``count`` steps."""
    if not math.isfinite(count) or count != int(count) or count < 0:
        raise ValueError(f"state of {label}: step {count}, expected a whole number")
    return int(count) + 1


def _whole_of(steps: list[Tensor]) -> Tensor | None:
    """One tensor over all of these, if they lie side by side in one."""
    first, size = steps[0], steps[0].element_size()
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for i, step in enumerate(steps):
        alike = step.dtype == first.dtype and step.untyped_storage().data_ptr() == storage and step.dim() == 0
        if not alike or step.data_ptr() != start + i * size:
            return None
    return torch.as_strided(first, (len(steps),), (1,), first.storage_offset())
