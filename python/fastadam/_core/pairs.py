"""The pairs of gradient and variable that ``apply_gradients`` takes: what is wrong with them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fastadam._core.common.checks import check_list
from fastadam._core.common.warning import warn
from fastadam._core.native.variable import Variable, unwrap

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, AnyPair

__all__ = ["check_copies", "check_pairs", "check_pairs_list", "first_variable"]


def check_pairs_list(pairs: object) -> list[AnyPair]:
    """The items of ``grads_and_vars``, any iterable."""
    return check_list("grads_and_vars", pairs, "an iterable of (gradient, variable) pairs")


def check_copies(copies: object, pairs: list[AnyPair]) -> list[AnyArray]:
    """For each pair None or the array that receives a copy of the variable; empty if there is none."""
    if copies is None:
        return []
    arrays = check_list("copies", copies)
    if len(arrays) != len(pairs):
        raise ValueError(f"copies: {len(arrays)} items, expected {len(pairs)}, an array or None for each pair")
    return [] if all(array is None for array in arrays) else arrays


def first_variable(pairs: list[AnyPair]) -> AnyArray:
    """The array of the first variable that has a gradient; raises if there is none."""
    for pair in pairs:
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and pair[0] is not None:
            return unwrap(pair[1])
    return check_pairs(pairs)


def check_pairs(pairs: list[AnyPair]) -> None:
    """Raise what is wrong with the pairs; warn of gradients that are None."""
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)):
            raise TypeError(f"grads_and_vars[{i}]: {type(pair).__name__}, expected a (gradient, variable) pair")
        if len(pair) != 2:
            raise ValueError(f"grads_and_vars[{i}]: {len(pair)} items, expected a (gradient, variable) pair")
        _check_order(i, *pair)
    absent = [getattr(v, "name", None) or f"vars[{i}]" for i, (g, v) in enumerate(pairs) if g is None]
    if len(absent) == len(pairs):
        raise ValueError(f"No gradients provided for any variable: {absent}.")
    if absent:
        warn(f"Gradients do not exist for variables {absent} when minimizing the loss.")


def _check_order(i: int, gradient: object, variable: object) -> None:
    """Refuse a pair that is seen to be swapped; variables of one kind on both sides may hold gradients, as in TF."""
    if not _is_trainable(gradient) or _is_trainable(variable):
        return
    name = getattr(gradient, "name", None)
    what = f"Variable '{name}'" if name else type(gradient).__name__
    raise TypeError(
        f"grads_and_vars[{i}]: {what} as the gradient of a {type(variable).__name__}, expected (gradient, variable); "
        "the array itself, if it does hold a gradient"
    )


def _is_trainable(value: object) -> bool:
    """Whether it is a Variable, or a parameter of a framework; none is imported for that."""
    if isinstance(value, Variable):
        return True
    for module, path in (("torch", "nn.Parameter"), ("keras", "Variable"), ("tensorflow", "Variable")):
        kind: object = sys.modules.get(module)
        for part in path.split("."):
            kind = getattr(kind, part, None)
        if isinstance(kind, type) and isinstance(value, kind):
            return True
    return False
