"""Gradients of a few rows of a table: TensorFlow's IndexedSlices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from fastadam._core.common.checks import check_integer, check_list, shown
from fastadam._core.common.display import array_text, html_or_none, html_table, name_of, never_raises, preformatted
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.native.arrays import native_of, on_gpu
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gradients import as_float_array, convert_values

if TYPE_CHECKING:
    from fastadam._core.common.types import AnyArray, AnyGradient, ArrayLike, HostArray, SparseUpdate

__all__ = [
    "DEFERRED",
    "SPARSE_UPDATES",
    "IndexedSlices",
    "as_integers",
    "check_ids",
    "check_sparse_update",
    "convert_slices",
    "is_native_sparse",
    "is_slices",
    "is_sparse",
    "native_gradient",
]

DEFERRED = ("deferred", "deferred_fast")
SPARSE_UPDATES = ("dense", *DEFERRED, "lazy")


class IndexedSlices:
    """A gradient that is zero except in some rows: ``values[i]`` belongs to row ``indices[i]`` of the variable.

    Indices may come in any order and more than once: the values of a row are summed in order of occurrence. Without
    any values it is a gradient of zeros, which differs from no gradient: every row of the variable still moves along
    its moments, as in TF.

    Args:
        values: Array of floats (n, ...), a row of the variable's shape for each index.
        indices: n integers, one-dimensional, as TensorFlow has them. Flatten those of a batch, and its values likewise.
        dense_shape: The shape of the variable, if it is to be checked.

    Raises:
        TypeError: ``indices`` are not integers. The step checks everything else against the variable.
        ValueError: ``indices`` are not one-dimensional.

    Source: https://www.tensorflow.org/api_docs/python/tf/IndexedSlices.

    >>> import numpy as np, fastadam
    >>> table = np.ones((4, 2), np.float32)
    >>> gradient = fastadam.IndexedSlices(np.full((3, 2), 0.5, np.float32), [2, 0, 2])
    >>> step = fastadam.Adam(0.1).apply_gradients([(gradient, table)])
    >>> table.round(5).tolist()
    [[0.8999999761581421, 0.8999999761581421], [1.0, 1.0], [0.8999999761581421, 0.8999999761581421], [1.0, 1.0]]
    """

    __slots__ = ("__weakref__", "dense_shape", "indices", "values")

    values: AnyArray  # as they were given
    indices: AnyArray  # an array of int32 or int64, or one on a GPU
    dense_shape: tuple[int, ...] | None

    @suggests_keywords()
    def __init__(self, values: ArrayLike, indices: ArrayLike, dense_shape: Sequence[int] | None = None) -> None:
        self.values = values
        self.indices = _as_indices(indices)
        self.dense_shape = None if dense_shape is None else _as_shape(dense_shape)

    @never_raises
    def __repr__(self) -> str:
        start, gap = f"{name_of(type(self))}(", " " * 4
        values, indices = (array_text(array, len(gap + name) + 1) for name, array in self._arrays())
        shape = "" if self.dense_shape is None else f", dense_shape={self.dense_shape}"
        if "\n" in values + indices:
            return f"{start}\n{gap}values={values},\n{gap}indices={indices}{shape})"
        return f"{start}values={values}, indices={indices}{shape})"

    @html_or_none
    def _repr_html_(self) -> str:
        shape = [] if self.dense_shape is None else [("dense_shape", self.dense_shape)]
        texts = (preformatted(f"{name}={array_text(array, len(name) + 1)}") for name, array in self._arrays())
        return html_table(name_of(type(self)), shape, "".join(texts))

    def _arrays(self) -> list[tuple[str, AnyArray]]:
        return [("values", self.values), ("indices", self.indices)]


def _as_shape(dense_shape: Sequence[int]) -> tuple[int, ...]:
    if type(dense_shape) is tuple and set(map(type, dense_shape)) <= {int} and min(dense_shape, default=0) >= 0:
        return dense_shape  # quickly, for most steps on tables come here
    is_array = isinstance(dense_shape, np.ndarray) and dense_shape.ndim == 1
    lengths = check_list("dense_shape", list(dense_shape) if is_array else dense_shape, "the shape of the variable")
    shape = tuple(check_integer(f"dense_shape[{i}]", length) for i, length in enumerate(lengths))
    if any(length < 0 for length in shape):
        raise ValueError(f"dense_shape: {shape}, expected no negative length")
    return shape


def check_sparse_update(value: object) -> SparseUpdate:
    """One of the names in ``SPARSE_UPDATES``."""
    if not isinstance(value, str) or value not in SPARSE_UPDATES:
        raise ValueError(f"sparse_update: {shown(value)}, expected one of {', '.join(map(repr, SPARSE_UPDATES))}")
    return cast("SparseUpdate", str(value))


def check_ids(ids: ArrayLike, shape: tuple[int, ...], label: str, name: str = "ids") -> HostArray:
    """Row indices of a variable of this shape, as int32 or int64 of any shape; ``name``: of the argument."""
    rows = as_integers(name, ids)
    if not shape:
        raise ValueError(f"{name}: {label} has shape (), expected at least one axis")
    bad = rows[(rows < 0) | (rows >= shape[0])]
    if bad.size:
        one = {"ids": "id", "rows": "row"}.get(name, "index")
        raise ValueError(f"{name}: {bad.flat[0]} is not a row of {label}, expected 0 <= {one} < {shape[0]}")
    return rows


def _as_indices(indices: ArrayLike) -> AnyArray:
    if on_gpu(indices):
        return indices  # the step checks it
    array = as_integers("indices", indices)
    if array.ndim != 1:
        hint = "; reshape both, to values (n, ...) and indices (n,)" if array.ndim else ""
        raise ValueError(f"indices: shape {array.shape}, expected one dimension, as of tf.IndexedSlices{hint}")
    return np.require(array, requirements=["C", "A"])


def as_integers(name: str, values: ArrayLike) -> HostArray:
    """In int32 or int64, as the kernels read them."""
    try:
        array = np.asarray(values)
    except (MemoryError, OverflowError, RecursionError, TypeError, ValueError) as error:
        why = str(error) or type(error).__name__
        raise TypeError(f"{name}: {type(values).__name__} that is not an array of integers ({why})") from error
    if isinstance(values, np.ma.MaskedArray):  # as the native code refuses one of numbers
        raise TypeError(f"{name}: masked array, whose mask Adam cannot honour; pass its .data or .compressed()")
    if array.size == 0 and not isinstance(values, np.ndarray):
        array = array.astype(np.int64)  # an empty list has no dtype
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: dtype {array.dtype}, expected integers")
    if array.dtype in (np.int32, np.int64) and array.dtype.isnative:
        return array
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: {int(array.max())}, expected int64")
    return array.astype(np.int64)


def is_sparse(gradient: AnyGradient) -> bool:
    """Whether a gradient names the rows that it touches: IndexedSlices, or a sparse one of PyTorch or SciPy."""
    if isinstance(gradient, (np.ndarray, list)):
        return False
    return isinstance(gradient, IndexedSlices) or _is_torch(gradient) or _is_scipy(gradient)


def is_native_sparse(gradient: AnyGradient) -> bool:
    """Whether it is sparse, or native Slices already."""
    return is_slices(gradient) or is_sparse(gradient)


def is_slices(gradient: AnyGradient) -> bool:
    """Whether a gradient is native Slices, which a plan reads."""
    return type(gradient).__name__ == "Slices" and type(gradient).__module__ in ("fastadam._cpu", "fastadam._cuda")


def native_gradient(gradient: AnyGradient, variable: _cpu.Buffer, label: str) -> AnyGradient:
    """A sparse gradient of any library as native Slices; a dense one as it is."""
    slices = gradient if isinstance(gradient, IndexedSlices) else _of_other_library(gradient, label)
    if slices is None:
        return gradient
    if slices.dense_shape is not None and slices.dense_shape != variable.shape:
        raise ValueError(f"{label}: dense_shape {slices.dense_shape}, expected {variable.shape} like {variable.label}")
    return native_of(variable).Slices(slices.values, _as_indices(slices.indices))  # set by a user since


def convert_slices(slices: _cpu.Slices, variable: _cpu.Buffer, label: str) -> _cpu.Slices:
    """The same rows with values that a step reads, in a NumPy array."""
    values = as_float_array(slices.values, f"{label}.values")
    shape = (len(slices.indices), *variable.shape[1:])
    if values.size == 0 and len(slices.indices) == 0:
        values = np.zeros(shape, values.dtype)  # an empty list does not show the shape of rows
    dtype = variable.dtype if values.dtype.name == variable.dtype else variable.state_dtype
    return _cpu.Slices(convert_values(values, dtype), slices.indices)


def _of_other_library(gradient: AnyGradient, label: str) -> IndexedSlices | None:
    if _is_torch(gradient):
        return _of_torch(gradient, label)
    return _of_scipy(gradient) if _is_scipy(gradient) else None


def _is_torch(gradient: AnyGradient) -> bool:
    return getattr(gradient, "is_sparse", False) is True and hasattr(gradient, "_indices")


def _is_scipy(gradient: AnyGradient) -> bool:
    return hasattr(gradient, "tocsr") and hasattr(gradient, "nnz")


def _of_torch(tensor: AnyGradient, label: str) -> IndexedSlices:
    """A COO tensor with the first axis sparse, as ``nn.Embedding(sparse=True)`` gives; coalesced or not."""
    if tensor.sparse_dim() != 1:
        raise ValueError(f"{label}: sparse tensor with {tensor.sparse_dim()} sparse axes, expected the first alone")
    return IndexedSlices(tensor._values().detach(), _of_host(tensor._indices()[0]), tuple(tensor.shape))


def _of_host(indices: AnyArray) -> AnyArray:
    return indices if on_gpu(indices) else indices.numpy()


def _of_scipy(matrix: AnyGradient) -> IndexedSlices:
    """The rows of a SciPy matrix that hold elements."""
    rows = matrix.tocsr()
    touched = np.flatnonzero(np.diff(rows.indptr))
    return IndexedSlices(rows[touched].toarray(), touched, tuple(matrix.shape))
