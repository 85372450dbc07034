"""The state dicts of bitsandbytes' ``Adam``, ``AdamW``, ``Adam8bit`` and ``AdamW8bit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastadam._core.common import frameworks
from fastadam._core.common.checks import check_count
from fastadam._core.common.keywords import suggests_keywords
from fastadam.exchange._moments import (
    check_state_dict,
    check_values,
    count_of,
    is_set,
    moment_of,
    number_of,
    plain_tensor,
    require,
    times_scales,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["from_bitsandbytes", "is_bitsandbytes", "to_bitsandbytes"]

BLOCK = 256  # elements that share an absmax
WRAPPED = "__bnb_optimizer_quant_state__"  # where state_dict() puts the tensors, so that FSDP does not gather them
_OF_8_BITS = ("qmap1", "qmap2", "absmax1", "absmax2")
_OF_ADEMAMIX = ("alpha", "t_alpha", "t_beta3")  # in every group, 0.0 or None for Adam
_NOT_THERE = (  # options of groups that only PyTorch and fastadam have
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
    "moments",
    "master",
    "stochastic_rounding",
    "float32_for",
    "seed",
    "compute_params",
)


def is_bitsandbytes(state: Mapping[str, object]) -> bool:
    """Whether this is the state of a parameter in bitsandbytes."""
    return WRAPPED in state or "state1" in state


@suggests_keywords()
def from_bitsandbytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    r"""A state dict of bitsandbytes with the names and float32 moments of PyTorch.

    .. math:: m = q_1[s_1]\,a_1, \quad v = q_2[s_2]\,a_2 \quad \text{for state}_i, \text{qmap}_i, \text{absmax}_i

    The moments are exactly those that bitsandbytes itself decodes. The result loads into :class:`fastadam.torch.Adam`,
    :class:`fastadam.torch.AdamW` and the optimizers of PyTorch. bitsandbytes decays weights apart from the gradient in
    Adam as in AdamW, so the groups say ``decoupled_weight_decay``.

    Args:
        state_dict: What ``state_dict()`` of bitsandbytes' Adam or AdamW, in 8 or 32 bits, returned. It is not changed.

    Returns:
        A new state dict. For each parameter ``step`` (a float32 tensor), ``exp_avg`` and ``exp_avg_sq`` (float32, of
        the shape and on the device of the codes; moments that bitsandbytes kept unquantized are passed on).

    Raises:
        TypeError: ``state_dict`` is not a state dict, or an entry is not a tensor of the right dtype.
        ValueError: An entry is missing, as in states of Lion or LAMB, or has the wrong shape or range.

    Source: ``bitsandbytes/backends/cpu/ops.py``, ``dequantize_blockwise``.

    >>> import importlib.util, fastadam
    >>> if importlib.util.find_spec("torch"):
    ...     import torch
    ...     moments = {"exp_avg": torch.ones(4096), "exp_avg_sq": torch.ones(4096)}
    ...     group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    ...     ours = {"state": {0: {"step": torch.tensor(5.0), **moments}}, "param_groups": [group]}
    ...     theirs = fastadam.exchange.to_bitsandbytes(ours)
    ...     again = fastadam.exchange.from_bitsandbytes(theirs)
    ...     assert torch.equal(again["state"][0]["exp_avg"], torch.ones(4096))
    """
    check_state_dict(state_dict)
    frameworks.require("torch", "a state dict of PyTorch")
    state = {
        key: _decoded(value, f"state of parameter {key}") if value else {} for key, value in state_dict["state"].items()
    }
    groups = [_group_from(group, f"param_groups[{i}]") for i, group in enumerate(state_dict["param_groups"])]
    return {**state_dict, "state": state, "param_groups": groups}


@suggests_keywords()
def to_bitsandbytes(state_dict: Mapping[str, Any], *, min_8bit_size: int = 4096) -> dict[str, Any]:
    """A state dict of PyTorch's form that bitsandbytes' ``Adam8bit`` and ``AdamW8bit`` load and go on with.

    Codes are the nearest of bitsandbytes' map, the lower of two that are equally near. A second moment that is not 0
    never gets the code of 0: bitsandbytes would divide by epsilon alone.

    Args:
        state_dict: What ``state_dict()`` of :class:`fastadam.torch.Adam` or AdamW, or of PyTorch's, returned; moments
            may be float32, half or 8-bit. It is not changed.
        min_8bit_size: Parameters with fewer elements keep float32 moments. It is bitsandbytes' argument of this name,
            with the same default; a number larger than every parameter is for ``Adam32bit``.

    Raises:
        TypeError: ``state_dict`` is not a state dict, or an entry is not a tensor of the right dtype.
        ValueError: bitsandbytes has no AMSGrad, ``maximize``, coupled weight decay or masters; an entry is missing, or
            a moment has numbers that no moment has.

    Source: ``bitsandbytes/functional.py``, ``create_dynamic_map``, for what the codes stand for.

    >>> import importlib.util, fastadam
    >>> if importlib.util.find_spec("torch"):
    ...     import torch, fastadam.torch
    ...     w = torch.nn.Parameter(torch.zeros(64, 64))
    ...     opt = fastadam.torch.AdamW([w])
    ...     w.grad = torch.ones(64, 64)
    ...     opt.step()
    ...     saved = fastadam.exchange.to_bitsandbytes(opt.state_dict())
    ...     codes = saved["state"][0]["__bnb_optimizer_quant_state__"]["state1"]
    ...     assert codes.dtype == torch.uint8 and codes.shape == (64, 64)
    """
    check_state_dict(state_dict)
    frameworks.require("torch", "a state dict of PyTorch")
    smallest = check_count("min_8bit_size", min_8bit_size)
    groups = [_group_to(group, f"param_groups[{i}]") for i, group in enumerate(state_dict["param_groups"])]
    state = {
        key: _encoded(value, f"state of parameter {key}", smallest) if value else {}
        for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": state, "param_groups": groups}


def _decoded(saved: Mapping[str, Any], label: str) -> dict[str, Any]:
    """PyTorch's state of one parameter."""
    wrapped = saved.get(WRAPPED, {})
    if not isinstance(wrapped, Mapping):
        raise TypeError(f"{label}: {WRAPPED}: {type(wrapped).__name__}, expected a dict")
    state = {**{key: value for key, value in saved.items() if key != WRAPPED}, **wrapped}
    needed = ["step", "state1", "state2"]
    if any(str(getattr(state.get(name), "dtype", "")) == "torch.uint8" for name in ("state1", "state2")):
        needed += _OF_8_BITS
    require(needed, state, label, "bitsandbytes' Adam has them")
    if foreign := [repr(name) for name in state if name not in needed]:
        raise ValueError(f"{label}: with {', '.join(foreign)}, expected only {', '.join(needed)}, as Adam has them")
    shapes = [tuple(plain_tensor(state[name], f"{label}: {name}").shape) for name in ("state1", "state2")]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{label}: state1 of shape {shapes[0]} and state2 of shape {shapes[1]}, expected equal shapes")
    step, has_codes = count_of(state["step"], label), _OF_8_BITS[0] in needed
    m, v = (_moment(state, i, label) if has_codes else state[f"state{i}"] for i in (1, 2))
    return {"step": step, "exp_avg": m, "exp_avg_sq": v}


