"""Checks of arguments and options, and what error messages call a parameter."""

from __future__ import annotations

import math
import numbers as numbers_abc
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastadam._core.common.checks import shown
from fastadam._core.common.frameworks import first_of, hint_for_variable, is_array
from fastadam._core.common.warning import warn
from fastadam._core.native.slices import DEFERRED, check_ids
from fastadam.torch._layout import is_lazy_view

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

__all__ = [
    "Group",
    "OfGroups",
    "ParamState",
    "States",
    "check_capturable",
    "check_closure",
    "check_flags",
    "check_group",
    "check_kinds",
    "check_module",
    "check_numbers",
    "check_options",
    "check_params",
    "check_rows",
    "check_saved_group",
    "check_tensor",
    "firsts_of",
    "label_of",
    "refuse_options_of_optimizer",
]

_OF_OPTIMIZER = {
    "sparse_update",
    "float32_for",
    "clipvalue",
    "clipnorm",
    "global_clipnorm",
    "skip_nonfinite",
    "master_weights",
    "telemetry",
}
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = {float, int}
_FLAGS = {bool, type(None)}
_UNSAVED = {"weight_decay": 0, "amsgrad": False, "maximize": False, "decoupled_weight_decay": False}  # by SparseAdam
_FLAG_NAMES = ("amsgrad", "maximize", "decoupled_weight_decay")
_read_options = itemgetter("lr", "betas", "eps", "weight_decay", *_FLAG_NAMES)


Group: TypeAlias = dict[str, Any]  # a parameter group: "params", and its values of the options
ParamState: TypeAlias = dict[str, Any]  # "step", "exp_avg", ..., and what others have put there
States: TypeAlias = dict[Tensor, ParamState]  # `optimizer.state`


class OfGroups:
    """An option that belongs to the groups: as an attribute of the optimizer, it would be set and never read."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: object, owner: type | None = None) -> object:
        raise AttributeError(self._message(owner or type(optimizer)))

    def __set__(self, optimizer: object, value: object) -> None:
        raise AttributeError(self._message(type(optimizer)))

    def _message(self, owner: type) -> str:
        name = f"{owner.__name__!r} object has no attribute {self._name!r}"
        return f"{name}, expected group[{self._key!r}] of each group in param_groups"


def label_of(group: Group, index: int, place: int) -> str:
    """What error messages call a parameter: its name, or its place in the groups."""
    names = group.get("param_names")
    return f"parameter '{names[place]}'" if names else f"param_groups[{index}]['params'][{place}]"


def firsts_of(groups: list[Group]) -> list[int]:
    """For each group how many parameters those before it have: the number of its first parameter."""
    return list(accumulate((len(group["params"]) for group in groups), initial=0))


def check_flags(group: Group, param: Tensor, label: str, sparse_update: str) -> None:
    """Refuse a parameter that the kernels cannot step, or not with the options of its group."""
    if param.device.type not in ("cpu", "cuda", "meta") or (param.is_meta and group.get("fused")):
        fused = " with fused=True" if group.get("fused") else ""
        raise RuntimeError(f"{label}: on {param.device}{fused}, expected CPU memory or a CUDA device")
    if is_lazy_view(param):
        raise ValueError(f"{label}: a conjugated or negated view, expected resolve_conj() of it")
    if group.get("capturable"):
        _require_cuda(param, label)
    if param.device.type == "cuda" and sparse_update in DEFERRED:
        raise ValueError(f"sparse_update: {sparse_update!r} with {label} on {param.device}, expected CPU memory")


def check_options(group: Group) -> None:
    """Check the options that may have been changed in a group since they were given."""
    if group.get("differentiable"):
        raise ValueError("differentiable: True, expected False: the kernels have no derivative")
    if not 0.0 <= group.get("weight_decay", 0.0) < math.inf:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")


def refuse_options_of_optimizer(group: Group) -> None:
    """Refuse a group with an option that is one for all groups: nothing would read it there."""
    if not _OF_OPTIMIZER.isdisjoint(group):
        found = next(name for name in group if name in _OF_OPTIMIZER)
        raise ValueError(f"{found}: in a parameter group, expected it as an argument of the optimizer")


def _check_rule(group: Group) -> None:
    """Check the numbers of a group that native code checks under other names."""
    rate = group["lr"]
    is_on_gpu = isinstance(rate, Tensor) and rate.is_cuda  # reading it would wait
    if not is_on_gpu and not math.isfinite(rate):
        raise ValueError(f"lr: {float(rate)}, expected a finite number")
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"betas: {group['betas']}, expected 0 or more and less than 1")
    if not group["eps"] >= 0.0:
        raise ValueError(f"eps: {group['eps']}, expected 0 or more")


def check_tensor(name: str, value: object, *, foreach: bool, capturable: bool) -> None:
    """Check a number that is given as a tensor as torch does."""
    if not isinstance(value, Tensor):
        return
    if foreach and not capturable:
        raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")


def check_kinds(lr: object, betas: object, eps: object, weight_decay: object) -> None:
    """Check that these are numbers, before they are compared."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: {shown(betas, 60)}, expected a pair of numbers")
    given = (lr, eps, weight_decay, *betas)
    if set(map(type, given)) <= _NUMBERS:
        return
    names = ("lr", "eps", "weight_decay", "betas[0]", "betas[1]")
    for name, value in zip(names, given, strict=True):
        is_number = isinstance(value, (float, int, Tensor, numbers_abc.Real))  # the last is slow to ask for
        if not is_number or isinstance(value, np.timedelta64):  # which is an Integral by its base class
            is_schedule = name == "lr" and callable(value)
            how = (
                "; torch.optim.lr_scheduler.LambdaLR(optimizer, function) changes it after each step"
                if is_schedule
                else ""
            )
            raise TypeError(f"{name}: {type(value).__name__}, expected a number{how}")


