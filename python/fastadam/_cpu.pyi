"""What csrc/bind registers. Checks and error texts live there; these functions are private to fastadam."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadam._core.native.plan import StepHyper

__version__: str
compiler: str
cuda_build: str
most_threads: int

class Buffer:
    """A writable variable as it lies in memory; keeps its owner alive."""

    def __init__(self, object: Any, label: str) -> None: ...
    @property
    def label(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def state_dtype(self) -> str: ...
    @property
    def order(self) -> str: ...
    @property
    def device(self) -> int:
        """Number of the GPU that it lies on; -1 for the host."""
    @property
    def source(self) -> Any:
        """The array that it was read from."""
    def is_current(self) -> bool: ...
    def array(self) -> npt.NDArray[Any]: ...

class Slices:
    """An IndexedSlices on its way to a plan."""

    def __init__(self, values: Any, indices: Any) -> None: ...
    @property
    def values(self) -> Any: ...
    @property
    def indices(self) -> Any: ...

class ClosedForms:
    """A cache that belongs to one history: csrc/bind/closed_forms.h."""

    @staticmethod
    def exist(beta_1: float, beta_2: float, amsgrad: bool) -> bool:
        """Whether gaps of any length have one, if the rate is constant."""

code_block: int  # elements that share the scale of an 8-bit moment

def encode_moment(
    values: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    is_m: bool,
    seed: int,
    step: int,
    number: int,
) -> None:
    """Write the codes of a moment, rounded as that step of parameter ``number`` would: csrc/core/small_state.h."""

def decode_moment(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8], values: npt.NDArray[np.float32], is_m: bool
) -> None: ...
def round_moment(
    values: npt.NDArray[np.float32], bits: npt.NDArray[np.uint16], seed: int, step: int, number: int
) -> None:
    """Write a moment as bits of bfloat16, rounded likewise."""

class StepLog:
    """What undoes one step: csrc/core/undo.h."""

    @property
    def nbytes(self) -> int: ...

def set_thread_budget(threads: int) -> int:
    """The most threads of later calls from this thread; 0: as many as others. Returns what it was."""

class Plan:
    """A checked set of variables and state, ready to step."""

    def __init__(
        self,
        variables: list[Buffer],
        slots: Mapping[str, Sequence[Any]],
        decays: list[bool],
        positions: list[int],
        lazy: bool,
        histories: Sequence[tuple[Any, ...] | None],
        context: Any = None,
        copies: Sequence[Any] = (),
        stochastic_moments: bool = False,
        stochastic_variables: bool = False,
        numbers: Sequence[int] = (),
        names: Mapping[str, str] = ...,
    ) -> None: ...
    def catch_up(self, ids: Any, hyper: StepHyper, counter: npt.NDArray[np.int64] | None) -> None: ...
    @property
    def all_finite(self) -> bool: ...
    def gradients_of(self, pairs: list[Any], holder: type) -> list[Any] | None: ...
    def holds(self, variables: Sequence[Any], slots: Mapping[str, Sequence[Any]], copies: Sequence[Any]) -> bool: ...
    def has_copies(self, copies: Sequence[Any]) -> bool: ...
    def gradient_dtype(self, place: int) -> str: ...
    def set_telemetry(self, wanted: bool) -> None: ...
    def telemetry(self) -> npt.NDArray[np.float64]: ...
    def check(self, gradients: list[Any]) -> list[int]: ...
    def check_numbers(self, hyper: StepHyper, grad_factors: Sequence[float]) -> None: ...
    def step(
        self,
        gradients: list[Any],
        hyper: StepHyper,
        grad_factors: Sequence[float],
        counter: npt.NDArray[np.int64] | None,
    ) -> list[int]: ...
    def step_apart(
        self,
        gradients: list[Any],
        hyper: StepHyper,
        grad_factors: Sequence[float],
        counter: npt.NDArray[np.int64] | None,
        steps: list[int],
        clip_factors: npt.NDArray[np.float64],
    ) -> list[int]: ...
    def step_clipped(
        self,
        gradients: list[Any],
        hyper: StepHyper,
        grad_factors: Sequence[float],
        counter: npt.NDArray[np.int64] | None,
        clip_factors: npt.NDArray[np.float64],
    ) -> list[int]:
        """A step whose gradients are multiplied by these factors of ``clip``; norms are not read again."""
    def can_undo(self, gradients: list[Any]) -> bool: ...
    def step_logged(
        self,
        gradients: list[Any],
        hyper: StepHyper,
        grad_factors: Sequence[float],
        clip_factors: npt.NDArray[np.float64],
        log: StepLog,
    ) -> None: ...
    def changed_since(
        self, gradients: list[Any], hyper: StepHyper, grad_factors: Sequence[float], log: StepLog
    ) -> list[int]: ...
    def undo(
        self,
        gradients: list[Any],
        hyper: StepHyper,
        grad_factors: Sequence[float],
        clip_factors: npt.NDArray[np.float64],
        log: StepLog,
        instead: npt.NDArray[np.float64] | None = None,
    ) -> list[int]: ...
    def norms(self, gradients: list[Any], hyper: StepHyper) -> npt.NDArray[np.float64]:
        """A row of three sums of squares for each gradient: csrc/capi/clipping.h."""
    def remember(self, hyper: StepHyper, stamp: int, grad_factors: Sequence[float]) -> None: ...
    def step_again(self, pairs: list[Any], holder: type, stamp: int, counter: npt.NDArray[np.int64]) -> bool: ...
    def follow(self, states: list[dict[str, Any]], keys: tuple[str, ...], masters: Sequence[Any] = ()) -> bool: ...
    def report_skip(self, gradients: list[Any], hyper: StepHyper) -> None: ...
    def accumulate(
        self,
        gradients: list[Any],
        scale: float,
        require_finite: bool,
        restart: bool,
        update: Plan | None,
        rows: list[npt.NDArray[np.int64] | None],
        hyper: StepHyper,
        counter: npt.NDArray[np.int64] | None,
    ) -> list[int]: ...

def copy_all(copies: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]], counter: npt.NDArray[np.int64]) -> None:
    """Copy each second array over the first, of the same size in bytes, then raise the counter; nothing in between."""

def drop_steps(history: tuple[Any, ...], count: int) -> None:
    """Drop the oldest steps of a history in its arrays; nothing is interrupted in between."""

def flag_moving_rows(flags: npt.NDArray[np.uint8], moments: npt.NDArray[Any]) -> None:
    """Set the flag MOVES of the rows of a table that have a moment other than +0."""

def expect_random_rows(array: npt.NDArray[Any], small_pages: bool) -> None:
    """Tell the operating system that rows are touched in no order, each in its own page."""

def same_items(a: object, b: object) -> bool:
    """Whether these are dicts with the same objects as keys and values, in the same order; nothing is hashed."""

def step_groups_again(
    plans: list[Plan],
    groups: object,
    followed: list[tuple[Any, ...]],
    state: object,
    known: dict[Any, Any],
) -> bool | None:
    """A step of PyTorch's groups like the last one, each with its plan; None, and no change, if it is not like it.

    False, and no change, if gradients had to be finite and are not.
    """

def clip(
    norms: npt.NDArray[np.float64],
    hyper: StepHyper,
    grad_factors: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], bool]:
    """The factors of gradients with these norms, and whether everything is finite that had to be."""

def require_place(buffer: Buffer, like: Buffer) -> None:
    """Raise unless the two lie on one device, or both in memory of the host."""

def bfloat16_bits(bits: npt.NDArray[np.uint16]) -> Buffer: ...
def read_array(object: Any, label: str) -> tuple[npt.NDArray[Any], bool] | None: ...
def norm(arrays: list[Any]) -> float: ...

class DefaultArithmetic:
    """In the context this thread rounds to nearest, keeps denormals and does not trap, whatever the caller's mode."""

    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

class SwappedValues:
    """In the context arrays have other values; Ctrl-C comes before, after or inside, and never in between.

    ``owner.lock`` is held while values move. ``prepare()`` returns pairs of arrays and, for memory of other devices,
    the values that ``write`` puts back and those that it puts in, or None. ``flag`` is 1 in the context.
    """

    def __init__(
        self,
        owner: Any,
        prepare: Callable[[], tuple[list[tuple[npt.NDArray[Any], npt.NDArray[Any]]], tuple[Any, Any] | None]],
        write: Callable[[Any], None],
        flag: npt.NDArray[np.int64],
    ) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

def compiled_isas() -> list[tuple[str, bool]]: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def requested_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def split(sizes: list[int], shares: int) -> list[list[tuple[int, int, int]]]: ...
