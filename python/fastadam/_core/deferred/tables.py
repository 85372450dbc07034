"""Deferred tables: their rows wait for steps, and are brought up to date when they are read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastadam._core.common.warning import warn
from fastadam._core.deferred.history import History
from fastadam._core.deferred.rates import Doubt, Numbers
from fastadam._core.native.arrays import expect_random_rows, native_of, on_gpu, zeros_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import buffer_of, key_of
from fastadam._core.native.gpu import late_error
from fastadam._core.native.gradients import bfloat16_to_float32
from fastadam._core.native.slices import check_ids, is_sparse
from fastadam._core.native.variable import label_of, unwrap
from fastadam._core.options.state_format import VariableFormat
from fastadam._core.state.entry import Entry, Spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastadam._core.common.types import AnyArray, AnyGradient, ArrayLike, VariableLike
    from fastadam._core.native.plan import StepHyper
    from fastadam._core.options.options import Options
    from fastadam._core.runtime import Runtime, StepPlan
    from fastadam._core.state.state import State

__all__ = ["Tables"]


class Tables:
    """The variables of an optimizer as its user should see them: every row up to date, no step refused afterwards.

    Whatever reads or replaces state calls :meth:`catch_up_all` or :meth:`settle` first, under the lock.
    """

    def __init__(self, options: Options, state: State, runtime: Runtime) -> None:
        self._options, self._state, self._runtime = options, state, runtime

    # ---- reading ---------------------------------------------------------------------------------------------------

    def gather(self, variable: VariableLike, indices: ArrayLike, out: AnyArray | None) -> AnyArray:
        """See ``Adam.gather``; call it under the lock."""
        label = label_of(variable, 0)
        buffer = buffer_of(variable)
        if buffer.device >= 0:
            return self._gather_on_gpu(buffer, indices, out)
        ids = check_ids(indices, buffer.shape, label, "indices")
        values = _readable(variable, buffer)
        if out is not None:
            _check_out(out, values, (*ids.shape, *buffer.shape[1:]), label)
        entry = self._state.slots.entry_of(buffer)
        if self._options.sparse_update != "dense" and (entry is None or entry.history is None):
            self._expect_random_rows(buffer, is_known=entry is not None)
        self.catch_up(buffer, ids)
        rows: npt.NDArray[np.uint16] = np.take(values, ids, axis=0, out=out, mode="clip")  # checked above
        return bfloat16_to_float32(rows) if rows.dtype == np.uint16 else rows

    def _expect_random_rows(self, buffer: _cpu.Buffer, *, is_known: bool) -> None:
        """As the first step of a table does; once for a variable of the optimizer."""
        key, told = key_of(buffer), self._runtime.read_at_random
        if key not in told:
            expect_random_rows(buffer.array(), small_pages=False)
        if is_known:
            told.add(key)

    def _gather_on_gpu(self, buffer: _cpu.Buffer, indices: ArrayLike, out: AnyArray | None) -> AnyArray:
        """Indices may be on the GPU, too: the next call raises if one of them was invalid."""
        native, gatherer = native_of(buffer), self._runtime.gatherer_of(buffer)
        failure = gatherer.take_failure()
        self.raise_late()
        if failure:
            raise ValueError(
                f"ids: an earlier gather read index {failure[1]} at position {failure[0]}, out of range; it gave zeros"
            )
        ids: AnyArray = indices
        if not on_gpu(ids):
            host = np.ascontiguousarray(check_ids(indices, buffer.shape, buffer.label, "indices"))
            ids = zeros_beside(buffer, host.dtype.name, host.shape)
            native.assign(ids, host)
        if out is None:
            out = zeros_beside(buffer, buffer.dtype, (*ids.shape, *buffer.shape[1:]))
        self.catch_up(buffer, ids)
        gatherer.run(buffer, ids, out, self._runtime.context_of(buffer))
        return out

    # ---- bringing rows up to date ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring every row up to date and wait for GPUs: all steps are made, and were good."""
        self.catch_up_all()
        self.raise_late(wait=True)

    def settle_gpus(self) -> None:
        """The same, if there are GPUs: the history of a table there cannot be copied."""
        if self._runtime.has_gpus:
            self.settle()

    def catch_up_all(self) -> None:
        """Every row of every table."""
        for entry in self._state.entries:
            self._catch_up_entry(entry)

    def catch_up(self, buffer: _cpu.Buffer, ids: AnyArray | None = None) -> None:
        """The rows ``ids`` of a variable, or all; nothing if it is not a deferred table."""
        slots = self._state.slots
        entry = slots.entry_of(buffer)
        if entry is not None and entry.buffer is None and entry.history is not None and entry.history.waits:
            slots.prepare([buffer], lambda *_: VariableFormat(())).commit()  # a deep copy goes on with the original's
            entry = slots.entry_of(buffer)
        if entry is not None:
            self._catch_up_entry(entry, ids)
            return
        slots.require_new_memory(buffer)  # another view of a table would show rows that wait
        for unclaimed in slots.unclaimed():
            if unclaimed.history and unclaimed.history.waits and unclaimed.spec.admits(Spec.of(buffer)):
                raise _not_seen_yet(unclaimed, buffer.label)

    def has_any(self) -> bool:
        """Whether some variable is a deferred table."""
        return any(entry.history for entry in self._state.entries)

    def _catch_up_entry(self, entry: Entry, ids: AnyArray | None = None) -> None:
        history = entry.history
        if history is None:
            return
        if history.waits:
            if entry.buffer is None and (variable := self._state.slots.variable_of(entry)) is not None:
                self._state.slots.prepare([variable], lambda *_: VariableFormat(())).commit()
                entry = self._state.entries[entry.place]
            if entry.buffer is None:
                raise _not_seen_yet(entry, str(entry.spec))
            history = entry.history or history  # on a GPU the entry has got another one
            context = self._runtime.context_of(entry.buffer)
            slots = self._state.slots.slots_of(entry)
            history.catch_up(entry.buffer, slots, ids, counter=self._state.calls, context=context)
        history.is_read = True

    # ---- around a step ---------------------------------------------------------------------------------------------

    def numbers_of(self, hyper: StepHyper, *, amsgrad: bool, averages: bool) -> Numbers:
        """What a step has in common with those that rows may wait for."""
        momentum, accumulates = hyper.ema_momentum if averages else None, self._options.accumulation is not None
        return Numbers(hyper.beta_1, hyper.beta_2, hyper.epsilon, amsgrad, momentum, accumulates)

    def history_of(
        self, buffer: _cpu.Buffer, entry: Entry | None, gradient: AnyGradient, numbers: Numbers
    ) -> History | None:
        """The history of a variable that is, or with this gradient becomes, a deferred table; with room for a step."""
        if not self._options.is_deferred:
            return None
        if entry is not None and entry.history is not None:
            if entry.history.is_full:
                self._runtime.clear_plans()  # they read the old arrays, whatever becomes of this step
                entry.history.make_room(partial(self.catch_up, buffer))
            return entry.history.placed(buffer)
        if not is_sparse(gradient) or not buffer.shape:
            return None
        doubt = Doubt.NONE if entry is None else entry.doubt
        moment = None if entry is None else self._state.slots.slots_of(entry).get("m")
        history = History.of(buffer, numbers, self._options.sparse_update == "deferred", doubt, moment)
        if self._runtime.chain is not None:
            history.begin_trail()
        return history

    def before_step(self, plan: StepPlan, touches_rows: Sequence[bool], numbers: Numbers) -> None:
        """Bring up to date the tables whose rows cannot wait for this step, which has been found good.

        ``touches_rows``: for each variable whether its gradient names rows.
        """
        for buffer, history, touches in zip(plan.plan.buffers, plan.histories, touches_rows, strict=True):
            entry = self._state.slots.entry_of(buffer) if history else None
            if history is None or entry is None:
                continue
            history.claim(buffer.label)
            if history.must_catch_up(numbers, touches_rows=touches):
                self._catch_up_entry(entry)
            if history.numbers != numbers:
                if self._runtime.has_gpus:
                    self.raise_late(wait=True)  # rows are up to date only if the GPU did not skip that
                history.change_numbers(numbers)
                self._runtime.clear_plans()  # they have the crossover of the old numbers

    def must_catch_up(self, plan: StepPlan, touches_rows: Sequence[bool], numbers: Numbers) -> bool:
        """Whether :meth:`before_step` would move rows."""
        return any(
            history is not None and history.must_catch_up(numbers, touches_rows=touches)
            for history, touches in zip(plan.histories, touches_rows, strict=True)
        )

    def after_step(self, plan: StepPlan) -> None:
        """Keep every row within ``max_staleness`` steps."""
        most = self._options.max_staleness
        for buffer, history in zip(plan.plan.buffers, plan.histories, strict=True):
            if history is None:
                continue
            if most is not None and history.waits and (entry := self._state.slots.entry_of(buffer)):
                self._catch_up_entry(entry, history.next_rows(most))
            history.is_read = False

    def end_reading(self, plan: StepPlan) -> None:
        """After a call that only added gradients up: rows are read again for the next one."""
        for history in plan.histories:
            if history is not None:
                history.is_read = False

    def warn_of_unread(self, plan: StepPlan, gradients: list[AnyGradient]) -> None:
        """Once: the loss read rows that wait from memory, so this gradient belongs to stale values."""
        if "unread" in self._runtime.told:
            return
        for buffer, history, gradient in zip(plan.plan.buffers, plan.histories, gradients, strict=True):
            if history is not None and not history.is_read and history.is_behind(gradient):
                self._runtime.told.add("unread")
                warn(
                    f"{buffer.label}: a gradient for rows that wait for their steps, which were not read through the "
                    f"optimizer since the last one. With sparse_update={self._options.sparse_update!r} read them by "
                    "opt.gather(table, ids), or after opt.sync()"
                )
                return

    # ---- steps that a GPU refused ----------------------------------------------------------------------------------

    def raise_late(self, *, wait: bool = False) -> None:
        """Raise what a GPU found wrong with a step after the call had returned, and take back the steps since."""
        failure = self._runtime.late_failure(wait=wait)
        if failure is None:
            return
        calls, message = failure
        for entry in self._state.entries:
            if entry.history is not None:
                entry.history.forget_from(calls)
        self._state.calls[...] = calls
        self._runtime.clear_plans()  # they may hold closed forms of the steps taken back
        raise late_error(message, f"that step, after iteration {calls // self._options.calls_per_step},")

    def set_calls(self, calls: int) -> None:
        """Set the count; no step before this is taken back any more."""
        self.raise_late(wait=True)
        self._state.calls[...] = calls
        self.confirm()

    def confirm(self) -> None:
        """The steps so far are never taken back."""
        for entry in self._state.entries:
            if entry.history is not None:
                entry.history.confirm()

    def note_all_changed(self) -> None:
        """For the next delta: no gradient tells which rows have changed."""
        if self._runtime.chain is not None:
            self._runtime.chain.note_all()

    def forget_histories(self) -> None:
        """Every row is up to date and none will wait."""
        self.note_all_changed()
        for entry in self._state.entries:
            entry.raise_doubt(Doubt.ONCE)
            entry.history = None
        self._runtime.clear_plans()


def _not_seen_yet(entry: Entry, label: str) -> ValueError:
    return ValueError(
        f"{label}: rows of the table {entry.spec} waited for steps when this optimizer was saved or copied, and it has "
        "not seen its variables since; call build() with all variables, in their old order, before rows are read"
    )


def _readable(variable: VariableLike, buffer: _cpu.Buffer) -> npt.NDArray[np.generic]:
    """The memory as a NumPy array; a bfloat16 tensor of PyTorch as its bits."""
    array = unwrap(variable)
    return array if isinstance(array, np.ndarray) else buffer.array()


def _check_out(out: AnyArray, values: npt.NDArray[np.generic], shape: tuple[int, ...], label: str) -> None:
    if not (isinstance(out, np.ndarray) and out.flags.writeable):
        raise TypeError(f"out: {type(out).__name__}, expected a writable array")
    if (out.shape, out.dtype) != (shape, values.dtype):
        raise ValueError(f"out: {out.dtype} {out.shape}, expected {values.dtype} {shape}")
    if np.may_share_memory(out, values):
        raise ValueError(f"out: shares memory with {label}, expected a separate array")
