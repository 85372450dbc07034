"""The step under ``torch.compile``: one operator that mutates parameters, moments and step counts.

The host reads the step counts and what a GradScaler says, and waits for the GPU if they are on one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import Counter
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastadam._core.native.plan import BoundedCache, StepHyper
from fastadam._core.native.slices import DEFERRED
from fastadam.torch._checks import Group, States, check_flags, check_options, label_of
from fastadam.torch._grad_scaler import ScaledStep
from fastadam.torch._layout import Turn, turns_of
from fastadam.torch._options import Options
from fastadam.torch._parameter_set import ParameterSet
from fastadam.torch._state import Kind, states_of
from fastadam.torch._step_count import is_on_gpu, whole_count

__all__ = ["Columns", "CompiledSteps", "traced_step"]

_library = torch.library.Library("fastadam", "FRAGMENT")
_library.define(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, int group, "
    "int owner, bool fused=False, bool foreach=False) -> ()"
)
# Inductor copies tensors that an operator mutates if they share a storage. Before PyTorch 2.13 (seen in 2.11) it then
# reads a view with an offset from the wrong place, beyond its end.
_VIEWS_ARE_SAFE = TorchVersion(torch.__version__) >= (2, 13)
_MOST_SETS = 16  # each keeps the memory of its tensors, of which a backend may make copies


class SetKey(NamedTuple):
    """One set is kept for each: a backend may give new memory in every step."""

    group: int
    places: tuple[int, ...]
    kind: Kind


class CompiledSteps:
    """What the operator finds of an optimizer by a number, as long as the optimizer lives."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # of all steps, compiled or not, and of what reads rows or states
        self.skipped: bool | ScaledStep = False  # whether the last step, compiled or not, was; or what knows it
        self.number = number = id(self)
        # A WeakValueDictionary takes longer than the rest. The reference is the default of pop().
        _known[number] = weakref.ref(self, partial(_forget, number))

    @cached_property
    def sets(self) -> BoundedCache[SetKey, ParameterSet]:
        """Those of compiled steps."""
        return BoundedCache(_MOST_SETS)


_known: dict[int, weakref.ref[CompiledSteps]] = {}
_forget = _known.pop


