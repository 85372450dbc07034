"""State dicts and unpickled states: checked, and brought into the form in which the optimizer keeps them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastadam.exchange._foreign import foreign_states
from fastadam.torch._checks import Group, ParamState, States, check_saved_group, firsts_of, label_of
from fastadam.torch._conversion import Key
from fastadam.torch._formats import OPTIONS, Choice, StateFormat, asked_of, check_seed
from fastadam.torch._loaded_state import OURS, LoadedState
from fastadam.torch._state import NEEDED, require_keys
from fastadam.torch._step_count import number_of, whole_count, zero_steps
from fastadam.torch._stored import MASTER, SCALES, SLOTS

__all__ = ["check_is_dict", "check_structure", "fill_groups", "keep_tensors", "restore_states"]

_FLAGS = ("foreach", "capturable", "differentiable", "fused")  # they belong to the implementation, not to the rule
_NAMES = ("step", *OURS)
_OF_CODES = (SLOTS["m"], SLOTS["v"], *SCALES.values())
_NEEDED_IN_GROUP = ("lr", "betas", "eps")
_NEEDED_IN_DICT = ("state", "param_groups")


class SavedFormat(NamedTuple):
    """What a group asked for where its states were saved, and whether it asks for the same here."""

    has_same_moments: bool
    has_same_master: bool

    def keeps(self, choice: Choice, kept: ParamState) -> Choice:
        """The choice for a state: one that is larger than what its group asked for was so for its sparse gradients."""
        moment = kept.get(SLOTS["m"])
        if self.has_same_moments and isinstance(moment, Tensor) and moment.dtype == torch.float32:
            choice = choice._replace(moments="float32")
        if self.has_same_master and choice.master == "split" and MASTER in kept:
            choice = choice._replace(master="float32")
        return choice


def fill_groups(groups: list[Group], before: list[Group], defaults: Group) -> list[SavedFormat]:
    """Add the options that older versions and other optimizers do not save, and ``defaults``.

    Of the groups ``before`` the flags stay, how they store states, and ``compute_params``, which are not saved.

    Returns:
        For each group what it asked for where it was saved.
    """
    saved = []
    for index, group in enumerate(groups):
        of = before[index] if before else defaults
        saved.append(SavedFormat(*(_is_same(group.get(name, 0), of.get(name)) for name in ("moments", "master"))))
        for name in ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay"):
            group.setdefault(name, False)
        for name in ("foreach", "fused"):
            group.setdefault(name, None)
        group.setdefault("weight_decay", 0)  # SparseAdam has none
        for name, value in {**defaults, **({"seed": of["seed"]} if "seed" in of else {})}.items():
            group.setdefault(name, value)
        if before:
            kept = (*OPTIONS, "compute_params")
            for name in kept:
                group.pop(name, None)
            group.update({name: of[name] for name in (*_FLAGS, *kept) if name in of})
    return saved


def _is_same(saved: object, asked: str | None) -> bool:
    return isinstance(saved, (str, type(None))) and saved == asked


def check_is_dict(state_dict: object) -> None:
    """Raise TypeError for what not even a hook can turn into a state dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: {_shown(state_dict)}, expected a dict, as state_dict() returns it")


def check_structure(state_dict: Mapping[str, object]) -> None:
    """Raise TypeError or ValueError unless it has states and groups of the right types."""
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
    check_structure(state_dict)
    state_dict = {**foreign_states(state_dict)}  # of bitsandbytes and torchao
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=False)):
        require_keys(_NEEDED_IN_GROUP, saved, f"state_dict: param_groups[{index}]")
        check_saved_group(saved, f"state_dict: param_groups[{index}]")
        _check_saved_formats(group, saved, f"state_dict: param_groups[{index}]")
        for place, key in enumerate(saved["params"][: len(group["params"])]):
            state, label = state_dict["state"].get(key, {}), f"state of {label_of(group, index, place)}"
            if not isinstance(state, dict):
                raise TypeError(f"{label}: {_shown(state)}, expected a dict")
            if state:
                require_keys(NEEDED, state, label)
                if _has_codes(state):
                    require_keys(_OF_CODES, state, label, "8-bit moments of fastadam")
    known = {key for group in state_dict["param_groups"] for key in group["params"]}
    state = {
        key: {name: _Kept(x) if isinstance(x, Tensor) or name in _NAMES else x for name, x in value.items()}
        if key in known and isinstance(value, dict)
        else value
        for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _has_codes(state: ParamState) -> bool:
    """Whether a state has 8-bit moments, or parts of them."""
    moments = [state.get(SLOTS[name]) for name in ("m", "v")]
    return any(isinstance(moment, Tensor) and moment.dtype == torch.uint8 for moment in moments) or any(
        key in state for key in SCALES.values()
    )


def _check_saved_formats(group: Group, saved: Group, label: str) -> None:
    try:
        check_seed(saved.get("seed", 0))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}") from error
    if saved.get("amsgrad") and asked_of(group).moments == "8bit":
        raise ValueError(
            f"{label}: amsgrad: True, expected False as the optimizer has moments='8bit', or an optimizer with "
            "moments='bfloat16' or 'float32'"
        )


def restore_states(
    state: States, groups: list[Group], format_of: Callable[[Group], StateFormat], saved: list[SavedFormat]
) -> None:
    """Replace what :func:`keep_tensors` kept by clones on the parameters' devices, with step counts side by side.

    Other tensors, which were unpickled or copied with the optimizer, stay as they are: another process may share them.
    What is loaded is brought into the format that the parameter's group asks for. A moment that the group wants in the
    parameter's dtype stays float32 if it is and the parameter is half precision. Other dtypes, which the kernels do not
    support, become that of a new moment. Masters are left out if the parameter has none: they would not be stepped.

    Args:
        state: Of the optimizer, with what was kept.
        groups: Of the optimizer.
        format_of: What a group asks for.
        saved: For each group what it asked for where it was saved; empty if nothing was loaded.

    Raises:
        TypeError: A state is not a dict, or a moment is not a tensor of floating point numbers.
        ValueError: A moment is sparse, has no data or another shape, or a step is not a count.
    """
    for index, (group, first) in enumerate(zip(groups, firsts_of(groups), strict=False)):
        states = []
        for place, param in enumerate(group["params"]):
            if not state.get(param):
                continue
            named, called = state[param], label_of(group, index, place)
            label = f"state of {called}"
            if not isinstance(named, dict):
                raise TypeError(f"{label}: {type(named).__name__}, expected a dict")
            step = named.get("step")
            if "step" in named and not isinstance(step, Tensor):
                named["step"] = number_of(step.value if isinstance(step, _Kept) else step, label)
                if isinstance(step, _Kept):
                    whole_count(named["step"], called)
            kept = {name: value.value for name, value in named.items() if isinstance(value, _Kept)}
            if kept:
                choice = format_of(group).choose(param, called, is_sparse=False)
                loading = LoadedState(param, kept, saved[index].keeps(choice, kept), label)
                named.update(loading.moments(Key(group.get("seed", 0), int(named["step"]), first + place)))
                named.update(loading.master())
                named.update(loading.others())
                for name in [name for name, value in named.items() if isinstance(value, _Kept)]:
                    del named[name]
            states.append((param, named))
        _place_steps(states, on_device=group["capturable"] or bool(group["fused"]))


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
