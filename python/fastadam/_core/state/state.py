"""The state of an optimizer: the count of calls and the slots, as ``get_weights`` and ``set_weights`` list them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fastadam._core.common.checks import check_iterations, check_list
from fastadam._core.deferred.rates import Doubt
from fastadam._core.native.arrays import assign, on_gpu, to_host
from fastadam._core.native.backend import _cpu
from fastadam._core.native.rows import RowMap
from fastadam._core.options.keras3 import ACCUMULATOR
from fastadam._core.options.state_format import LOW, SCALES
from fastadam._core.state.entry import Entry
from fastadam._core.state.moments import check_scales
from fastadam._core.state.slots import SlotStore

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, Config

__all__ = ["Cycle", "Rows", "State"]


Rows: TypeAlias = Mapping[int, tuple[npt.NDArray[np.int64], ...]]
_NOT_KNOWN: Rows = {}


class Cycle(NamedTuple):
    """The variables whose accumulators hold gradients for one step, and the number of steps before it."""

    step: int
    places: frozenset[int]  # of the variables in the store
    # By place: the rows outside of which an accumulator is zero, of variables that have had only sparse gradients since
    # it was all zero: in this cycle, or in an earlier one if it is not among `places`. Of others they are not known.
    rows: Rows = _NOT_KNOWN

    def of(self, step: int) -> frozenset[int]:
        """The variables, if it is for this step."""
        return self.places if self.step == step else frozenset()

    def moved(self, place: int, row_map: RowMap) -> Cycle:
        """After the rows of a variable have got other places."""
        if place not in self.rows:
            return self
        rows = np.concatenate([np.zeros(0, np.int64), *self.rows[place]])
        return self._replace(rows={**self.rows, place: (np.flatnonzero(np.isin(row_map.sources, rows)),)})

    def without(self, place: int) -> Cycle:
        """After a variable was dropped; those after it have moved up."""
        places = frozenset([other - (other > place) for other in self.places if other != place])
        rows = {other - (other > place): known for other, known in self.rows.items() if other != place}
        return Cycle(self.step, places, rows)


NO_CYCLE = Cycle(-1, frozenset())


class Journal(NamedTuple):
    """Bookkeeping that takes effect together with native writes, which no signal handler can cut in two."""

    before: Cycle
    after: Cycle  # from when the native code has raised the counter to `due`
    counter: npt.NDArray[np.int64]
    due: int


class State:
    """What is saved and copied beside the options."""

    def __init__(self) -> None:
        self.calls = np.zeros((), np.int64)  # of apply_gradients; users may write to it, as `weights[0]`
        self.slots = SlotStore()
        self._fills = np.zeros((), np.int64)  # calls of `fill`
        self._journal = Journal(NO_CYCLE, NO_CYCLE, self.calls, 0)

    @property
    def entries(self) -> list[Entry]:
        """What is kept for each variable."""
        return self.slots.entries

    # ---- weights ---------------------------------------------------------------------------------------------------

    def weights(self) -> list[AnyArray]:
        """The live arrays: calls, then the slots in the order of their creation."""
        return [self.calls, *self.slots.arrays]

    def copies(self) -> list[AnyArray]:
        """Copies in host memory; the first is an ``np.int64``."""
        return [np.int64(int(self.calls)), *(np.array(to_host(array), order="C") for array in self.slots.arrays)]

    def checked(self, weights: Sequence[AnyArray], name: str) -> tuple[int, list[npt.NDArray[np.generic]]]:
        """The count and copies of the slots from a list in the order of ``weights``; ``name``: the optimizer's.

        Raises:
            TypeError: An array that does not hold real numbers.
            ValueError: Wrong number of arrays, a wrong shape, or an invalid count.
        """
        current = self.weights()
        given = _drop_keras1_dummies(check_list("weights", weights), len(current))
        if len(given) != len(current):
            raise ValueError(
                f"You called `set_weights(weights)` on optimizer {name} with a weight list of length "
                f"{len(given)}, but the optimizer was expecting {len(current)} weights."
                + ("" if self.entries else " It has no variables yet: call build(var_list) first.")
                + (" Small states are listed as they are stored: see `weights`." if self._has_small_states() else "")
            )
        calls = check_iterations("weights[0]", given[0])
        names = {at: name for entry in self.entries for name, at in entry.slots.items()}
        slots = [_like(old, given[i], f"weights[{i}]") for i, old in enumerate(current) if i > 0]
        for at, array in enumerate(slots):
            check_scales(names[at], array, f"weights[{at + 1}]")
        return calls, slots

    def fill(self, calls: int, slots: Sequence[npt.NDArray[np.generic]], calls_per_step: int) -> None:
        """Overwrite the count and all slots with checked values, at once: no signal handler runs in between.

        In the middle of a cycle the accumulators that are not all zero hold gradients.
        """
        accumulators = {entry.place: slots[entry.slots[ACCUMULATOR]] for entry in self._with_accumulators()}
        accumulating = [place for place, array in accumulators.items() if calls % calls_per_step and array.any()]
        known = {place: (_nonzero_rows(accumulators[place]),) for place in self.cycle.rows if place in accumulators}
        cycle = Cycle(calls // calls_per_step, frozenset(accumulating), known)
        on_gpu = [
            (old, new) for old, new in zip(self.slots.arrays, slots, strict=True) if not isinstance(old, np.ndarray)
        ]
        on_host = [(old, new) for old, new in zip(self.slots.arrays, slots, strict=True) if isinstance(old, np.ndarray)]
        for array, values in on_gpu:
            assign(array, values)
        self._journal = Journal(self.cycle, cycle, self._fills, int(self._fills) + 1)
        for entry in self.entries:
            entry.raise_doubt(Doubt.ONCE)
        _cpu.copy_all([*on_host, (self.calls, np.array(calls, np.int64))], self._fills)

    # ---- accumulated gradients -------------------------------------------------------------------------------------

    @property
    def cycle(self) -> Cycle:
        """The variables whose accumulators hold gradients, and for which step."""
        before, after, counter, due = self._journal
        return after if int(counter) >= due else before

    def begin(self, cycle: Cycle) -> None:
        """Let the cycle become this one when the native code raises ``calls``, and not before."""
        self._journal = Journal(self.cycle, cycle, self.calls, int(self.calls) + 1)

    def settle_cycle(self) -> None:
        """Keep the present cycle, whatever count is set from here on."""
        self._journal = Journal(self.cycle, self.cycle, self.calls, 0)

    def is_accumulating(self, entry: Entry, calls_per_step: int) -> bool:
        """Whether the accumulator of a variable holds gradients for the next step."""
        return calls_per_step > 1 and entry.place in self.cycle.of(int(self.calls) // calls_per_step)

    def drop(self, entry: Entry) -> None:
        """Drop a known variable and its slots, at once: no signal handler runs in between."""
        draft = self.slots.draft()
        draft.remove(entry)
        self.take(draft, self.cycle.without(entry.place))

    def take(self, draft: SlotStore, cycle: Cycle) -> None:
        """Take over other slots, and with them what is known of their accumulators."""
        vars(self).update(slots=draft, _journal=Journal(cycle, cycle, self.calls, 0))

    def accumulated_rows(self, entry: Entry, calls_per_step: int) -> npt.NDArray[np.int64] | None:
        """The rows of a variable whose accumulated gradients wait for the next step; None for all, or any."""
        none = np.zeros(0, np.int64)
        if not self.is_accumulating(entry, calls_per_step):
            return none
        rows = self.cycle.rows.get(entry.place)
        return None if rows is None else np.concatenate([none, *rows])

    def restart_accumulation(self, places: Iterable[int], calls_per_step: int, rows: Rows | None = None) -> None:
        """As if only these variables had had gradients since the last step; ``rows``: of the cycle, or None: as now."""
        known = self.cycle.rows if rows is None else rows
        cycle = Cycle(int(self.calls) // calls_per_step, frozenset(places), known)
        self._journal = Journal(cycle, cycle, self.calls, 0)

    def clear_accumulator(self, entry: Entry) -> None:
        """Set what gradients have left in an accumulator to zero; pages where there is nothing are not written."""
        accumulator = self.slots.arrays[entry.slots[ACCUMULATOR]]
        if not isinstance(accumulator, np.ndarray) or not accumulator.flags.c_contiguous or not accumulator.shape:
            assign(accumulator, 0)
        elif entry.place in self.cycle.rows:
            for rows in self.cycle.rows[entry.place]:
                accumulator[rows] = 0
        else:
            accumulator[_nonzero_rows(accumulator)] = 0

    def clear_stale_accumulators(self, calls_per_step: int) -> None:
        """Let a list of the weights show which accumulators hold gradients: all others are zero."""
        current = self.cycle.of(int(self.calls) // calls_per_step)
        for entry in self._with_accumulators():
            if entry.place not in current:
                self.clear_accumulator(entry)

    def _has_small_states(self) -> bool:
        return not {*SCALES, LOW}.isdisjoint(self.slots.names)

    def _with_accumulators(self) -> list[Entry]:
        return [entry for entry in self.entries if ACCUMULATOR in entry.slots]

    # ---- copies ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """A copy that a pickle holds: it knows no variables, and the first ones that it meets take its slots."""
        twin = State()
        twin.__setstate__(self.__getstate__())
        return twin

    def __getstate__(self) -> Config:
        return {"calls": int(self.calls), "slots": self.slots.__getstate__(), "cycle": self.cycle}

    def __setstate__(self, state: Config) -> None:
        self.__init__()  # type: ignore[misc]
        self.calls[...] = state["calls"]
        self.slots.__setstate__(state["slots"])
        self._journal = Journal(state["cycle"], state["cycle"], self.calls, 0)

    def __deepcopy__(self, memo: dict[int, object]) -> State:
        """A copy whose slots belong to the same variables, or to copies of them in the same order."""
        twin = State()
        twin.calls[...] = self.calls
        twin.slots = copy.deepcopy(self.slots, memo)
        twin._journal = Journal(self.cycle, self.cycle, twin.calls, 0)
        return twin


def _nonzero_rows(array: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """The rows that hold anything but zeros."""
    if not array.ndim:
        return np.zeros(0, np.int64)
    return np.flatnonzero(array.reshape(len(array), -1).any(axis=1)) if array.size else np.zeros(0, np.int64)


def _like(old: AnyArray, value: AnyArray, label: str) -> npt.NDArray[np.generic]:
    """A copy of ``value`` that can be assigned to ``old``; a copy, for it may be one of the arrays assigned before."""
    try:
        array = to_host(value) if on_gpu(value) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{label}: {type(value).__name__} that is not an array of numbers ({error})") from error
    if array.shape != tuple(old.shape):
        raise ValueError(
            f"{label}: Optimizer weight shape {old.shape} not compatible with provided weight shape {array.shape}"
        )
    if isinstance(old, np.ndarray) and not old.flags.writeable:
        raise ValueError(f"{label}: was made read-only, expected a writable array")
    if isinstance(old, np.ndarray) and old.dtype.kind in "iu" and array.dtype != old.dtype:  # codes, scales, low halves
        raise TypeError(f"{label}: dtype {array.dtype}, expected {old.dtype}, as get_weights of small states gives it")
    is_bfloat16 = array.dtype.name == "bfloat16"
    if array.dtype.kind not in "fiu" and not is_bfloat16:
        raise TypeError(f"{label}: dtype {array.dtype}, expected {old.dtype}")
    values = np.empty_like(to_host(old))
    values[...] = array  # in the layout of the slot
    return values


def _drop_keras1_dummies(weights: list[AnyArray], expected: int) -> list[AnyArray]:
    """A Keras 1 list without its dummies, one of shape (1,) for each variable."""
    variables = (expected - 1) // 2
    if variables == 0 or expected != 2 * variables + 1 or len(weights) != 3 * variables + 1:
        return weights
    return weights[:expected] if all(np.shape(dummy) == (1,) for dummy in weights[expected:]) else weights