def check_numbers(
    lr: float | Tensor, betas: tuple[float | Tensor, float | Tensor], eps: float, weight_decay: float
) -> None:
    """Check the ranges that torch checks, with its error texts."""
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for index in (0, 1):
        if not 0.0 <= betas[index] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {betas[index]}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")


def check_group(group: Group, where: int | str) -> None:
    """Check all options of a group but those of its states: any may have been set since they were given.

    Args:
        group: The group.
        where: Its place, or what error messages call it.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is missing or out of range.
    """
    try:
        if not _is_usual(group, *_read_options(group)):
            _check_each(group)
    except KeyError as error:
        raise ValueError(
            f"{_label_of_group(where)}: without {error}, expected it, as the constructor sets it"
        ) from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_label_of_group(where)}: {error}") from error


def _is_usual(group: Group, lr: float, betas: tuple[float, ...], eps: float, decay: float, *flags: bool | None) -> bool:
    """Whether the options of a group are plain numbers and flags in their ranges, which is quickly seen."""
    if type(betas) is not tuple or len(betas) != 2 or group.get("differentiable"):
        return False
    beta_1, beta_2 = betas
    if not (
        {type(lr), type(beta_1), type(beta_2), type(eps), type(decay)} <= _NUMBERS and {*map(type, flags)} <= _FLAGS
    ):
        return False
    are_decays = 0.0 <= beta_1 < 1.0 and 0.0 <= beta_2 < 1.0
    return are_decays and -math.inf < lr < math.inf and eps >= 0.0 and 0.0 <= decay < math.inf


def _check_each(group: Group) -> None:
    lr, betas, eps, weight_decay, *flags = _read_options(group)
    check_kinds(lr, betas, eps, weight_decay)
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "betas[0]": betas[0], "betas[1]": betas[1]}
    for name, value in numbers.items():
        check_tensor(name, value, foreach=False, capturable=False)
        if isinstance(value, Tensor) and (value.is_complex() or value.is_meta):
            raise TypeError(f"{name}: a tensor of {value.dtype} on {value.device}, expected a real number")
    check_options(group)
    _check_rule(group)
    for name, flag in zip(_FLAG_NAMES, flags, strict=True):
        if not isinstance(flag, (bool, np.bool_, int, type(None))):
            raise TypeError(f"{name}: {type(flag).__name__}, expected True or False")


