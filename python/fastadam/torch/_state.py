"""States of parameters: which tensors they consist of, how they begin, and what a step refuses of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastadam._core.common.types import SparseUpdate
from fastadam._core.native.backend import _cpu
from fastadam.torch._checks import ParamState, States
from fastadam.torch._formats import StateFormat
from fastadam.torch._layout import is_lazy_view, local_of
from fastadam.torch._step_count import number_of, zero_steps
from fastadam.torch._stored import HALF, LOW, MASTER, SLOTS, Stored

__all__ = ["NEEDED", "Kind", "check_slots", "kind_of", "require_keys", "states_of"]

_HOST = torch.device("cpu")
NEEDED = ("step", "exp_avg", "exp_avg_sq")  # in a state that is not empty


class Kind(NamedTuple):
    """How the parameters of a set are stepped."""

    mode: SparseUpdate
    rows: bool  # sparse gradients are rows; otherwise they are dense gradients that are mostly zero
    amsgrad: bool
    decays: bool  # by decoupled weight decay, if there is any
    axes: int = 1  # how many axes, from the first, the indices of sparse gradients have; a "row" is one element of them
    stored: Stored = Stored()

    @property
    def slots(self) -> dict[str, str]:
        """What native code calls the slots: what the states call them. Those of another shape come last."""
        return _slots_of(self.amsgrad, self.stored)


kind_of = lru_cache(maxsize=64)(Kind)  # the one object of equal kinds


@lru_cache(maxsize=64)  # there are fewer
def _slots_of(amsgrad: bool, stored: Stored) -> dict[str, str]:
    moments = SLOTS if amsgrad else {name: SLOTS[name] for name in ("m", "v")}
    return {**moments, **stored.slots}


def states_of(known: States, params: list[Tensor], labels: list[str], state_format: StateFormat) -> list[ParamState]:
    """The optimizer's states of these parameters, and new ones for the others, which are not the optimizer's yet.

    Nor are copies of states that lacked something, which the copies have.
    """
    made: dict[int, ParamState] = {}  # a parameter may come twice
    states = [known.get(param) or made.setdefault(id(param), {}) for param in params]
    completed: dict[int, ParamState] = {}  # by the identity of the state
    places = {id(param): k for k, param in enumerate(params)}
    fresh = [places[key] for key in made]
    group = state_format.group
    on_device = group.get("capturable") or (group.get("fused") and params[0].is_cuda)
    steps = zero_steps(len(fresh), params[0].device if on_device else _HOST)
    for k, step in zip(fresh, steps, strict=True):
        states[k].update({"step": step, **state_format.begin(params[k], labels[k])})
    if len(fresh) < len(states):
        for k, (param, state, label) in enumerate(zip(params, states, labels, strict=True)):
            if id(param) in made:
                continue
            of_state = completed.setdefault(id(state), {**state})
            if "step" in of_state and not isinstance(of_state["step"], Tensor):
                of_state["step"] = torch.tensor(number_of(of_state["step"], f"state of {label}"))
            require_keys(NEEDED, of_state, f"state of {label}")
            state_format.complete(param, of_state, label)
            if not _cpu.same_items(of_state, state):
                states[k] = of_state
    for param, state, label in zip(params, states, labels, strict=True):
        if id(param) in made:
            state_format.complete(param, state, label)
    return states


def require_keys(
    needed: tuple[str, ...], found: Mapping[str, object], label: str, owners: str = "Adam and AdamW"
) -> None:
    """Raise ValueError if a state, a group or a state dict lacks one of the keys."""
    missing = [repr(name) for name in needed if name not in found]
    if missing:
        expected = f"{', '.join(needed[:-1])} and {needed[-1]}"
        raise ValueError(f"{label}: without {', '.join(missing)}, expected {expected}, as {owners} have them")


def check_slots(
    keys: Sequence[str], columns: Sequence[list[Tensor]], params: list[Tensor], labels: list[str], stored: Stored
) -> None:
    """Raise what is wrong with tensors that a step reads and writes, and that have the shapes of parameters.

    Args:
        keys: What the states call the columns; the first is the master.
        columns: The parameters, or masters in their place, then each of their slots.
        params: The parameters.
        labels: What error messages call them.
        stored: How the slots are stored.
    """
    owners: dict[int, str] = {}
    for key, column in zip(keys, columns, strict=True):
        for label, param, value, slot in zip(labels, params, columns[0], column, strict=True):
            if slot is param:
                continue
            found = f"state of {label}: {key}"
            if not isinstance(slot, Tensor):
                raise TypeError(f"{found}: {type(slot).__name__}, expected a tensor")
            if slot.shape != param.shape:
                raise ValueError(f"{found}: shape {tuple(slot.shape)}, expected {tuple(param.shape)}")
            dtype = _dtype_of(key, stored, param.dtype if value is param and not stored.split else torch.float32)
            if stored.moments is not None and param.dtype == torch.float64:
                dtype = param.dtype  # a float64 parameter has no other moments
            if slot.dtype != dtype and not (stored.moments is None and dtype in HALF and slot.dtype == torch.float32):
                raise TypeError(
                    f"{found}: {slot.dtype}, expected {dtype} beside {label} of {param.dtype}; if the module was "
                    "converted after steps, as by module.double(), then opt.load_state_dict(opt.state_dict()) "
                    "converts the states"
                )
            if is_lazy_view(slot):
                raise ValueError(f"{found}: a conjugated or negated view, expected a tensor of its own")
            if slot.device != param.device:
                raise RuntimeError(f"{found}: on {slot.device}, expected {param.device}")
            local = local_of(slot)
            owner = owners.setdefault(local.data_ptr(), found) if local.numel() else found
            if owner != found:
                raise ValueError(f"{found}: shares memory with the {owner}, expected a tensor of its own")


def _dtype_of(key: str, stored: Stored, own: torch.dtype) -> torch.dtype:
    """The dtype that a slot of this key has beside a parameter or master of the dtype ``own``."""
    if key == LOW:
        return torch.int16
    if key == MASTER or stored.moments is None:
        return own
    return torch.uint8 if stored.moments == "8bit" else torch.bfloat16
