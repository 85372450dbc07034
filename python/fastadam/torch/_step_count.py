"""Step counts: torch keeps a tensor ``step`` for each parameter, which may be on its GPU."""

from __future__ import annotations

import math
from operator import is_

import torch
from torch import Tensor

from fastadam._core.common.checks import shown
from fastadam.torch._checks import ParamState

__all__ = ["StepCounts", "is_on_gpu", "number_of", "whole_count", "zero_steps"]


class StepCounts:
    """The ``step`` tensors of some parameters. If they are neighbours in one tensor they are read and written at once.

    Reading a count on a GPU waits for the GPU, so the last value is cached until someone else writes to a count.
    Writes through ``.data`` and by CUDA graphs are not noticed.
    """

    def __init__(self, steps: list[Tensor]) -> None:
        self.steps = tuple(steps)
        self._whole = _whole_of(steps)
        self.addresses = tuple([step.data_ptr() for step in steps])
        self._caches = any(map(is_on_gpu, steps))
        self._versions: list[int] | None = None  # of the tensors when the count was cached; None: nothing is cached
        self._count: float | None = None  # the cached count; None: only the GPU knows it

    def are_in(self, states: list[ParamState]) -> bool:
        """Whether these are still the tensors in the parameters' states, with the same memory."""
        if not all(map(is_, [state.get("step") for state in states], self.steps)):
            return False
        return tuple([step.data_ptr() for step in self.steps]) == self.addresses

    @property
    def device(self) -> torch.device | None:
        """The one on which all are; None if they are on several."""
        first = self.steps[0].device
        return first if all(step.device == first for step in self.steps) else None

    @property
    def are_plain(self) -> bool:
        """Whether native code can read and write them: floating point numbers in CPU memory."""
        kinds = {(step.device.type, step.dtype, step.dim()) for step in self.steps}
        return kinds <= {("cpu", torch.float32, 0), ("cpu", torch.float64, 0)}

    @property
    def written(self) -> tuple[Tensor, ...]:
        """What :meth:`set` writes."""
        return self.steps if self._whole is None else (self._whole,)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def read(self) -> list[float]:
        """One count for each parameter; waits for a GPU if they are on one and not cached."""
        if not self._caches:
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
        """Whether they are as :meth:`follow` wrote them: all the same, and only the GPU knows the value."""
        return self._count is None and self._are_untouched()

    def forget(self) -> None:
        """Someone may have written to them unnoticed."""
        self._versions = None

    def after(self, found_inf: Tensor) -> Tensor:
        """The count, on its GPU, after a step that is skipped unless ``found_inf`` is 0."""
        return self.steps[0] + (found_inf.reshape(()) == 0)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def take_back(self, count: int) -> None:
        """Subtract steps that turned out to have done nothing."""
        torch._foreach_sub_(self.steps, float(count))

    def set_each(self, counts: list[int]) -> None:
        """Write a count for each parameter, on the host; calling it twice is harmless."""
        self.forget()
        for step, count in zip(self.steps, counts, strict=True):
            step.fill_(count)

    def set(self, count: int) -> None:
        """Write the count after a step; calling it twice is harmless."""
        self.forget()
        if self._whole is not None:
            self._whole.fill_(count)
        elif len(self.steps) == 1:
            self.steps[0].fill_(count)
        else:
            first = self.steps[0]
            self._copy(torch.full((), float(count), dtype=first.dtype, device=first.device))
        self._cache(count)

    def follow(self, after: Tensor) -> None:
        """Write the count after a step that the GPU may have skipped; calling it twice is harmless."""
        self.forget()
        if self._whole is not None:
            self._whole.copy_(after)
        else:
            self._copy(after)
        self._cache(None)

    def raise_in_graph(self, found_inf: Tensor | None) -> None:
        """Count a step that a CUDA graph captures."""
        self.forget()
        if found_inf is None:
            torch._foreach_add_(self.steps, 1)
        else:
            by = (found_inf.reshape(()) == 0).to(self.steps[0].dtype)
            torch._foreach_add_(self.steps, [by] * len(self.steps))

    def _copy(self, count: Tensor) -> None:
        torch._foreach_copy_(self.steps, [count] * len(self.steps))

    # ---- the cache -------------------------------------------------------------------------------------------------

    def _cache(self, count: float | None) -> None:
        if not self._caches or self._versions_now() is None:
            return
        if self._whole is not None:  # a tensor of our own, which may not share its version with the step tensors
            torch.autograd.graph.increment_version(self.steps)
        self._count, self._versions = count, self._versions_now()

    def _are_untouched(self) -> bool:
        return self._versions is not None and self._versions == self._versions_now()

    def _versions_now(self) -> list[int] | None:
        """The versions of the tensors; None if nothing is cached, or if they are inference tensors, which have none."""
        if not self._caches:
            return None
        try:
            return [step._version for step in self.steps]
        except RuntimeError:
            return None


def is_on_gpu(number: object) -> bool:
    """Whether reading it on the host waits for a GPU."""
    return isinstance(number, Tensor) and number.is_cuda


def whole_count(count: float, label: str) -> int:
    """The number of the step after ``count`` steps."""
    if not math.isfinite(count) or count != int(count) or not 0 <= count < 2**62:
        raise ValueError(f"state of {label}: step {count}, expected a whole number from 0 to 2**62 - 1")
    return int(count) + 1


def number_of(count: object, label: str) -> float:
    """A step count in a state as a number; ``label``: what error messages call the state."""
    if isinstance(count, (str, bytes)):
        raise ValueError(f"{label}: step: {shown(count)}, expected a number")
    try:
        return float(count)  # type: ignore[arg-type]  # that is the question
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{label}: step: {shown(count)}, expected a number") from error


def zero_steps(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Step counts side by side, in torch's dtype; on a GPU each has its own version, which shows who wrote to it."""
    in_double = device.type == "cpu" and torch.get_default_dtype() == torch.float64
    dtype = torch.float64 if in_double else torch.float32
    if count == 0:
        return ()
    if count == 1:
        return (torch.zeros((), dtype=dtype, device=device),)
    whole = torch.zeros(count, dtype=dtype, device=device)
    return tuple(whole.unbind() if device.type == "cpu" else (step.data for step in whole.unbind()))


def _whole_of(steps: list[Tensor]) -> Tensor | None:
    """One tensor over all of these, if they are several, and neighbours in one."""
    if len(steps) == 1:
        return None
    first, size = steps[0], steps[0].element_size()
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for i, step in enumerate(steps):
        alike = step.dtype == first.dtype and step.untyped_storage().data_ptr() == storage and step.dim() == 0
        if not alike or step.data_ptr() != start + i * size:
            return None
    return torch.as_strided(first, (len(steps),), (1,), first.storage_offset())
