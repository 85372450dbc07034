"""Which states the options of a group ask for: ``moments``, ``master``, ``stochastic_rounding``, ``float32_for``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastadam._core.common.checks import check_bool, check_choice, check_integer, check_list
from fastadam._core.common.patterns import check_pattern, found
from fastadam._core.common.warning import warn
from fastadam._core.native.arrays import untouched_zeros
from fastadam._core.native.slices import DEFERRED
from fastadam.torch._checks import Group, ParamState
from fastadam.torch._stored import HALF, LOW, MASTER, SCALES, SLOTS, SMALL, require_place, scales_size

__all__ = [
    "OPTIONS",
    "Asked",
    "Choice",
    "Float32Rule",
    "Master",
    "Moments",
    "StateFormat",
    "asked_of",
    "check_formats",
    "check_seed",
    "fill_seed",
    "given_formats",
    "master_of",
]

Moments: TypeAlias = Literal["float32", "bfloat16", "8bit"]
Master: TypeAlias = Literal["float32", "split"]

OPTIONS = ("moments", "master", "stochastic_rounding")  # they belong to the optimizer that loads, not to what it loads
_DEFAULTS: Group = {"moments": None, "master": None, "stochastic_rounding": False, "seed": 0}
_CAN_BE_SMALL = (torch.float32, *HALF)
_LEAST = 4096


class Asked(NamedTuple):
    """The options of a group that say how states are stored."""

    moments: Moments | None
    master: Master | None
    rounds: bool  # bfloat16 parameters without a master are rounded at random

    @property
    def is_random(self) -> bool:
        """Whether anything may be rounded at random."""
        return self.rounds is True or (isinstance(self.moments, str) and self.moments in SMALL)


def asked_of(group: Group) -> Asked:
    """The options of a group, which lacks those that nobody has set: torch's groups have none of them.

    They are as the caller has set them until :func:`check_formats` has checked them.
    """
    return Asked(group.get("moments"), group.get("master"), group.get("stochastic_rounding", False))


def given_formats(moments: object, master: object, stochastic_rounding: object, seed: object) -> Group:
    """Those of these options that a group has to have, checked: the seed if it is read.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: It has another value than it can have.
    """
    given = {"moments": moments, "master": master, "stochastic_rounding": stochastic_rounding, "seed": seed}
    checked = {name: _CHECKS[name](value) for name, value in given.items()}
    chosen = {name: value for name, value in checked.items() if value != _DEFAULTS[name]}
    return fill_seed(chosen, checked["seed"])


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
        elif callable(given) and not isinstance(given, type):
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
        if self.is_given and not set(asked) & set(SMALL):
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
            return check_bool("float32_for", self._function(name, tuple(param.shape)))
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
    moves_rows_alone: bool  # sparse gradients move only the rows that they name, at once or in the end

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
        if moments in SMALL:
            if param.dtype not in _CAN_BE_SMALL:
                moments = None
            elif is_sparse or self.rule.keeps(param, self.group, label):
                moments = "float32"
        choice = Choice("float32" if moments is None and master is not None else moments, master)
        require_place(param, label, *choice, rounds=rounds and param.dtype == torch.bfloat16)
        return choice

    def begin(self, param: Tensor, label: str) -> ParamState:
        """The moments of a parameter before its first step, for which it has a gradient."""
        choice = self.choose(param, label, is_sparse=_has_sparse_gradient(param))
        dtype = choice.dtype_of_moments(param)

        state = {SLOTS[name]: self._zeros(param, param, dtype) for name in ("m", "v")}
        if choice.moments == "8bit":
            for key in SCALES.values():
                state[key] = torch.zeros(scales_size(param), dtype=torch.uint8, device=param.device)
        return state

    def _zeros(self, param: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A moment in the layout of another tensor; of a table in pages that come to be as rows are touched."""
        is_table = self.moves_rows_alone and _has_sparse_gradient(param) and param.device.type == "cpu"
        if is_table and like.is_contiguous() and dtype in (torch.float32, torch.float64):
            return torch.from_numpy(untouched_zeros(tuple(param.shape), str(dtype).removeprefix("torch.")))
        return torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def complete(self, param: Tensor, state: ParamState, label: str) -> None:
        """Add what a state lacks that was begun or saved with other options."""
        if self.group["amsgrad"] and SLOTS["vhat"] not in state:
            state[SLOTS["vhat"]] = self._zeros(param, state[SLOTS["v"]], state[SLOTS["v"]].dtype)
        if asked_of(self.group).master is None or param.dtype not in HALF or MASTER in state:
            return
        if LOW in state and param.dtype == torch.bfloat16:
            return
        if self.choose(param, label, is_sparse=_has_sparse_gradient(param)).master == "split":
            state[LOW] = torch.zeros_like(
                param, dtype=torch.int16, memory_format=torch.preserve_format, requires_grad=False
            )
        else:
            state[MASTER] = param.detach().to(torch.float32, memory_format=torch.preserve_format)


def _has_sparse_gradient(param: Tensor) -> bool:
    return param.grad is not None and param.grad.is_sparse


def check_formats(group: Group, sparse_update: str) -> None:
    """Check the options of a group that say how states are stored; plain Python values take their place.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: It has another value than it can have, or excludes another option.
    """
    group.update({name: check(group[name]) for name, check in _CHECKS.items() if name in group})
    moments, master, rounds = asked_of(group)
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
    if master_weights and master is not None and not (isinstance(master, str) and master == "float32"):
        raise ValueError(f"master_weights: True with master={master!r}, expected master='float32' or one of the two")
    return "float32" if master_weights else master


def check_seed(seed: object) -> int:
    """The seed of stochastic rounding, or raise what is wrong with it."""
    if not 0 <= (number := check_integer("seed", seed)) < 2**64:
        raise ValueError(f"seed: {seed}, expected an integer from 0 to 2**64 - 1")
    return number


def _check_string(name: str, value: object, choices: tuple[str, ...]) -> str | None:
    check_choice(name, value, choices)
    return None if value is None else str(value)  # not NumPy's string: torch.load does not take it


_CHECKS: dict[str, Callable[[Any], object]] = {
    "moments": lambda value: _check_string("moments", value, ("float32", *SMALL)),
    "master": lambda value: _check_string("master", value, ("float32", "split")),
    "stochastic_rounding": lambda value: check_bool("stochastic_rounding", value),
    "seed": check_seed,
}
