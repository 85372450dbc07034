"""An optional named holder of one array."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from fastadam._core.common.checks import shown
from fastadam._core.common.display import array_text, html_or_none, html_table, name_of, never_raises, preformatted
from fastadam._core.common.frameworks import hint_for_variable
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.strict import unknown_attribute
from fastadam._core.native.arrays import assign, native_for, on_gpu, to_host
from fastadam._core.native.gradients import as_float_array
from fastadam._core.native.slices import check_ids

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastadam._core.common.types import AnyArray, ArrayLike, Foreign, Tree

__all__ = ["Reader", "Variable", "label_of", "name_in", "present_name", "read_by", "unwrap"]


class Reader(Protocol):
    """Decides what ``Variable.value`` is while a loss runs."""

    def read(self, variable: Variable) -> AnyArray:
        """The array of the autodiff library that stands for the variable."""

    def gather(self, variable: Variable, ids: npt.NDArray[np.integer]) -> AnyArray:
        """The array of the autodiff library that stands for these rows."""


Result = TypeVar("Result")
_renamed: WeakValueDictionary[int, Variable] = WeakValueDictionary()  # by the ids of their arrays
_reader: ContextVar[Reader | None] = ContextVar("fastadam_reader", default=None)
_NAMED = "variable '"
_running: set[int] = set()  # one number for each running loss, in any thread; changed only by atomic operations


def read_by(reader: Reader | None, function: Callable[[], Result]) -> Result:
    """``function()``, in which ``reader`` answers for ``Variable.value``; None gives the arrays themselves.

    Ctrl-C cannot leave the reader behind: each ``finally`` is one native call, before which no signal handler runs.
    """
    before, mark = _reader.get(), object()
    try:
        _running.add(id(mark))
        try:
            _reader.set(reader)
            return function()
        finally:
            _reader.set(before)
    finally:
        _running.discard(id(mark))


def present_name(array: AnyArray, recorded: str | None) -> str | None:
    """The name of the variable with this array, which had the ``recorded`` one when it was met."""
    variable = _renamed.get(id(array))
    return recorded if variable is None or variable._value is not array else variable.name


class Variable:
    """A trainable array with a name; the optimizer updates ``value`` in place.

    A float array, in host memory or on a GPU, is held, not copied: the caller's array and ``value`` share memory.
    Anything else (numbers, nested lists) becomes a new float32 array, as in TensorFlow.

    Inside the loss of ``minimize`` ``value`` is an array of the autodiff library that stands for this variable. The
    operators ``+ - * / @ **``, unary ``-`` and indexing act on ``value``, and so do NumPy's ufuncs. Outside of a loss
    ``+= -= *= /=`` change it in place.

    Args:
        value: Writable contiguous float16, bfloat16, float32 or float64 array, or numbers.
        name: Used in messages and in saved files.

    Raises:
        TypeError: The array is not of a float dtype.
        ValueError: The array cannot be updated in place (read-only, strided, byte-swapped).

    >>> import fastadam
    >>> w = fastadam.Variable([1.0, 2.0], name="w")
    >>> step = fastadam.Adam(0.1).apply_gradients([([0.5, -0.5], w)])
    >>> w.value.round(5)
    array([0.9, 2.1], dtype=float32)
    """

    __slots__ = ("__weakref__", "_value", "name")

    name: str | None

    @suggests_keywords()
    def __init__(self, value: ArrayLike, name: str | None = None) -> None:
        _check_name(name)
        array: AnyArray = value if isinstance(value, np.ndarray) or on_gpu(value) else _new_array(value, name)
        self.name = name
        native_for([array]).Buffer(array, label_of(self, 0) if name else "value")
        self._value = array

    @property
    def value(self) -> AnyArray:
        """The array itself, not a copy; inside a loss the array of the autodiff library."""
        if not _running:
            return self._value
        reader = _reader.get()
        return self._value if reader is None else reader.read(self)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, new: object) -> None:
            if name in ("value", "shape", "dtype"):
                raise AttributeError(f"{name}: a Variable keeps its memory; expected assign(new), or value[...] = new")
            if not hasattr(type(self), name) and not hasattr(self, "__dict__"):
                raise AttributeError(unknown_attribute(self, name, ("name", "value")))
            if name == "name":
                _check_name(new)
            super().__setattr__(name, new)
            if name == "name" and hasattr(self, "_value"):
                _renamed[id(self._value)] = self

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``value``."""
        return tuple(self._value.shape)

    @property
    def dtype(self) -> Foreign:
        """Dtype of ``value``."""
        return self._value.dtype

    def gather(self, ids: ArrayLike) -> AnyArray:
        """The rows ``value[ids]``, of shape ``ids.shape + value.shape[1:]``.

        Inside a loss their gradient is an :class:`fastadam.IndexedSlices`: no array of the variable's shape is made,
        unless the loss also reads ``value``. Outside a loss this is plain indexing, and rows of a deferred table may
        be stale: read them with the optimizer's own ``gather``.

        Args:
            ids: Integers of any shape, repeated or not, known when the loss runs.

        Raises:
            TypeError: Ids that are not integers.
            ValueError: An id out of range, or a variable without rows.

        >>> import fastadam
        >>> table = fastadam.Variable([[1.0, 2.0], [3.0, 4.0]], name="table")
        >>> table.gather([1, 1, 0]).tolist()
        [[3.0, 4.0], [3.0, 4.0], [1.0, 2.0]]
        """
        rows = check_ids(ids, self.shape, label_of(self, 0) if self.name else "this variable")
        reader = _reader.get() if _running else None
        return self._value[rows] if reader is None else reader.gather(self, rows)

    def numpy(self) -> npt.NDArray[np.generic]:
        """A copy of the array; inside a loss too, where it is a constant."""
        return np.array(to_host(self._value))

    def assign(self, value: ArrayLike) -> Self:
        """Overwrite the elements, of any real dtype; a call that raises has changed none.

        Raises:
            TypeError: ``value`` does not hold real numbers: complex numbers, strings, dates, objects.
            ValueError: ``value`` does not have the variable's shape.
        """
        new = as_float_array(value, "value", "fiub")
        if new.shape != tuple(self._value.shape):
            raise ValueError(f"value: shape {new.shape}, expected {self._value.shape} like this variable")
        assign(self._value, new)
        return self

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.generic]:
        if not isinstance(self.value, np.ndarray):
            raise TypeError(
                f"{label_of(self, 0) if self.name else 'Variable'}: converted to an array inside a loss, which would "
                "lose its gradient; use its `value` and the functions of the autodiff library"
            )
        if copy or (dtype is not None and np.dtype(dtype) != self._value.dtype):
            return np.array(self._value, dtype=dtype)
        own: npt.NDArray[np.generic] = self._value
        return own

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: AnyArray, **kwargs: AnyArray) -> AnyArray:
        values = _values(inputs)
        if method == "__call__" and not kwargs and ufunc in _OPERATORS:
            return _OPERATORS[ufunc](*values)  # arrays of JAX and PyTorch have operators, but no ufuncs
        return getattr(ufunc, method)(*values, **_values(kwargs))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., AnyArray], types: object, args: Tree = (), kwargs: Tree = None
    ) -> AnyArray:
        return function(*_values(args), **_values(kwargs or {}))

    @property
    def _trace(self) -> object:
        # HIPS autograd, once a loss has used it, treats a Variable as a box with this trace and node; a number below
        # those of all traces says that it is not a box.
        return getattr(self.value, "_trace", -2)

    @property
    def _node(self) -> object:
        return getattr(self.value, "_node", None)

    def __add__(self, other: ArrayLike) -> AnyArray:
        return self.value + _values(other)

    def __radd__(self, other: ArrayLike) -> AnyArray:
        return other + self.value

    def __sub__(self, other: ArrayLike) -> AnyArray:
        return self.value - _values(other)

    def __rsub__(self, other: ArrayLike) -> AnyArray:
        return other - self.value

    def __mul__(self, other: ArrayLike) -> AnyArray:
        return self.value * _values(other)

    def __rmul__(self, other: ArrayLike) -> AnyArray:
        return other * self.value

    def __truediv__(self, other: ArrayLike) -> AnyArray:
        return self.value / _values(other)

    def __rtruediv__(self, other: ArrayLike) -> AnyArray:
        return other / self.value

    def __matmul__(self, other: ArrayLike) -> AnyArray:
        return self.value @ _values(other)

    def __rmatmul__(self, other: ArrayLike) -> AnyArray:
        return other @ self.value

    def __pow__(self, other: ArrayLike) -> AnyArray:
        return self.value ** _values(other)

    def __rpow__(self, other: ArrayLike) -> AnyArray:
        return other**self.value

    def __iadd__(self, other: ArrayLike) -> AnyArray:
        return self._in_place(operator.iadd, operator.add, other)

    def __isub__(self, other: ArrayLike) -> AnyArray:
        return self._in_place(operator.isub, operator.sub, other)

    def __imul__(self, other: ArrayLike) -> AnyArray:
        return self._in_place(operator.imul, operator.mul, other)

    def __itruediv__(self, other: ArrayLike) -> AnyArray:
        return self._in_place(operator.itruediv, operator.truediv, other)

    def _in_place(self, change: Callable[..., AnyArray], make: Callable[..., AnyArray], other: ArrayLike) -> AnyArray:
        """`w *= 0.999` changes the array and keeps the Variable; inside a loss it makes a new array."""
        if self.value is not self._value:
            return make(self.value, _values(other))
        operand = _values(other)
        try:
            change(self._value, operand)
        except TypeError as error:
            kind = type(operand).__name__ + (f" of dtype {operand.dtype}" if hasattr(operand, "dtype") else "")
            raise TypeError(f"other: {kind}, expected real numbers that {self.dtype} can hold ({error})") from error
        return self

    def __neg__(self) -> AnyArray:
        return -self.value

    def __getitem__(self, index: AnyArray) -> AnyArray:
        return self.value[_values(index)]

    __iter__ = None  # indexing alone would make every Variable a list of its rows

    @never_raises
    def __repr__(self) -> str:
        start = f"{name_of(type(self))}("
        name = "" if self.name is None else f", name={self.name!r}"
        return f"{start}{array_text(self._value, len(start))}{name})"

    @html_or_none
    def _repr_html_(self) -> str:
        rows = [("name", self.name or ""), ("shape", self.shape), ("dtype", str(self.dtype))]
        return html_table(name_of(type(self)), rows, preformatted(array_text(self._value)))