def _label_of_group(where: int | str) -> str:
    return where if isinstance(where, str) else f"param_groups[{where}]"


def check_saved_group(group: Group, label: str) -> None:
    """Check the options of a group in a state dict, before they replace the optimizer's; it may lack some."""
    check_group({**_UNSAVED, **group, "differentiable": False}, label)


def check_capturable(group: Group, index: int, gradients: list[Tensor | None]) -> None:
    """Refuse ``capturable`` with parameters that have a gradient and are not on a GPU."""
    if group.get("capturable"):
        for place, (param, gradient) in enumerate(zip(group["params"], gradients, strict=True)):
            if gradient is not None:
                _require_cuda(param, label_of(group, index, place))


def _require_cuda(param: Tensor, label: str) -> None:
    if param.device.type != "cuda":
        raise ValueError(f"capturable: True with {label} on {param.device}, expected parameters on a CUDA device")


def check_params(params: ParamsT) -> ParamsT:
    """Refuse what cannot be parameters of torch; an iterator becomes a list. Torch's own check follows."""
    if type(params) is list and params and type(params[0]) in _PLAIN:
        return params
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"params: {type(params).__name__}, expected its parameters: model.parameters()")
    if not isinstance(params, Iterable):
        raise TypeError(
            f"params: {shown(params, 60)}, expected parameters of PyTorch, as model.parameters(); the optimizer of "
            "NumPy arrays, whose first argument is the learning rate, is fastadam.Adam"
        )
    items = list(params) if isinstance(params, Iterator) else params
    first = first_of(items)
    if type(first) in _PLAIN:
        return items
    hint = hint_for_variable(first)
    if is_array(first) and not isinstance(first, Tensor):
        hint = "for NumPy arrays use fastadam.Adam"
    if hint is not None:
        raise TypeError(f"params: {type(first).__name__}, expected parameters of PyTorch; {hint}")
    return items


def check_module(module: torch.nn.Module, groups: list[Group], sparse_update: str) -> None:
    """Check that rows can be brought up to date when the module looks them up."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        raise TypeError(f"module: {type(module).__name__}, expected an Embedding or EmbeddingBag")
    if not any(weight is param for group in groups for param in group["params"]):
        raise ValueError("module: its weight is not a parameter of this optimizer")
    if sparse_update not in DEFERRED:
        return
    if type(weight) is not torch.nn.Parameter and not hasattr(weight, "_fastadam_owner"):
        raise TypeError(f"module: its weight is a {type(weight).__name__}, expected a torch.nn.Parameter")
    if module.max_norm is not None:
        raise ValueError(
            f"module: max_norm={module.max_norm} with sparse_update={sparse_update!r}, expected None: it writes to "
            "rows that wait for their steps"
        )
    if not module.sparse:
        warn(
            f"module: {type(module).__name__} with sparse=False, whose gradients are dense: every step moves all rows, "
            f"whatever sparse_update={sparse_update!r} is; expected sparse=True"
        )


def check_closure(closure: object) -> None:
    """Check the argument of ``step``."""
    if not callable(closure):
        raise TypeError(f"closure: {type(closure).__name__}, expected a function without arguments, or None")


def check_rows(param: Tensor, ids: object) -> npt.NDArray[np.signedinteger]:
    """Check that these are rows of a parameter; return them flat, on the host."""
    if not isinstance(param, Tensor):
        raise TypeError(f"param: {type(param).__name__}, expected a parameter of the optimizer")
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: {getattr(ids, 'dtype', type(ids).__name__)}, expected a tensor of int32 or int64")
    return check_ids(ids.detach().cpu().reshape(-1).numpy(), tuple(param.shape), "param")
