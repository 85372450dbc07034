"""How states are stored: what the options of a group ask for, and what a state has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastadam._core.common.checks import check_bool, check_integer, check_list
from fastadam._core.common.patterns import check_pattern, found
from fastadam._core.common.warning import warn
from fastadam._core.native.slices import DEFERRED
from fastadam.torch._checks import Group, ParamState
from fastadam.torch._layout import in_order_of

__all__ = [
    "BLOCK",
    "HALF",
    "LOW",
    "MASTER",
    "OPTIONS",
    "SCALES",
    "SLOTS",
    "Asked",
    "Choice",
    "Float32Rule",
    "Master",
    "Moments",
    "StateFormat",
    "Stored",
    "asked_of",
    "check_codes",
    "check_formats",
    "check_low",
    "check_seed",
    "fill_seed",
    "given_formats",
    "master_of",
    "scales_size",
    "stored_as",
]

Moments: TypeAlias = Literal["float32", "bfloat16", "8bit"]
Master: TypeAlias = Literal["float32", "split"]

HALF = (torch.float16, torch.bfloat16)
SLOTS = {"m": "exp_avg", "v": "exp_avg_sq", "vhat": "max_exp_avg_sq"}  # fastadam's names: torch's
MASTER = "master"  # key of the float32 value that a half parameter is rounded from, with master="float32"
LOW = "master_low"  # of its low 16 bits, to the high ones that are the parameter, with master="split"
SCALES = {"m_scale": "exp_avg_scale", "v_scale": "exp_avg_sq_scale"}  # of 8-bit moments
BLOCK = 128  # elements that share a scale, in the order in which the parameter is stored
OPTIONS = ("moments", "master", "stochastic_rounding")  # they belong to the optimizer that loads, not to what it loads

_DEFAULTS: Group = {"moments": None, "master": None, "stochastic_rounding": False, "seed": 0}
_SMALL = ("bfloat16", "8bit")
_CAN_BE_SMALL = (torch.float32, *HALF)
_LEAST = 4096


def scales_size(param: Tensor) -> int:
    """How many scales one moment of a parameter has."""
    return int(param.numel() + BLOCK - 1) // BLOCK


# ---- what is asked for -----------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """The options of a group that say how states are stored."""

    moments: Moments | None
    master: Master | None
    rounds: bool  # bfloat16 parameters without a master are rounded at random

    @property
    def is_random(self) -> bool:
        """Whether anything may be rounded at random."""
        return self.moments in _SMALL or self.rounds


def asked_of(group: Group) -> Asked:
    """The options of a group, which lacks those that nobody has set: torch's groups have none of them."""
    moments, master, rounds = (group.get(name, _DEFAULTS[name]) for name in OPTIONS)
    return Asked(moments, master, bool(rounds))


def given_formats(moments: object, master: object, stochastic_rounding: object, seed: object) -> Group:
    """Those of these options that a group has to have: the seed if it is read."""
    given = {"moments": moments, "master": master, "stochastic_rounding": stochastic_rounding, "seed": seed}
    chosen = {name: value for name, value in given.items() if value is not _DEFAULTS[name]}
    return fill_seed(chosen, seed)


def fill_seed(group: Group, seed: object) -> Group:
    """Give a group a seed if it has none and needs one, so that it is part of state dicts."""
    if asked_of(group).is_random:
        group.setdefault("seed", seed)
    return group


