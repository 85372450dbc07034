"""``begin_step``, ``step_bucket``, ``end_step``: the step of an optimizer in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastadam._core.common.checks import check_list
from fastadam._core.native.buckets import Bucket, OpenStep
from fastadam._core.native.plan import Factors, Norms, StepHyper
from fastadam.torch._checks import Group, States, label_of
from fastadam.torch._clipping import add_shards, is_sharded
from fastadam.torch._grad_scaler import ScaledStep
from fastadam.torch._no_memory import hide_gradients, refuse_simulation

if TYPE_CHECKING:
    from fastadam.torch._step import Call, GroupStepper

__all__ = ["BucketedStep"]


class BucketedStep:
    """The open step of an optimizer, with the options that its groups have when it begins.

    Args:
        stepper: Of the optimizer; whoever calls a method holds its lock.
        groups: Of the optimizer.
        state: Of the optimizer.
        early: Step buckets as they come.
        threads: Of the native calls; None for as many as a step uses.
        loss_scale: What the gradients are divided by.
    """

    def __init__(
        self,
        stepper: GroupStepper,
        groups: list[Group],
        state: States,
        *,
        early: bool,
        threads: int | None,
        loss_scale: float,
    ) -> None:
        self._stepper, self._state = stepper, state
        self._groups: list[Group] = [{**group, "params": list(group["params"])} for group in groups]
        self._scaled = ScaledStep(torch.tensor(loss_scale), None)
        self._places: dict[Tensor, tuple[int, int]] = {}
        for index, group in enumerate(self._groups):
            for place, param in enumerate(group["params"]):
                if param in self._places:
                    raise ValueError(f"begin_step: {label_of(group, index, place)} comes twice, expected it once")
                self._places[param] = (index, place)
        stepper.tables.forget_removed(self._groups)
        stepper.partitions.note_state(state, len(groups))
        self._calls: list[Call] = []  # in the order of the buckets
        self._counts: set[int] = set()  # addresses of step counts
        numbers = StepHyper(1, 0.0, 0.0, 0.0, 0.0, gradient_scale=self._scaled.gradient_scale)
        self._open = OpenStep(
            stepper.clipping.bound(numbers),
            early=early,
            threads=threads,
            guess=stepper.guess,
            logs=stepper.logs,
            join=self._join,
        )

    def add(self, params: object) -> Future[None]:
        """Take parameters that have their gradients; those without are left out."""
        given = check_list("params", params, "an iterable of parameters")
        places: list[tuple[int, int]] = []
        for i, param in enumerate(given):
            place = self._places.get(param) if isinstance(param, Tensor) else None
            if place is None:
                what = f"shape {tuple(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
                raise ValueError(f"step_bucket: params[{i}]: {what}, expected a parameter of this optimizer")
            if param.grad is not None:
                places.append(place)
        self._open.require(places, [label_of(self._groups[index], index, place) for index, place in places])
        if len(set(places)) < len(places):
            raise ValueError("step_bucket: a parameter was given twice, expected it once")
        with torch.no_grad():
            calls = self._calls_of(places)
        buckets = [self._bucket_of(call) for call in calls]
        self._calls += calls
        return self._open.add(buckets)

    def finish(self) -> bool:
        """Step the parameters that were not given but have a gradient, and end the step.

        Returns:
            Whether it was made; False if a gradient was not finite and has to be.
        """
        try:
            self.add([param for param, place in self._places.items() if place not in self._open.given])
        except BaseException:
            self.abort()
            raise
        was_made = self._open.finish(lambda: None)
        self._stepper.note_measured(self._calls, was_made=was_made)
        return was_made

    def abort(self) -> None:
        """Undo what was made."""
        self._open.abort()

    def _calls_of(self, places: Sequence[tuple[int, int]]) -> list[Call]:
        stepper = self._stepper
        calls: list[Call] = []
        for index in sorted({index for index, _ in places}):
            group = self._groups[index]
            mine = {place for at, place in places if at == index}
            gradients = [param.grad if place in mine else None for place, param in enumerate(group["params"])]
            if hide_gradients(group["params"], gradients):
                raise RuntimeError("step_bucket: parameters without memory (meta, fake), expected step() for these")
            refuse_simulation(gradients)
            stepper.require_options(index, group, gradients)
            if any(gradient is not None and gradient.is_cuda for gradient in gradients):
                raise RuntimeError("step_bucket: parameters on a GPU, expected CPU memory")
            for ready in stepper.ready(index, group, self._state, gradients, self._scaled):
                call = stepper.call_of(index, ready, group, gradients, self._scaled, Counter())
                checked = call.chosen.check(call.gradients, call.hyper, call.factors, call.steps)
                calls.append(call._replace(gradients=checked))
        addresses = {address for call in calls for address in call.chosen.counts.addresses}
        if shared := self._counts & addresses:
            raise ValueError(
                f"step_bucket: {len(shared)} parameters share their step count with those of an earlier bucket, "
                "expected them in one bucket"
            )
        self._counts |= addresses
        return calls

    def _bucket_of(self, call: Call) -> Bucket:
        chosen = call.chosen
        hyper = call.hyper._replace(require_finite=False)
        counter = int(chosen.counter)
        sharded = is_sharded(chosen.params)

        def make(factors: Factors | None) -> None:
            bounds = hyper if factors is not None else hyper._replace(clip_norm=torch.inf, global_clip_norm=torch.inf)
            with torch.no_grad():
                chosen.step(call.gradients, bounds, call.factors, call.steps, factors)

        def note() -> None:
            chosen.counter[...] = counter + 1
            with torch.no_grad():
                self._stepper.note_made(call, self._state)

        return Bucket(
            chosen.plan,
            call.gradients,
            call.hyper,
            call.factors,
            [(call.group, place) for place in chosen.positions],
            make,
            note,
            is_plain=call.steps is None and chosen.is_plain and not sharded,
        )

    def _join(self, norms: Norms) -> Norms:
        params = [param for call in self._calls for param in call.chosen.params]
        if is_sharded(params):
            add_shards(params, norms, require_finite=self._stepper.clipping.skip_nonfinite)
        return norms
