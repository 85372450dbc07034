"""``optimizer.state`` in a deferred mode: what is read from it has had all steps."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadam.torch._checks import ParamState, States

if TYPE_CHECKING:
    from fastadam.torch._step import GroupStepper

__all__ = ["SyncedStates"]


class SyncedStates(defaultdict[Tensor, ParamState]):
    """States of parameters; reading that of a table first makes the steps that its rows wait for.

    The optimizer itself, which holds its lock then, reads what is there. Copies and pickles are plain defaultdicts.

    Args:
        stepper: Has the tables. These are the states of its optimizer as long as it lives; after ``load_state_dict``
            the optimizer has others, and another stepper.
        states: What to begin with.
    """

    def __init__(self, stepper: GroupStepper, states: Mapping[Tensor, ParamState]) -> None:
        super().__init__(dict, states)
        self._stepper = weakref.ref(stepper)

    def _prepare(self, param: object = None) -> None:
        """Bring the rows of a parameter up to date, or for None those of all."""
        stepper = self._stepper()
        if stepper is None or not stepper.tables or stepper.is_busy:
            return
        if param is None or param in stepper.tables:
            with torch.no_grad(), stepper.lock:
                stepper.catch_up_state(self, param)

    def __getitem__(self, param: Tensor) -> ParamState:
        self._prepare(param)
        return super().__getitem__(param)

    def get(self, param: Any, default: Any = None) -> Any:
        self._prepare(param)
        return super().get(param, default)

    def setdefault(self, param: Any, default: Any = None) -> Any:
        self._prepare(param)
        return super().setdefault(param, default)

    def pop(self, param: Any, *default: Any) -> Any:
        self._prepare(param)
        return super().pop(param, *default)

    def popitem(self) -> tuple[Tensor, ParamState]:
        self._prepare()
        return super().popitem()

    def __iter__(self) -> Iterator[Tensor]:
        """Like that of a dict; without a method here ``dict(states)`` would not call ``__getitem__``."""
        return super().__iter__()

    def items(self) -> Any:
        return ItemsView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def __eq__(self, other: object) -> bool:
        self._prepare()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]  # as of a dict

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __repr__(self) -> str:
        return repr(self.copy())

    def copy(self) -> Any:
        """A plain defaultdict with the same states."""
        self._prepare()
        return defaultdict(dict, dict.items(self))

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, object]) -> States:
        return copy.deepcopy(self.copy(), memo)

    def __reduce__(self) -> Any:
        return self.copy().__reduce__()
