"""State dicts and unpickled states: checked, and brought into the form in which the optimizer keeps them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastadam.torch._checks import Group, ParamState, States, check_saved_group, label_of
from fastadam.torch._state import (
    MASTER,
    NEEDED,
    SLOTS,
    StateFormat,
    require_keys,
)
from fastadam.torch._step_count import number_of, whole_count, zero_steps

__all__ = ["check_is_dict", "fill_groups", "keep_tensors", "restore_states"]

_FLAGS = ("foreach", "capturable", "differentiable", "fused")  # they belong to the implementation, not to the rule
_NAMES = ("step", *SLOTS.values())
_NEEDED_IN_GROUP = ("lr", "betas", "eps")
_NEEDED_IN_DICT = ("state", "param_groups")


def fill_groups(groups: list[Group], before: list[Group]) -> None:
    """Add the options that older versions and other optimizers do not save.

    The flags of the groups ``before`` stay, and their ``compute_params``, which are not saved.
    """
    for index, group in enumerate(groups):
        for name in ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay"):
            group.setdefault(name, False)
        for name in ("foreach", "fused"):
            group.setdefault(name, None)
        group.setdefault("weight_decay", 0)  # SparseAdam has none
        if before:
            group.update({name: before[index][name] for name in _FLAGS})
            group.pop("compute_params", None)
            group.update({name: before[index][name] for name in ("compute_params",) if name in before[index]})


def check_is_dict(state_dict: object) -> None:
    """Raise TypeError for what not even a hook can turn into a state dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: {_shown(state_dict)}, expected a dict, as state_dict() returns it")


def _check_structure(state_dict: Mapping[str, object]) -> None:
    require_keys(_NEEDED_IN_DICT, state_dict, "state_dict")
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping):
        raise TypeError(f"state_dict: state: {_shown(states)}, expected a dict of the states of the parameters")
    if not isinstance(groups, (list, tuple)):
        raise TypeError(f"state_dict: param_groups: {_shown(groups)}, expected a list of dicts")
    for index, group in enumerate(groups):
        label = f"state_dict: param_groups[{index}]"
        if not isinstance(group, Mapping):
            raise TypeError(f"{label}: {_shown(group)}, expected a dict")
        if not isinstance(group.get("params"), (list, tuple)):
            found = _shown(group["params"]) if "params" in group else "missing"
            raise TypeError(f"{label}: params: {found}, expected a list of the parameters' numbers")
        for place, key in enumerate(group["params"]):
            if not isinstance(key, Hashable):
                raise TypeError(f"{label}: params[{place}]: {_shown(key)}, expected the number of a parameter")


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}" if isinstance(value, (str, bytes)) else type(value).__name__


