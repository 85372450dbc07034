"""``begin_step``, ``step_bucket``, ``end_step``: the step of an optimizer in parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastadam._core.common.checks import check_list
from fastadam._core.native.buckets import Bucket, OpenStep
from fastadam._core.native.plan import Factors, Norms, StepHyper
from fastadam._core.native.worker import Handle
from fastadam.torch._checks import Group, ParamState, States, check_group, firsts_of, label_of
from fastadam.torch._clipping import add_shards, is_sharded
from fastadam.torch._grad_scaler import ScaledStep
from fastadam.torch._no_memory import hide_gradients, refuse_simulation
from fastadam.torch._stored import MASTER

if TYPE_CHECKING:
    from fastadam.torch._native_calls import Call
    from fastadam.torch._step import GroupStepper

__all__ = ["BucketedStep"]


class _Given(NamedTuple):
    """A parameter of a bucket, as it was when it was given."""

    param: Tensor
    gradient: Tensor
    versions: tuple[int, int]  # torch's, of both
    state: ParamState
    group: Group
    place: tuple[int, int]  # of the group, and there

    @property
    def label(self) -> str:
        """What error messages call the parameter."""
        return label_of(self.group, *self.place)

    @property
    def moments(self) -> list[Tensor]:
        """What would be undone with a wrong value of the parameter; with a master in its place nothing is."""
        if MASTER in self.state:
            return []
        return [value for key, value in self.state.items() if key != "step" and isinstance(value, Tensor)]

    def was_written(self) -> bool:
        """Whether something else than the step has written to the parameter."""
        return _version(self.param) != self.versions[0]

    def has_other_gradient(self) -> bool:
        """Whether the gradient was written to or replaced; it may be dropped, as the step keeps it."""
        if _version(self.gradient) != self.versions[1]:
            return True
        return self.param.grad is not None and self.param.grad is not self.gradient


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
        self._numbers = [_numbers_of(group) for group in self._groups]
        self._live_groups = groups
        self._scaled = ScaledStep(None if loss_scale == 1.0 else torch.tensor(loss_scale, dtype=torch.float32), None)
        self._firsts = firsts_of(self._groups)
        self._places: dict[int, tuple[int, int]] = {}  # by the identity of the parameter
        for index, group in enumerate(self._groups):
            for place, param in enumerate(group["params"]):
                if id(param) in self._places:
                    raise ValueError(f"begin_step: {label_of(group, index, place)} comes twice, expected it once")
                self._places[id(param)] = (index, place)
        # If nothing is to be done before the end, the step is a plain one, which is faster.
        self._waits = not early and not stepper.clipping.reads_norms and _are_on_host(self._groups)
        self._waiting: dict[tuple[int, int], _Given] = {}
        stepper.tables.forget_removed(self._groups, state)
        stepper.partitions.note_state(state, len(groups))
        self._given: dict[tuple[int, int], _Given] = {}
        self._calls: list[Call] = []
        self._counts: dict[int, tuple[int, int]] = {}  # whose step count is at an address
        numbers = StepHyper(1, 0.0, 0.0, 0.0, 0.0, gradient_scale=self._scaled.gradient_scale)
        self._open = OpenStep(
            stepper.clipping.bound(numbers),
            early=early,
            threads=threads,
            guess=stepper.guess,
            logs=stepper.logs,
            join=self._join,
        )

    @property
    def is_open(self) -> bool:
        """Whether it was neither made nor undone yet."""
        return self._open.is_open

    def add(self, params: object) -> Handle[None]:
        """Take parameters that have their gradients; those without are left out."""
        given = check_list("params", params, "an iterable of parameters")
        places: list[tuple[int, int]] = []
        for i, param in enumerate(given):
            place = self._places.get(id(param))
            if place is None:
                what = f"shape {tuple(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
                raise ValueError(f"step_bucket: params[{i}]: {what}, expected a parameter of this optimizer")
            if param.grad is not None:
                places.append(place)
        if self._waits:
            return self._wait_with(places)
        self._open.require(places, [label_of(self._groups[index], index, place) for index, place in places])
        return self._take(places)

    def _wait_with(self, places: Sequence[tuple[int, int]]) -> Handle[None]:
        self._open.require([], [])
        waiting: dict[tuple[int, int], _Given] = {}
        for place in places:
            group = self._groups[place[0]]
            if place in self._waiting or place in waiting:
                label = label_of(group, *place)
                raise ValueError(f"step_bucket: {label} was given before in this step, expected it once")
            param = group["params"][place[1]]
            waiting[place] = _Given(param, param.grad, _versions(param), {}, group, place)
        handle: Handle[None] = Handle(lambda: None)
        handle.run()
        self._waiting.update(waiting)
        return handle

    def _take(self, places: Sequence[tuple[int, int]]) -> Handle[None]:
        with torch.no_grad():
            calls = self._calls_of(places)
        buckets = [self._bucket_of(call) for call in calls]
        for call in calls:
            self._note_given(call)
        handle = self._open.add(buckets)
        self._calls += calls
        return handle

    def finish(self) -> bool:
        """Step the parameters that were not given but have a gradient, and end the step.

        Returns:
            Whether it was made; False if a gradient was not finite and has to be.
        """
        try:
            self._require_same_numbers()
        except BaseException:
            self.abort()
            raise
        if self._waits:
            return self._make_plain()
        try:
            self._take(
                [
                    (index, place)
                    for index, group in enumerate(self._groups)
                    for place, param in enumerate(group["params"])
                    if param.grad is not None and not self._open.has((index, place))
                ]
            )
            for index, group in enumerate(self._groups):  # also of those that no parameter was given of
                check_group(group, index)
            _require_unchanged(self._taken)
        except BaseException:
            self.abort()
            raise
        return self._open.finish(self._commit)

    def _require_same_numbers(self) -> None:
        for index, (group, numbers) in enumerate(zip(self._live_groups, self._numbers, strict=False)):
            for key, number in _numbers_of(group).items():
                old = numbers.get(key)
                if number != old:
                    raise RuntimeError(
                        f"param_groups[{index}][{key!r}]: set from {old} to {number} while a step was open, "
                        "expected that before begin_step() or the backward pass; the step was undone"
                    )

    def _make_plain(self) -> bool:
        def step() -> bool:
            self._stepper.step_scaled(self._groups, self._state, self._scaled)
            return True

        try:
            _require_unchanged(self._waiting.values())
        except BaseException:
            self.abort()
            raise
        dropped = [given for given in self._waiting.values() if given.param.grad is None]
        try:
            for given in dropped:
                given.param.grad = given.gradient
            return self._open.finish_with(step)
        finally:
            for given in dropped:
                given.param.grad = None

    def abort(self) -> None:
        """Undo what was made. A parameter that something else has written to keeps its values and moments."""
        kept = [
            (tensor, tensor.detach().clone())
            for given in self._taken
            if given.was_written()
            for tensor in (given.param, *given.moments)
        ]
        try:
            self._open.abort()
        finally:
            with torch.no_grad():
                for tensor, values in kept:
                    tensor.copy_(values)

    def _commit(self, was_made: bool) -> None:
        self._stepper.forget_numbers()
        self._stepper.compiled.skipped = not was_made
        self._stepper.note_measured(self._calls, was_made=was_made)

    @property
    def _taken(self) -> list[_Given]:
        """The parameters so far, in the order of the buckets."""
        return [self._given[index, place] for index, place in self._open.places]

    def _note_given(self, call: Call) -> None:
        group, chosen = self._groups[call.group], call.chosen
        for at, param, state, address in zip(
            chosen.positions, chosen.params, chosen.states, chosen.counts.addresses, strict=True
        ):
            place = call.group, at
            self._given[place] = _Given(param, param.grad, _versions(param), state, group, place)
            self._counts[address] = place

    def _calls_of(self, places: Sequence[tuple[int, int]]) -> list[Call]:
        stepper = self._stepper
        calls: list[Call] = []
        by_group: dict[int, list[int]] = {}
        for index, place in places:
            by_group.setdefault(index, []).append(place)
        for index, chosen in sorted(by_group.items()):
            group = self._groups[index]
            params = [group["params"][place] for place in chosen]
            mine = [param.grad for param in params]
            if hide_gradients(params, mine):
                raise RuntimeError("step_bucket: parameters without memory (meta, fake), expected step() for these")
            refuse_simulation(mine)
            gradients: list[Tensor | None] = [None] * len(group["params"])
            for place, gradient in zip(chosen, mine, strict=True):
                gradients[place] = gradient
            if any(gradient is not None and gradient.is_cuda for gradient in mine):
                stepper.clipping.require_host(index, group, gradients)
                raise RuntimeError("step_bucket: parameters on a GPU, expected CPU memory")
            stepper.require_options(index, group, gradients)
            for ready in stepper.ready(index, group, self._firsts[index], self._state, gradients, self._scaled):
                call = stepper.call_of(index, ready, group, gradients, self._scaled, {})
                checked = call.chosen.check(call.gradients, call.hyper, call.factors, call.steps)
                calls.append(call._replace(gradients=checked))
        addresses = {address for call in calls for address in call.chosen.counts.addresses}
        shared = [address for address in addresses & self._counts.keys() if self._open.has(self._counts[address])]
        if shared:
            raise ValueError(
                f"step_bucket: {len(shared)} parameters share their step count with those of an earlier bucket, "
                "expected them in one bucket"
            )
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
                self._stepper.calls.note_made(call, self._state)

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
        params = [given.param for given in self._taken]
        if is_sharded(params):
            add_shards(params, norms, require_finite=self._stepper.clipping.skip_nonfinite)
        return norms


def _numbers_of(group: Group) -> dict[str, object]:
    """The numbers of a group, by value: those in tensors can be changed in place."""
    keys = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
    return {key: _value_of(group[key]) for key in keys if key in group}


def _value_of(number: object) -> object:
    if isinstance(number, (tuple, list)):
        return tuple(map(_value_of, number))
    return number.tolist() if isinstance(number, Tensor) else number


def _are_on_host(groups: list[Group]) -> bool:
    """Whether all parameters are in CPU memory."""
    for group in groups:
        params = group["params"]
        if any(not param.is_cpu for param in params) or hide_gradients(params, list(params)):
            return False
    return True


def _require_unchanged(given: Iterable[_Given]) -> None:
    """Raise if something else than the step has written to a parameter or to its gradient."""
    for each in given:
        if each.was_written():
            raise RuntimeError(f"{each.label}: was written to while a step was open, expected no write before it ends")
        if each.has_other_gradient():
            raise RuntimeError(
                f"gradient of {each.label}: changed since step_bucket() or the backward pass, expected it as it was "
                "until the step ends (the optimizer clips with global_clipnorm=); the step was undone"
            )


def _versions(param: Tensor) -> tuple[int, int]:
    return _version(param), _version(param.grad)


def _version(tensor: Tensor) -> int:
    try:
        return int(tensor._version)
    except RuntimeError:  # an inference tensor has none
        return -1