def _renew_locks() -> None:
    """A thread that held a lock when the process forked does not exist in the child."""
    for known in list(_known.values()):
        if (steps := known()) is not None:
            steps.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class Columns(NamedTuple):
    """What ``_init_group`` fills: one tensor for each parameter that has a gradient."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad
    state_steps: list[Tensor]

    def fill(self, group: Group, groups: list[Group], states: States, options: Options) -> bool:
        """Add the parameters of a group and their states, which then are the optimizer's.

        Returns:
            False, with nothing added, if only an eager step can use the gradients or say what is wrong.
        """
        stepped = [param for param in group["params"] if param.grad is not None]
        if options.sparse_update in DEFERRED or any(param.grad.layout != torch.strided for param in stepped):
            return False
        if any(hasattr(param, "_local_tensor") for param in stepped):  # a DTensor, which the operator does not take
            return False
        index = next(index for index, other in enumerate(groups) if other is group)
        labels = [label_of(group, index, k) for k, param in enumerate(group["params"]) if param.grad is not None]
        try:
            check_options(group)
            for param, label in zip(stepped, labels, strict=True):
                check_flags(group, param, label, options.sparse_update)
            named = states_of(states, stepped, labels, options.state_format(group)) if stepped else []
            moments = [value for state in named for key, value in state.items() if key.startswith("exp_avg")]
            if not _VIEWS_ARE_SAFE and _are_parts_of_one_storage([*stepped, *moments]):
                return False
        except (RuntimeError, TypeError, ValueError):
            return False  # in the compiler these would be internal errors
        states.update(zip(stepped, named, strict=True))
        if not _VIEWS_ARE_SAFE:
            _count_apart(states)
        for param, state in zip(stepped, named, strict=True):
            self.params.append(param)
            self.grads.append(param.grad)
            self.exp_avgs.append(state["exp_avg"])
            self.exp_avg_sqs.append(state["exp_avg_sq"])
            if group["amsgrad"]:
                self.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
            self.state_steps.append(state["step"])
        return True


def _are_parts_of_one_storage(tensors: list[Tensor]) -> bool:
    """Whether one with an offset shares its storage with another one; a wrapper of other tensors has no storage."""
    plain = [tensor for tensor in tensors if tensor.numel() and not is_traceable_wrapper_subclass(tensor)]
    places = [(tensor.untyped_storage().data_ptr(), tensor.storage_offset()) for tensor in plain]
    tensors_in = Counter(storage for storage, _ in places)
    return any(offset > 0 and tensors_in[storage] > 1 for storage, offset in places)


def _count_apart(states: States) -> None:
    """Let step counts that are views of one tensor be tensors of their own."""
    apart: dict[int, Tensor] = {}  # by address: a count of several parameters stays one
    for state in states.values():
        step = state.get("step")
        if isinstance(step, Tensor) and step.untyped_storage().nbytes() > step.nbytes:
            state["step"] = apart.setdefault(step.data_ptr(), step.clone())


def traced_step(
    index: int, group: Group, columns: Columns, grad_scale: Tensor | None, found_inf: Tensor | None, number: int
) -> None:
    """The step of a group, as ``torch.compile`` traces it."""
    rate = group["lr"]
    torch.ops.fastadam.adam_(
        *columns,
        grad_scale,
        found_inf,
        rate if isinstance(rate, Tensor) else None,
        0.0 if isinstance(rate, Tensor) else rate,
        group["betas"][0],
        group["betas"][1],
        group["eps"],
        group["weight_decay"],
        group["decoupled_weight_decay"],
        group["maximize"],
        index,
        number,
        bool(group["fused"]),
        bool(group["foreach"]),
    )
    if grad_scale is not None:
        for gradient in columns.grads:
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # which has the scale
            unscaled = wide / grad_scale
            gradient.copy_(unscaled if found_inf is None else torch.where(found_inf == 0, unscaled, wide))


def _adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    group: int,
    owner: int,
    fused: bool = False,
    foreach: bool = False,
) -> None:
    scaled = ScaledStep(grad_scale, found_inf)
    known = _known.get(owner)
    steps = None if known is None else known()
    if steps is not None:
        steps.skipped = scaled.skips
    if scaled.skips:
        return
    columns = Columns(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    with contextlib.nullcontext() if steps is None else steps.lock:
        calls = []
        kind = Kind("dense", rows=False, amsgrad=bool(max_exp_avg_sqs), decays=decoupled)
        for (turn, count), places in _by_turn_and_count(params, state_steps, fused, foreach).items():
            chosen = _set_of(steps, SetKey(group, tuple(places), kind), columns)
            rate = lr_tensor if chosen.context is not None and is_on_gpu(lr_tensor) else None
            if chosen.context is not None:
                chosen.set_device_numbers(rate)
            hyper = StepHyper(
                step=whole_count(count, chosen.labels[0]) + turn.earlier,
                learning_rate=lr if lr_tensor is None else float(lr_tensor) if rate is None else 0.0,
                beta_1=beta1,
                beta_2=beta2,
                epsilon=eps,
                gradient_scale=scaled.gradient_scale,
                weight_decay=weight_decay if decoupled else 0.0,
                l2=0.0 if decoupled else weight_decay,
                epsilon_corrected=True,
            )
            gradients = chosen.read_gradients(scaled.divided([grads[place] for place in places]), densify=True)
            factors = chosen.factors_of({"maximize": maximize})
            calls.append((chosen, chosen.check(gradients, hyper, factors), hyper, factors))
        for chosen, gradients, hyper, factors in calls:
            before = int(chosen.counter)
            try:
                chosen.step(gradients, hyper, factors)
            finally:
                if int(chosen.counter) > before:
                    chosen.finish(hyper.step)


def _by_turn_and_count(
    params: list[Tensor], steps: list[Tensor], fused: bool, foreach: bool
) -> dict[tuple[Turn, float], list[int]]:
    turns = turns_of(params, steps, fused=fused, foreach=foreach)
    places: dict[tuple[Turn, float], list[int]] = {}
    for place, key in enumerate(zip(turns, map(float, steps), strict=True)):
        places.setdefault(key, []).append(place)
    return dict(sorted(places.items()))


def _set_of(steps: CompiledSteps | None, key: SetKey, columns: Columns) -> ParameterSet:
    """The set of the last step if it was made with this memory; otherwise a new one."""
    names = list(key.kind.slots.values())
    slots = [columns.exp_avgs, columns.exp_avg_sqs, columns.max_exp_avg_sqs][: len(names)]
    params = [columns.params[place] for place in key.places]
    states = [
        {"step": columns.state_steps[place], **{name: slot[place] for name, slot in zip(names, slots, strict=True)}}
        for place in key.places
    ]
    kept = None if steps is None else steps.sets.get(key)
    if kept is not None and kept.move_to(params, states):
        return kept
    labels = [f"params[{place}]" for place in key.places]
    made = ParameterSet(params, states, labels, list(key.places), key.kind, [])
    if steps is not None:
        steps.sets.put(key, made)
    return made


def _fake_adam(*_arguments: object) -> None:
    """The operator returns nothing, and what it mutates keeps its shape."""


for _device in ("CPU", "CUDA"):
    _library.impl("adam_", _adam, _device)
torch.library.register_fake("fastadam::adam_", _fake_adam, lib=_library)
