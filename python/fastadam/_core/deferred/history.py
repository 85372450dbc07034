"""The history of a deferred table: which steps each row has had, and the rates of the steps that some rows wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from fastadam._core.common.types import AnyArray, NativeHistory
from fastadam._core.deferred.rates import PEAK_STEPS, Doubt, Numbers, Rates, crossover
from fastadam._core.deferred.trail import Segment, Trail
from fastadam._core.native.arrays import assign, native_of, to_host, untouched_zeros, zeros_beside
from fastadam._core.native.backend import _cpu
from fastadam._core.native.buffers import fingerprint_of
from fastadam._core.native.plan import Plan, StepHyper
from fastadam._core.native.rows import RowMap
from fastadam._core.native.slices import IndexedSlices

__all__ = ["CHANGED", "MOVES", "History"]

_FIRST_ROOM = 1024
_MOST_ROOM = 2**16  # on the host
_MANY_ROWS = 2**20  # looked through at a time
MOVES, CHANGED = 1, 2  # flags of a row: kMoves and kChanged in csrc/core/step_args.h
_DEVICE_CROSSOVER = 2.0  # of `crossover`; not measured on a GPU


class History:
    """The steps of one table, and which of them each row has had.

    A step that moves all rows is a step of the history, too, and a row has had at least the steps before the last of
    these. ``rates`` are replaced all at once or changed by one native call: whatever is interrupted leaves one whole
    history. On a GPU ``calls`` has the count of calls before each step, so that steps which turn out to have done
    nothing can be taken back.

    On the host ``flags`` says of each row whether it ``MOVES``: its moments may be other than zero, so that it moves
    without a gradient. The others are neither read nor written, unless weights decay. ``CHANGED``: it had a gradient
    since someone cleared that flag. In doubt whether rows without ``MOVES`` have moments, all are replayed.
    """

    def __init__(
        self,
        rates: Rates,
        numbers: Numbers,
        shape: tuple[int, ...],
        exact: bool,
        fingerprint: int | None = None,
        flags: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self.rates = rates
        self.flags = untouched_zeros((shape[0],), np.uint8) if flags is None else flags
        self.numbers = numbers
        self.shape = shape
        self.exact = exact  # rows get the bits of dense steps; else missed steps may be summed in closed form
        self.fingerprint = fingerprint  # of the table's values when this copy was made
        self.calls: npt.NDArray[np.int64] | None = None
        self.is_read = False  # since the last step, some rows were brought up to date to be read
        self.swept = 0  # the row where the next sweep begins
        self.sharing: tuple[list[object], object] | None = None  # with deep copies: whose token is there moves the rows
        self.trail: Trail | None = None  # of the steps since a file was saved that deltas follow
        self._table: _cpu.Buffer | None = None  # the table, if it is on a GPU
        self._on_gpu: object = None  # a copy of the rates there
        self._crossover: float | None = None
        self._forms: _cpu.ClosedForms | None = None  # a cache
        self._plan: Plan | None = None  # brings rows up to date

    @classmethod
    def of(
        cls, buffer: _cpu.Buffer, numbers: Numbers, exact: bool, doubt: Doubt, moment: AnyArray | None = None
    ) -> History:
        """The history of a table whose rows are all up to date; a float64 table is always exact.

        ``doubt``: whether its moments are zero. ``moment``: one of them; if it is in a file, the counters are too.
        """
        rows = buffer.shape[:1]
        rates = Rates.zeros(untouched_zeros(rows, np.int32, near=moment), buffer.state_dtype, _FIRST_ROOM)
        rates.counts[3] = doubt
        flags = untouched_zeros(rows, np.uint8, near=moment)
        exact = exact or buffer.state_dtype == "float64"
        return cls(rates, numbers, buffer.shape, exact, flags=flags).placed(buffer)

    def placed(self, buffer: _cpu.Buffer) -> History:
        """This history, or a copy on the GPU if its table is on one."""
        if buffer.device < 0 or self._table is not None:
            return self
        found = self.rates.copy(self.rates.last.copy())
        history = (*found, None, 1.0, self.flags, self.numbers.accumulates)
        _cpu.drop_steps(history, int(found.counts[2]))  # on a GPU rows count from the first
        last = zeros_beside(buffer, "int32", (self.shape[0],))
        assign(last, found.last)
        twin = History(found._replace(last=last), self.numbers, self.shape, self.exact)
        twin._table = buffer
        twin.calls = np.zeros(self.room, np.int64)
        return twin

    # ---- what it says ----------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps in the history."""
        return int(self.rates.counts[0])

    @property
    def waits(self) -> bool:
        """Whether some row may be behind; False again once all rows have been brought up to date in one call."""
        return self.steps != int(self.rates.counts[2])

    @property
    def room(self) -> int:
        """Steps for which there is room."""
        return len(self.rates.alphas)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another step."""
        return self.steps >= self.room

    @property
    def dropped(self) -> int:
        """Steps before the first that the history still has, on the host."""
        return int(self.rates.counts[4])

    @property
    def planned(self) -> list[_cpu.Buffer]:
        """The table, if the plan that brings its rows up to date keeps it alive."""
        return [] if self._plan is None else self._plan.buffers

    @property
    def leaves_rows(self) -> bool:
        """Whether rows without MOVES are left as they are."""
        leaves = not self.rates.counts[1] and self.rates.counts[3] == Doubt.NONE
        return leaves and self._table is None and self.numbers.ema_momentum is None

    def behind(self, rows: npt.NDArray[np.integer] | slice = slice(None), steps: int | None = None) -> AnyArray:
        """For each of these rows whether it waits for one of the first so many steps.

        A row that all steps leave as it is never waits.
        """
        had = np.maximum(to_host(self.rates.last)[rows], self.rates.counts[2])
        waits = had < (self.steps if steps is None else steps)
        return waits & ((self.flags[rows] & MOVES) != 0) if self.leaves_rows else waits

    def is_behind(self, gradient: object) -> bool:
        """Whether a step on the host touches a row that waits; the indices have not been checked."""
        indices = gradient.indices if isinstance(gradient, IndexedSlices) else None
        if not self.waits or not isinstance(indices, np.ndarray) or self._table is not None or not self.shape[0]:
            return False
        return bool(indices.size and self.behind(np.clip(indices, 0, self.shape[0] - 1)).any())

    def must_catch_up(self, numbers: Numbers, *, touches_rows: bool) -> bool:
        """Rows cannot wait for a dense gradient, nor for numbers that the history does not have."""
        return self.waits and not (touches_rows and self.numbers == numbers)

    # ---- bringing rows up to date ----------------------------------------------------------------------------------

    def catch_up(
        self,
        table: _cpu.Buffer,
        slots: Mapping[str, AnyArray],
        ids: AnyArray | None = None,
        *,
        counter: npt.NDArray[np.int64] | None = None,
        context: object = None,
    ) -> bool:
        """Make the steps that rows missed: the rows ``ids``, of any shape, or all. False if no row was behind."""
        self.is_read = True
        if not self.waits:
            return False
        self.claim(table.label)
        beta_1, beta_2, epsilon, amsgrad, momentum, _ = self.numbers
        if ids is None and self._table is None and self.rates.counts[3] == Doubt.ONCE:
            for name in ("m", "v", *(("vhat",) if "vhat" in slots else ())):
                _cpu.flag_moving_rows(self.flags, _cpu.Buffer(slots[name], "slot").array())
            self.rates.counts[3] = Doubt.NONE
        columns = {name: [slots[name]] for name in (("m", "v", "vhat") if amsgrad else ("m", "v"))}
        averages = {} if momentum is None else {"average": [slots["average"]]}
        if self._plan is None or not self._plan.holds([table.source], {**columns, **averages}):
            self._plan = Plan([table], {**columns, **averages}, histories=[self.native], context=context)
        flat = np.ascontiguousarray(ids.reshape(-1)) if isinstance(ids, np.ndarray) else ids
        self._plan.catch_up(flat, StepHyper(1, 0.0, beta_1, beta_2, epsilon, ema_momentum=momentum or 0.0), counter)
        return True

    def share(self, twin: History, owner: list[object], tokens: tuple[object, object]) -> None:
        """Either this optimizer or its deep copy may make the steps that rows of a table wait for, whichever begins.

        ``owner`` is to hold the token of that one; ``tokens``: of this optimizer and of the copy.
        """
        if self.waits and self._table is None:
            if self.sharing is None or self.sharing[0][0] is self.sharing[1]:
                self.sharing = owner, tokens[0]
            twin.sharing = self.sharing[0], tokens[1]

    def claim(self, label: str) -> None:
        """Rows of the table are about to be moved; raises ValueError if that is up to another optimizer."""
        self.require_own(label)
        if self.sharing is not None:
            owner, token = self.sharing
            owner[0] = token

    def require_own(self, label: str) -> None:
        """Raise ValueError if another optimizer has made steps that rows of the table wait for here."""
        if self.sharing is not None and self.sharing[0][0] not in (None, self.sharing[1]):
            raise ValueError(
                f"{label}: rows waited for steps when this optimizer was deep-copied or made as a deep copy, and the "
                "other one has moved them since, so that they would make these steps twice; go on with the other one, "
                "and call sync() before a copy is made, or copy.deepcopy((optimizer, variables)) and build() of the "
                "copy with its own variables"
            )

    def raise_doubt(self, doubt: Doubt) -> None:
        """From here on there is at least this doubt."""
        self.rates.counts[3] = max(int(self.rates.counts[3]), doubt)

    def change_numbers(self, numbers: Numbers) -> None:
        """Use other numbers from here on; every row is up to date."""
        if self.trail is not None:
            self.trail.change_numbers(self.total, numbers)
        self.numbers = numbers
        self._crossover = self._plan = None

    def next_rows(self, max_staleness: int) -> npt.NDArray[np.int64]:
        """The rows that a step must sweep so that every row is swept within ``max_staleness`` steps."""
        rows = self.shape[0]
        swept = (self.swept + np.arange(-(-rows // max_staleness))) % max(rows, 1)
        self.swept = int(swept[-1] + 1) % rows if rows else 0
        return swept

    # ---- files of what changed; on the host ------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Steps that the history ever had."""
        return self.dropped + self.steps

    def begin_trail(self) -> None:
        """Keep the rates of all steps from here on, for the next file."""
        self.trail = Trail(self.total, self.numbers)

    def segments(self, begin: int) -> list[Segment]:
        """The steps from ``begin`` of all on."""
        steps = self.steps
        trail = self.trail or Trail(begin, self.numbers)
        return trail.segments(begin, self.dropped, self.rates.alphas[:steps], self.rates.keeps[:steps])

    def had(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """How many steps of all each of these rows has had at least."""
        counts: npt.NDArray[np.int64] = np.maximum(self.rates.last[rows].astype(np.int64), self.rates.counts[2])
        return counts + self.dropped

    def changed_rows(self) -> npt.NDArray[np.int64]:
        """The rows with the flag CHANGED."""
        begins = range(0, self.shape[0], _MANY_ROWS)
        found = [np.flatnonzero(self.flags[at : at + _MANY_ROWS] & CHANGED) + at for at in begins]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def clear_changed(self) -> None:
        """No row has changed since a file was saved; pages without the flag are not written."""
        rows = self.changed_rows()
        self.flags[rows] &= np.uint8(~CHANGED & 0xFF)

    @classmethod
    def of_segment(
        cls, segment: Segment, shape: tuple[int, ...], *, exact: bool, had: npt.NDArray[np.int64]
    ) -> History:
        """A history of these steps; ``had``: for each row, how many of them it has had."""
        steps = len(segment.alphas)
        rates = Rates.zeros(had.astype(np.int32), str(segment.alphas.dtype), -(-steps // PEAK_STEPS) * PEAK_STEPS)
        rates.alphas[:steps], rates.keeps[:steps] = segment.alphas, segment.keeps
        rates.counts[0] = steps
        made = cls(rates, segment.numbers, shape, exact or str(segment.alphas.dtype) == "float64")
        _cpu.drop_steps(made.native, 0)  # which finds the peaks
        return made

    # ---- steps that a GPU refused ----------------------------------------------------------------------------------

    def confirm(self) -> None:
        """The steps so far are never taken back, whatever calls are counted from here on."""
        if self.calls is not None:
            self.calls[: self.steps] = -1

    def forget_from(self, calls: int) -> None:
        """Take back the steps made after so many calls; they have changed nothing."""
        if self.calls is None:
            return
        steps = int(np.searchsorted(self.calls[: self.steps], calls))
        self.rates.counts[:3] = (steps, np.count_nonzero(self.rates.keeps[:steps] != 1), 0)
        self._forms = self._plan = None

    # ---- memory ----------------------------------------------------------------------------------------------------

    @property
    def native(self) -> NativeHistory:
        """As a native plan takes it."""
        beta_1, beta_2, _, amsgrad, momentum, accumulates = self.numbers
        replays = self.exact or momentum is not None  # an average has no closed form
        if self._forms is None and not replays:
            self._forms = (_cpu if self._table is None else native_of(self._table)).ClosedForms()
        if self._crossover is None:
            always = replays or not _cpu.ClosedForms.exist(beta_1, beta_2, amsgrad)
            self._crossover = crossover(self.shape, self.rates.alphas.itemsize, always)
        if self._table is None:
            return (*self.rates, None if replays else self._forms, self._crossover, self.flags, accumulates)
        rows = _DEVICE_CROSSOVER if self.exact else self._crossover  # a pass changes last bits of closed forms
        if self._on_gpu is None:
            native, stream = native_of(self._table), native_of(self._table).stream_of(self._table.source) or 0
            self._on_gpu = native.History(*self.rates[1:4], self.steps, self._table.device, stream)
        return (*self.rates, self._forms, rows, self.calls, self._on_gpu)

    def make_room(self, catch_up: Callable[[npt.NDArray[np.int64]], None]) -> None:
        """For another step: drop steps that no row waits for, if they are half of all, or grow.

        On the host it does not grow beyond ``_MOST_ROOM``: ``catch_up`` brings the rows up to date that lag further
        behind than half of that. On a GPU it grows as long as there is such a row.
        """
        steps = self.steps
        if self._table is not None:
            self._make_room_on_gpu()
            return
        first = max(int(self.rates.counts[2]), self._least_had() // PEAK_STEPS * PEAK_STEPS)
        if first < steps // 2 and self.room < _MOST_ROOM:
            self._grow()
            return
        if first < steps // 2:
            first = steps // 2
            for rows in self._lagging(first):
                catch_up(rows)
        if self.trail is not None:
            self.trail.keep(self.dropped, self.rates.alphas[:first], self.rates.keeps[:first])
        _cpu.drop_steps(self.native, first)

    def _least_had(self) -> int:
        """The steps that every row has had which may not be left as it is."""
        least = self.steps
        for begin in range(0, self.shape[0], _MANY_ROWS):
            rows = slice(begin, begin + _MANY_ROWS)
            had = self.rates.last[rows]
            moving = had[(self.flags[rows] & MOVES) != 0] if self.leaves_rows else had
            least = min(least, int(moving.min(initial=least)))
        return least

    def _lagging(self, steps: int) -> Iterator[npt.NDArray[np.int64]]:
        """The rows that wait for one of the first so many steps."""
        for begin in range(0, self.shape[0], _MANY_ROWS):
            rows = np.flatnonzero(self.behind(slice(begin, begin + _MANY_ROWS), steps)) + begin
            if rows.size:
                yield rows

    def _grow(self) -> None:
        """Twice as much room, in new arrays."""
        self._on_gpu = self._plan = None
        alphas, keeps, peaks = (np.concatenate([old, np.zeros_like(old)]) for old in self.rates[1:4])
        self.rates = self.rates._replace(alphas=alphas, keeps=keeps, peaks=peaks)
        if self.calls is not None:
            self.calls = np.concatenate([self.calls, np.zeros_like(self.calls)])

    def _make_room_on_gpu(self) -> None:
        """In new arrays: without the steps that every row has had, if these are half of them, else twice as long."""
        rates = self.rates
        last = to_host(rates.last)
        first = int(last.min(initial=self.steps)) // PEAK_STEPS * PEAK_STEPS
        if first < self.steps // 2:
            self._grow()
            return
        self._on_gpu = self._plan = self._forms = None
        places = (first, first, first // PEAK_STEPS)
        alphas, keeps, peaks = (np.roll(old, -place) for old, place in zip(rates[1:4], places, strict=True))
        steps, synced = self.steps - first, max(0, int(rates.counts[2]) - first)
        counts = np.array([steps, np.count_nonzero(keeps[:steps] != 1), synced, 0, 0], np.int64)
        shifted = zeros_beside(self._table, "int32", last.shape)  # type: ignore[arg-type]
        assign(shifted, last - np.int32(first))
        if self.calls is not None:
            self.calls = np.roll(self.calls, -first)
        self.rates = Rates(shifted, alphas, keeps, peaks, counts)

    def copy(self, buffer: _cpu.Buffer | None) -> History:
        """With arrays of its own, for a copy of the table as it is now; a table on a GPU is up to date."""
        if self._table is not None:
            rates = self.rates._replace(last=np.zeros(self.shape[0], np.int32), counts=np.zeros(5, np.int64))
            twin = History(rates, self.numbers, self.shape, self.exact)
            twin.raise_doubt(Doubt.ONCE)
            return twin
        self.require_own("a table" if buffer is None else buffer.label)
        fingerprint = self.fingerprint if buffer is None else fingerprint_of(buffer)
        rates = self.rates.copy(self.rates.last.copy())
        rates.counts[3] = min(int(rates.counts[3]), Doubt.ONCE)  # nobody has the arrays of the copy
        return History(rates, self.numbers, self.shape, self.exact, fingerprint, self.flags.copy())

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({"trail": None, **state, "sharing": None})
        if "flags" not in state:  # a pickle of fastadam 0.1
            self.flags = untouched_zeros(self.shape[:1], np.uint8)
            self.rates = self.rates._replace(counts=np.array([*self.rates.counts[:3], *[0] * 5], np.int64)[:5])
            self.raise_doubt(Doubt.ONCE)

    # ---- rows that change ------------------------------------------------------------------------------------------

    def moved(self, buffer: _cpu.Buffer, row_map: RowMap, moment: AnyArray | None = None) -> History:
        """For the array that replaces the table: rows that wait go on waiting, and fresh rows wait for nothing.

        ``moment``: its new one, if that is given.
        """
        last = untouched_zeros(buffer.shape[:1], np.int32, near=moment)
        if self.waits:
            last[...] = self.steps
            last[row_map.kept] = to_host(self.rates.last)[row_map.sources[row_map.kept]]
        flags = untouched_zeros(buffer.shape[:1], np.uint8, near=moment)
        row_map.move(self.flags, flags)
        rates = self.rates.copy(last)
        rates.counts[3] = min(int(rates.counts[3]), Doubt.ONCE)  # nobody has the new arrays
        twin = History(rates, self.numbers, buffer.shape, self.exact, flags=flags).placed(buffer)
        twin.is_read = self.is_read
        if self.calls is not None:
            twin.calls = self.calls.copy()
        return twin

    def moving_rows(self) -> npt.NDArray[np.int64] | None:
        """The rows that may have moments; None if any may."""
        if self._table is not None or self.rates.counts[3] != Doubt.NONE:
            return None
        return np.flatnonzero(self.flags & MOVES)

    def moved_so_far(self) -> npt.NDArray[np.bool_]:
        """For each row of a table on the host whether steps may have changed it or are to do so."""
        rows = self.moving_rows()
        if rows is None:
            return np.ones(self.shape[0], bool)
        moved = np.asarray(self.behind())
        moved[rows] = True
        return moved

    def note_reset(self, ids: npt.NDArray[np.integer] | None) -> None:
        """The moments of these rows, or of all, which are up to date, have become zero."""
        rows = self.moving_rows() if ids is None else ids
        self.flags[slice(None) if rows is None else rows] = CHANGED
        if ids is None and self.rates.counts[3] == Doubt.ONCE:
            self.rates.counts[3] = Doubt.NONE

    def fits(self, buffer: _cpu.Buffer) -> bool:
        """Whether this is the table, as it was, that the copied history belongs to."""
        return not self.waits or self.fingerprint is None or self.fingerprint == fingerprint_of(buffer)
