"""Tensors that receive parameters, rounded, in the pass that steps them: ``compute_params``, and half parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastadam._core.native.slices import DEFERRED
from fastadam.torch._checks import Group, ParamState, label_of
from fastadam.torch._layout import Turn, clusters_of, is_lazy_view, local_of, span_of, versions_of
from fastadam.torch._stored import HALF, LOW, MASTER, has_no_place

__all__ = ["ComputeParams", "Copies", "check_compute_params", "check_groups_apart", "check_place"]

_KINDS = (torch.bfloat16, torch.float16, torch.float32)


class ComputeParams(list[Any]):
    """The list that a group gets; the ``repr`` of an optimizer does not print its tensors."""

    def __repr__(self) -> str:
        return f"[{sum(each is not None for each in self)} tensors]"


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_compute_params(group: Group, index: int, sparse_update: str) -> None:
    """Check ``compute_params`` of a group of torch's, whose "params" are a list; it becomes a list, too.

    Raises:
        TypeError: It is not a list of tensors and None; or a dtype is wrong, of them or of their parameters.
        ValueError: Its length, a shape, a device or a layout differs from that of the parameters.
    """
    given = group.get("compute_params")
    if given is None:
        return
    name = f"param_groups[{index}]['compute_params']"
    if isinstance(given, (Tensor, set, dict, str)) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: {type(given).__name__}, expected a list of tensors and None")
    tensors = given if isinstance(given, list) else ComputeParams(given)
    params = group["params"]
    if len(tensors) != len(params):
        raise ValueError(f"{name}: {len(tensors)} items, expected {len(params)}, a tensor or None for each parameter")
    if sparse_update in DEFERRED and any(tensor is not None for tensor in tensors):
        raise ValueError(
            f"{name}: tensors with sparse_update={sparse_update!r}, whose rows wait, expected sparse_update='dense' or "
            "'lazy'"
        )
    for place, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if tensor is not None:
            _check(tensor, param, f"{name}[{place}]", label_of(group, index, place))
    group["compute_params"] = tensors


def _check(tensor: object, param: Tensor, name: str, label: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}, expected a tensor or None")
    if param.dtype != torch.float32:
        hint = "; master='float32' keeps float32 masters of half parameters" if param.dtype in HALF else ""
        raise TypeError(f"{name}: beside {label} of {param.dtype}, expected None or a float32 parameter{hint}")
    if tensor.dtype not in _KINDS:
        raise TypeError(f"{name}: {tensor.dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
    if tensor.shape != param.shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(param.shape)} like {label}")
    kinds = ("cpu",) if param.device.type == "cpu" else ("meta",)
    if tensor.device.type not in kinds or param.device.type not in ("cpu", "meta"):
        raise ValueError(f"{name}: on {tensor.device} beside {label} on {param.device}, expected both in CPU memory")
    if tensor.layout != torch.strided or is_lazy_view(tensor):
        raise ValueError(f"{name}: {tensor.layout} or a lazy view, expected a dense tensor of its own")
    if hasattr(tensor, "_local_tensor") != hasattr(param, "_local_tensor"):
        raise TypeError(f"{name}: {type(tensor).__name__}, expected {type(param).__name__} like {label}")
    if hasattr(tensor, "_local_tensor") and tensor.placements != param.placements:
        raise ValueError(f"{name}: other placements than {label}, expected the same")
    local = local_of(tensor)
    if local.numel() and any(n > 1 and not step for n, step in zip(local.shape, local.stride(), strict=True)):
        raise ValueError(f"{name}: strides {local.stride()}, elements share memory; expected a clone of it")


def check_groups_apart(groups: Iterable[tuple[int, Group]]) -> None:
    """Raise ValueError if compute parameters overlap with each other or with parameters of any of the groups.

    Args:
        groups: Groups, each after its place.
    """
    groups = list(groups)
    receivers = [
        (tensor, f"param_groups[{index}]['compute_params'][{place}]")
        for index, group in groups
        for place, tensor in enumerate(group.get("compute_params") or ())
        if tensor is not None
    ]
    if not receivers:
        return
    found: dict[int, tuple[Tensor, str]] = {}
    for index, group in groups:
        for place, param in enumerate(group["params"]):
            found.setdefault(id(param), (param, label_of(group, index, place)))
    named = [pair for pair in (*receivers, *found.values()) if not pair[0].is_meta]
    for cluster in clusters_of([span_of(tensor) for tensor, _ in named]):
        names = [named[place][1] for place in cluster]
        if any(place < len(receivers) for place in cluster):
            raise ValueError(f"{names[0]}: shares memory with {names[1]}, expected memory of its own")


def check_place(copies: Copies, params: list[Tensor], labels: list[str], turn: Turn, *, measures: bool) -> None:
    """Raise ValueError if parameters cannot have copies, or be measured, where they lie."""
    if measures and params[0].is_cuda:
        raise ValueError(f"telemetry: True with {labels[0]} on {params[0].device}, expected parameters in CPU memory")
    for label, param, receiver in zip(labels, params, copies.receivers, strict=False):
        name = "master: 'float32'" if receiver is param else "compute_params: a tensor"
        if receiver is not None and param.is_cuda:
            raise ValueError(f"{name} with {label} on {param.device}, expected parameters in CPU memory")
        if receiver is not None and not turn.owns_memory:
            raise ValueError(
                f"{name} with {label}, which shares memory with another parameter of its group or comes twice, "
                "expected each once and with memory of its own"
            )


# ---- the copies of a set ---------------------------------------------------------------------------------------------


class Copies:
    """What a set steps in place of its parameters, and the tensors that receive rounded copies of that.

    Args:
        params: The parameters.
        computed: For each of them None or the tensor that receives its copy.
        states: Of the parameters. Those with a master receive its copies.
    """

    def __init__(self, params: list[Tensor], computed: Sequence[Tensor | None], states: list[ParamState]) -> None:
        self._params, self._computed = params, tuple(computed)
        halves = [i for i, param in enumerate(params) if states and param.dtype in HALF]
        self._mastered = tuple([i for i in halves if MASTER in states[i]])
        self._split = tuple([i for i in halves if LOW in states[i]])
        receivers = list(computed) or [None] * len(params)
        for i in self._mastered:
            receivers[i] = params[i]
        self.written = tuple([tensor for tensor in receivers if tensor is not None])
        self.receivers: tuple[Tensor | None, ...] = tuple(receivers) if self.written else ()
        self._watched = (*self.written, *[params[i] for i in self._split])
        # Of `_watched` after the last step: versions, empty if nobody asks for them, and addresses.
        self._versions: tuple[int | None, ...] = ()
        self._addresses: tuple[int, ...] = ()

    def are(self, computed: Sequence[Tensor | None]) -> bool:
        """Whether these are still the tensors that were given."""
        return len(computed) == len(self._computed) and all(map(is_, computed, self._computed))

    def stepped(self, states: list[ParamState]) -> list[Tensor]:
        """What is stepped: the parameters, or masters in their place."""
        values = self._params[:] if self._mastered else self._params
        for i in self._mastered:
            values[i] = states[i][MASTER]
        return values

    def masters(self, states: list[ParamState]) -> list[Tensor | None]:
        """For each parameter its master or None; empty for none."""
        if not self._mastered:
            return []
        mastered = set(self._mastered)
        return [state[MASTER] if i in mastered else None for i, state in enumerate(states)]

    @property
    def are_any(self) -> bool:
        """Whether any parameter has a copy or a master."""
        return bool(self._watched)

    @property
    def are_untouched(self) -> bool:
        """Whether only the optimizer has written to parameters with masters, in this memory, since their last step."""
        return not (self._mastered or self._split) or tuple(versions_of(self._watched)) == self._versions

    @property
    def are_rounded(self) -> bool:
        """Whether the receivers hold, as far as that can be seen, what the last step wrote to them."""
        return tuple(versions_of(self._watched)) == self._versions and self._places() == self._addresses

    def take_written(self, states: list[ParamState]) -> None:
        """Before a step: where a parameter is not its rounded master any more, its value becomes the master's.

        One that is the high half of its master keeps the low half, unless that would make a NaN of it.
        """
        if not (self._mastered or self._split) or self.are_rounded:
            return
        for i in self._split:
            low = local_of(states[i][LOW])
            low.masked_fill_(has_no_place(local_of(self._params[i].detach()), low), 0)
        for i in self._mastered:
            value, master = local_of(self._params[i].detach()), local_of(states[i][MASTER])
            master.copy_(torch.where(master.to(value.dtype) == value, master, value.to(master.dtype)))

    def note_step(self) -> None:
        """After a step, once the versions of the receivers have gone up."""
        if self._watched:
            self._versions, self._addresses = tuple(versions_of(self._watched)), self._places()

    def note_repeated(self) -> None:
        """The same after a step that was like the last one, with the same memory; faster."""
        self._versions = tuple(versions_of(self._watched)) if self._mastered or self._split else ()

    def _places(self) -> tuple[int, ...]:
        return tuple([local_of(tensor).data_ptr() for tensor in self._watched])
