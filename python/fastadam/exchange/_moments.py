"""What converters of PyTorch's state dicts share: checks, and moments in few bits read as float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_state_dict",
    "check_values",
    "count_of",
    "is_set",
    "moment_of",
    "number_of",
    "plain_tensor",
    "require",
    "times_scales",
]

_BLOCK = 128  # elements of fastadam's 8-bit moments that share a scale


def check_state_dict(state_dict: object) -> None:
    """Raise TypeError for anything but a dict with a dict of states and a list of groups."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(f"state_dict: {type(state_dict).__name__}, expected a dict with 'state' and 'param_groups'")
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping):
        raise TypeError(f"state_dict: state: {type(states).__name__}, expected a dict of the states of the parameters")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        raise TypeError(f"state_dict: param_groups: {type(groups).__name__}, expected a list of dicts")
    for key, state in states.items():
        if not isinstance(state, Mapping):
            raise TypeError(f"state of parameter {key}: {type(state).__name__}, expected a dict")


def require(needed: Iterable[str], found: Mapping[str, object], label: str, source: str) -> None:
    """Raise ValueError that names what is missing."""
    needed = list(needed)
    if missing := [repr(name) for name in needed if name not in found]:
        expected = f"{', '.join(needed[:-1])} and {needed[-1]}"
        raise ValueError(f"{label}: without {', '.join(missing)}, expected {expected}, as {source}")


def number_of(value: object, label: str) -> float:
    """An option of a group as a float, which may be kept in a tensor."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{label}: {type(value).__name__}, expected a number") from None


def is_set(group: Mapping[str, object], name: str, label: str) -> bool:
    """Whether a group has a flag that is True."""
    flag = group.get(name)
    if not isinstance(flag, (bool, int, type(None))):
        raise TypeError(f"{label}: {name}: {type(flag).__name__}, expected True or False")
    return bool(flag)


def plain_tensor(value: object, label: str) -> Tensor:
    """The value, if it is a dense tensor with data and not a wrapper of others."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
        raise TypeError(f"{label}: {type(value).__name__}, expected a tensor")
    if value.is_meta or value.layout != torch.strided:
        raise ValueError(f"{label}: {value.layout} on {value.device}, expected a dense tensor with data")
    return value.detach()


def count_of(step: object, label: str) -> Tensor:
    """The count of steps, as PyTorch keeps it."""
    import torch

    try:
        number = float(step)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{label}: step: {type(step).__name__}, expected a whole number") from None
    if not (0 <= number <= 2**24 and number == int(number)):
        raise ValueError(f"{label}: step: {number}, expected a whole number from 0 to 2**24")
    return torch.tensor(number)


def check_values(values: Tensor, label: str, *, positive: bool) -> None:
    """Raise ValueError for numbers that no moment has."""
    low, high = (float(x) for x in values.aminmax()) if values.numel() else (0.0, 0.0)
    if not (low - low == 0 and high - high == 0):
        raise ValueError(f"{label}: not finite, expected finite numbers")
    if positive and low < 0:
        raise ValueError(f"{label}: {low}, expected numbers >= 0")


def times_scales(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each block of consecutive values times its scale; the last block may be shorter."""
    return (values.reshape(-1) * scales.repeat_interleave(block)[: values.numel()]).view(values.shape)


def moment_of(state: Mapping[str, Any], name: str, label: str, *, signed: bool) -> Tensor:
    """A moment of :mod:`fastadam.torch` or PyTorch as float32, whatever it is kept in."""
    import torch

    moment = plain_tensor(state[name], label)
    if moment.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return moment.float()
    if moment.dtype != torch.uint8:
        raise TypeError(f"{label}: {moment.dtype}, expected torch.float32, half or 8-bit codes")
    key = f"{name}_scale"
    require((name, key), state, label.rpartition(":")[0], "fastadam.torch has them")
    scales, count = plain_tensor(state[key], f"{label}_scale"), moment.numel()
    if scales.dtype != torch.uint8 or tuple(scales.shape) != (-(-count // _BLOCK),):
        expected = f"torch.uint8 of shape ({-(-count // _BLOCK)},)"
        raise ValueError(f"{label}_scale: {scales.dtype} of shape {tuple(scales.shape)}, expected {expected}")
    codes = moment.clone()  # without gaps; blocks run through memory, and the codes have the parameter's strides
    flat = codes.as_strided((count,), (1,)).int()
    least, bias, bits = (2.0**-15, 896, 127) if signed else (2.0**-31, 768, 255)
    values = ((flat & bits) + bias << 20).view(torch.float32) - least
    exponents = scales.int()
    powers = torch.where(exponents == 255, 0x7FC00000, exponents << 23).int().view(torch.float32)
    values = times_scales(values, powers, _BLOCK)
    if signed:
        values = torch.where(flat > 127, -values, values)
    return values.as_strided(codes.shape, codes.stride())
