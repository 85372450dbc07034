"""The state of an optimizer, as tf.keras users read and write it: iterations, slots, weights."""

from __future__ import annotations

import abc
import copy
import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastadam._core import serialization
from fastadam._core.backend import _cpu
from fastadam._core.checks import check_iterations, check_list
from fastadam._core.device_state import DeviceState, Now
from fastadam._core.placement import assign, copy_beside, on_gpu, to_host
from fastadam._core.plans import Plans
from fastadam._core.replaced import Replacements
from fastadam._core.slots import Entry, Initializer, SlotStore, initial_value
from fastadam._core.strict import Strict, class_only
from fastadam._core.variable import buffer_of, buffers_of, label_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.types import ArrayLike, VariableLike

__all__ = ["OptimizerState"]

_PASSING = (
    "_lock",
    "_now",
    "_plans",
    "_replacements",
    "_last_numbers",
    "_contexts",
    "_gatherers",
)
_live: weakref.WeakSet[OptimizerState] = weakref.WeakSet()


class OptimizerState(Strict, DeviceState):
    """Iterations and slots; a subclass says which slots its step needs."""

    name: str

    def __init__(self) -> None:
        self._iterations = np.zeros((), np.int64)
        self._slots = SlotStore()
        self._start()

    def _start(self) -> None:
        """What a process has and a copy does not: the lock, held while state changes, and caches."""
        self._lock = threading.RLock()
        self._now = Now()
        self._plans = Plans()
        self._replacements = Replacements()
        self._last_numbers: tuple[Any, ...] | None = None  # of the last step, if nothing had to be asked for them
        self._contexts = {}
        self._gatherers = {}
        _live.add(self)

    @abc.abstractmethod
    def _slot_names(self) -> list[str]: ...

    @property
    def iterations(self) -> np.int64:
        """Steps made so far. Setting it continues from there: after ``opt.iterations = 5`` the next step uses t = 6."""
        count: np.int64 = np.int64(int(self._iterations) // self._micro_steps)
        return count

    @iterations.setter
    def iterations(self, value: int) -> None:
        steps = check_iterations("iterations", value) * self._micro_steps
        self._set_count(check_iterations("iterations", steps))
        self._restart_accumulation([])

    def _is_accumulating(self, entry: Entry) -> bool:
        """Whether its accumulator holds gradients for the next step."""
        return self._micro_steps > 1 and entry.accumulating == int(self._iterations) // self._micro_steps

    def _restart_accumulation(self, entries: Iterable[Entry]) -> None:
        """As if only these variables had had gradients since the last step."""
        for entry in self._slots.entries:
            entry.accumulating = None
        for entry in entries:
            entry.accumulating = int(self._iterations) // self._micro_steps

    def build(self, var_list: Iterable[VariableLike]) -> None:
        """Create the slots of these variables now, so that ``set_weights`` works before the first step."""
        variables = check_list("var_list", var_list)
        buffers = buffers_of(variables, range(len(variables)))
        with self._lock:
            self._slots.prepare(buffers, self._slot_names()).commit()

    @property
    def weights(self) -> list[Any]:
        """The live state: iterations, then all m, all v, all vhat; variables that came later follow in the same way.

        With ``gradient_accumulation_steps`` the first counts the calls, not the steps, as in Keras 3.
        """
        with self._lock:
            self._raise_late()
            self._settle()
            return [self._iterations, *self._slots.arrays]

    def variables(self) -> list[Any]:
        """The same as ``weights``."""
        return self.weights

    def get_weights(self) -> list[Any]:
        """Copies of ``weights``; the first is an ``np.int64``."""
        with self._lock:
            self._settle()
            self._wait()
            arrays = (to_host(array) for array in self._slots.arrays)
            return [np.int64(int(self._iterations)), *(array.copy() for array in arrays)]

    def set_weights(self, weights: Sequence[ArrayLike]) -> None:
        """Overwrite the state with a list in the order of ``weights``, for example from ``get_weights``.

        The list of a Keras 1 Adam, which ends in one dummy of shape (1,) for each variable, is accepted as TF does.

        Raises:
            ValueError: Wrong number of arrays or a wrong shape; nothing is changed.
        """
        with self._lock:
            current = self.weights
            given = _drop_keras1_dummies(check_list("weights", weights), len(current))
            if len(given) != len(current):
                raise ValueError(
                    f"You called `set_weights(weights)` on optimizer {self.name} with a weight list of length "
                    f"{len(given)}, but the optimizer was expecting {len(current)} weights."
                    + ("" if self._slots.entries else " It has no variables yet: call build(var_list) first.")
                )
            iterations = check_iterations("weights[0]", given[0])
            self._raise_late(wait=True)
            new = [_like(old, given[i], f"weights[{i}]") for i, old in enumerate(current) if i > 0]
            for old, value in zip(current[1:], new, strict=True):
                assign(old, value)
            self._set_count(iterations)
            is_amid = iterations % self._micro_steps != 0
            self._restart_accumulation(self._slots.entries if is_amid else [])

    def get_slot(self, var: VariableLike, slot_name: str) -> Any:
        """The live state array "m", "v" or "vhat" of a variable; KeyError if there is none."""
        label = label_of(var, 0)
        with self._lock:
            self._raise_late()
            self._settle()
            slots = self._slots.find(buffer_of(var))
        if slots is None:
            raise KeyError(f"{label}: not a variable of this optimizer")
        if slot_name not in slots:
            raise KeyError(f"{slot_name}: not a slot of {label}, which has {list(slots)}")
        return slots[slot_name]

    def get_slot_names(self) -> list[str]:
        """Names of the slots in the order of their creation."""
        return list(self._slots.names)

    def add_slot(self, var: VariableLike, slot_name: str, initializer: Initializer = "zeros") -> Any:
        """Create a slot of the variable's shape, appended to ``weights``, or return the one that is there.

        Args:
            var: The variable.
            slot_name: Name of the slot; "m", "v" and "vhat" are then used by the next step.
            initializer: "zeros", "ones", a callable ``(shape, dtype=...)``, or an array.
        """
        if not isinstance(slot_name, str):
            raise TypeError(f"slot_name: {slot_name!r}, expected a string")
        buffer = buffer_of(var)

        def make(variable: _cpu.Buffer, _: str) -> Any:
            value = initial_value(initializer, variable.shape, variable.state_dtype, variable.order)
            return value if variable.device < 0 else copy_beside(value, variable)

        with self._lock:
            self._settle()
            prepared = self._slots.prepare([buffer], [slot_name], make)
            prepared.commit()
            return prepared.slots[0][0]

    # ---- files and copies ------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], variables: Iterable[VariableLike] | None = None) -> None:
        """Write configuration, iterations and slots, not the variables, to one safetensors file.

        The file is written under another name in its directory, then renamed: ``path`` is the old file or the new one,
        whole, whenever the process is killed or the disk is full (a killed process may leave ``.fastadam-*.tmp``).
        A callable hyperparameter is saved as its present value.

        Args:
            path: The file, replaced if it is there; of any name whose suffix is not that of another format.
            variables: Which variables' slots, in which order; None means all, in the order they came.

        Raises:
            OSError: The file could not be written.
            ValueError: The suffix of another format; a variable without slots; a configuration that is not plain JSON.
        """
        serialization.save(self, path, variables)

    @class_only
    def load(
        cls,
        path: str | os.PathLike[str],
        variables: Iterable[VariableLike],
        custom_objects: Mapping[str, Any] | None = None,
    ) -> Self:
        """An optimizer from ``save``, which goes on to the bit with these variables.

        Args:
            path: The file. It is data only: nothing in it is run.
            variables: The variables, with the values they had, in the order they were saved in.
            custom_objects: Schedule classes of your own by name.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not whole, not of this class, or not of these variables: shape, dtype, or name differ.
        """
        optimizer, loss_scale = serialization.load([cls], path, variables, custom_objects)
        if loss_scale is not None:
            raise ValueError(f"{os.fsdecode(path)}: state of LossScaleOptimizer, expected {cls.__name__}")
        return optimizer

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the variables: the first ones that a restored optimizer meets take its slots, in order."""
        with self._lock:
            self._settle_devices()
            return {**self._lasting(), "_iterations": int(self._iterations), "_slots": self._slots.__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        slots = SlotStore()
        slots.__setstate__(state["_slots"])
        self._restore({**state, "_iterations": np.array(state["_iterations"], np.int64), "_slots": slots})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with its own state: it goes on with the same variables, or with copies of them in the same order."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with self._lock:
            self._settle_devices()
            twin._restore(copy.deepcopy(self._lasting(), memo))
        return twin

    def __copy__(self) -> Self:
        return copy.deepcopy(self)

    def _lasting(self) -> dict[str, Any]:
        if getattr(self.__dict__.get("_extras"), "excluded_keys", None):
            raise ValueError(
                "exclude_from_weight_decay: var_list names variables by their memory, which a copy of the optimizer "
                "does not share; expected var_names, to copy or pickle it"
            )
        return {name: _lasting(value) for name, value in self.__dict__.items() if name not in _PASSING}

    def _restore(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
        self._now.checks_exclusions = self.__dict__["_extras"].excludes

    def add_weight(
        self,
        name: str,
        shape: Sequence[int] = (),
        dtype: npt.DTypeLike = np.float32,
        initializer: Initializer = "zeros",
    ) -> npt.NDArray[Any]:
        """A new array for a subclass to keep state in; as in TF it is not part of ``weights``."""
        if not isinstance(name, str):
            raise TypeError(f"name: {name!r}, expected a string")
        return initial_value(initializer, tuple(shape), dtype)


def _lasting(value: Any) -> Any:
    """Hyperparameters, of which a number on a GPU becomes one of the host."""
    return {k: float(to_host(v)) if on_gpu(v) else v for k, v in value.items()} if isinstance(value, dict) else value


def _like(old: Any, value: Any, label: str) -> npt.NDArray[Any]:
    """A copy of ``value`` that can be assigned to ``old``; a copy, for it may be one of the arrays assigned before."""
    array = to_host(value) if on_gpu(value) else np.asarray(value)
    if array.shape != tuple(old.shape):
        raise ValueError(
            f"{label}: Optimizer weight shape {old.shape} not compatible with provided weight shape {array.shape}"
        )
    if isinstance(old, np.ndarray) and not old.flags.writeable:
        raise ValueError(f"{label}: was made read-only, expected a writable array")
    is_bfloat16 = array.dtype.name == "bfloat16"
    if array.dtype.kind not in "fiu" and not is_bfloat16:
        raise TypeError(f"{label}: dtype {array.dtype}, expected {old.dtype}")
    return np.array(array, dtype=to_host(old).dtype)


def _drop_keras1_dummies(weights: list[Any], expected: int) -> list[Any]:
    variables = (expected - 1) // 2
    if variables == 0 or expected != 2 * variables + 1 or len(weights) != 3 * variables + 1:
        return weights
    return weights[:expected] if all(np.shape(dummy) == (1,) for dummy in weights[expected:]) else weights


def _renew_locks() -> None:
    """A thread that held a lock when the process forked does not exist in the child."""
    for optimizer in _live:
        optimizer._lock = threading.RLock()
        optimizer._now.stepping = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
