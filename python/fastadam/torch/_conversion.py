"""States in one format brought into another: moments encoded, decoded and rounded, masters split and joined."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastadam._core.native.backend import _cpu
from fastadam.torch._layout import local_of
from fastadam.torch._stored import has_no_place, scales_size

__all__ = ["Key", "decoded", "encoded", "joined", "low_half", "rounded"]


class Key(NamedTuple):
    """From which the random bits derive with which moments are rounded."""

    seed: int
    step: int  # that the moments are of
    number: int  # of the parameter in the optimizer


def decoded(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The float32 values of an 8-bit moment; ``signed``: the first one."""
    codes, scales = codes.detach().cpu().clone(memory_format=torch.preserve_format), scales.detach().cpu().contiguous()
    values = torch.empty_like(codes, dtype=torch.float32, memory_format=torch.preserve_format)
    if not codes.is_meta:
        _cpu.decode_moment(_memory(codes), _memory(scales), _memory(values), signed)
    return values


def encoded(values: Tensor, param: Tensor, key: Key, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes and the scales of a moment, in the order of a parameter."""
    ordered = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format, requires_grad=False)
    codes = torch.empty_like(ordered, dtype=torch.uint8, memory_format=torch.preserve_format)
    scales = torch.empty(scales_size(param), dtype=torch.uint8, device=param.device)
    ordered.copy_(values)
    if not param.is_meta:
        _cpu.encode_moment(_memory(ordered), _memory(codes), _memory(scales), signed, *key)
    return codes, scales


def rounded(values: Tensor, param: Tensor, key: Key) -> Tensor:
    """A moment in bfloat16, rounded at random, in the order of a parameter."""
    ordered = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format, requires_grad=False)
    found = torch.empty_like(ordered, dtype=torch.bfloat16, memory_format=torch.preserve_format)
    ordered.copy_(values)
    if not param.is_meta:
        out = _memory(local_of(found).view(torch.int16)).view(np.uint16)
        _cpu.round_moment(_memory(local_of(ordered)), out, *key)
    return found


def low_half(master: Tensor, param: Tensor) -> Tensor:
    """The low half of float32 masters, beside the bfloat16 parameter that they are rounded to.

    The low half cannot represent a master halfway between two values of the parameter if the smaller one is even:
    it loses one bit.
    """
    found = torch.empty_like(param, dtype=torch.int16, memory_format=torch.preserve_format, requires_grad=False)
    values = local_of(master)
    low = _bits(values) - (_bits(values.to(torch.bfloat16)) << 16)
    local_of(found).copy_(low.clamp(-(2**15), 2**15 - 1).masked_fill(values.isnan(), 0))
    return found


def joined(param: Tensor, low: Tensor) -> Tensor:
    """The float32 masters that a bfloat16 parameter and low halves make up; they are rounded to the parameter.

    A master halfway between two values of the parameter that rounds to the other one is moved by one bit.
    """
    found = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format, requires_grad=False)
    value = local_of(param.detach())
    kept = local_of(low).masked_fill(has_no_place(value, local_of(low)), 0).to(torch.int32)
    high = _bits(value) << 16
    master = (high + kept).view(torch.float32)
    is_other = (master.to(torch.bfloat16) != value) & ~value.isnan()
    local_of(found).copy_(torch.where(is_other, (high + kept - kept.sign()).view(torch.float32), master))
    return found


def _bits(values: Tensor) -> Tensor:
    """The bits of values of 16 or 32 bits, as int32."""
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32).to(torch.int32)


def _memory(tensor: Tensor) -> npt.NDArray[Any]:
    """The elements of a tensor without gaps, in the order in which they lie in memory."""
    flat: npt.NDArray[Any] = tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()
    return flat
