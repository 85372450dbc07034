"""What the providers of gradients share: one run of a loss, and what it read."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.slices import IndexedSlices
from fastadam._core.variable import Variable, reading

__all__ = ["Gathered", "Loss", "Refresh", "Resolve", "Tape", "check_loss", "seed_of"]

Loss = Callable[[], Any]
Resolve = Callable[[], Sequence[Variable]]
Refresh = Callable[[Variable, Any], None]
Gathered = tuple[Variable, npt.NDArray[Any], Any]  # the ids, and the array that stands for the rows


class Tape(abc.ABC):
    """One run of a loss.

    Args:
        variables: What to differentiate with respect to; None means every Variable that the loss reads.
        refresh: Called before a variable is read, with the ids of the rows or None for all: a table may lag behind.
    """

    def __init__(self, variables: Sequence[Variable] | None, refresh: Refresh) -> None:
        self._refresh = refresh
        self._wanted = None if variables is None else {id(variable) for variable in variables}
        self._seen: dict[int, tuple[Variable, Any]] = {}  # holds the variables: the id of a freed one comes again
        self._gathered: list[Gathered] = []

    def read(self, variable: Variable) -> Any:
        """The library's array for this variable, the same in the whole run."""
        if id(variable) not in self._seen:
            make = self.leaf if self._wants(variable) else self.constant
            self._seen[id(variable)] = (variable, make(variable))
        return self._seen[id(variable)][1]

    def gather(self, variable: Variable, ids: npt.NDArray[Any]) -> Any:
        """The library's array for some rows, a new one each time."""
        if not self._wants(variable):
            return self.array(self.memory(variable, ids))
        rows = self.rows(variable, ids)
        self._gathered.append((variable, ids, rows))
        return rows

    def _wants(self, variable: Variable) -> bool:
        return self._wanted is None or id(variable) in self._wanted

    def leaf_of(self, variable: Variable) -> Any:
        """The array that the loss got for this variable; None if it never asked."""
        return self._seen.get(id(variable), (None, None))[1]

    def run(self, loss: Loss) -> Any:
        """The value of the loss; of a Variable its array."""
        with reading(self):
            result = loss()
            return result.value if isinstance(result, Variable) else result

    @abc.abstractmethod
    def leaf(self, variable: Variable) -> Any:
        """An array to differentiate with respect to."""

    @abc.abstractmethod
    def rows(self, variable: Variable, ids: npt.NDArray[Any]) -> Any:
        """The same of some rows."""

    @abc.abstractmethod
    def array(self, values: npt.NDArray[Any]) -> Any:
        """An array without gradient."""

    def constant(self, variable: Variable) -> Any:
        """The whole variable without gradient."""
        return self.array(self.memory(variable))

    def memory(self, variable: Variable, ids: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The variable itself, or copies of rows, up to date."""
        self._refresh(variable, ids)
        return variable._value if ids is None else np.asarray(variable._value[ids])

    @abc.abstractmethod
    def differentiate(self, loss: Loss, resolve: Resolve, upstream: Any) -> list[Any]:
        """Run the loss, ask ``resolve`` for the variables; their gradients, None where it depends on none."""

    def gradients(self, variables: Sequence[Variable], of_value: list[Any], of_rows: list[Any]) -> list[Any]:
        """What was found for the values of the variables and for each gather, put together for each variable."""
        return [
            _together(variable, dense, [(ids, part) for (v, ids, _), part in parts if v is variable])
            for variable, dense in zip(variables, of_value, strict=True)
            for parts in [list(zip(self._gathered, of_rows, strict=True))]
        ]


def _together(variable: Variable, dense: Any, gathered: list[tuple[npt.NDArray[Any], Any]]) -> Any:
    """One gradient: IndexedSlices of all gathers, added to that of the value where the loss read it too."""
    width = variable.shape[1:]
    found = [(ids.reshape(-1), np.asarray(part).reshape(-1, *width)) for ids, part in gathered if part is not None]
    if not found:
        return dense
    values = np.concatenate([part for _, part in found]).astype(variable.dtype, copy=False)
    indices = np.concatenate([ids for ids, _ in found])
    if dense is None:
        return IndexedSlices(values, indices, variable.shape)
    total = np.array(dense, variable.dtype)
    np.add.at(total, indices, values)
    return total


def check_loss(result: Any, upstream: Any) -> None:
    """Refuse what is no float array, or not of the shape of ``upstream``."""
    dtype = getattr(result, "dtype", None)
    is_float = isinstance(result, float) if dtype is None else "float" in str(dtype)
    if not is_float:
        what = type(result).__name__ if dtype is None else f"{type(result).__name__} of dtype {dtype}"
        raise TypeError(f"loss: returned {what}, expected a float array of the provider of gradients")
    shape = tuple(np.shape(result))
    if upstream is not None and np.shape(upstream) != shape:
        raise ValueError(f"grad_loss: shape {np.shape(upstream)}, expected {shape} like the loss")


def seed_of(upstream: Any, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What the gradient starts from, a new array: ones, or the caller's ``grad_loss``."""
    return np.ones(np.shape(like), like.dtype) if upstream is None else np.array(upstream, like.dtype)
