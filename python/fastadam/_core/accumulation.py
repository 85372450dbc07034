"""``gradient_accumulation_steps``: k - 1 calls add gradients up, and the k-th makes the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastadam._core.native.arrays import assign
from fastadam._core.native.plan import Plan, StepHyper
from fastadam._core.native.slices import is_native_sparse
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.state.state import Cycle

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyGradient
    from fastadam._core.parts import Parts
    from fastadam._core.runtime import StepPlan

__all__ = ["accumulate"]


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

    Returns:
        Whether the gradients were finite, if that is required.
    """
    state, per_step = parts.state, parts.options.calls_per_step
    calls = int(state.calls)
    step = calls // per_step
    entries = [entry for buffer in plan.plan.buffers if (entry := state.slots.entry_of(buffer))]
    earlier = state.cycle.of(step)
    places = [entry.place for entry in entries]
    fresh = [entry for entry in {entry.place: entry for entry in entries}.values() if entry.place not in earlier]
    if restart := not earlier.intersection(places):
        fresh = []
    cycle = Cycle(step, earlier.union(places))
    update = _update_plan(parts, plan.plan, places, cycle) if (calls + 1) % per_step == 0 else None
    if fresh:  # refused before anything is written
        gradients = plan.plan.check(gradients)
        plan.plan.check_numbers(hyper._replace(gradient_scale=scale))
        (update or plan.plan).check_numbers(hyper)
    for entry in fresh:
        assign(state.slots.slots_of(entry)[ACCUMULATOR], 0)
    state.begin(cycle)
    is_finite = plan.plan.accumulate(
        gradients, scale, hyper, state.calls, require_finite=require_finite, restart=restart, update=update
    )
    if plan.plan.device >= 0 and any(map(is_native_sparse, gradients)):
        parts.tables.raise_late(wait=True)  # a cycle is not taken back call by call
    return is_finite


def _update_plan(parts: Parts, plan: Plan, places: list[int], cycle: Cycle) -> Plan:
    """The plan of all variables with an accumulated gradient: this call's, unless others had one before."""
    state, options = parts.state, parts.options
    waiting = [entry for entry in state.entries if entry.place in cycle.places]
    if len(set(places)) == len(places) == len(waiting):
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
    decays = options.decays([entry.spec.name for entry in waiting], buffers)
    context = parts.runtime.context_of(buffers[0])
    rounding = options.small.rounding
    histories = [None if entry.history is None else entry.history.native for entry in waiting]
    return Plan(
        buffers,
        prepared.slots,
        decays=decays,
        histories=histories,
        context=context,
        numbers=prepared.numbers,
        **rounding,
    )
