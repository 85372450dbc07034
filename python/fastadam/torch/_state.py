"""States of parameters: which tensors they consist of, how they begin, and what a step refuses of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadam._core.common.types import SparseUpdate
from fastadam.torch._checks import Group, ParamState, States
from fastadam.torch._layout import is_lazy_view, local_of
from fastadam.torch._step_count import number_of, zero_steps

__all__ = ["HALF", "MASTER", "NEEDED", "SLOTS", "Kind", "StateFormat", "check_slots", "require_keys", "states_of"]

HALF = (torch.float16, torch.bfloat16)
SLOTS = {"m": "exp_avg", "v": "exp_avg_sq", "vhat": "max_exp_avg_sq"}  # fastadam's names: torch's
MASTER = "master"  # key of the float32 value that a half parameter is rounded from, with master_weights
NEEDED = ("step", "exp_avg", "exp_avg_sq")  # in a state that is not empty


class Kind(NamedTuple):
    """How the parameters of a set are stepped."""

    mode: SparseUpdate
    rows: bool  # sparse gradients are rows; otherwise they are dense gradients that are mostly zero
    amsgrad: bool
    decays: bool  # by decoupled weight decay, if there is any
    axes: int = 1  # how many axes, from the first, the indices of sparse gradients have; a "row" is one element of them

    @property
    def slots(self) -> tuple[str, ...]:
        """What native code calls the moments."""
        return tuple(SLOTS) if self.amsgrad else ("m", "v")


class StateFormat(NamedTuple):
    """The tensors of a parameter's state besides its step count, and their dtypes."""

    moments_dtype: torch.dtype | None = None  # of half parameters; None for the parameter's
    has_masters: bool = False  # half parameters are rounded from float32 values in their states

    def has_master(self, param: Tensor) -> bool:
        """Whether a parameter is rounded from a master."""
        return self.has_masters and param.dtype in HALF

    def begin(self, param: Tensor) -> ParamState:
        """The moments of a parameter before its first step."""
        dtype = self.moments_dtype if param.dtype in HALF else None

        def zeros() -> Tensor:
            return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

        return {SLOTS[name]: zeros() for name in ("m", "v")}

    def complete(self, param: Tensor, state: ParamState, *, amsgrad: bool) -> None:
        """Add what a state lacks that was begun or saved with other options."""
        if amsgrad and SLOTS["vhat"] not in state:
            state[SLOTS["vhat"]] = torch.zeros_like(state[SLOTS["v"]], memory_format=torch.preserve_format)
        if self.has_master(param) and MASTER not in state:
            state[MASTER] = param.detach().to(torch.float32, memory_format=torch.preserve_format)

    def dtype_of_loaded(self, param: Tensor, saved: Tensor) -> torch.dtype:
        """The dtype that a saved moment or master gets."""
        if param.dtype in HALF:
            return self.moments_dtype or (saved.dtype if saved.dtype == torch.float32 else param.dtype)
        return param.dtype if saved.is_floating_point() or saved.is_complex() else saved.dtype


def states_of(
    known: States, params: list[Tensor], labels: list[str], group: Group, state_format: StateFormat
) -> list[ParamState]:
    """The optimizer's states of these parameters, and new ones for the others, which are not the optimizer's yet."""
    made: dict[int, ParamState] = {}  # a parameter may come twice
    states = [known.get(param) or made.setdefault(id(param), {}) for param in params]
    places = {id(param): k for k, param in enumerate(params)}
    fresh = [places[key] for key in made]
    on_device = group["capturable"] or (group["fused"] and params[0].is_cuda)
    steps = zero_steps(len(fresh), params[0].device if on_device else torch.device("cpu"))
    for k, step in zip(fresh, steps, strict=True):
        states[k].update({"step": step, **state_format.begin(params[k])})
    for state, label in zip(states, labels, strict=True):
        if "step" in state and not isinstance(state["step"], Tensor):
            state["step"] = torch.tensor(number_of(state["step"], f"state of {label}"))
        require_keys(NEEDED, state, f"state of {label}")
    for param, state in zip(params, states, strict=True):
        state_format.complete(param, state, amsgrad=group["amsgrad"])
    return states


def require_keys(needed: tuple[str, ...], found: Mapping[str, object], label: str) -> None:
    """Raise ValueError if a state, a group or a state dict lacks one of the keys."""
    missing = [repr(name) for name in needed if name not in found]
    if missing:
        expected = f"{', '.join(needed[:-1])} and {needed[-1]}"
        raise ValueError(f"{label}: without {', '.join(missing)}, expected {expected}, as Adam and AdamW have them")


def check_slots(keys: Sequence[str], columns: Sequence[list[Tensor]], params: list[Tensor], labels: list[str]) -> None:
    """Raise what is wrong with tensors that a step reads and writes.

    Args:
        keys: What the states call the columns; the first is the master.
        columns: The parameters, or masters in their place, then each of their slots.
        params: The parameters.
        labels: What error messages call them.
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
            dtype = param.dtype if value is param else torch.float32
            if slot.dtype != dtype and not (dtype in HALF and slot.dtype == torch.float32):
                raise TypeError(f"{found}: {slot.dtype}, expected {dtype}")
            if is_lazy_view(slot):
                raise ValueError(f"{found}: a conjugated or negated view, expected a tensor of its own")
            if slot.device != param.device:
                raise RuntimeError(f"{found}: on {slot.device}, expected {param.device}")
            local = local_of(slot)
            owner = owners.setdefault(local.data_ptr(), found) if local.numel() else found
            if owner != found:
                raise ValueError(f"{found}: shares memory with the {owner}, expected a tensor of its own")
