"""What a GPU knows of an optimizer and the host does not: errors found after a call returned."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam import cuda
from fastadam._core.backend import _cpu
from fastadam._core.placement import on_gpu
from fastadam._core.plans import Plans
from fastadam._core.slices import DEFERRED
from fastadam._core.slots import SlotStore

__all__ = ["DeviceState"]


class DeviceState(abc.ABC):
    """The native contexts of an optimizer, one for each GPU."""

    _contexts: dict[int, Any]
    _gatherers: dict[int, Any]
    _plans: Plans
    sparse_update: Any
    _iterations: npt.NDArray[np.int64]
    _slots: SlotStore

    @abc.abstractmethod
    def _settle(self) -> None:
        """Finish what was deferred: whatever reads or replaces the state comes after it."""

    @property
    def _micro_steps(self) -> int:
        """Calls of ``apply_gradients`` in a step."""
        return 1

    def _context_of(self, buffer: _cpu.Buffer) -> Any:
        """What the plans of this optimizer share on the device of a variable; None for the host."""
        if buffer.device < 0:
            return None
        if buffer.device not in self._contexts:
            self._contexts[buffer.device] = cuda.native().Context(buffer.device)
        return self._contexts[buffer.device]

    def _set_count(self, calls: int) -> None:
        """Set the count, of which nothing before is taken back any more."""
        self._raise_late(wait=True)
        self._iterations[...] = calls
        for entry in self._slots.entries:
            if entry.staleness is not None:
                entry.staleness.confirm()

    def _raise_late(self, *, wait: bool = False) -> None:
        """Raise what a GPU found wrong with a step after the call had returned; it and all later ones did nothing."""
        for context in self._contexts.values():
            if wait:
                context.wait()
            failure = context.take_failure()
            if failure is None:
                continue
            calls, message = failure
            for entry in self._slots.entries:
                if entry.staleness is not None:
                    entry.staleness.forget_from(calls)
            self._iterations[...] = calls
            self._plans.clear()  # which may hold closed forms of the steps taken back
            raise ValueError(
                f"{message}; found on the GPU after the call had returned: that step, after iteration "
                f"{calls // self._micro_steps}, and those since then have changed nothing"
            )

    def _settle_devices(self) -> None:
        """Before a copy of the state: the history of a table on a GPU does not go with it."""
        if self._contexts:
            self._settle()
            self._wait()

    def _wait(self) -> None:
        """Before state is copied to the host: all steps are done, and were good."""
        self._raise_late(wait=True)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def _rate_on_gpu(self, first: Any, rate: Any) -> Any:
        """Before a step of an optimizer that knows GPUs: the learning rate where it lies on one, else None."""
        lies_there = on_gpu(first)
        if lies_there and cuda.native().is_capturing(first):
            raise RuntimeError(
                "apply_gradients: a CUDA graph is being captured, expected no capture "
                "(fastadam.torch.Adam(capturable=True) can be captured)"
            )
        elsewhere = len(self._contexts) > 1 or lies_there != (self._plans.device >= 0)  # where steps would go on
        self._raise_late(wait=elsewhere)
        if not on_gpu(rate):
            return None
        if not lies_there:
            raise ValueError("learning_rate: on a GPU, expected a number for variables in CPU memory")
        if self.sparse_update in DEFERRED:
            raise ValueError(f"learning_rate: on the GPU with sparse_update={self.sparse_update!r}, expected a number")
        return rate
