"""The step under ``torch.compile``: one operator that mutates parameters, moments and step counts.

The host reads the step counts and what a GradScaler says, and waits for a GPU that holds them.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadam._core.native.plan import StepHyper
from fastadam.torch._counts import lies_on_gpu, whole_count
from fastadam.torch._sets import Kind, ParameterSet
from fastadam.torch._states import SLOTS

__all__ = ["remember", "traced_step"]

_library: Any = torch.library.Library("fastadam", "FRAGMENT")
_library.define(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize, int owner) -> ()"
)
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def remember(optimizer: Any) -> int:
    """A number by which the operator finds the optimizer, whose plans it keeps, as long as it lives."""
    _optimizers[id(optimizer)] = optimizer
    return id(optimizer)


def traced_step(optimizer: Any) -> None:
    """What ``torch.compile`` traces; ``_init_group`` is run while it does, as it is for torch's own optimizers."""
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        optimizer._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        if not params:
            continue
        rate = group["lr"]
        torch.ops.fastadam.adam_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
            rate if isinstance(rate, Tensor) else None,
            0.0 if isinstance(rate, Tensor) else rate,
            group["betas"][0],
            group["betas"][1],
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
            optimizer._number,
        )


def _adam(*arguments: Any) -> None:
    optimizer = _optimizers.get(arguments[-1])
    with contextlib.nullcontext() if optimizer is None else optimizer._lock:
        _step(*arguments)


def _step(
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
    owner: int,
) -> None:
    if found_inf is not None and float(found_inf):
        return
    names = tuple(SLOTS.values()) if max_exp_avg_sqs else (SLOTS["m"], SLOTS["v"])
    columns = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs][: len(names)]
    states = [
        {"step": step, **dict(zip(names, row, strict=True))} for step, *row in zip(state_steps, *columns, strict=True)
    ]
    kind = Kind("dense", rows=False, amsgrad=bool(max_exp_avg_sqs), decays=decoupled)
    calls = []
    for count, places in _by_count(state_steps).items():
        together = _set_of(owner, params, states, places, kind)
        rate = lr_tensor if together.context is not None and lies_on_gpu(lr_tensor) else None
        if together.context is not None:
            together.set_device_numbers(rate)
        hyper = StepHyper(
            step=whole_count(count, together.labels[0]),
            learning_rate=lr if lr_tensor is None else float(lr_tensor) if rate is None else 0.0,
            beta_1=beta1,
            beta_2=beta2,
            epsilon=eps,
            gradient_scale=1.0 if grad_scale is None else 1.0 / float(grad_scale),
            weight_decay=weight_decay if decoupled else 0.0,
            l2=0.0 if decoupled else weight_decay,
            epsilon_corrected=True,
        )
        gradients = together.read_gradients([grads[place] for place in places], densify=True)
        factors = together.reversed if maximize else []
        gradients = together.check(gradients, hyper, factors)
        calls.append((together, gradients, hyper, factors))
    for together, gradients, hyper, factors in calls:
        counter = np.zeros((), np.int64)
        try:
            together.step(gradients, hyper, factors, counter)
        finally:
            if counter:
                together.finish(hyper.step)


def _by_count(steps: list[Tensor]) -> dict[float, list[int]]:
    places: dict[float, list[int]] = {}
    for place, step in enumerate(steps):
        places.setdefault(float(step), []).append(place)
    return places


def _set_of(
    owner: int, params: list[Tensor], states: list[dict[str, Any]], places: list[int], kind: Kind
) -> ParameterSet:
    """That of the last step if it was made with this memory, which a backend may give anew each time."""
    optimizer = _optimizers.get(owner)
    kept = {} if optimizer is None else optimizer._compiled_sets
    key = (params[places[0]].data_ptr(), tuple(places), kind.slots, kind.decays)
    chosen, named = [params[place] for place in places], [states[place] for place in places]
    found: ParameterSet | None = kept.get(key)
    if found is not None and found.move_to(chosen, named):
        return found
    labels = [f"params[{place}]" for place in places]
    kept.clear()
    made = kept[key] = ParameterSet(chosen, named, labels, places, kind, [None] * len(places))
    return made


def _fake_adam(*_arguments: Any) -> None:
    """It returns nothing; what it mutates keeps its shape."""


for _device in ("CPU", "CUDA"):
    _library.impl("adam_", _adam, _device)
torch.library.register_fake("fastadam::adam_", _fake_adam, lib=_library)