_OPERATORS: dict[np.ufunc, Callable[..., AnyArray]] = {
    np.add: operator.add,
    np.subtract: operator.sub,
    np.multiply: operator.mul,
    np.true_divide: operator.truediv,
    np.matmul: operator.matmul,
    np.power: operator.pow,
    np.negative: operator.neg,
}


def _values(tree: Tree) -> Tree:
    """``tree`` with the value of every Variable in it, through lists, tuples and dicts."""
    if isinstance(tree, Variable):
        return tree.value
    if type(tree) in (list, tuple):
        return type(tree)(map(_values, tree))
    if type(tree) is dict:
        return {key: _values(item) for key, item in tree.items()}
    return tree


def _new_array(value: ArrayLike, name: str | None) -> npt.NDArray[np.float32]:
    label = f"variable '{name}'" if name else "value"
    hint = hint_for_variable(value)
    is_variable = hint is not None and hasattr(value, "assign")  # of Keras or TensorFlow; a copy would be trained
    if is_variable or (hasattr(value, "__dlpack__") and not isinstance(value, np.generic)):
        hint = hint or "pass other arrays as they are"
        raise TypeError(f"{label}: {type(value).__name__}, expected a NumPy array; {hint}")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{label}: {type(value).__name__} that is not an array of numbers ({error})") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{label}: dtype {array.dtype}, expected real numbers")
    return np.array(array, dtype=np.float32)


def _check_name(name: object) -> None:
    if not isinstance(name, (str, type(None))):
        raise TypeError(f"name: {shown(name)}, expected a string")
    if name and not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"name: {shown(name)}, expected a string that UTF-8 can encode") from error


def label_of(variable: object, position: int) -> str:
    """How messages call a variable: by its name, or by its place in the list."""
    name = variable.name if isinstance(variable, Variable) else None
    return f"{_NAMED}{name}'" if name else f"vars[{position}]"


def name_in(label: str) -> str | None:
    """The name of the variable that :func:`label_of` labelled; None if it had none."""
    return label[len(_NAMED) : -1] if label.startswith(_NAMED) else None


def unwrap(variable: AnyArray) -> AnyArray:
    """The array of a :class:`Variable`; anything else as it is."""
    return variable._value if isinstance(variable, Variable) else variable
