"""The types that public signatures name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsFloat, TypeAlias

import numpy.typing as npt

if TYPE_CHECKING:
    from fastadam._core.autodiff import Loss
    from fastadam._core.slices import IndexedSlices
    from fastadam._core.variable import Variable
    from fastadam.schedules import LearningRateSchedule

__all__ = [
    "Array",
    "ArrayLike",
    "Gradient",
    "Hyperparameter",
    "LearningRate",
    "Provider",
    "SparseUpdate",
    "VariableLike",
    "VariableTree",
]

SparseUpdate: TypeAlias = Literal["dense", "deferred", "deferred_fast", "lazy"]

Hyperparameter: TypeAlias = "float | Callable[[], SupportsFloat]"
# An array: one number on a GPU.
LearningRate: TypeAlias = "Hyperparameter | LearningRateSchedule | KerasSchedule | TorchScheduler | Array"

Provider: TypeAlias = "Literal['autograd', 'jax', 'torch'] | Callable[[Loss, list[Any]], Sequence[Any]]"


class KerasSchedule(Protocol):
    """A schedule of Keras or TensorFlow."""

    def __call__(self, step: Any) -> Any:
        """The rate at a step."""

    def get_config(self) -> dict[str, Any]:
        """What it was made with."""


class TorchScheduler(Protocol):
    """A scheduler of PyTorch."""

    optimizer: Any

    def get_last_lr(self) -> list[Any]:
        """The rates of the parameter groups."""


class SupportsDLPack(Protocol):
    """An array of PyTorch, JAX, CuPy and others."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


class SupportsArrayInterface(Protocol):
    """Memory of the host as NumPy describes it."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


class SupportsCudaArrayInterface(Protocol):
    """Memory of a GPU as Numba describes it."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class SparseMatrix(Protocol):
    """A sparse matrix or array of SciPy."""

    def tocsr(self, *args: Any, **kwargs: Any) -> Any:
        """The same by rows."""


Array: TypeAlias = "npt.NDArray[Any] | SupportsDLPack | SupportsArrayInterface | SupportsCudaArrayInterface"
ArrayLike: TypeAlias = "npt.ArrayLike | Array"  # nested lists of numbers, too
VariableLike: TypeAlias = "Variable | Array"
VariableTree: TypeAlias = "VariableLike | Iterable[Any] | Callable[[], Any]"  # lists and dicts in each other
Gradient: TypeAlias = "ArrayLike | IndexedSlices | SparseMatrix"

# What is duck-typed inside the package: checked by the native code or by a function of its own, not by annotations.
AnyArray: TypeAlias = Any  # an array of NumPy, CuPy, PyTorch or another library
AnyDType: TypeAlias = Any  # a dtype of whatever library the array is of
AnyGradient: TypeAlias = Any  # an array, IndexedSlices, a sparse matrix, or native Slices
AnyOptimizer: TypeAlias = Any  # an optimizer of this package or of a user's subclass
AnyPair: TypeAlias = Any  # what should be a (gradient, variable) pair
AnyRate: TypeAlias = Any  # a number, an array, a variable or a schedule of any library
KerasVariable: TypeAlias = Any  # keras.Variable, which is not typed
Config: TypeAlias = dict[str, Any]  # arguments by name, plain JSON values
Tree: TypeAlias = Any  # arrays and Variables in nested lists, tuples and dicts
NativeObject: TypeAlias = Any  # an object of the extension fastadam._cuda
NativeHistory: TypeAlias = tuple[Any, ...]  # StaleTable::Arrays in csrc/bind/stale.h
