"""``gradient_accumulation_steps``: k - 1 calls add gradients up, and the k-th makes the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastadam._core.deferred.rates import Numbers
from fastadam._core.native.arrays import assign
from fastadam._core.native.plan import Plan, StepHyper
from fastadam._core.native.slices import is_native_sparse, is_slices, native_gradient
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.runtime import StepPlan
from fastadam._core.state.state import Cycle

if TYPE_CHECKING:
    from collections.abc import Collection

    from fastadam._core.common.types import AnyGradient
    from fastadam._core.parts import Parts
    from fastadam._core.state.entry import Entry

__all__ = ["accumulate"]

_NO_ROWS = np.zeros(0, np.int64)


def accumulate(
    parts: Parts,
    plan: StepPlan,
    gradients: list[AnyGradient],
    scale: float,
    hyper: StepHyper,
    *,
    require_finite: bool,
) -> bool:
    """Add gradients times ``scale``; in the last call of a cycle make the step with all that were added.

    Unless ``sparse_update`` is "dense", the rows of sparse gradients are noted, and the step of a table that has had
    only such gradients moves these rows alone. Deferred rows that wait will move as the dense step moves them.

    Returns:
        Whether the gradients were finite, if that is required.
    """
    state, options, tables = parts.state, parts.options, parts.tables
    calls = int(state.calls)
    step, is_last = calls // options.calls_per_step, (calls + 1) % options.calls_per_step == 0
    entries = [entry for buffer in plan.plan.buffers if (entry := state.slots.entry_of(buffer))]
    earlier = state.cycle.of(step)
    fresh = {entry.place: entry for entry in entries if entry.place not in earlier}
    if plan.has_tables:
        tables.warn_of_unread(plan, gradients)
    if options.sparse_update != "dense":
        labels = [f"grads[{position}]" for position in plan.plan.positions]
        gradients = [native_gradient(*row) for row in zip(gradients, plan.plan.buffers, labels, strict=True)]
    cycle = Cycle(step, earlier.union(fresh), _noted(parts, entries, gradients, fresh))
    restart = not earlier.intersection([entry.place for entry in entries]) and cycle.rows.keys().isdisjoint(fresh)
    numbers = tables.numbers_of(hyper, amsgrad=plan.amsgrad, averages=plan.averages)
    update = _update_plan(parts, plan, entries, cycle, numbers) if is_last else None
    rows = _rows_of(parts, update, cycle) if update else None
    touches = [indices is not None for indices in rows or ()]
    moves = update is not None and tables.must_catch_up(update, touches, numbers)
    if moves or (fresh and not restart):  # refused before anything is written
        gradients = plan.plan.check(gradients)
        plan.plan.check_numbers(hyper._replace(gradient_scale=scale))
        (update or plan).plan.check_numbers(hyper)
    if update is not None and rows is not None:
        _note_rows(parts, update, rows, averages=plan.averages)
    for entry in () if restart else fresh.values():
        if entry.place in cycle.rows:
            state.clear_accumulator(entry)
        else:
            assign(state.slots.slots_of(entry)[ACCUMULATOR], 0)
    if update is not None:
        tables.before_step(update, touches, numbers)
    state.begin(cycle)
    is_finite = plan.plan.accumulate(
        gradients,
        scale,
        hyper,
        state.calls,
        require_finite=require_finite,
        restart=restart,
        update=None if update is None else update.plan,
        rows=rows,
    )
    if plan.plan.device >= 0 and any(map(is_native_sparse, gradients)):
        tables.raise_late(wait=True)  # a cycle is not taken back call by call
    state.settle_cycle()
    if update is not None and is_finite:
        tables.after_step(update)
    if plan.has_tables:
        tables.end_reading(plan)
    return is_finite


def _noted(
    parts: Parts, entries: list[Entry], gradients: list[AnyGradient], fresh: Collection[int]
) -> dict[int, tuple[npt.NDArray[np.int64], ...]]:
    """The rows of each accumulator after this call; a variable whose rows are not noted has gradients of all rows."""
    rows = {**parts.state.cycle.rows, **dict.fromkeys(fresh, ())}
    notes = parts.options.sparse_update != "dense"
    for entry, gradient in zip(entries, gradients, strict=True):
        if notes and entry.place in rows and is_slices(gradient):
            rows[entry.place] = (*rows[entry.place], np.array(gradient.indices, np.int64))
        else:
            rows.pop(entry.place, None)
    return rows


def _rows_of(parts: Parts, update: StepPlan, cycle: Cycle) -> list[npt.NDArray[np.int64] | None]:
    """For each variable of the step the rows of its gradients in the cycle, or None: all rows."""
    entries = [parts.state.slots.entry_of(buffer) for buffer in update.plan.buffers]
    known = [None if entry is None else cycle.rows.get(entry.place) for entry in entries]
    return [None if rows is None else np.concatenate([_NO_ROWS, *rows]) for rows in known]


def _note_rows(parts: Parts, update: StepPlan, rows: list[npt.NDArray[np.int64] | None], *, averages: bool) -> None:
    """Note for the next delta which rows the step will change of variables without a history.

    Some may have had no gradient in this call. Of a restored table without a history every row may move.
    """
    chain, options = parts.runtime.chain, parts.options
    if chain is None or options.sparse_update == "dense":
        return
    for buffer, history, indices in zip(update.plan.buffers, update.histories, rows, strict=True):
        if history is None:
            moves_rows_alone = options.sparse_update == "lazy" and not averages
            chain.note(parts.state.slots.entry_of(buffer), indices if moves_rows_alone else None)


def _update_plan(parts: Parts, plan: StepPlan, entries: list[Entry], cycle: Cycle, numbers: Numbers) -> StepPlan:
    """The plan of all variables with an accumulated gradient: this call's, unless others had one before."""
    options, state, runtime, tables = parts
    waiting = [entry for entry in state.entries if entry.place in cycle.places]
    if len({entry.place for entry in entries}) == len(entries) == len(waiting):
        return plan
    buffers = []
    for entry in waiting:
        buffer = state.slots.variable_of(entry)
        if buffer is None:
            raise ValueError(
                f"gradients were accumulated for {entry.spec}, whose variable a restored or copied optimizer has not "
                "seen yet; call build() with all variables first"
            )
        buffers.append(buffer)
    prepared = state.slots.prepare(buffers, options.state_format.of)
    prepared.commit()  # of a deep copy: it goes on with the same variables
    waiting = [state.entries[entry.place] for entry in waiting]
    decays = options.decays([entry.spec.name for entry in waiting], buffers)
    histories = [tables.history_of(*row, None, numbers) for row in zip(buffers, waiting, strict=True)]
    native = Plan(
        buffers,
        prepared.slots,
        decays=decays,
        lazy=options.sparse_update == "lazy",
        histories=[None if history is None else history.native for history in histories],
        context=runtime.context_of(buffers[0]),
        numbers=prepared.numbers,
        **options.small.rounding,
    )
    return StepPlan(native, plan.version, plan.amsgrad, decays, histories, [])
