"""``begin_step``, ``step_bucket``, ``end_step``, ``abort_step`` of :class:`fastadam.Adam`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastadam._core.averages import refuse_while_swapped
from fastadam._core.common.checks import check_bool
from fastadam._core.native.arrays import on_gpu
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buckets import Bucket, OpenStep, check_threads
from fastadam._core.native.buffers import buffers_of
from fastadam._core.native.worker import Handle

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, AnyGradient, AnyPair
    from fastadam._core.native.plan import Factors
    from fastadam._core.runtime import StepPlan
    from fastadam._core.step import Hyperparameters, Stepper

__all__ = ["abort", "add", "begin", "check_begin", "end"]


class BucketedStep(OpenStep):
    """The open step of an optimizer, with the numbers that it had when the step began."""

    def __init__(
        self,
        stepper: Stepper,
        optimizer: Hyperparameters,
        *,
        early: bool,
        threads: int | None,
        loss_scale: float | None,
    ) -> None:
        runtime, options = stepper.runtime, stepper.options
        self._stepper = stepper
        self._scale = 1.0 / (loss_scale or options.keras3.loss_scale_factor or 1.0)
        self._hyper = stepper.numbers(optimizer, self._scale)._replace(require_finite=loss_scale is not None)
        self._plan_version = options.plan_version
        super().__init__(self._hyper, early=early, threads=threads, guess=runtime.guess, logs=runtime.logs)

    def take(self, pairs: list[AnyPair], copies: list[AnyArray]) -> Handle[None]:
        """Check pairs as ``apply_gradients`` does, and take them."""
        stepper = self._stepper
        if stepper.options.plan_version != self._plan_version:
            raise RuntimeError("step_bucket: options were set since begin_step(), expected that before it")
        pairs, match = stepper.match(pairs, copies, zeroes=False)
        if match is None:
            self._require_built(pairs)
            match = stepper.make_plan(pairs, copies, self._hyper, self._scale, zeroes=False)
        plan, gradients = match
        if plan.places is None:
            plan.places = [(entry.place,) for buffer in plan.plan.buffers if (entry := stepper.entry_of(buffer))]
        self.require(plan.places, [f"grads_and_vars[{place}]" for place in plan.plan.positions])
        gradients = plan.plan.check(gradients)
        plan.plan.check_numbers(self._hyper)
        labels = [f"variables[{place}] of build()" for (place,) in plan.places]
        make = self._maker(plan, gradients)
        return self.add([Bucket(plan.plan, gradients, self._hyper, [], plan.places, make, labels=labels)])

    def _require_built(self, pairs: list[AnyPair]) -> None:
        """Raise if a variable has no slots yet: these, and squares, must not come in the order of the buckets."""
        positions = [i for i, (gradient, _) in enumerate(pairs) if gradient is not None]
        state_format = self._stepper.options.state_format
        for place, buffer in zip(positions, buffers_of([pairs[i][1] for i in positions], positions), strict=True):
            if buffer.device >= 0:
                raise ValueError(f"grads_and_vars[{place}]: a variable on a GPU, expected CPU memory")
            entry = self._stepper.entry_of(buffer)
            slots = None if entry is None or entry.buffer is None else self._stepper.state.slots.slots_of(entry)
            if slots is None or not set(state_format.of(buffer, slots).names) <= set(slots):
                raise ValueError(
                    f"grads_and_vars[{place}]: a variable without slots, expected build(variables) before "
                    "begin_step(); the order of the variables there is the one that results depend on"
                )

    def _maker(self, plan: StepPlan, gradients: list[AnyGradient]) -> Callable[[Factors | None], object]:
        hyper = self._hyper._replace(require_finite=False)

        def make(factors: Factors | None) -> None:
            plan.plan.step(gradients, hyper, clip_factors=factors)

        return make


def check_begin(early: object, threads: object) -> tuple[bool, int | None]:
    """The arguments of ``begin_step``, checked."""
    return check_bool("early", early), None if threads is None else check_threads("threads", threads)


def begin(
    stepper: Stepper,
    optimizer: Hyperparameters,
    *,
    early: bool,
    threads: int | None,
    loss_scale: float | None = None,
) -> None:
    """Begin a step, or raise why not; ``loss_scale``: a dynamic one, with which gradients must be finite."""
    runtime, options = stepper.runtime, stepper.options
    with runtime.lock:
        runtime.require_between_steps("begin_step")
        refuse_while_swapped(stepper.parts, "begin_step")
        refused = {
            "gradient_accumulation_steps": options.accumulation is not None,
            "sparse_update": options.is_deferred,
            "telemetry": options.telemetry,
        }
        for name, is_refused in refused.items():
            if is_refused:
                expected = {"sparse_update": "'dense' or 'lazy'", "telemetry": "False"}.get(name, "None")
                raise ValueError(f"{name}: with begin_step(), expected {expected}")
        if runtime.has_gpus or on_gpu(options.numbers["learning_rate"]):
            raise ValueError("begin_step: variables or a learning rate on a GPU, expected CPU memory")
        with _cpu.DefaultArithmetic():
            stepper.tables.note_all_changed()
            runtime.open = BucketedStep(stepper, optimizer, early=early, threads=threads, loss_scale=loss_scale)


def add(stepper: Stepper, pairs: list[AnyPair], copies: list[AnyArray]) -> Handle[None]:
    """Give the open step a bucket."""
    with stepper.runtime.lock, _cpu.DefaultArithmetic():
        step = _require_open(stepper, "step_bucket")
        return step.take(pairs, copies) if pairs else step.add([])


def end(stepper: Stepper) -> bool:
    """Make the open step, and count it; False, with nothing changed, if gradients had to be finite and are not."""
    runtime, calls = stepper.runtime, stepper.state.calls

    def count(was_made: bool) -> None:
        calls[...] = int(calls) + was_made

    with runtime.lock:
        step = _require_open(stepper, "end_step")
        try:
            return step.finish(count)
        finally:
            runtime.forget_closed()


def abort(stepper: Stepper) -> None:
    """Undo the open step, if there is one."""
    runtime = stepper.runtime
    with runtime.lock:
        try:
            if runtime.open is not None:
                runtime.open.abort()
        finally:
            runtime.forget_closed()


def _require_open(stepper: Stepper, what: str) -> BucketedStep:
    step = stepper.runtime.open
    if not isinstance(step, BucketedStep) or not step.is_open:
        raise RuntimeError(f"{what}: no step is open, expected begin_step() first")
    return step