class Float32Rule:
    """Says which parameters keep float32 moments where others get smaller ones.

    Args:
        given: None, a number of elements, a function of the name and the shape, or patterns of names.

    Raises:
        TypeError: It is none of these.
        ValueError: A negative number, or a string that is not a pattern.
    """

    def __init__(self, given: int | Callable[[str, tuple[int, ...]], bool] | Iterable[str] | None) -> None:
        self.is_given = given is not None
        self.patterns: tuple[str, ...] = ()
        self._function: Callable[[str, tuple[int, ...]], bool] | None = None
        self._least = 0
        expected = "a number of elements, a function of a name and a shape, or a list of patterns of names"
        if given is None:
            self._least = _LEAST
        elif callable(given):
            self._function = given
        elif isinstance(given, Iterable):
            self.patterns = tuple(check_list("float32_for", given, expected))
            for i, pattern in enumerate(self.patterns):
                try:
                    check_pattern(pattern)
                except ValueError as error:
                    raise ValueError(f"float32_for[{i}]: {error}") from None
        else:
            self._least = check_integer("float32_for", given, expected)
            if self._least < 0:
                raise ValueError(f"float32_for: {given}, expected {expected}")

    def require_names(self, group: Group) -> None:
        """Raise ValueError if there are patterns of names, and parameters without."""
        if self.patterns and not group.get("param_names"):
            raise ValueError(
                "float32_for: patterns of names with parameters without names, expected model.named_parameters()"
            )

    def check_use(self, groups: list[Group]) -> None:
        """Raise ValueError if no group has smaller moments; warn of patterns that name none of the parameters."""
        asked = [asked_of(group).moments for group in groups]
        if self.is_given and not set(asked) & set(_SMALL):
            raise ValueError(f"float32_for: given with moments={asked[0]!r}, expected moments='bfloat16' or '8bit'")
        names = [name for group in groups for name in group.get("param_names") or ()]
        unused = [repr(pattern) for pattern in self.patterns if not any(found(pattern, name) for name in names)]
        if unused:
            warn(f"float32_for: {', '.join(unused)} names none of the parameters; compare model.named_parameters()")

    def keeps(self, param: Tensor, group: Group, label: str) -> bool:
        """Whether this parameter keeps float32 moments."""
        if not self.patterns and self._function is None:
            return bool(param.numel() < self._least)
        params, names = group["params"], group.get("param_names")
        place = next((place for place, other in enumerate(params) if other is param), None)
        name = label if not names or place is None else str(names[place])
        if self._function is not None:
            return bool(self._function(name, tuple(param.shape)))
        return any(found(pattern, name) for pattern in self.patterns)


class Choice(NamedTuple):
    """What the state of one parameter is to consist of."""

    moments: Moments | None  # None: of the parameter's dtype
    master: Master | None

    def dtype_of_moments(self, param: Tensor) -> torch.dtype:
        """The dtype of the tensors ``exp_avg`` and ``exp_avg_sq``."""
        if self.moments == "8bit":
            return torch.uint8
        if self.moments == "bfloat16":
            return torch.bfloat16
        return torch.float32 if self.moments == "float32" and param.dtype in HALF else param.dtype


class StateFormat(NamedTuple):
    """What a group asks for."""

    group: Group
    rule: Float32Rule

    def choose(self, param: Tensor, label: str, *, is_sparse: bool) -> Choice:
        """What the state of a parameter consists of; ``is_sparse``: its gradients are, and need float32.

        Raises:
            TypeError: The parameter has a dtype that cannot be split.
            ValueError: It is on a GPU or distributed, where small states are not supported.
        """
        moments, master, rounds = asked_of(self.group)
        if param.dtype not in HALF:
            master = None
        elif master == "split":
            if param.dtype != torch.bfloat16:
                raise TypeError(
                    f"master: 'split' with {label} of {param.dtype}, expected bfloat16 parameters, or master='float32'"
                )
            master = "float32" if is_sparse else "split"
        if moments in _SMALL:
            if param.dtype not in _CAN_BE_SMALL:
                moments = None
            elif is_sparse or self.rule.keeps(param, self.group, label):
                moments = "float32"
        choice = Choice("float32" if moments is None and master is not None else moments, master)
        _require_place(param, label, *choice, rounds=rounds and param.dtype == torch.bfloat16)
        return choice

    def begin(self, param: Tensor, label: str) -> ParamState:
        """The moments of a parameter before its first step, for which it has a gradient."""
        choice = self.choose(param, label, is_sparse=_has_sparse_gradient(param))
        dtype = choice.dtype_of_moments(param)

        def zeros() -> Tensor:
            return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

        state = {SLOTS[name]: zeros() for name in ("m", "v")}
        if choice.moments == "8bit":
            for key in SCALES.values():
                state[key] = torch.zeros(scales_size(param), dtype=torch.uint8, device=param.device)
        return state

    def complete(self, param: Tensor, state: ParamState, label: str) -> None:
        """Add what a state lacks that was begun or saved with other options."""
        if self.group["amsgrad"] and SLOTS["vhat"] not in state:
            state[SLOTS["vhat"]] = torch.zeros_like(state[SLOTS["v"]], memory_format=torch.preserve_format)
        if asked_of(self.group).master is None or param.dtype not in HALF or MASTER in state or LOW in state:
            return
        if self.choose(param, label, is_sparse=_has_sparse_gradient(param)).master == "split":
            state[LOW] = torch.zeros_like(
                param, dtype=torch.int16, memory_format=torch.preserve_format, requires_grad=False
            )
        else:
            state[MASTER] = param.detach().to(torch.float32, memory_format=torch.preserve_format)


