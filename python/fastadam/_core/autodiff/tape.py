"""The base of the providers of gradients: it runs a loss and records what the loss reads."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import numpy as np

from fastadam._core.common.types import AnyArray, HostArray
from fastadam._core.native.slices import IndexedSlices
from fastadam._core.native.variable import Variable, read_by, unwrap

__all__ = ["Gathered", "Loss", "Refresh", "Resolve", "Tape", "check_loss", "seed_of"]

Loss = Callable[[], AnyArray]
Resolve = Callable[[], Sequence[Variable]]
Refresh = Callable[[Variable, "HostArray | None"], None]
Gathered = tuple[Variable, HostArray, AnyArray]  # a table, the ids, and the provider's array of the rows


class Tape(abc.ABC):
    """One run of a loss.

    Args:
        variables: What to differentiate with respect to; None means every Variable that the loss reads.
        refresh: Called before a variable is read, with the ids of the rows or None for all, since rows may be behind.
    """

    def __init__(self, variables: Sequence[Variable] | None, refresh: Refresh) -> None:
        self._refresh = refresh
        self._wanted = None if variables is None else {id(variable) for variable in variables}
        self.seen: dict[int, tuple[Variable, AnyArray]] = {}  # keeps the variables alive, so that ids stay unique
        self.gathered: list[Gathered] = []

    def read(self, variable: Variable) -> AnyArray:
        """The provider's array for this variable, the same one throughout the run."""
        if id(variable) not in self.seen:
            make = self.leaf if self._wants(variable) else self.constant
            self.seen[id(variable)] = (variable, make(variable))
        return self.seen[id(variable)][1]

    def gather(self, variable: Variable, ids: HostArray) -> AnyArray:
        """The provider's array for some rows, a new one each time."""
        if not self._wants(variable):
            return self.array(self.memory(variable, ids))
        rows = self.rows(variable, ids)
        self.gathered.append((variable, ids, rows))
        return rows

    def _wants(self, variable: Variable) -> bool:
        return self._wanted is None or id(variable) in self._wanted

    def leaf_of(self, variable: Variable) -> AnyArray:
        """The array that the loss got for this variable; None if it did not read it."""
        return self.seen.get(id(variable), (None, None))[1]

    def run(self, loss: Loss) -> AnyArray:
        """The value of the loss, as an array if it is a Variable."""

        def value() -> AnyArray:
            result = loss()
            return result.value if isinstance(result, Variable) else result

        return read_by(self, value)

    @abc.abstractmethod
    def leaf(self, variable: Variable) -> AnyArray:
        """An array to differentiate with respect to."""

    @abc.abstractmethod
    def rows(self, variable: Variable, ids: HostArray) -> AnyArray:
        """An array of some rows to differentiate with respect to."""

    @abc.abstractmethod
    def array(self, values: HostArray) -> AnyArray:
        """An array without gradient."""

    def constant(self, variable: Variable) -> AnyArray:
        """The whole variable without gradient."""
        return self.array(self.memory(variable))

    def memory(self, variable: Variable, ids: HostArray | None = None) -> HostArray:
        """The variable's own array, or copies of rows, brought up to date."""
        self._refresh(variable, ids)
        array = unwrap(variable)
        return array if ids is None else np.asarray(array[ids])

    @abc.abstractmethod
    def differentiate(self, loss: Loss, resolve: Resolve, upstream: HostArray | None) -> list[AnyArray]:
        """Run the loss, get the variables from ``resolve`` and return their gradients, None if it depends on none."""

    def gradients(
        self, variables: Sequence[Variable], of_value: list[AnyArray], of_rows: list[AnyArray]
    ) -> list[AnyArray]:
        """Combine the gradients of values, one for each variable, with those of rows, one for each gather."""
        parts = list(zip(self.gathered, of_rows, strict=True))
        return [
            _combine(variable, dense, [(ids, rows) for (table, ids, _), rows in parts if table is variable])
            for variable, dense in zip(variables, of_value, strict=True)
        ]


def _combine(variable: Variable, dense: AnyArray, gathered: list[tuple[HostArray, AnyArray]]) -> AnyArray:
    """One gradient of a variable: the rows of all gathers as IndexedSlices, added to the dense gradient if any."""
    width = variable.shape[1:]
    slices = [(ids.reshape(-1), np.asarray(rows).reshape(-1, *width)) for ids, rows in gathered if rows is not None]
    if not slices:
        return dense
    values = np.concatenate([rows for _, rows in slices]).astype(variable.dtype, copy=False)
    indices = np.concatenate([ids for ids, _ in slices])
    if dense is None:
        return IndexedSlices(values, indices, variable.shape)
    total = np.array(dense, variable.dtype)
    np.add.at(total, indices, values)
    return total


def check_loss(result: AnyArray, upstream: HostArray | None) -> None:
    """Refuse a loss that is not a float array, or does not have the shape of ``upstream``."""
    dtype = getattr(result, "dtype", None)
    is_float = isinstance(result, float) if dtype is None else "float" in str(dtype)
    if not is_float:
        what = type(result).__name__ if dtype is None else f"{type(result).__name__} of dtype {dtype}"
        raise TypeError(f"loss: returned {what}, expected a float array of the provider of gradients")
    shape = tuple(np.shape(result))
    if upstream is not None and np.shape(upstream) != shape:
        raise ValueError(f"grad_loss: shape {np.shape(upstream)}, expected {shape} like the loss")


def seed_of(upstream: HostArray | None, like: HostArray) -> HostArray:
    """A new array with the gradient at the loss: ones, or the caller's ``grad_loss``."""
    return np.ones(np.shape(like), like.dtype) if upstream is None else np.array(upstream, like.dtype)
