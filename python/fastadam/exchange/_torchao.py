"""The state dicts of torchao's ``Adam8bit``, ``AdamW8bit``, ``AdamFp8`` and ``AdamWFp8``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastadam._core.common import frameworks
from fastadam._core.common.keywords import suggests_keywords
from fastadam.exchange._moments import check_state_dict, check_values, number_of, plain_tensor, require, times_scales

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["from_torchao", "is_torchao"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def is_torchao(state: Mapping[str, object]) -> bool:
    """Whether a moment of this state is one of torchao's tensors."""
    return any(_name_of(state.get(name)) is not None for name in _MOMENTS)


@suggests_keywords()
def from_torchao(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    r"""A state dict of torchao's optimizers with float32 tensors in the place of its ``OptimState8bit`` and others.

    .. math:: m = \text{qmap}[\text{codes}]\,\text{scale}, \quad \text{or codes} \cdot \text{scale for float8}

    The moments are exactly those that torchao itself decodes. The result loads into :class:`fastadam.torch.Adam`,
    :class:`fastadam.torch.AdamW` and the optimizers of PyTorch. The state dict does not say how weights are decayed:
    the class that loads it decides. torchao need not be installed, but ``torch.load`` of its files needs it.

    Args:
        state_dict: What ``state_dict()`` of torchao's Adam or AdamW returned. It is not changed.

    Raises:
        TypeError: ``state_dict`` is not a state dict, or a moment is an ``OptimState4bit``.
        ValueError: An entry is missing, or a moment has scales or codes of the wrong shape or range.

    Source: ``torchao/optim/subclass_8bit.py`` and ``subclass_fp8.py``, ``dequantize``.

    >>> import importlib.util, fastadam
    >>> if importlib.util.find_spec("torch"):
    ...     import torch
    ...     moments = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}  # torchao quantizes from 4096 elements on
    ...     group = {"lr": torch.tensor(0.5), "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    ...     saved = {"state": {0: {"step": torch.tensor(1.0), **moments}}, "param_groups": [group]}
    ...     assert fastadam.exchange.from_torchao(saved)["param_groups"][0]["lr"] == 0.5
    """
    check_state_dict(state_dict)
    frameworks.require("torch", "a state dict of PyTorch")
    state = {
        key: _plain(value, f"state of parameter {key}") if value else {} for key, value in state_dict["state"].items()
    }
    groups = [
        {**group, "lr": number_of(group["lr"], f"param_groups[{i}]: lr")} if "lr" in group else {**group}
        for i, group in enumerate(state_dict["param_groups"])
    ]
    return {**state_dict, "state": state, "param_groups": groups}


def _name_of(value: object) -> str | None:
    """The name of the class, if it is one of torchao's; the shard that a DTensor holds counts."""
    kind = type(getattr(value, "_local_tensor", value))
    return kind.__name__ if kind.__module__.partition(".")[0] == "torchao" else None


def _plain(state: Mapping[str, Any], label: str) -> dict[str, Any]:
    require(("step", *_MOMENTS[:2]), state, label, "torchao's Adam has them")
    return {
        name: value if _name_of(value) is None else _whole(value, f"{label}: {name}", signed=name == "exp_avg")
        for name, value in state.items()
    }


def _whole(value: Any, label: str, *, signed: bool) -> Tensor:
    """The moment, decoded; of a DTensor the shard of this process, and the result is such a DTensor."""
    if not hasattr(value, "_local_tensor"):
        return _decoded(value, label, signed=signed)
    from torch.distributed.tensor import DTensor

    local = _decoded(value._local_tensor, label, signed=signed)
    places, mesh = value.placements, value.device_mesh
    whole: Tensor = DTensor.from_local(local, mesh, places, run_check=False, shape=value.shape, stride=value.stride())
    return whole


def _decoded(value: Any, label: str, *, signed: bool) -> Tensor:
    import torch

    kind = _name_of(value)
    if kind not in ("OptimState8bit", "OptimStateFp8"):
        raise TypeError(f"{label}: {kind}, expected OptimState8bit, OptimStateFp8 or a plain tensor")
    codes, scale = (plain_tensor(getattr(value, name), f"{label}: {name}") for name in ("codes", "scale"))
    if scale.ndim != 1 or not scale.numel() or codes.numel() % scale.numel():
        found = f"{tuple(scale.shape)} for {codes.numel()} codes"
        raise ValueError(f"{label}: scale: shape {found}, expected one number for each block of equal size")
    check_values(scale, f"{label}: scale", positive=True)
    if kind == "OptimStateFp8":
        numbers = codes.float()
    else:
        qmap = plain_tensor(value.qmap, f"{label}: qmap")
        if tuple(qmap.shape) != (256,):
            raise ValueError(f"{label}: qmap: shape {tuple(qmap.shape)}, expected (256,)")
        numbers = qmap.to(codes.device, torch.float32)[codes.long()]
    check_values(numbers, label, positive=not signed)
    return times_scales(numbers, scale.to(codes.device, torch.float32), codes.numel() // scale.numel())
