"""Parameters that are replaced by longer, shorter or permuted ones, forgotten, or given moments of zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadam._core.native.arrays import untouched_zeros
from fastadam._core.native.rows import RowMap, chunks_of
from fastadam._core.native.slices import check_ids
from fastadam.torch._attached import attach_to, release
from fastadam.torch._checks import Group, ParamState, States
from fastadam.torch._conversion import Key, decoded, encoded
from fastadam.torch._layout import is_lazy_view
from fastadam.torch._step import GroupStepper
from fastadam.torch._stored import MASTER, SCALES, SLOTS

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, ArrayLike
    from fastadam.torch._deferred import Table
    from fastadam.torch._options import Options

__all__ = ["forget", "reset", "resize"]

_KEYS = {key: name for name, key in SLOTS.items()}  # torch's names: ours
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Held(NamedTuple):
    """What an optimizer consists of."""

    stepper: GroupStepper
    options: Options
    groups: list[Group]
    states: States
    read: Callable[[Tensor, AnyArray | None], None]  # before rows of an attached parameter are read


class Place(NamedTuple):
    """Where a parameter is in the groups; it may come several times."""

    group: int
    place: int


def resize(held: Held, old: Tensor, new: Tensor, rows: ArrayLike | None) -> None:
    """See ``Adam.resize``; call it under the lock."""
    places = _places_of(held, old, "resize", "old")
    stepper, options, groups, states, _ = held
    _check_new(old, new, groups)
    state, table = states.get(old) or {}, stepper.tables.find(old)
    length = len(state[SLOTS["m"]]) if old is new and SLOTS["m"] in state else len(old) if old.ndim else 1
    row_map = RowMap.of(_on_host(rows), length, len(new) if new.ndim else 1, "old")
    if table is not None:
        table.require_untouched()
        _check_values(table, old, new, row_map)
    moved = _moved(held, state, new, length, row_map, places[0])
    twin = None if table is None else table.replaced(new, moved, row_map)
    copies = [(place, _rounded_copy(groups, place, new)) for place in places]
    if state:
        states[new] = moved
    stepper.tables.replace(old, twin)
    for place, copy in copies:
        group = groups[place.group]
        if copy is not None:
            group["compute_params"][place.place] = copy
        group["params"][place.place] = new
    if old is not new:
        states.pop(old, None)
    if old is not new and release(old, options.attached) and isinstance(new, torch.nn.Parameter):
        attach_to(new, held.read)
        options.attached.append(new)
    stepper.let_go()


def forget(held: Held, param: Tensor) -> None:
    """See ``Adam.forget``; call it under the lock."""
    places = _places_of(held, param, "forget", "param")
    stepper, options, groups, states, _ = held
    stepper.catch_up(states, param)
    stepper.tables.replace(param, None)
    for place in reversed(places):
        group = groups[place.group]
        for name in ("params", "param_names", "compute_params"):
            if group.get(name) is not None:
                del group[name][place.place]
    states.pop(param, None)
    release(param, options.attached)
    stepper.let_go()


def reset(held: Held, param: Tensor | None, rows: ArrayLike | None) -> None:
    """See ``Adam.reset``; call it under the lock."""
    stepper, _, groups, states, _ = held
    if param is None:
        if rows is not None:
            raise ValueError("rows: given without param, expected the parameter that they are rows of")
        chosen = [p for group in groups for p in group["params"]]
        _require_between_steps(held, "reset")
    else:
        _places_of(held, param, "reset", "param")
        chosen = [param]
    ids = None
    if rows is not None:
        ids = np.unique(check_ids(_on_host(rows), tuple(chosen[0].shape), "param", "rows")).astype(np.int64)
        _require_plain(chosen[0], "param")
    stepper.catch_up(states, param, ids)
    for each in dict.fromkeys(chosen):
        _zero(states.get(each) or {}, ids, stepper.tables.find(each))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _require_between_steps(held: Held, call: str) -> None:
    stepper, states = held.stepper, held.states
    stepper.require_closed(call)
    if stepper.overlap is not None:
        raise RuntimeError(f"{call}: an overlap() of this optimizer is attached, expected its detach() first")
    if stepper.calls.are_captured:
        raise RuntimeError(f"{call}: a CUDA graph has captured a step of this optimizer, expected none")
    stepper.calls.finish(states)
    stepper.tables.note_states(states)


def _places_of(held: Held, param: Tensor, call: str, argument: str) -> list[Place]:
    _require_between_steps(held, call)
    groups = held.groups
    if not isinstance(param, Tensor):
        raise TypeError(f"{argument}: {type(param).__name__}, expected a parameter of this optimizer")
    places = [Place(i, k) for i, group in enumerate(groups) for k, each in enumerate(group["params"]) if each is param]
    if not places:
        raise ValueError(f"{argument}: a tensor of shape {tuple(param.shape)}, expected a parameter of this optimizer")
    return places


def _require_plain(tensor: Tensor, argument: str) -> None:
    """Refuse tensors whose rows this process cannot move."""
    if hasattr(tensor, "_local_tensor"):
        raise TypeError(f"{argument}: {type(tensor).__name__}, expected a plain tensor: no process has all of its rows")


def _check_new(old: Tensor, new: object, groups: list[Group]) -> None:
    if not isinstance(new, Tensor):
        raise TypeError(f"new: {type(new).__name__}, expected a tensor")
    if new is not old and any(each is new for group in groups for each in group["params"]):
        raise ValueError("new: a parameter of this optimizer already, expected one that it does not step")
    for name, tensor in (("old", old), ("new", new)):
        _require_plain(tensor, name)
    if not (new.is_leaf or new.retains_grad):
        raise ValueError("new: the result of other tensors, expected a leaf: torch.nn.Parameter(values)")
    kinds = [(t.dtype, t.device, t.layout, t.ndim, t.shape[1:]) for t in (old, new)]
    if kinds[0] != kinds[1] or is_lazy_view(new):
        shape = str(("n", *old.shape[1:]) if old.ndim else ()).replace("'", "")
        found = f"{new.dtype} {tuple(new.shape)} on {new.device}"
        raise ValueError(f"new: {found}, expected {old.dtype} {shape} on {old.device} like old")


def _check_values(table: Table, old: Tensor, new: Tensor, row_map: RowMap) -> None:
    """Raise ValueError if a row that steps have changed, or are to change, is something else in the new parameter."""
    if old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr():
        if table.history.waits and (old is new or old.data_ptr() != new.data_ptr() or not row_map.keeps_places):
            raise ValueError(
                "new: in the memory of old, whose rows wait for their steps; expected sync() before the values are "
                "moved"
            )
        return
    for chunk in chunks_of(row_map.waiting(table.history.moved_so_far()), _row_bytes(old)):
        before = old.detach()[torch.from_numpy(row_map.sources[chunk])]
        differ = (_bits(before) != _bits(new.detach()[torch.from_numpy(chunk)])).any(1)
        if differ.any():
            row = int(chunk[differ.nonzero()[0]])
            raise ValueError(
                f"new: row {row} is not the one of old as it is now, so that steps of it may be missing; "
                "expected the values to be copied right before the call, and changed after it"
            )


# ---- states ----------------------------------------------------------------------------------------------------------


def _moved(held: Held, state: ParamState, new: Tensor, length: int, row_map: RowMap, place: Place) -> ParamState:
    """The state of a parameter for the one that replaces it; 8-bit moments are rounded anew."""
    groups, moves_rows_alone = held.groups, held.options.sparse_update != "dense"
    shape = torch.Size([length, *new.shape[1:]]) if new.ndim else new.shape
    moved: ParamState = {}
    for key, value in state.items():
        if key in SCALES.values():
            continue  # they come with their moments
        if not isinstance(value, Tensor) or value.shape != shape or key == "step":
            moved[key] = value
            continue
        scale_key = SCALES.get(f"{_KEYS.get(key, '')}_scale", "")
        is_coded = scale_key in state
        before = decoded(value, state[scale_key], signed=key == SLOTS["m"]) if is_coded else value
        after = _zeros(new, before.dtype, moves_rows_alone=moves_rows_alone)
        _move(before, after, row_map)
        if key == MASTER:
            fresh = torch.from_numpy(np.flatnonzero(row_map.sources < 0))
            _with_rows(after)[fresh] = _with_rows(new.detach())[fresh].to(after.dtype)
        if is_coded:
            group = groups[place.group]
            number = sum(len(other["params"]) for other in groups[: place.group]) + place.place
            seeded = Key(int(group.get("seed", 0)), int(state["step"]), number)
            moved[key], moved[scale_key] = encoded(after, new, seeded, signed=key == SLOTS["m"])
        else:
            moved[key] = after
    return moved


def _zeros(new: Tensor, dtype: torch.dtype, *, moves_rows_alone: bool) -> Tensor:
    """A slot in the layout of a parameter; of a table in pages that come to be as rows are touched."""
    if (
        moves_rows_alone
        and new.device.type == "cpu"
        and new.is_contiguous()
        and dtype in (torch.float32, torch.float64)
    ):
        return torch.from_numpy(untouched_zeros(tuple(new.shape), str(dtype).removeprefix("torch.")))
    return torch.zeros_like(new, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def _move(before: Tensor, after: Tensor, row_map: RowMap) -> None:
    """Copy the rows that are kept into a tensor of zeros; rows of zeros are not written."""
    before, after = _with_rows(before), _with_rows(after)
    for chunk in chunks_of(row_map.kept, _row_bytes(after)):
        values = before[torch.from_numpy(row_map.sources[chunk]).to(before.device)]
        is_set = (_bits(values) != 0).any(1)
        after[torch.from_numpy(chunk).to(after.device)[is_set]] = values[is_set]


def _rounded_copy(groups: list[Group], place: Place, new: Tensor) -> Tensor | None:
    """A tensor in the place of the one that received rounded copies of the old parameter, if there was one."""
    computed = groups[place.group].get("compute_params")
    before = None if computed is None else computed[place.place]
    if before is None:
        return None
    copy = new.detach().to(before.dtype, memory_format=torch.preserve_format, copy=True)
    return copy.requires_grad_(before.requires_grad)


def _zero(state: ParamState, ids: npt.NDArray[np.int64] | None, table: Table | None) -> None:
    """Set moments to zero where they are something else; without ``ids`` the step count, too."""
    written = []
    for key, value in state.items():
        if key == "step" and ids is None:
            value.zero_()
        if (key not in SLOTS.values() and key not in SCALES.values()) or not isinstance(value, Tensor):
            continue
        if key in SCALES.values():
            if ids is None:  # codes of zero need no other scale
                value.zero_()
            continue
        if hasattr(value, "_local_tensor"):
            value.zero_()
            continue
        rows = np.arange(len(value) if value.ndim else 1) if ids is None else ids
        if table is not None and ids is None and (moving := table.history.moving_rows()) is not None:
            rows = moving
        for chunk in chunks_of(rows, _row_bytes(value)):
            places = torch.from_numpy(chunk).to(value.device)
            is_set = (_bits(_with_rows(value.detach())[places]) != 0).any(1)
            _with_rows(value.detach())[places[is_set]] = 0
        written.append(value)
    increment_version(written)
    if table is not None:
        table.note_reset(ids)


def _on_host(rows: ArrayLike | None) -> Any:
    return rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows


def _with_rows(tensor: Tensor) -> Tensor:
    """The tensor itself; a view with one row of a tensor without axes."""
    return tensor if tensor.ndim else tensor.reshape(1)


def _row_bytes(tensor: Tensor) -> int:
    rows = len(tensor) if tensor.ndim else 1
    return tensor.numel() * tensor.element_size() // rows if rows else 0


def _bits(rows: Tensor) -> Tensor:
    """The bits of elements, a line for each row; the rows are not empty."""
    plain = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
    return plain.contiguous().view(_BITS[plain.element_size()]).reshape(len(rows), -1)
