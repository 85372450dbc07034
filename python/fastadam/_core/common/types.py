"""The types that signatures name: first what users see, then names for what has no better type than ``Any``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsFloat, TypeAlias

import numpy.typing as npt

if TYPE_CHECKING:
    from fastadam._core.autodiff import Loss
    from fastadam._core.native.slices import IndexedSlices
    from fastadam._core.native.variable import Variable
    from fastadam.schedules import LearningRateSchedule

__all__ = [
    "AnyArray",
    "AnyGradient",
    "AnyPair",
    "Array",
    "ArrayLike",
    "Config",
    "Foreign",
    "Gradient",
    "HostArray",
    "Hyperparameter",
    "LearningRate",
    "NativeHistory",
    "Provider",
    "SparseUpdate",
    "Tree",
    "VariableLike",
    "VariableTree",
]

# Each of these stands for Any where only the library that an object comes from knows more.
AnyArray: TypeAlias = Any  # an array or a number, of NumPy, CuPy, PyTorch or JAX
Foreign: TypeAlias = Any  # an object of another library or of the extension for GPUs, used by its attributes
AnyGradient: TypeAlias = Any  # a gradient of any library, dense or sparse, or native Slices
AnyPair: TypeAlias = Any  # an item of grads_and_vars, before it is checked
Tree: TypeAlias = Any  # lists, tuples and dicts of arrays, nested
HostArray: TypeAlias = npt.NDArray[Any]  # a NumPy array of any dtype
Config: TypeAlias = dict[str, Any]  # plain JSON values
NativeHistory: TypeAlias = tuple[Any, ...]  # StaleTable::Arrays in csrc/bind/stale.h

SparseUpdate: TypeAlias = Literal["dense", "deferred", "deferred_fast", "lazy"]

Hyperparameter: TypeAlias = "float | Callable[[], SupportsFloat]"
# The array is a single number, on a GPU for example.
LearningRate: TypeAlias = "Hyperparameter | LearningRateSchedule | KerasSchedule | TorchScheduler | Array"

Provider: TypeAlias = "Literal['autograd', 'jax', 'torch'] | Callable[[Loss, list[Any]], Sequence[Any]]"


class KerasSchedule(Protocol):
    """A schedule of Keras or TensorFlow."""

    def __call__(self, step: AnyArray) -> AnyArray:
        """The rate at a step."""

    def get_config(self) -> Config:
        """The constructor's arguments."""


class TorchScheduler(Protocol):
    """A scheduler of PyTorch."""

    optimizer: Foreign

    def get_last_lr(self) -> list[Any]:
        """The rates of the parameter groups."""


class SupportsDLPack(Protocol):
    """An array of PyTorch, JAX, CuPy and others."""

    @property
    def __dlpack__(self) -> Callable[..., object]: ...


class SupportsArrayInterface(Protocol):
    """Host memory, described as NumPy does."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


class SupportsCudaArrayInterface(Protocol):
    """GPU memory, described as Numba does."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class SparseMatrix(Protocol):
    """A sparse matrix or array of SciPy."""

    @property
    def tocsr(self) -> Callable[..., Foreign]:
        """A method that returns the same matrix by rows."""


Array: TypeAlias = "HostArray | SupportsDLPack | SupportsArrayInterface | SupportsCudaArrayInterface"
ArrayLike: TypeAlias = "npt.ArrayLike | Array"  # nested lists of numbers, too
VariableLike: TypeAlias = "Variable | Array"
VariableTree: TypeAlias = "VariableLike | Iterable[Any] | Callable[[], Any]"  # nested lists and dicts
Gradient: TypeAlias = "ArrayLike | IndexedSlices | SparseMatrix"
