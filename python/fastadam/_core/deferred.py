"""Reading tables in a deferred mode: rows are brought up to date when they are asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastadam._core.backend import _cpu
from fastadam._core.checks import check_count
from fastadam._core.extras import Extras
from fastadam._core.gradients import bfloat16_to_float32
from fastadam._core.hyper import StepHyper
from fastadam._core.placement import native_of, on_gpu, zeros_beside
from fastadam._core.plans import StepPlan
from fastadam._core.slices import check_ids, check_sparse_update
from fastadam._core.slots import Entry
from fastadam._core.state import OptimizerState
from fastadam._core.variable import buffer_of, label_of, unwrap
from fastadam._core.warning import warn

if TYPE_CHECKING:
    from fastadam._core.types import Array, ArrayLike, SparseUpdate, VariableLike

__all__ = ["DeferredTables"]


class DeferredTables(OptimizerState):
    """``gather``, ``sync`` and ``dense_view`` for an optimizer whose tables may lag behind their steps."""

    _extras: Extras
    _sparse_update: SparseUpdate
    _max_staleness: int | None

    @property
    def sparse_update(self) -> SparseUpdate:
        """How IndexedSlices are applied; see the class. Set later, every row is brought up to date first."""
        return self._sparse_update

    @sparse_update.setter
    def sparse_update(self, value: SparseUpdate) -> None:
        check_sparse_update(value)
        extras = self._extras
        if value != "dense" and (extras.use_ema or extras.gradient_accumulation_steps):
            raise ValueError(f"sparse_update: {value!r} with use_ema or gradient_accumulation_steps, expected 'dense'")
        with self._lock:
            if self._now.stepping:
                raise RuntimeError("sparse_update: set by code that a step runs, expected between steps")
            self._settle()
            self._wait()
            for entry in self._slots.entries:
                entry.staleness = None
            self._plans.clear()
            self._sparse_update = value

    @property
    def max_staleness(self) -> int | None:
        """Steps that a row of a deferred table may wait; None for any number."""
        return self._max_staleness

    @max_staleness.setter
    def max_staleness(self, value: int | None) -> None:
        self._max_staleness = None if value is None else check_count("max_staleness", value)

    def gather(self, var: VariableLike, indices: ArrayLike, out: Array | None = None) -> Any:
        """The rows ``var[indices]`` as they are after all steps so far, a copy.

        In a deferred mode the rows of the variable's buffer lag behind until they are touched, gathered or synced; the
        rows gathered are written back. With the other modes it is plain indexing.

        Args:
            var: The variable.
            indices: Integers of any shape, repeated or not.
            out: Array of the result's shape and dtype to write to; a bfloat16 tensor of PyTorch gives float32.

        Raises:
            TypeError: Indices that are no integers.
            ValueError: An index that is not a row; ``out`` of another shape.

        >>> import numpy as np, fastadam
        >>> table = np.ones((1000, 2), np.float32)
        >>> opt = fastadam.Adam(0.1, sparse_update="deferred")
        >>> gradient = fastadam.IndexedSlices(np.full((1, 2), 0.5, np.float32), [7])
        >>> for _ in range(3):
        ...     step = opt.apply_gradients([(gradient, table)])
        >>> opt.gather(table, [7, 0]).round(3).tolist()
        [[0.699999988079071, 0.699999988079071], [1.0, 1.0]]
        """
        label = label_of(var, 0)
        buffer = buffer_of(var)
        if buffer.device >= 0:
            with self._lock:
                return self._gather_on_device(buffer, indices, out)
        ids = check_ids(indices, buffer.shape, label)
        with self._lock:
            values = _readable(var, buffer)
            shape = (*ids.shape, *buffer.shape[1:])
            if out is not None and not (isinstance(out, np.ndarray) and out.flags.writeable):
                raise TypeError(f"out: {type(out).__name__}, expected a writable array")
            if out is not None and (out.shape, out.dtype) != (shape, values.dtype):
                raise ValueError(f"out: {out.dtype} {out.shape}, expected {values.dtype} {shape}")
            if out is not None and np.may_share_memory(out, values):
                raise ValueError(f"out: shares memory with {label}, expected a separate array")
            self._catch_up_variable(buffer, ids)
            rows: npt.NDArray[Any] = np.take(values, ids, axis=0, out=out, mode="clip")  # checked above
            return bfloat16_to_float32(rows) if rows.dtype == np.uint16 else rows

    def _gather_on_device(self, buffer: _cpu.Buffer, indices: Any, out: Any) -> Any:
        """The same on a GPU, where ids may lie: those that are no rows are then found later."""
        native = native_of(buffer)
        if buffer.device not in self._gatherers:
            self._gatherers[buffer.device] = native.Gather(buffer.device)
        gatherer = self._gatherers[buffer.device]
        found = gatherer.take_failure()
        self._raise_late()
        if found:
            raise ValueError(f"ids: {found[1]} at place {found[0]} of an earlier gather is not a row, which gave zeros")
        if not on_gpu(indices):
            host = np.ascontiguousarray(check_ids(indices, buffer.shape, buffer.label))
            indices = zeros_beside(buffer, host.dtype.name, host.shape)
            native.assign(indices, host)
        shape = (*indices.shape, *buffer.shape[1:])
        if out is None:
            out = zeros_beside(buffer, buffer.dtype, shape)
        self._catch_up_variable(buffer, indices)
        gatherer.run(buffer, indices, out)
        return out

    def sync(self, var: VariableLike | None = None) -> None:
        """Bring every row of a variable, or of all, up to date; does nothing where none lags behind."""
        with self._lock:
            self._raise_late()
            if var is None:
                self._settle()
                return
            self._catch_up_variable(buffer_of(var))

    @contextlib.contextmanager
    def dense_view(self, var: VariableLike) -> Iterator[Any]:
        """``with opt.dense_view(table) as values``: the array itself, every row up to date, as long as no step is made.

        >>> import numpy as np, fastadam
        >>> table = np.ones((3, 1), np.float32)
        >>> opt = fastadam.Adam(0.1, sparse_update="deferred")
        >>> step = opt.apply_gradients([(fastadam.IndexedSlices([[0.5]], [1]), table)])
        >>> with opt.dense_view(table) as values:
        ...     values.round(3).tolist()
        [[1.0], [0.8999999761581421], [1.0]]
        """
        self.sync(var)
        yield unwrap(var)

    def _refresh(self, variable: Any, ids: Any) -> None:
        """What a loss of ``minimize`` reads is brought up to date first."""
        if variable is None:
            with self._lock:
                self._settle()
        elif any(entry.staleness for entry in self._slots.entries):
            with self._lock:
                self._catch_up_variable(buffer_of(variable), ids)

    def _settle(self) -> None:
        """Every row of every table; whatever reads or replaces the state comes after it."""
        for entry in self._slots.entries:
            self._catch_up(entry)

    def _settle_known(self) -> None:
        """Likewise, but for tables that a restored optimizer has not met."""
        with self._lock:
            for entry in self._slots.entries:
                if entry.buffer is not None:
                    self._catch_up(entry)

    def _catch_up_variable(self, buffer: _cpu.Buffer, ids: npt.NDArray[Any] | None = None) -> None:
        entry = self._slots.entry_of(buffer)
        if entry is None:
            self._slots.require_new_memory(buffer)  # another view of a table would be read as it lies
        if entry is not None:
            self._catch_up(entry, ids)
        elif any(waiting.staleness and waiting.staleness.waits for waiting in self._slots.waiting()):
            raise ValueError(
                f"{buffer.label}: not met since the state was restored, rows may lag behind; build all variables first"
            )

    def _catch_up(self, entry: Entry, ids: npt.NDArray[Any] | None = None) -> None:
        """Replay the steps that the rows missed: those that ``ids`` name, or all."""
        table = entry.staleness
        if table is None:
            return
        table.is_asked_for = True
        if not table.waits:
            return
        if entry.buffer is None and entry.origin is not None and entry.origin.is_current():
            self._slots.prepare([entry.origin], []).commit()  # of a deep copy: it goes on with the same variable
        if entry.buffer is None:
            raise ValueError(f"{entry.spec}: rows wait for steps since before the state was restored; build it first")
        beta_1, beta_2, epsilon, amsgrad = table.numbers
        named = self._slots.slots_of(entry)
        slots = {name: [named[name]] for name in (("m", "v", "vhat") if amsgrad else ("m", "v"))}
        flat = np.ascontiguousarray(ids.reshape(-1)) if isinstance(ids, np.ndarray) else ids
        if table.catching_up is None:
            context = self._context_of(entry.buffer)
            plan = native_of(entry.buffer).Plan([entry.buffer], slots, [False], [0], False, [table.native], context)
            table.catching_up = plan
        table.catching_up.catch_up(flat, StepHyper(1, 0.0, beta_1, beta_2, epsilon), self._iterations)

    def _sweep(self, plan: StepPlan) -> None:
        """After a step: keep gaps within ``max_staleness``."""
        for buffer, table in zip(plan.buffers, plan.tables, strict=True):
            if table is None:
                continue
            if self.max_staleness is not None and table.waits and (entry := self._slots.entry_of(buffer)):
                self._catch_up(entry, table.next_rows(self.max_staleness))
            table.is_asked_for = False

    def _warn_of_unread(self, plan: StepPlan, gradients: list[Any]) -> None:
        """Once: a gradient for rows that wait, none of which was asked for, is that of values that are out of date."""
        if "unread" in self._now.told:
            return
        for buffer, table, gradient in zip(plan.buffers, plan.tables, gradients, strict=True):
            if table is not None and not table.is_asked_for and table.is_behind(gradient):
                self._now.told.add("unread")
                warn(
                    f"{buffer.label}: a gradient for rows that wait for their steps, which were not read through the "
                    f"optimizer since the last one. With sparse_update={self.sparse_update!r} read them by "
                    "opt.gather(table, ids), or after opt.sync()"
                )
                return


def _readable(var: Any, buffer: _cpu.Buffer) -> npt.NDArray[Any]:
    """The memory as NumPy has it; bfloat16 of PyTorch as its bits."""
    array = unwrap(var)
    return array if isinstance(array, np.ndarray) else buffer.array()