class _Kept:
    """Hides a value from ``torch.optim.Optimizer.load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, value: object) -> None:
        self.value = value


def keep_tensors(optimizer: torch.optim.Optimizer, state_dict: ParamState) -> ParamState:
    """The last hook before loading; torch takes entries that belong to no parameter unchanged.

    Raises:
        TypeError: A part of the state dict, or an option of a group, has the wrong type.
        ValueError: A group or a state of another optimizer, such as SGD; or an option that is out of range.
    """
    check_is_dict(state_dict)  # a hook may have returned it
    _check_structure(state_dict)
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=False)):
        require_keys(_NEEDED_IN_GROUP, saved, f"state_dict: param_groups[{index}]")
        check_saved_group(saved, f"state_dict: param_groups[{index}]")
        for place, key in enumerate(saved["params"][: len(group["params"])]):
            state = state_dict["state"].get(key)
            if state and isinstance(state, dict):
                require_keys(NEEDED, state, f"state of {label_of(group, index, place)}")
    known = {key for group in state_dict["param_groups"] for key in group["params"]}
    state = {
        key: {name: _Kept(x) if isinstance(x, Tensor) or name in _NAMES else x for name, x in value.items()}
        if key in known and isinstance(value, dict)
        else value
        for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def restore_states(state: States, groups: list[Group], state_format: StateFormat) -> None:
    """Replace what :func:`keep_tensors` kept by clones on the parameters' devices, with step counts side by side.

    Other tensors, which were unpickled or copied with the optimizer, stay as they are: another process may share them.
    A moment that is loaded keeps its dtype if that is the parameter's, or if it is float32 and the parameter is half
    precision. Other dtypes, which the kernels do not support, become that of a new moment. Masters are left out if the
    parameter has none: they would not be stepped.

    Raises:
        TypeError: A state is not a dict, or a moment is not a tensor of floating point numbers.
        ValueError: A moment is sparse, has no data or another shape, or a step is not a count.
    """
    for index, group in enumerate(groups):
        states = []
        for place, param in enumerate(group["params"]):
            if not state.get(param):
                continue
            named, called = state[param], label_of(group, index, place)
            label = f"state of {called}"
            if not isinstance(named, dict):
                raise TypeError(f"{label}: {type(named).__name__}, expected a dict")
            if isinstance(named.get(MASTER), _Kept) and not state_format.has_master(param):
                del named[MASTER]
            for name, value in named.items():
                if name == "step" and not isinstance(value, Tensor):
                    named[name] = number_of(value.value if isinstance(value, _Kept) else value, label)
                    if isinstance(value, _Kept):
                        whole_count(named[name], called)
                elif name not in _NAMES and name != MASTER and isinstance(value, _Kept):
                    named[name] = _foreign_like(param, value.value, state_format, label, name)
                elif isinstance(value, _Kept):
                    named[name] = _moment_like(param, value.value, state_format, f"{label}: {name}")
            states.append((param, named))
        _place_steps(states, on_device=group["capturable"] or bool(group["fused"]))


def _foreign_like(param: Tensor, value: Tensor, state_format: StateFormat, label: str, name: str) -> Tensor:
    """What another program has put into the state; it is taken if it has the parameter's shape."""
    _refuse_wrapper(value, f"{label}: {name}")
    if value.shape != param.shape:
        expected = "step, exp_avg and exp_avg_sq, as Adam and AdamW have them"
        raise ValueError(f"{label}: with {name!r} of shape {tuple(value.shape)}, expected {expected}")
    return _cloned_like(param, value, state_format, f"{label}: {name}")


def _moment_like(param: Tensor, value: object, state_format: StateFormat, label: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label}: {type(value).__name__}, expected a tensor")
    _refuse_wrapper(value, label)
    if value.shape != param.shape:
        raise ValueError(f"{label}: shape {tuple(value.shape)}, expected {tuple(param.shape)}")
    if not value.is_floating_point() and not (value.is_complex() and param.is_complex()):
        expected = f"{param.dtype} or another floating point dtype"
        raise TypeError(f"{label}: {value.dtype}, expected {expected}")
    return _cloned_like(param, value, state_format, label)


def _refuse_wrapper(value: Tensor, label: str) -> None:
    if is_traceable_wrapper_subclass(value) and not hasattr(value, "_local_tensor"):
        raise TypeError(f"{label}: {type(value).__name__}, expected a plain tensor, as its dequantize() may return")


def _cloned_like(param: Tensor, value: Tensor, state_format: StateFormat, label: str) -> Tensor:
    if value.layout != torch.strided:
        raise ValueError(f"{label}: {value.layout}, expected a dense tensor")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{label}: on {value.device}, without data, expected a tensor with data")
    dtype = state_format.dtype_of_loaded(param, value)
    return value.detach().to(device=param.device, dtype=dtype).clone(memory_format=torch.preserve_format)


def _place_steps(states: list[tuple[Tensor, ParamState]], *, on_device: bool) -> None:
    places: dict[torch.device, list[tuple[ParamState, float]]] = {}
    for param, named in states:
        if not isinstance(named.get("step"), float):
            continue  # a tensor that was unpickled, or none
        device = param.device if on_device else torch.device("cpu")
        places.setdefault(device, []).append((named, named["step"]))
    for device, found in places.items():
        steps = zero_steps(len(found), device)
        for (named, count), step in zip(found, steps, strict=True):
            named["step"] = step.fill_(count)
