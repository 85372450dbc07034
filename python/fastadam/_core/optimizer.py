"""What every optimizer of this package has: its state, as users of tf.keras read and write it, and its copies."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from fastadam._core import resizing
from fastadam._core.averages import refuse_while_swapped
from fastadam._core.common.checks import check_integer, check_iterations, check_list, shown
from fastadam._core.common.strict import class_only
from fastadam._core.deferred.rates import Doubt
from fastadam._core.minimize import Minimizer
from fastadam._core.native.arrays import copy_beside
from fastadam._core.native.buffers import buffer_of, buffers_of
from fastadam._core.native.variable import label_of, unwrap
from fastadam._core.options.options import Options
from fastadam._core.options.state_format import LOW, MOMENTS, SCALES
from fastadam._core.parts import Parts
from fastadam._core.saving.delta_writer import save_delta
from fastadam._core.saving.reader import load_optimizer
from fastadam._core.saving.writer import save_optimizer
from fastadam._core.state.given_slots import GivenSlots
from fastadam._core.state.initial_value import Initializer, initial_value
from fastadam._core.state.moments import readable
from fastadam._core.state.state import State
from fastadam._core.step import Stepper

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.common.types import AnyArray, Array, ArrayLike, Config, Foreign, VariableLike
    from fastadam._core.native.backend import _cpu

__all__ = ["Optimizer"]


class _OneSlot(NamedTuple):
    """A slot that a user adds."""

    names: tuple[str, ...]
    begin: Callable[[_cpu.Buffer, str], AnyArray]


class _NotMade:
    """In the place of the parts until ``__init__`` has made them."""

    def __getattr__(self, name: str) -> NoReturn:
        self.__iter__()

    def __iter__(self) -> NoReturn:
        raise AttributeError("__init__ of the optimizer has not run, expected super().__init__() in that of a subclass")


class Optimizer(Minimizer):
    """Iterations, slots and tables of variables, held in :class:`Parts`; a subclass steps them."""

    name: str
    _parts: Parts = _NotMade()  # type: ignore[assignment]
    _stepper: Stepper = _NotMade()  # type: ignore[assignment]

    def __init__(self) -> None:
        self._hold(Options(), State())

    def _hold(self, options: Options, state: State) -> None:
        self._parts = Parts.around(options, state)
        self._stepper = Stepper(self._parts)

    # ---- state -----------------------------------------------------------------------------------------------------

    @property
    def iterations(self) -> np.int64:
        """Steps made so far. Setting it continues from there: after ``opt.iterations = 5`` the next step uses t = 6.

        Setting it in the middle of an accumulation cycle drops the gradients of the cycle.
        """
        count: np.int64 = np.int64(self._parts.state.calls.item() // self._parts.options.calls_per_step)
        return count

    @iterations.setter
    def iterations(self, value: int) -> None:
        per_step = self._parts.options.calls_per_step
        calls = check_iterations("iterations", check_iterations("iterations", value) * per_step)
        with self._parts.runtime.lock:
            self._parts.runtime.require_closed("iterations")
            self._parts.state.settle_cycle()
            self._parts.tables.set_calls(calls)
            self._parts.state.restart_accumulation([], per_step)

    def build(
        self,
        var_list: Iterable[VariableLike],
        slots: Sequence[Mapping[str, npt.NDArray[np.generic]] | None] | None = None,
    ) -> None:
        """Create the slots of these variables now, so that ``set_weights`` works before the first step.

        An unpickled optimizer assigns its state to them, in the order in which the variables first came.

        Args:
            var_list: The variables.
            slots: For each variable None, or arrays that become its slots as they are, neither copied nor set to zero:
                ``{"m": ..., "v": ..., "vhat": ..., "average": ..., "gradient_accumulator": ...}`` or some of these, of
                the variable's shape and layout and the state's dtype (float32; float64 for a float64 variable). They
                may be memory maps of files. An average of zeros begins at its variable, whose values are copied into
                it; an accumulator must be zero. From then on they are the optimizer's: write to them with
                :meth:`set_weights`.

        Raises:
            RuntimeError: A step is open; nothing is changed.
            TypeError: A variable or a slot of the wrong type or dtype; nothing is changed.
            ValueError: A slot of another shape or layout, read-only, in the memory of something else, or of a variable
                that has it already, or an accumulator that is not zero; nothing is changed.

        >>> import numpy as np, fastadam
        >>> table, m, v = (np.zeros((1000, 2), np.float32) for _ in range(3))
        >>> opt = fastadam.Adam(0.1, sparse_update="deferred")
        >>> opt.build([table], slots=[{"m": m, "v": v}])
        >>> step = opt.apply_gradients([(fastadam.IndexedSlices([[1.0, 1.0]], [7]), table)])
        >>> m[7].round(3).tolist()
        [0.10000000149011612, 0.10000000149011612]
        """
        variables = check_list("var_list", var_list)
        buffers = buffers_of(variables, range(len(variables)))
        options, state, runtime, _ = self._parts
        with runtime.lock:
            runtime.require_closed("build")
            if slots is None:
                state.slots.prepare(buffers, options.state_format.of).commit()
            else:
                state.slots.take(GivenSlots(slots, buffers, options.state_format), buffers)

    @property
    def weights(self) -> list[AnyArray]:
        """The live state: iterations, then all m, all v, all vhat; variables that came later follow in the same way.

        Small states are listed as they are stored: after these come the scales of 8-bit moments and the low halves of
        split masters.

        With ``gradient_accumulation_steps`` the first counts the calls, not the steps, as in Keras 3.
        """
        options, state, runtime, tables = self._parts
        with runtime.lock:
            runtime.require_closed("weights")
            tables.raise_late()
            tables.catch_up_all()
            state.clear_stale_accumulators(options.calls_per_step)
            for entry in state.entries:
                entry.raise_doubt(Doubt.ALWAYS)
            return state.weights()

    def variables(self) -> list[AnyArray]:
        """The same as ``weights``."""
        return self.weights

    def get_weights(self) -> list[AnyArray]:
        """Copies of ``weights``; the first is an ``np.int64``."""
        options, state, runtime, tables = self._parts
        with runtime.lock:
            runtime.require_closed("get_weights")
            tables.settle()
            state.clear_stale_accumulators(options.calls_per_step)
            return state.copies()

    def set_weights(self, weights: Sequence[ArrayLike]) -> None:
        """Overwrite the state with a list in the order of ``weights``, for example from ``get_weights``.

        The list of a Keras 1 Adam, which ends in one dummy of shape (1,) for each variable, is accepted as TF does.

        With ``gradient_accumulation_steps``, in the middle of a cycle, a variable has had a gradient if its accumulator
        in the list is not all zero.

        Raises:
            RuntimeError: Inside of ``with averages(...)``; nothing is changed.
            ValueError: Wrong number of arrays or a wrong shape; nothing is changed.
        """
        options, state, runtime, tables = self._parts
        with runtime.lock:
            runtime.require_closed("set_weights")
            refuse_while_swapped(self._parts, "set_weights")
            tables.settle()
            calls, slots = state.checked(weights, self.name)
            tables.note_all_changed()
            state.fill(calls, slots, options.calls_per_step)
            tables.confirm()

    def get_slot(self, var: VariableLike, slot_name: str) -> AnyArray:
        """The live state array "m", "v" or "vhat" of a variable; KeyError if there is none.

        With ``moments="8bit"`` it is a read-only float32 copy of the values of m or v; the codes and their scales are
        in ``weights``.
        """
        if not isinstance(slot_name, str):
            raise TypeError(f"slot_name: {shown(slot_name)}, expected a string")
        label = label_of(var, 0)
        _, state, runtime, tables = self._parts
        with runtime.lock:
            runtime.require_closed("get_slot")
            tables.raise_late()
            buffer = buffer_of(var)
            if state.slots.entry_of(buffer) is not None:
                tables.catch_up(buffer)
            entry = state.slots.entry_of(buffer)  # which catching up may have renewed
            if entry is None:
                raise KeyError(f"{label}: not a variable of this optimizer")
            slots = state.slots.slots_of(entry)
            if slot_name not in slots:
                raise KeyError(f"{slot_name}: not a slot of {label}, which has {list(slots)}")
            if slot_name in MOMENTS:
                entry.raise_doubt(Doubt.ALWAYS)
            return readable(slots, slot_name)

    def get_slot_names(self) -> list[str]:
        """Names of the slots in the order of their creation."""
        return list(self._parts.state.slots.names)

    def add_slot(self, var: VariableLike, slot_name: str, initializer: Initializer = "zeros") -> AnyArray:
        """Create a slot of the variable's shape, appended to ``weights``, or return the existing one.

        An array is copied, as in Keras; ``build(variables, slots=...)`` takes arrays as they are.

        Args:
            var: The variable.
            slot_name: Name of the slot; "m", "v" and "vhat" are then used by the next step.
            initializer: "zeros", "ones", a callable ``(shape, dtype=...)``, or an array.
        """
        if not isinstance(slot_name, str):
            raise TypeError(f"slot_name: {shown(slot_name)}, expected a string")
        buffer = buffer_of(var)
        options, state, runtime, tables = self._parts

        def format_of(variable: _cpu.Buffer, slots: Mapping[str, AnyArray]) -> _OneSlot:
            chosen = options.state_format.of(variable, slots)

            def begin(_: _cpu.Buffer, name: str) -> AnyArray:
                dtype = chosen.dtype_of(variable, name)
                if name in (*SCALES, LOW) or dtype == "uint8":
                    raise ValueError(
                        f"slot_name: {name!r}, which belongs to small states of {variable.label}, expected build()"
                    )
                value = initial_value(initializer, variable.shape, dtype, variable.order)
                return value if variable.device < 0 else copy_beside(value, variable)

            return _OneSlot((slot_name,), begin)

        with runtime.lock:
            runtime.require_closed("add_slot")
            if state.slots.entry_of(buffer) is not None:
                tables.catch_up(buffer)
            prepared = state.slots.prepare([buffer], format_of)
            prepared.commit()
            entry = state.slots.entry_of(buffer)
            if entry is not None and slot_name in MOMENTS:
                entry.raise_doubt(Doubt.ALWAYS)
            return prepared.slots[slot_name][0]

    def add_weight(
        self,
        name: str,
        shape: Sequence[int] = (),
        dtype: npt.DTypeLike = np.float32,
        initializer: Initializer = "zeros",
    ) -> npt.NDArray[np.generic]:
        """A new array for a subclass to keep state in; as in TF it is not part of ``weights``."""
        if not isinstance(name, str):
            raise TypeError(f"name: {shown(name)}, expected a string")
        is_vector = isinstance(shape, np.ndarray) and 0 < shape.size <= 64 and shape.ndim == 1
        lengths = check_list("shape", list(shape) if is_vector else shape)
        sizes = tuple(check_integer("shape", length) for length in lengths)
        if any(size < 0 for size in sizes):
            raise ValueError(f"shape: {sizes}, expected no negative length")
        try:
            return initial_value(initializer, sizes, dtype)
        except (MemoryError, OverflowError) as error:
            kind = MemoryError if isinstance(error, MemoryError) else OverflowError
            raise kind(f"shape: {shown(shape)}, expected one that fits in memory ({error})") from error

    # ---- tables ----------------------------------------------------------------------------------------------------

    def gather(self, var: VariableLike, indices: ArrayLike, out: Array | None = None) -> AnyArray:
        """The rows ``var[indices]`` as they are after all steps so far, a copy.

        In a deferred mode the rows of the variable's buffer lag behind until they are touched, gathered or synced; the
        rows gathered are written back. With the other modes it is plain indexing.

        Args:
            var: The variable.
            indices: Integers of any shape, repeated or not.
            out: Array of the result's shape and dtype to write to; a bfloat16 tensor of PyTorch gives float32.

        Raises:
            TypeError: Indices that are not integers.
            ValueError: An index out of range; ``out`` of another shape; an unpickled optimizer whose variables have not
                been given to :meth:`build` yet, if rows waited when it was pickled.

        >>> import numpy as np, fastadam
        >>> table = np.ones((1000, 2), np.float32)
        >>> opt = fastadam.Adam(0.1, sparse_update="deferred")
        >>> gradient = fastadam.IndexedSlices(np.full((1, 2), 0.5, np.float32), [7])
        >>> for _ in range(3):
        ...     step = opt.apply_gradients([(gradient, table)])
        >>> opt.gather(table, [7, 0]).round(3).tolist()
        [[0.699999988079071, 0.699999988079071], [1.0, 1.0]]
        """
        with self._parts.runtime.lock:
            self._parts.runtime.require_closed("gather")
            return self._parts.tables.gather(var, indices, out)

    def sync(self, var: VariableLike | None = None) -> None:
        """Bring every row of a variable, or of all, up to date; does nothing where no row lags behind."""
        _, _, runtime, tables = self._parts
        with runtime.lock:
            runtime.require_closed("sync")
            tables.raise_late()
            if var is None:
                tables.catch_up_all()
            else:
                tables.catch_up(buffer_of(var))

    @contextlib.contextmanager
    def dense_view(self, var: VariableLike) -> Iterator[AnyArray]:
        """``with opt.dense_view(table) as values``: the array itself, every row up to date, as long as no step is made.

        >>> import numpy as np, fastadam
        >>> table = np.ones((3, 1), np.float32)
        >>> opt = fastadam.Adam(0.1, sparse_update="deferred")
        >>> step = opt.apply_gradients([(fastadam.IndexedSlices([[0.5]], [1]), table)])
        >>> with opt.dense_view(table) as values:
        ...     values.round(3).tolist()
        [[1.0], [0.8999999761581421], [1.0]]
        """
        self.sync(var)
        yield unwrap(var)

    # ---- variables that change -------------------------------------------------------------------------------------

    def resize(
        self,
        old: VariableLike,
        new: VariableLike,
        rows: ArrayLike | None = None,
        slots: Mapping[str, npt.NDArray[np.generic]] | None = None,
    ) -> None:
        """Let an array of another length take the place of a variable: rows keep their moments, new rows start fresh.

        Values are not copied: ``new`` has them already, as from ``np.concatenate``. In a deferred mode these must be
        the rows as they are in the memory of ``old`` at the time of the call: copy them right before it, and change
        them after it. Rows that wait for steps go on waiting in ``new``. Where ``max_staleness`` is set, all rows are
        brought up to date.

        A fresh row has moments of zero, zeros in the slots of :meth:`add_slot`, and a moving average that starts at its
        value. Its bias correction is that of the optimizer's next step, as for a row that has had no gradient so far.
        In the middle of an accumulation cycle rows keep what they have accumulated. 8-bit moments are decoded and
        rounded anew, which changes them only where blocks of 128 elements change. The place in ``weights``, an
        exclusion from weight decay and, unless ``new`` has one, the name go to ``new``; ``old`` is forgotten.

        Args:
            old: A variable.
            new: An array of the same dtype and shape but for its first axis, or a :class:`fastadam.Variable`. It may be
                in other memory, overlap that of ``old``, or be ``old`` itself, with its rows in another order.
            rows: For each row of ``new`` which row of ``old`` it was, or -1 if it is fresh; a row may come several
                times, each with a copy of its moments. None: the first rows are where they were.
            slots: Arrays for the moments, average and accumulator of ``new``, memory maps for example, as :meth:`build`
                takes them. They are overwritten. None: new memory, where only rows with moments are written.

        Raises:
            TypeError: ``rows`` are not integers; ``new`` is not an array of floats; a slot of another dtype.
            ValueError: ``old`` is not a variable of this optimizer, or ``new`` is one already; the dtype or shape
                differs; a number in ``rows`` is out of range; in a deferred mode, ``new`` and ``old`` differ in a row
                that steps have moved; a slot has another shape or layout, or shares memory.
            RuntimeError: Inside of ``with averages(...)`` or between ``begin_step`` and ``end_step``. A call that
                raises has changed nothing.

        >>> import numpy as np, fastadam
        >>> table = np.ones((2, 1), np.float32)
        >>> opt = fastadam.Adam(0.1, sparse_update="deferred")
        >>> step = opt.apply_gradients([(fastadam.IndexedSlices([[0.5]], [1]), table)])
        >>> longer = np.concatenate([table, np.zeros((2, 1), np.float32)])
        >>> opt.resize(table, longer)
        >>> opt.get_slot(longer, "m").round(3).ravel().tolist()
        [0.0, 0.05000000074505806, 0.0, 0.0]
        >>> kept = np.array([1, 0])
        >>> shorter = longer[kept].copy()
        >>> opt.resize(longer, shorter, rows=kept)
        >>> opt.get_slot(shorter, "m").round(3).ravel().tolist()
        [0.05000000074505806, 0.0]
        """
        resizing.resize(self._parts, old, new, rows, slots)

    def forget(self, var: VariableLike) -> None:
        """Drop what is kept for a variable, after its rows have been brought up to date, and release the memory.

        A later gradient of it starts anew, with moments of zero. An exclusion from weight decay by ``var_list`` is
        dropped, too: it keeps the array alive. In ``weights`` the variables that follow move up.

        Raises:
            ValueError: It is not a variable of this optimizer.
            RuntimeError: Inside of ``with averages(...)`` or between ``begin_step`` and ``end_step``.

        >>> import numpy as np, fastadam
        >>> v, w = np.ones(2), np.ones(3)
        >>> opt = fastadam.Adam(0.1)
        >>> step = opt.apply_gradients([(np.ones(2), v), (np.ones(3), w)])
        >>> opt.forget(v)
        >>> [slot.shape for slot in opt.weights]
        [(), (3,), (3,)]
        """
        resizing.forget(self._parts, var)

    def reset(self, var: VariableLike | None = None, rows: ArrayLike | None = None) -> None:
        """Set moments to zero in place, as before the first step: of a variable, of some of its rows, or of all.

        Rows that wait for steps are brought up to date first. Moving averages start at the variable again, gradients
        that were accumulated for the next step become zero, and slots with names of your own stay as they are.
        ``iterations`` stays, and with it the bias correction: set it to 0 to begin training anew.

        Args:
            var: A variable; None for all.
            rows: Integers of any shape, for the rows of ``var``; None for all.

        Raises:
            TypeError: ``rows`` are not integers.
            ValueError: It is not a variable of this optimizer; a row out of range; ``rows`` without ``var``.
            RuntimeError: Inside of ``with averages(...)`` or between ``begin_step`` and ``end_step``.

        >>> import numpy as np, fastadam
        >>> w = np.ones((3, 1))
        >>> opt = fastadam.Adam(0.1)
        >>> step = opt.apply_gradients([(np.ones((3, 1)), w)])
        >>> opt.reset(w, rows=[0, 2])
        >>> opt.get_slot(w, "m").round(3).ravel().tolist()
        [0.0, 0.1, 0.0]
        """
        resizing.reset(self._parts, var, rows)

    def _refresh(self, variable: VariableLike | None, ids: AnyArray | None) -> None:
        _, _, runtime, tables = self._parts
        if variable is None:
            with runtime.lock:
                tables.catch_up_all()
        elif tables.has_any():
            with runtime.lock:
                tables.catch_up(buffer_of(variable), ids)

    @property
    def _told(self) -> set[str]:
        return self._parts.runtime.told

    # ---- files and copies ------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        variables: Iterable[VariableLike] | None = None,
        *,
        values: bool = False,
    ) -> None:
        """Write configuration, iterations and slots, with ``values=True`` the variables too, to one safetensors file.

        The file is written under another name in its directory, then renamed: ``path`` is the old file or the new one,
        whole, whenever the process is killed or the disk is full (a killed process may leave ``.fastadam-*.tmp``).
        A callable hyperparameter is saved as its present value.

        Args:
            path: The file, replaced if it exists; of any name whose suffix is not that of another format.
            variables: Which variables' slots, in which order; None means all, in the order they came.
            values: Write the values of the variables, too; ``load`` writes them into the variables that it gets, and
                ``save_delta`` can follow. From then on lazy steps note which rows they touch.

        Raises:
            OSError: The file could not be written.
            RuntimeError: With ``values=True`` inside of ``with averages(...)``.
            ValueError: The suffix of another format; a variable without slots; a configuration that is not plain JSON;
                with ``values=True`` a variable on a GPU.
        """
        self._parts.runtime.require_closed("save")
        save_optimizer(self, path, variables, values=values)

    def save_delta(self, path: str | os.PathLike[str]) -> None:
        """Write what has changed since the last ``save(values=True)`` or ``save_delta``, to be loaded after that file.

        Of a table in a deferred or lazy mode these are the rows that had a gradient, with their moments, and the rates
        of the steps, by which ``load`` moves all others. Of other variables, and of tables in the "dense" mode, it is
        everything. What is written to variables and slots by other means than steps is not noticed, except by
        ``set_weights``: save a new base then.

        The file is replaced as by ``save``. If that fails, the next delta has everything since the last successful
        call. A call may fail with its file in place: the directory could not be synced, or a signal handler raised at
        the end. Leave out that file when you load the next one; ``load`` refuses the two together.

        Args:
            path: The file; of any name whose suffix is not that of another format. Not one of the same chain.

        Raises:
            OSError: The file could not be written.
            RuntimeError: Inside of ``with averages(...)``.
            ValueError: No base was saved; a variable was added or replaced since then; a table has had more than 2^20
                steps since the last file; ``path`` is the base or a delta of this chain.

        >>> import tempfile, numpy as np, fastadam
        >>> folder = tempfile.mkdtemp()
        >>> table = np.ones((1000, 2), np.float32)
        >>> opt = fastadam.Adam(0.1, sparse_update="deferred")
        >>> opt.build([table])
        >>> opt.save(f"{folder}/base", values=True)
        >>> step = opt.apply_gradients([(fastadam.IndexedSlices([[0.5, 0.5]], [7]), table)])
        >>> opt.save_delta(f"{folder}/delta_1")
        >>> step = opt.apply_gradients([(fastadam.IndexedSlices([[0.5, 0.5]], [8]), table)])
        >>> opt.save_delta(f"{folder}/delta_2")
        >>> again = np.empty((1000, 2), np.float32)
        >>> loaded = fastadam.Adam.load(f"{folder}/base", [again], deltas=[f"{folder}/delta_1", f"{folder}/delta_2"])
        >>> opt.sync()
        >>> np.array_equal(again, table)
        True
        """
        self._parts.runtime.require_closed("save_delta")
        save_delta(self, path)

    @class_only
    def load(
        cls,
        path: str | os.PathLike[str],
        variables: Iterable[VariableLike],
        custom_objects: Mapping[str, object] | None = None,
        changes: Mapping[str, Any] | None = None,
        *,
        deltas: Iterable[str | os.PathLike[str]] = (),
        slots: Sequence[Mapping[str, npt.NDArray[np.generic]] | None] | None = None,
    ) -> Self:
        """An optimizer from ``save``, which goes on to the bit with these variables.

        A file of ``save(values=True)`` writes the values into the variables. Everything is checked before, checksums
        included; only an interrupt can leave variables that are partly written.

        Args:
            path: The file. It is data only: nothing in it is run.
            variables: The variables in the order they were saved in. They must have the values that they had, but get
                these from a file of ``save(values=True)``.
            custom_objects: Schedule classes of your own by name.
            changes: ``moments``, ``master``, ``stochastic_rounding``, ``float32_for`` or ``seed`` in place of the saved
                ones, such as ``{"moments": "8bit"}``. Moments are converted; fewer bits are rounded at random.
            deltas: Files of ``save_delta`` that follow a file of ``save(values=True)``, in their order. All rows of
                tables are brought up to date.
            slots: As of :meth:`build`: for each variable None, or arrays that the state is written to and that
                become its slots, such as memory maps. Of slots that the file has.

        Raises:
            OSError: A file cannot be read.
            TypeError: A slot of another type or dtype.
            ValueError: Other ``changes``, or any with ``deltas``; a file is damaged, of another class, or of other
                variables: shape, dtype or name differ; a delta that does not follow the file before it; a slot that
                does not fit.
        """

        def finish(optimizer: Foreign, loss_scale: Config | None) -> Foreign:
            if loss_scale is not None:
                raise ValueError(f"state of LossScaleOptimizer, expected {cls.__name__}")
            return optimizer

        loaded: Self = load_optimizer([cls], path, variables, finish, custom_objects, changes, deltas, slots)
        return loaded

    def __getstate__(self) -> Config:
        """Everything but the variables: the first ones that a restored optimizer meets take its slots, in order."""
        options, state, runtime, tables = self._parts
        with runtime.lock:
            runtime.require_closed("pickle")
            tables.settle_gpus()
            return {**self._own_attributes(), "_options": copy.copy(options), "_state": state.snapshot()}

    def __setstate__(self, attributes: Config) -> None:
        attributes = dict(attributes)
        self._hold(attributes.pop("_options"), attributes.pop("_state"))
        self.__dict__.update(attributes)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy with its own state: it goes on with the same variables, or with copies of them in the same order."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        options, state, runtime, tables = self._parts
        with runtime.lock:
            runtime.require_closed("copy")
            tables.settle_gpus()
            twin.__setstate__(copy.deepcopy({**self._own_attributes(), "_options": options, "_state": state}, memo))
        return twin

    def __copy__(self) -> Self:
        return copy.deepcopy(self)

    def _own_attributes(self) -> Config:
        """Attributes beside the parts: the name, and what a subclass has added."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, (Parts, Stepper))}