def _has_sparse_gradient(param: Tensor) -> bool:
    return param.grad is not None and param.grad.is_sparse


def _require_place(param: Tensor, label: str, moments: str | None, master: str | None, *, rounds: bool) -> None:
    """Raise ValueError if a state cannot be kept in this way where the parameter is."""
    name = None
    if moments in _SMALL:
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
            f"{name} with {label}, a DTensor, of which no block of {BLOCK} elements would keep its scale when it is "
            "sharded anew; expected moments='bfloat16' or plain parameters"
        )


def check_formats(group: Group, sparse_update: str) -> None:
    """Check the options of a group that say how states are stored.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: It has another value than it can have, or excludes another option.
    """
    moments, master, rounds = asked_of(group)
    if moments not in (None, "float32", *_SMALL):
        raise ValueError(f"moments: {moments!r:.60}, expected None, 'float32', 'bfloat16' or '8bit'")
    if master not in (None, "float32", "split"):
        raise ValueError(f"master: {master!r:.60}, expected None, 'float32' or 'split'")
    check_bool("stochastic_rounding", group.get("stochastic_rounding", False))
    check_seed(group.get("seed", 0))
    if group["amsgrad"] and moments == "8bit":
        raise ValueError(
            "amsgrad: True with moments='8bit', in whose rounding the largest second moment would only grow; expected "
            "moments='bfloat16' or 'float32'"
        )
    if master is not None and rounds:
        raise ValueError(
            f"stochastic_rounding: True with master={master!r}, which loses nothing by rounding; expected one of both"
        )
    if master is not None and sparse_update in DEFERRED:
        raise ValueError(
            f"master: {master!r} with sparse_update={sparse_update!r}, whose rows wait in memory, expected "
            "sparse_update='dense' or 'lazy'"
        )


def master_of(master: Master | None, master_weights: object) -> Master | None:
    """What the two arguments of the constructor mean together."""
    if not isinstance(master_weights, bool):
        raise TypeError(f"master_weights: {type(master_weights).__name__}, expected a bool")
    if master_weights and master not in (None, "float32"):
        raise ValueError(f"master_weights: True with master={master!r}, expected master='float32' or one of the two")
    return "float32" if master_weights else master


def check_seed(seed: object) -> None:
    """Raise what is wrong with the seed of stochastic rounding."""
    if not 0 <= check_integer("seed", seed) < 2**64:
        raise ValueError(f"seed: {seed}, expected an integer from 0 to 2**64 - 1")


# ---- what is there ---------------------------------------------------------------------------------------------------


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


def stored_as(param: Tensor, state: ParamState, group: Group, label: str) -> Stored:
    """How the state of a parameter is stored, whatever the options were when it was begun.

    Raises:
        ValueError: The parameter is where such a state cannot be stepped, or the state lacks scales.
    """
    moment = state[SLOTS["m"]]
    dtype = moment.dtype if isinstance(moment, Tensor) else None
    asked, has_master, is_split = asked_of(group), MASTER in state, LOW in state
    moments: Literal["bfloat16", "8bit"] | None = None
    if dtype == torch.uint8:
        moments = "8bit"
        if missing := [repr(key) for key in SCALES.values() if key not in state]:
            raise ValueError(f"state of {label}: without {', '.join(missing)}, expected the scales of 8-bit moments")
    elif dtype == torch.bfloat16 and asked.moments in _SMALL:
        moments = "bfloat16"
    rounds = asked.rounds and param.dtype == torch.bfloat16 and not has_master and not is_split
    _require_place(param, label, moments, "split" if is_split else None, rounds=rounds)
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