def _moment(state: Mapping[str, Any], number: int, label: str) -> Tensor:
    """Codes times their scales."""
    import torch

    codes, qmap, absmax = (
        plain_tensor(state[f"{name}{number}"], f"{label}: {name}{number}") for name in ("state", "qmap", "absmax")
    )
    where = f"{label}: state{number}"
    if codes.dtype != torch.uint8:
        raise TypeError(f"{where}: {codes.dtype}, expected torch.uint8, as the other moment")
    if not codes.is_contiguous():
        raise ValueError(f"{where}: strides {codes.stride()}, expected a contiguous tensor: blocks are of its elements")
    blocks = -(-codes.numel() // BLOCK)
    for name, tensor, shape in (("qmap", qmap, (256,)), ("absmax", absmax, (blocks,))):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{label}: {name}{number}: {found}, expected torch.float32 of shape {shape}")
        check_values(tensor, f"{label}: {name}{number}", positive=name == "absmax" or number == 2)
    return times_scales(qmap.to(codes.device)[codes.long()], absmax.to(codes.device), BLOCK)


def _encoded(saved: Mapping[str, Any], label: str, smallest: int) -> dict[str, Any]:
    """What bitsandbytes keeps for one parameter."""
    import torch

    require(("step", "exp_avg", "exp_avg_sq"), saved, label, "Adam has them")
    for name in ("max_exp_avg_sq", "master", "master_low"):
        if name in saved:
            raise ValueError(
                f"{label}: with {name!r}, expected none, as bitsandbytes keeps none; without the entry it would go on "
                f"from {'v' if name.startswith('max') else 'the rounded parameter'}"
            )
    step, quantized = int(count_of(saved["step"], label)), {}
    for number, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
        where = f"{label}: {name}"
        moment = moment_of(saved, name, where, signed=number == 1)
        check_values(moment, where, positive=number == 2)
        if moment.numel() < smallest:
            quantized[f"state{number}"] = moment.clone()
            continue
        qmap = _dynamic_map(signed=number == 1).to(moment.device)
        flat = moment.reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        scaled = (blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: flat.numel()]
        codes = torch.searchsorted((qmap[:-1] + qmap[1:]) / 2, scaled, out_int32=True)
        if number == 2:
            codes = torch.maximum(codes, (flat > 0).to(codes.dtype))
        quantized[f"state{number}"] = codes.to(torch.uint8).view(moment.shape)
        quantized[f"qmap{number}"], quantized[f"absmax{number}"] = qmap, absmax
    return {"step": step, WRAPPED: quantized}


def _dynamic_map(*, signed: bool) -> Tensor:
    """The 256 numbers that codes stand for: in each of seven decades the middles of equal intervals, and 0 and 1."""
    import torch

    positive = []
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float32)
        positive.append(10 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2))
    values = torch.cat(positive)
    both = [values, -values] if signed else [values]
    return torch.cat([*both, torch.tensor([0.0, 1.0])]).sort().values


