"""Embedding tables in a deferred mode: rows are brought up to date when they are touched or asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from fastadam._core.deferred.history import History, Numbers
from fastadam._core.native.backend import _cpu
from fastadam.torch._states import SLOTS

__all__ = ["Reader", "Tables"]


class Table:
    """A parameter some of whose rows wait for steps that they have missed."""

    def __init__(self, param: Tensor, state: dict[str, Any], label: str, numbers: Numbers, exact: bool) -> None:
        self.param, self.state, self.label = param, state, label
        self.history = History.of(_cpu.Buffer(param, label), numbers, exact)
        self._note()

    def _note(self) -> None:
        self._seen = (self.param._version, self.param.data_ptr())

    @property
    def is_untouched(self) -> bool:
        """Whether nobody but the optimizer has written to the parameter since its last step."""
        return self._seen == (self.param._version, self.param.data_ptr())

    def require_untouched(self) -> None:
        """Raise if the steps that rows wait for would be made with values that they were not meant for."""
        if self.history.waits and not self.is_untouched:
            raise RuntimeError(
                f"{self.label}: written to while rows waited for their steps; call sync() before writing"
            )

    def note_step(self) -> None:
        """The optimizer has written to it."""
        self._note()
        self.history.is_read = False

    def catch_up(self, ids: Any = None) -> None:
        """Make the steps that the rows missed: those that ``ids`` name, or all."""
        self.history.is_read = True
        self.require_untouched()
        slots = {name: self.state[key] for name, key in SLOTS.items() if key in self.state}
        if self.history.catch_up(_cpu.Buffer(self.param, self.label), slots, ids):
            increment_version([self.param, *slots.values()])
            self._note()


class Tables:
    """All of an optimizer, by parameter."""

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._tables: dict[Tensor, Table] = {}

    def __bool__(self) -> bool:
        return bool(self._tables)

    def __contains__(self, param: Tensor) -> bool:
        return param in self._tables

    def of(self, param: Tensor | None) -> list[Table]:
        """That of a parameter, if it is a table; with None all."""
        return [table for key, table in self._tables.items() if param is None or key is param]

    def make(self, param: Tensor, state: dict[str, Any], label: str, numbers: Numbers) -> Table:
        """The table of a parameter, new unless it is one with this state; :meth:`keep` makes it known."""
        found = self._tables.get(param)
        if found is not None and found.state is state:
            return found
        if found is not None:
            found.catch_up()  # with the moments that its rows waited with
        return Table(param, state, label, numbers, self._exact)

    def keep(self, tables: Iterable[Table]) -> None:
        """Once the first step of them has been found good."""
        for table in tables:
            self._tables[table.param] = table


class Reader:
    """The hooks of an attached module.

    It is copied and pickled without its optimizer, which owns it and, copied or pickled along, makes itself known to
    it again; alone it does nothing.
    """

    optimizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def before_forward(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Bring the rows that are looked up up to date."""
        ids = inputs[0] if inputs else named.get("input")
        if self.optimizer is not None and ids is not None:  # without any the module says what is missing
            self.optimizer._look_up(module.weight, ids)

    def before_state_dict(self, module: Any, *_: Any) -> None:
        """Bring all rows up to date."""
        if self.optimizer is not None:
            self.optimizer.sync(module.weight)
