"""State dicts: tensors that are loaded are cloned, and moments keep their dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["HALF", "keep_tensors", "restore_states", "zero_steps"]

HALF = (torch.float16, torch.bfloat16)


class _Kept:
    """A tensor that ``torch.optim.Optimizer.load_state_dict`` neither casts to the parameter's dtype nor looks into."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def keep_tensors(_optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook before loading, the last one."""
    state = {
        key: {name: _Kept(x) if isinstance(x, Tensor) else x for name, x in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def restore_states(state: Any, groups: list[dict[str, Any]], moments_dtype: torch.dtype | None) -> None:
    """Replace what :func:`keep_tensors` kept by clones beside their parameters, and lay step counts side by side.

    Moments keep their dtype if it is the parameter's, or float32 for a half parameter. Any other, which the kernels do
    not have, becomes the parameter's, or ``moments_dtype``.
    """
    for group in groups:
        states = [(param, state[param]) for param in group["params"] if state.get(param)]
        for param, named in states:
            for name, value in named.items():
                if isinstance(value, _Kept) and name != "step":
                    named[name] = _moment_like(param, value.tensor, moments_dtype)
        _place_steps(states, on_device=group["capturable"] or bool(group["fused"]))


def _moment_like(param: Tensor, value: Tensor, moments_dtype: torch.dtype | None) -> Tensor:
    dtype = value.dtype
    if param.dtype in HALF:
        dtype = moments_dtype or (dtype if dtype == torch.float32 else param.dtype)
    elif value.is_floating_point() or value.is_complex():
        dtype = param.dtype
    return value.detach().to(device=param.device, dtype=dtype).clone(memory_format=torch.preserve_format)


def _place_steps(states: list[tuple[Tensor, dict[str, Any]]], *, on_device: bool) -> None:
    places: dict[torch.device, list[tuple[dict[str, Any], float]]] = {}
    for param, named in states:
        if "step" not in named:
            continue
        step = named["step"].tensor if isinstance(named["step"], _Kept) else named["step"]
        device = param.device if on_device else torch.device("cpu")
        places.setdefault(device, []).append((named, float(step)))
    for device, found in places.items():
        steps = zero_steps(len(found), device)
        for (named, count), step in zip(found, steps, strict=True):
            named["step"] = step.fill_(count)


def zero_steps(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Step counts side by side, of torch's dtype."""
    in_double = device.type == "cpu" and torch.get_default_dtype() == torch.float64
    return torch.zeros(count, dtype=torch.float64 if in_double else torch.float32, device=device).unbind()
