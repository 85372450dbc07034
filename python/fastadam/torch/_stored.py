"""How a parameter and its state are stored: in which tensors, of which dtypes and shapes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastadam.torch._checks import ParamState
from fastadam.torch._layout import in_order_of

__all__ = [
    "BLOCK",
    "HALF",
    "LOW",
    "MASTER",
    "SCALES",
    "SLOTS",
    "SMALL",
    "Stored",
    "check_codes",
    "check_low",
    "has_no_place",
    "require_place",
    "scales_size",
    "stored_as",
]

HALF = (torch.float16, torch.bfloat16)
SLOTS = {"m": "exp_avg", "v": "exp_avg_sq", "vhat": "max_exp_avg_sq"}  # fastadam's names: torch's
MASTER = "master"  # key of the float32 value that a half parameter is rounded from, with master="float32"
LOW = "master_low"  # of its low 16 bits, to the high ones that are the parameter, with master="split"
SCALES = {"m_scale": "exp_avg_scale", "v_scale": "exp_avg_sq_scale"}  # of 8-bit moments
BLOCK = 128  # elements that share a scale, in the order in which the parameter is stored
SMALL = ("bfloat16", "8bit")


def scales_size(param: Tensor) -> int:
    """How many scales one moment of a parameter has."""
    return int(param.numel() + BLOCK - 1) // BLOCK


def has_no_place(high: Tensor, low: Tensor) -> Tensor:
    """Where these halves would make a NaN, which no rounded master can: bfloat16 0 or infinity was written there."""
    return ((high == 0) & (low < 0)) | (high.isinf() & (low > 0))


def require_place(param: Tensor, label: str, moments: str | None, master: str | None, *, rounds: bool) -> None:
    """Raise ValueError if a state cannot be kept in this way where the parameter is."""
    name = None
    if moments in SMALL:
        name = f"moments: {moments!r}"
    elif master == "split":
        name = "master: 'split'"
    elif rounds and master is None:
        name = "stochastic_rounding: True"
    if name is None:
        return
    if param.is_cuda:
        raise ValueError(f"{name} with {label} on {param.device}, expected parameters in CPU memory")
    if moments == "8bit" and hasattr(param, "_local_tensor"):
        raise ValueError(
            f"{name} with {label}, a DTensor, whose blocks of {BLOCK} elements would be others when it is sharded "
            "anew; expected moments='bfloat16' or plain parameters"
        )


class Stored(NamedTuple):
    """How a parameter and its state are stored; a native plan has those that are stored alike."""

    moments: Literal["bfloat16", "8bit"] | None = None  # rounded at random; None: to nearest, or not at all
    split: bool = False  # the parameter is the high half of a master
    rounds: bool = False  # a bfloat16 parameter is rounded at random

    @property
    def is_small(self) -> bool:
        """Whether the kernels of small states step it, which take no sparse gradients."""
        return self != _PLAIN

    @property
    def slots(self) -> dict[str, str]:
        """What is there besides moments, by native names: the keys of the state. Scales come last."""
        return {**({"low": LOW} if self.split else {}), **(SCALES if self.moments == "8bit" else {})}

    def check_slots(self, param: Tensor, state: ParamState, label: str) -> None:
        """Raise what is wrong with scales, and with codes whose blocks are not those of the parameter."""
        if self.moments != "8bit":
            return
        for key in (SLOTS["m"], SLOTS["v"]):
            if isinstance(state[key], Tensor) and state[key].shape == param.shape:
                _check_order(state[key], param, f"state of {label}: {key}")
        for key in SCALES.values():
            found, scales = f"state of {label}: {key}", state[key]
            _check_scales(scales, param, found)
            if scales.device != param.device:
                raise RuntimeError(f"{found}: on {scales.device}, expected {param.device}")
            if not scales.is_contiguous():
                raise ValueError(f"{found}: strides {scales.stride()}, expected (1,)")


_PLAIN = Stored()


def stored_as(param: Tensor, state: ParamState, label: str, *, may_be_small: bool, rounds: bool) -> Stored:
    """How the state of a parameter is stored, whatever the options were when it was begun.

    Args:
        param: The parameter.
        state: Its state.
        label: What error messages call the parameter.
        may_be_small: bfloat16 moments are rounded at random.
        rounds: So are bfloat16 parameters.

    Raises:
        ValueError: The parameter is where such a state cannot be stepped, or the state lacks scales.
    """
    moment = state[SLOTS["m"]]
    dtype = moment.dtype if isinstance(moment, Tensor) else None
    has_master, is_split = MASTER in state, LOW in state and param.dtype == torch.bfloat16
    moments: Literal["bfloat16", "8bit"] | None = None
    if dtype == torch.uint8:
        moments = "8bit"
        if missing := [repr(key) for key in SCALES.values() if key not in state]:
            raise ValueError(f"state of {label}: without {', '.join(missing)}, expected the scales of 8-bit moments")
    elif dtype == torch.bfloat16 and may_be_small:
        moments = "bfloat16"
    rounds = rounds and param.dtype == torch.bfloat16 and not has_master and not is_split
    require_place(param, label, moments, "split" if is_split else None, rounds=rounds)
    return Stored(moments, is_split, rounds)


def _check_order(codes: Tensor, param: Tensor, label: str) -> None:
    """Raise ValueError for codes in another order than the parameter: each block would have the scale of another."""
    if not in_order_of(codes, param):
        raise ValueError(
            f"{label}: strides {codes.stride()} with a parameter of strides {param.stride()}, expected codes in the "
            "order of the parameter; a state dict that is loaded anew is brought into it"
        )


def _check_scales(scales: object, param: Tensor, label: str) -> None:
    """Raise what is wrong with the scales of 8-bit moments, but for their values."""
    if not isinstance(scales, Tensor):
        raise TypeError(f"{label}: {type(scales).__name__}, expected a tensor")
    if scales.dtype != torch.uint8:
        raise TypeError(f"{label}: {scales.dtype}, expected torch.uint8")
    if scales.shape != (scales_size(param),):
        raise ValueError(f"{label}: shape {tuple(scales.shape)}, expected {(scales_size(param),)}")
    if hasattr(scales, "_local_tensor"):
        raise TypeError(f"{label}: {type(scales).__name__}, expected a plain tensor")


# ---- what is loaded --------------------------------------------------------------------------------------------------


def check_codes(codes: object, scales: object, param: Tensor, label: str, scale_label: str) -> None:
    """Raise what is wrong with 8-bit moments that are loaded, and with the values of their scales."""
    _check_integers(codes, param, torch.uint8, label)
    _check_scales(scales, param, scale_label)
    if not isinstance(scales, Tensor) or scales.is_meta:
        return
    is_wrong = ((scales > 0) & (scales < 35)) | (scales == 254)
    if is_wrong.any():
        place = int(is_wrong.nonzero()[0])
        raise ValueError(f"{scale_label}: {int(scales[place])} at {place}, expected 0, 35 to 253 or 255")


def check_low(low: object, param: Tensor, label: str) -> None:
    """Raise what is wrong with the low half of a master."""
    _check_integers(low, param, torch.int16, label)
    if hasattr(low, "_local_tensor") != hasattr(param, "_local_tensor"):
        raise TypeError(f"{label}: {type(low).__name__}, expected {type(param).__name__} like the parameter")


def _check_integers(value: object, param: Tensor, dtype: torch.dtype, label: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label}: {type(value).__name__}, expected a tensor")
    if value.dtype != dtype:
        raise TypeError(f"{label}: {value.dtype}, expected {dtype}")
    if value.shape != param.shape:
        raise ValueError(f"{label}: shape {tuple(value.shape)}, expected {tuple(param.shape)}")
    if value.layout != torch.strided:
        raise ValueError(f"{label}: {value.layout}, expected a dense tensor")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{label}: on {value.device}, without data, expected a tensor with data")
