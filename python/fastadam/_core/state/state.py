"""The state of an optimizer: the count of calls and the slots, as ``get_weights`` and ``set_weights`` list them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastadam._core.common.checks import check_iterations, check_list
from fastadam._core.native.arrays import assign, on_gpu, to_host
from fastadam._core.state.slots import Entry, SlotStore

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, Config

__all__ = ["State"]


class State:
    """What is saved and copied beside the options."""

    def __init__(self) -> None:
        self.calls = np.zeros((), np.int64)  # of apply_gradients; users may write to it, as `weights[0]`
        self.slots = SlotStore()

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
        return [np.int64(int(self.calls)), *(to_host(array).copy() for array in self.slots.arrays)]

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
            )
        calls = check_iterations("weights[0]", given[0])
        return calls, [_like(old, given[i], f"weights[{i}]") for i, old in enumerate(current) if i > 0]

    def fill(self, slots: Iterable[npt.NDArray[np.generic]]) -> None:
        """Overwrite all slots with checked values."""
        for array, values in zip(self.slots.arrays, slots, strict=True):
            assign(array, values)

    # ---- accumulated gradients -------------------------------------------------------------------------------------

    def is_accumulating(self, entry: Entry, calls_per_step: int) -> bool:
        """Whether the accumulator of a variable holds gradients for the next step."""
        return calls_per_step > 1 and entry.accumulating == int(self.calls) // calls_per_step

    def restart_accumulation(self, entries: Iterable[Entry], calls_per_step: int) -> None:
        """As if only these variables had had gradients since the last step."""
        for entry in self.entries:
            entry.accumulating = None
        for entry in entries:
            entry.accumulating = int(self.calls) // calls_per_step

    # ---- copies ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> State:
        """A copy that a pickle holds: it knows no variables, and the first ones that it meets take its slots."""
        twin = State()
        twin.__setstate__(self.__getstate__())
        return twin

    def __getstate__(self) -> Config:
        return {"calls": int(self.calls), "slots": self.slots.__getstate__()}

    def __setstate__(self, state: Config) -> None:
        self.calls = np.array(state["calls"], np.int64)
        self.slots = SlotStore()
        self.slots.__setstate__(state["slots"])

    def __deepcopy__(self, memo: dict[int, object]) -> State:
        """A copy whose slots belong to the same variables, or to copies of them in the same order."""
        twin = State()
        twin.calls = self.calls.copy()
        twin.slots = copy.deepcopy(self.slots, memo)
        return twin


def _like(old: AnyArray, value: AnyArray, label: str) -> npt.NDArray[np.generic]:
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


def _drop_keras1_dummies(weights: list[AnyArray], expected: int) -> list[AnyArray]:
    """A Keras 1 list without its dummies, one of shape (1,) for each variable."""
    variables = (expected - 1) // 2
    if variables == 0 or expected != 2 * variables + 1 or len(weights) != 3 * variables + 1:
        return weights
    return weights[:expected] if all(np.shape(dummy) == (1,) for dummy in weights[expected:]) else weights
