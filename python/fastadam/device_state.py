"""What a GPU knows of an optimizer and the host does not: steps of CUDA graphs, errors found after a call returned."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam import cuda
from fastadam._backend import _cpu
from fastadam.slots import SlotStore

__all__ = ["DeviceState"]


class DeviceState(abc.ABC):
    """The native contexts of an optimizer, one for each GPU."""

    _contexts: dict[int, Any]
    _gatherers: dict[int, Any]
    _replays: dict[int, int]
    _capturing: bool
    _plan: Any
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

    def _read_captured(self) -> None:
        """Add the steps that CUDA graphs have made to the count; waits for the GPU, but only if one was captured."""
        if self._capturing:
            return
        for device, context in self._contexts.items():
            if context.is_captured:
                replays = context.replays()
                made, self._replays[device] = replays - self._replays.get(device, 0), replays
                self._iterations[...] += made * self._micro_steps

    def _set_count(self, calls: int) -> None:
        """Set the count, of which nothing before is taken back any more."""
        self._raise_late(wait=True)
        self._read_captured()
        self._iterations[...] = calls
        self._write_captured()
        for entry in self._slots.entries:
            if entry.staleness is not None:
                entry.staleness.confirm()

    def _write_captured(self) -> None:
        """Steps of CUDA graphs go on from the count."""
        for context in self._contexts.values():
            if context.is_captured:
                context.set_step(int(self._iterations) // self._micro_steps)

    def _raise_late(self, *, wait: bool = False) -> None:
        """Raise what a GPU found wrong with a step after the call had returned; it and all later ones did nothing."""
        if self._capturing:
            return
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
            self._read_captured()  # or what graphs made would be added later
            self._iterations[...] = calls
            self._write_captured()
            self._plan = None  # which may hold closed forms of the steps taken back
            raise ValueError(
                f"{message}; found on the GPU after the call had returned: that step, after iteration "
                f"{calls // self._micro_steps}, and those since then have changed nothing"
            )

    def _settle_devices(self) -> None:
        """Before a copy of the state: the history of a table on a GPU does not go with it."""
        if self._contexts:
            self._read_captured()
            self._settle()
            self._wait()

    def _wait(self) -> None:
        """Before state is copied to the host: all steps are done, and were good."""
        self._raise_late(wait=True)
