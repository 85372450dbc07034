"""Embedding tables in a deferred mode: rows are brought up to date when they are touched or read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadam._core.common.warning import warn
from fastadam._core.deferred.history import History
from fastadam._core.deferred.rates import Doubt, Numbers
from fastadam._core.native.arrays import expect_random_rows
from fastadam._core.native.backend import _cpu
from fastadam._core.native.rows import RowMap
from fastadam.torch._attached import AttachedParameter
from fastadam.torch._checks import Group, ParamState, States
from fastadam.torch._layout import versions_of
from fastadam.torch._step_count import number_of
from fastadam.torch._stored import SLOTS

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, SparseUpdate

__all__ = ["Table", "Tables"]


class Table:
    """A parameter some of whose rows wait for steps, and the moments with which they wait."""

    def __init__(self, param: Tensor, state: ParamState, label: str, numbers: Numbers, exact: bool) -> None:
        self.param, self.state, self.label = param, state, label
        # Since the last step, rows that waited have been brought up to date only because `optimizer.state` was read.
        # What was read of the parameter before that, as it is in memory, is out of date.
        self._lagged = False
        moments = self._moments_now().values()
        is_new = not number_of(state["step"], label) and not any(versions_of(list(moments)))
        doubt = Doubt.NONE if is_new else Doubt.ONCE
        buffer = _cpu.Buffer(param, label)
        self.history = History.of(buffer, numbers, exact, doubt)
        if buffer.device < 0:
            expect_random_rows(buffer.array(), small_pages=False)
        self._note()

    def _note(self) -> None:
        self._moments = self._moments_now()
        self._seen = [_mark_of(tensor) for tensor in (self.param, *self._moments.values())]

    def _moments_now(self) -> dict[str, Tensor]:
        found = {name: self.state.get(key) for name, key in SLOTS.items()}
        return {name: moment for name, moment in found.items() if isinstance(moment, Tensor)}

    @property
    def is_untouched(self) -> bool:
        """Whether only the optimizer has written to the parameter since its last step."""
        return self._seen[0] == _mark_of(self.param)

    def require_untouched(self) -> None:
        """Raise if the waiting steps would be made with values that they were not meant for."""
        label = self._written()
        if label is not None:
            raise RuntimeError(
                f"{label}: written to while rows waited for their steps; call sync() before writing; del "
                "optimizer.state[parameter] begins anew, without these steps"
            )

    def _written(self) -> str | None:
        """What error messages call a tensor that was written to while rows waited for a step; None for none."""
        if not self.history.waits:
            return self.label if self._lagged and not self.is_untouched else None
        labels = [self.label, *[self._label_of(name) for name in self._moments]]
        for tensor, seen, label in zip((self.param, *self._moments.values()), self._seen, labels, strict=True):
            if _mark_of(tensor) != seen:
                return label
        return None

    def _label_of(self, name: str) -> str:
        return f"state of {self.label}: {SLOTS[name]}"

    def note_state(self, state: ParamState | None) -> bool:
        """Take the parameter's state as it is now; whether it was dropped to give up steps that cannot be made."""
        self.state = state or {SLOTS[name]: moment for name, moment in self._moments.items()}
        return not state and self._written() is not None

    def note_step(self) -> None:
        """The optimizer has written to the parameter."""
        self._note()
        self._lagged = self.history.is_read = False

    def replaced(self, param: Tensor, state: ParamState, row_map: RowMap) -> Table:
        """The table of the parameter that replaces this one's; rows that wait go on waiting."""
        twin = copy.copy(self)
        twin.param, twin.state = param, state
        twin.history = self.history.moved(_cpu.Buffer(param, self.label), row_map)
        twin._note()
        return twin

    def note_reset(self, ids: npt.NDArray[np.int64] | None) -> None:
        """The moments of these rows, or of all, which are up to date, have been set to zero."""
        self.history.note_reset(ids)
        self._note()

    def catch_up(self, ids: AnyArray = None) -> None:
        """Make the steps that rows have missed: the rows ``ids``, or all."""
        self.history.is_read = True
        self.require_untouched()
        if ids is None:
            self._lagged = False
        are_replaced = self._are_replaced()
        if self.history.catch_up(_cpu.Buffer(self.param, self.label), self._moments, None if are_replaced else ids):
            increment_version([self.param, *self._moments.values()])
        elif not are_replaced:
            return
        if are_replaced:
            self.history.raise_doubt(Doubt.ONCE)
        self._note()

    def catch_up_state(self) -> None:
        """Make all steps before `optimizer.state` is read."""
        lags = self.lags and not isinstance(self.param, AttachedParameter)
        is_read = self.history.is_read
        self.catch_up()
        self._lagged, self.history.is_read = lags, is_read

    @property
    def lags(self) -> bool:
        """Whether values of the parameter that were read from its memory since the last step may lack steps."""
        return self.history.waits or self._lagged

    def _are_replaced(self) -> bool:
        """Whether the state has other moments than those that rows wait with.

        Raises:
            RuntimeError: One is a copy of a moment whose rows waited: it would be taken for the moment after all steps.
            TypeError: One is not a tensor.
        """
        are_replaced = False
        for name, known in self._moments.items():
            now = self.state.get(SLOTS[name], known)
            if now is known:
                continue
            if not isinstance(now, Tensor):
                raise TypeError(f"{self._label_of(name)}: {type(now).__name__}, expected a tensor")
            if name != "vhat" and self._lags(known, now):  # a step without gradient leaves the largest as it is
                raise RuntimeError(
                    f"{self._label_of(name)}: replaced by a copy that was made while rows waited for their steps; call "
                    "sync() before copying; del optimizer.state[parameter] begins anew"
                )
            are_replaced = True
        return are_replaced

    def _lags(self, known: Tensor, now: Tensor) -> bool:
        """Whether a row that waits, and that its steps would change, is the same in both."""
        is_alike = now.shape == known.shape and now.device == known.device and now.layout == known.layout
        if not self.history.waits or not is_alike or not known.numel():
            return False
        rows = len(known)
        same = (now == known).reshape(rows, -1).all(1) & (known != 0).reshape(rows, -1).any(1)
        return bool((same & torch.from_numpy(self.history.behind())).any())

    def take_moments(self) -> None:
        """Go on with the moments that the state has now, after the waiting steps were made with those before."""
        self.require_untouched()
        if self._are_replaced():
            self.catch_up()
        elif not self.history.waits:
            if self._seen[1:] != [_mark_of(moment) for moment in self._moments.values()]:
                self.history.raise_doubt(Doubt.ONCE)
            self._note()

    def before_step(self, numbers: Numbers, *, touches_rows: bool) -> bool:
        """Bring rows up to date that cannot wait for a step; return whether its numbers are new to the history."""
        self.take_moments()
        if self.history.must_catch_up(numbers, touches_rows=touches_rows):
            self.catch_up()
        if self.history.numbers == numbers:
            return False
        self.history.change_numbers(numbers)
        return True


