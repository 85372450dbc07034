"""One state that is loaded, brought into the format of the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastadam.torch._checks import ParamState
from fastadam.torch._conversion import Key, decoded, encoded, joined, low_half, rounded
from fastadam.torch._formats import Choice
from fastadam.torch._layout import in_order_of
from fastadam.torch._stored import HALF, LOW, MASTER, SCALES, SLOTS, check_codes, check_low

__all__ = ["OURS", "LoadedState"]

OURS = (*SLOTS.values(), *SCALES.values(), MASTER, LOW)  # the keys of a state besides its step count


class LoadedState:
    """The tensors of one state that is loaded, in the format that was chosen for it.

    Args:
        param: The parameter.
        kept: What was loaded.
        choice: The format.
        label: What error messages call the state.
    """

    def __init__(self, param: Tensor, kept: ParamState, choice: Choice, label: str) -> None:
        self._param, self._kept, self._choice, self._label = param, kept, choice, label

    def moments(self, key: Key) -> ParamState:
        """The moments, and their scales if they have some."""
        found: ParamState = {}
        for name, slot in SLOTS.items():
            if slot not in self._kept:
                continue
            label, scale_key = f"{self._label}: {slot}", SCALES.get(f"{name}_scale", "")
            value, scales = self._kept[slot], self._kept.get(scale_key)
            if scales is not None:
                check_codes(value, scales, self._param, label, f"{self._label}: {scale_key}")
                if self._choice.moments == "8bit" and in_order_of(value, self._param):
                    found[slot] = _cloned_like(self._param, value, torch.uint8)
                    found[scale_key] = scales.detach().to(self._param.device).clone()
                    continue
                value = decoded(value, scales, signed=name == "m")
            moment = _checked_like(self._param, value, label)
            if self._choice.moments == "8bit" and name in ("m", "v"):
                found[slot], found[scale_key] = encoded(moment, self._param, key, signed=name == "m")
            elif self._choice.moments == "bfloat16":
                is_rounded = moment.dtype == torch.bfloat16
                same = _cloned_like(self._param, moment, moment.dtype)
                found[slot] = same if is_rounded else rounded(same, self._param, key)
            else:
                found[slot] = _cloned_like(self._param, moment, self._wide_dtype(moment))
        return found

    def _wide_dtype(self, value: Tensor) -> torch.dtype:
        """The dtype that a floating point tensor gets which is not to be smaller; others keep their own."""
        if not value.is_floating_point() and not value.is_complex():
            return value.dtype
        is_wide = self._choice.moments == "float32" or value.dtype == torch.float32
        return torch.float32 if is_wide and self._param.dtype in HALF else self._param.dtype

    def master(self) -> ParamState:
        """The master, or its low half; empty if there is none or the parameter needs none."""
        label, param, wanted = self._label, self._param, self._choice.master
        found: ParamState = {}
        if MASTER in self._kept:
            master = _checked_like(param, self._kept[MASTER], f"{label}: {MASTER}")
            master = _cloned_like(param, master, torch.float32)
            found = {MASTER: master} if wanted == "float32" else {LOW: low_half(master, param)}
        elif LOW in self._kept:
            low = self._kept[LOW]
            check_low(low, param, f"{label}: {LOW}")
            low = _cloned_like(param, low, torch.int16)
            found = {LOW: low} if wanted == "split" else {MASTER: joined(param, low)}
        return found if wanted is not None else {}

    def others(self) -> ParamState:
        """What another program has put into the state; it is taken if it has the parameter's shape."""
        found: ParamState = {}
        for name, value in self._kept.items():
            if name in OURS:
                continue
            label, param = f"{self._label}: {name}", self._param
            _refuse_wrapper(value, label)
            if value.shape != param.shape:
                expected = "step, exp_avg and exp_avg_sq, as Adam and AdamW have them"
                raise ValueError(f"{self._label}: with {name!r} of shape {tuple(value.shape)}, expected {expected}")
            _require_data(value, param, label)
            found[name] = _cloned_like(param, value, self._wide_dtype(value))
        return found


def _checked_like(param: Tensor, value: object, label: str) -> Tensor:
    """A moment or master; raises for what cannot be one of this parameter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{label}: {type(value).__name__}, expected a tensor")
    _refuse_wrapper(value, label)
    if value.shape != param.shape:
        raise ValueError(f"{label}: shape {tuple(value.shape)}, expected {tuple(param.shape)}")
    if not value.is_floating_point() and not (value.is_complex() and param.is_complex()):
        expected = f"{param.dtype} or another floating point dtype"
        raise TypeError(f"{label}: {value.dtype}, expected {expected}")
    _require_data(value, param, label)
    return value


def _refuse_wrapper(value: Tensor, label: str) -> None:
    if is_traceable_wrapper_subclass(value) and not hasattr(value, "_local_tensor"):
        raise TypeError(f"{label}: {type(value).__name__}, expected a plain tensor, as its dequantize() may return")


def _require_data(value: Tensor, param: Tensor, label: str) -> None:
    if value.layout != torch.strided:
        raise ValueError(f"{label}: {value.layout}, expected a dense tensor")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{label}: on {value.device}, without data, expected a tensor with data")


def _cloned_like(param: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(device=param.device, dtype=dtype).clone(memory_format=torch.preserve_format)