def _group_from(group: Mapping[str, Any], label: str) -> dict[str, Any]:
    if number_of(group.get("alpha") or 0.0, f"{label}: alpha"):
        raise ValueError(f"{label}: alpha: {group['alpha']}, expected 0: it belongs to AdEMAMix")
    kept = {key: value for key, value in group.items() if key not in _OF_ADEMAMIX}
    return {**kept, "decoupled_weight_decay": True}


def _group_to(group: Mapping[str, Any], label: str) -> dict[str, Any]:
    require(("lr", "betas", "eps"), group, label, "Adam has them")
    for name in ("amsgrad", "maximize"):
        if is_set(group, name, label):
            raise ValueError(f"{label}: {name}: True, expected False: bitsandbytes does not have it")
    decay = number_of(group.get("weight_decay", 0.0), f"{label}: weight_decay")
    if not is_set(group, "decoupled_weight_decay", label) and decay:
        raise ValueError(
            f"{label}: weight_decay: {decay} added to the gradient, expected 0, or decoupled_weight_decay as in AdamW: "
            "bitsandbytes decays weights apart from the gradient"
        )
    kept = {key: value for key, value in group.items() if key not in _NOT_THERE}
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{label}: betas: {type(betas).__name__}, expected a pair of numbers")
    return {
        **kept,
        "lr": number_of(group["lr"], f"{label}: lr"),
        "betas": tuple(number_of(beta, f"{label}: betas[{i}]") for i, beta in enumerate(betas)),
        "eps": number_of(group["eps"], f"{label}: eps"),
        "weight_decay": decay,
    }