class Tables:
    """The deferred tables of an optimizer, by parameter."""

    def __init__(self, mode: SparseUpdate) -> None:
        self._mode = mode
        self._tables: dict[Tensor, Table] = {}
        self._has_warned = False

    def renewed(self) -> Tables:
        """No tables; a warning that was given is not repeated."""
        tables = Tables(self._mode)
        tables._has_warned = self._has_warned
        return tables

    def __bool__(self) -> bool:
        return bool(self._tables)

    def __contains__(self, param: Tensor) -> bool:
        return param in self._tables

    def of(self, param: Tensor | None) -> list[Table]:
        """The table of a parameter, if it is one; all tables for None."""
        return [table for key, table in self._tables.items() if param is None or key is param]

    def find(self, param: Tensor) -> Table | None:
        """The table of a parameter; None if it is not one."""
        return self._tables.get(param)

    def replace(self, param: Tensor, table: Table | None) -> None:
        """Forget the table of a parameter, if it is one; ``table``: that of the parameter that replaces it."""
        tables = {key: other for key, other in self._tables.items() if key is not param}
        self._tables = tables if table is None else {**tables, table.param: table}

    def make(self, param: Tensor, state: ParamState, label: str, numbers: Numbers) -> Table:
        """The table of a parameter with this state; a new one becomes known by :meth:`keep`."""
        found = self._tables.get(param)
        if found is not None:
            found.take_moments()
        if found is None or found.state is not state or found.history.shape != tuple(param.shape):
            if found is not None:
                found.catch_up()  # with the moments that its rows waited with
            found = Table(param, state, label, numbers, exact=self._mode == "deferred")
        if found.history.is_full:
            found.history.make_room(found.catch_up)
        return found

    def keep(self, tables: Iterable[Table]) -> None:
        """Add tables, after their first step."""
        for table in tables:
            self._tables[table.param] = table

    def note_states(self, states: States) -> None:
        """Take the states as they are now; forget tables that were written to and whose states were dropped then."""
        for param, table in list(self._tables.items()):
            if table.note_state(states.get(param)):
                del self._tables[param]

    def forget_removed(self, groups: list[Group], states: States) -> None:
        """Before a step: take the states as they are now, and forget the tables whose parameters have left the groups.

        Raises:
            RuntimeError: Rows of one of them wait for their steps.
        """
        if not self._tables:
            return
        self.note_states(states)
        stepped = {id(param) for group in groups for param in group["params"]}
        removed = [table for param, table in self._tables.items() if id(param) not in stepped]
        for table in removed:
            if table.lags:
                raise RuntimeError(
                    f"{table.label}: left param_groups while rows waited for their steps; call sync() before the step"
                )
        for table in removed:
            del self._tables[table.param]

    def warn_of_unread(self, tables: Sequence[Table]) -> None:
        """Once: the loss read rows that wait from memory, so this gradient belongs to stale values.

        There is no warning in a table's first step: no row waits before it, and only the second one shows whether rows
        are read through the optimizer.
        """
        if self._has_warned:
            return
        for table in tables:
            if table.lags and not table.history.is_read and not isinstance(table.param, AttachedParameter):
                self._has_warned = True
                warn(
                    f"{table.label}: its rows were read from its memory, where with sparse_update={self._mode!r} they "
                    "lag behind; call opt.attach(embedding) once, with the module that looks them up, or read them by "
                    "opt.gather(param, ids) or after opt.sync()"
                )
                return


def _mark_of(tensor: Tensor) -> tuple[int | None, int]:
    """What changes when a tensor is written to or gets other memory."""
    return versions_of([tensor])[0], tensor.data_ptr()
