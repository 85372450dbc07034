"""Check the arguments of a step, and convert them to the arrays that the kernels read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fastadam._core.common import checks
from fastadam._core.common.checks import as_array, shown
from fastadam._core.common.types import AnyArray, HostArray, Tree
from fastadam._core.common.warning import warn
from fastadam.schedules import LearningRateSchedule

if TYPE_CHECKING:
    from jax.tree_util import PyTreeDef

Scalar: TypeAlias = "float | np.floating[Any] | jax.Array"
Rate: TypeAlias = "Scalar | Callable[[jax.Array], AnyArray]"  # a schedule gets the count before the step
Mask: TypeAlias = Tree  # a tree or prefix of bools, or a function that returns one; None means that all decay
CLIPPING = {  # hints for keywords of Keras
    "clipnorm": "clip the gradients first, as optax.clip_by_global_norm does",
    "clipvalue": "clip the gradients first, as optax.clip does",
    "global_clipnorm": "clip the gradients first, as optax.clip_by_global_norm does",
}
HALF = ("float16", "bfloat16")
_FLOATS = (*HALF, "float32", "float64")
_INT32_MAX = 2**31 - 1
Arrays = list[jax.Array]


class AdamState(Protocol):
    """The attributes of optax's ``ScaleByAdamState``, whose own annotation allows a count that is not an array."""

    @property
    def count(self) -> jax.Array:
        """Number of steps made."""

    @property
    def mu(self) -> Tree:
        """First moments, in the tree of the parameters."""

    @property
    def nu(self) -> Tree:
        """Second moments, in the tree of the parameters."""


class AmsgradState(NamedTuple):
    """The state of AMSGrad as in TensorFlow and PyTorch: ``nu_max`` is the maximum of the second moments.

    optax's ``ScaleByAmsgradState`` has the maximum of bias-corrected moments, which is a different algorithm.
    """

    count: jax.Array
    """Number of steps made."""
    mu: Tree
    """First moments, in the tree of the parameters."""
    nu: Tree
    """Second moments, in the tree of the parameters."""
    nu_max: Tree
    """Maxima of the second moments, in the tree of the parameters."""


def flatten(tree: Tree, name: str) -> tuple[list[str], Arrays, PyTreeDef]:
    """The paths of the leaves (for messages), the leaves as arrays, and the structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    labels = [jax.tree_util.keystr(path) for path, _ in paths]
    for label, (_, leaf) in zip(labels, paths, strict=True):
        if isinstance(leaf, (str, bytes)):  # JAX's own error does not name the argument
            raise TypeError(f"{name}{label}: {shown(leaf, 60)}, expected an array")
    return labels, [jnp.asarray(leaf) for _, leaf in paths], structure


def flatten_like(
    name: str, tree: Tree, labels: Sequence[str], structure: PyTreeDef, like: str = "the parameters"
) -> Arrays:
    """The leaves of a tree that must have this structure, which is that of ``like``."""
    paths, leaves, actual = flatten(tree, name)
    if paths != list(labels) or actual != structure:
        raise ValueError(f"{name}: a tree {actual}, expected {structure} like {like}")
    return leaves


def check_array(name: str, value: AnyArray) -> jax.Array:
    """A single array; trees are refused."""
    if not jax.tree_util.all_leaves([value]):
        raise TypeError(f"{name}: {type(value).__name__}, expected an array")
    return jnp.asarray(value)


def check_order(table: AnyArray, ids: AnyArray, grads: AnyArray, state: Tree) -> None:
    """Refuse arguments of ``sparse_update`` that come in another order, as far as their kinds show it."""
    order = "the order is sparse_update(table, ids, grads, state)"
    given = {"table": table, "ids": ids, "grads": grads}
    for name, value in given.items():
        if {"count", "mu", "nu"} <= set(getattr(value, "_fields", ())):
            raise TypeError(f"{name}: {type(value).__name__}, expected an array; {order}")
    arrays = {name: value for name, value in given.items() if isinstance(value, (np.ndarray, jax.Array))}
    integers = [name for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.integer)]
    if "ids" in arrays and integers in (["table"], ["grads"]):
        raise TypeError(f"ids: {arrays['ids'].dtype}, expected integers, as {integers[0]} has them; {order}")
    if isinstance(state, (np.ndarray, jax.Array)):
        raise TypeError(f"state: {type(state).__name__}, expected what init(table) returns; {order}")
    shape = getattr(getattr(state, "mu", None), "shape", None)
    if {"table", "grads"} <= set(arrays) and arrays["table"].shape != shape == arrays["grads"].shape:
        raise ValueError(f"table: shape {arrays['table'].shape}, expected {shape}, which grads and state have; {order}")


def moments_of(state: Tree) -> dict[str, Tree]:
    """The fields with moments, by name."""
    fields = getattr(state, "_fields", ())
    if type(state).__name__ == "ScaleByAmsgradState":
        raise TypeError(
            "state: ScaleByAmsgradState, with the maximum of bias-corrected moments, expected an AmsgradState"
        )
    if not {"count", "mu", "nu"} <= set(fields):
        raise TypeError(
            f"state: {type(state).__name__}, expected a ScaleByAdamState or AmsgradState, as init() returns"
        )
    return {name: getattr(state, name) for name in ("mu", "nu", "nu_max") if name in fields}


def next_count(state: Tree) -> jax.Array:
    """The count of this step. It stops at the largest integer, as in optax."""
    moments_of(state)
    count = check_count("state.count", state.count, least=0)
    return jnp.where(count < np.iinfo(count.dtype).max, count + 1, count)


def check_ids(ids: AnyArray) -> jax.Array:
    """Ids as int32 or int64. Integers that would overflow into another id are refused."""
    integers = ids if isinstance(ids, jax.Array) else as_array("ids", ids, "integers")
    if isinstance(ids, (list, tuple)) and not integers.size:
        integers = integers.astype(np.int32)
    if not jnp.issubdtype(integers.dtype, jnp.integer):
        raise TypeError(f"ids: {integers.dtype}, expected integers")
    widest = jnp.result_type(int)
    if isinstance(integers, np.ndarray) and integers.size:
        limits, low, high = np.iinfo(widest), int(integers.min()), int(integers.max())
        if not (limits.min <= low and high <= limits.max):
            raise ValueError(f"ids: {low} to {high}, expected integers in the range of {widest}")
    array = jnp.asarray(integers)
    return array if array.dtype in ("int32", "int64") else array.astype(widest)


def check_count(name: str, value: AnyArray, least: int = 1) -> jax.Array:
    """The count t as int32, or as int64 if it is an int64 array and JAX allows int64."""
    if isinstance(value, (bool, np.bool_)) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{name}: {shown(value)}, expected an integer or an integer array")
    if jnp.shape(value) != ():
        raise ValueError(f"{name}: shape {jnp.shape(value)}, expected a scalar")
    if isinstance(value, (int, np.integer)) and not least <= value <= _INT32_MAX:
        raise ValueError(f"{name}: {value}, expected an integer from {least} to 2**31 - 1")
    is_long = getattr(value, "dtype", None) == jnp.int64 and jnp.result_type(int) == jnp.int64
    return jnp.asarray(value, jnp.int64 if is_long else jnp.int32)


def rate_of(learning_rate: Rate, state: Tree) -> AnyArray:
    """The learning rate; a schedule is called with the count before this step, as in optax."""
    if isinstance(learning_rate, LearningRateSchedule) and isinstance(state.count, jax.core.Tracer):
        raise TypeError(
            f"learning_rate: {type(learning_rate).__name__} of fastadam.schedules under jit, expected a number or a "
            "schedule that JAX can trace, such as optax.cosine_decay_schedule"
        )
    return check_scalar("learning_rate", learning_rate(state.count) if callable(learning_rate) else learning_rate)


def check_scalar(name: str, value: AnyArray, check: Callable[[str, AnyArray], float] = checks.check_number) -> AnyArray:
    """A Python number, which is checked now, or a scalar array, whose value the handler checks when a step runs."""
    if not isinstance(value, jax.Array):
        return check(name, value)
    if value.shape != () or not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"{name}: {value.dtype}{list(value.shape)}, expected a number or a scalar array")
    return value


def pack_numbers(
    learning_rate: AnyArray,
    beta_1: Scalar,
    beta_2: Scalar,
    epsilon: Scalar,
    weight_decay: Scalar,
    grad_factor: Scalar,
    names: tuple[str, str, str] = ("b1", "b2", "eps"),
) -> HostArray | jax.Array:
    """The operand `numbers`, with a row for each number: a NumPy array, unless a number is an array of JAX."""
    values = [
        learning_rate,
        check_scalar(names[0], beta_1, checks.check_beta),
        check_scalar(names[1], beta_2, checks.check_beta),
        check_scalar(names[2], epsilon, checks.check_non_negative),
        check_scalar("weight_decay", weight_decay, checks.check_non_negative),
        check_scalar("grad_factor", grad_factor),
    ]
    rows = [_parts_of(value) for value in values]
    return (jnp if any(isinstance(row, jax.Array) for row in rows) else np).stack(rows)


def _parts_of(value: AnyArray) -> AnyArray:
    """The number: one float64, or if JAX has only float32, three whose sum times 2**(a fourth) is a float64 exactly."""
    is_array = isinstance(value, jax.Array)
    if jnp.result_type(float) == jnp.float64:
        return value.astype(jnp.float64)[None] if is_array else np.asarray([value], np.float64)
    if is_array:
        return jnp.stack([value.astype(jnp.float32), *3 * [jnp.float32(0)]])
    rest, exponent = math.frexp(value)
    parts = np.zeros(4, np.float32)
    for i in range(3):
        parts[i] = np.float32(rest)
        rest -= float(parts[i]) if np.isfinite(parts[i]) else rest
    parts[3] = exponent
    return parts


def spread_mask(mask: Mask, params: Tree, structure: PyTreeDef, weight_decay: Scalar) -> list[bool]:
    """For every leaf, whether weight decay applies to it. Warns if it applies to none."""
    if mask is None:
        return [True] * structure.num_leaves
    prefix = mask(params) if callable(mask) else mask
    try:
        spread = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), prefix, params)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"mask: {shown(prefix)}, expected bools in the tree of the parameters, or a prefix of it"
        ) from error
    flags = [checks.check_bool("mask", flag) for flag in jax.tree.leaves(spread)]
    if flags and not any(flags) and (isinstance(weight_decay, jax.Array) or weight_decay != 0):
        warn(
            f"mask: False for every parameter, so weight_decay={weight_decay} has no effect; use True where it applies"
        )
    return flags


def state_dtype(param: jax.Array) -> np.dtype[Any]:
    """The dtype of the moments that `init` makes."""
    return jnp.dtype("float32") if param.dtype.name in HALF else param.dtype


def check_params(labels: Sequence[str], params: Arrays, name: str = "params", others: str = "") -> None:
    """Refuse dtypes that the kernels do not have. `others` are dtypes that the caller takes as well."""
    for label, param in zip(labels, params, strict=True):
        if param.dtype.name not in _FLOATS:
            expected = ", ".join([*_FLOATS, *([others] if others else [])])
            raise TypeError(f"{name}{label}: {param.dtype}, expected one of {expected}")


def check_shape(label: str, array: jax.Array, shape: tuple[int, ...], like: str) -> None:
    """Refuse an array of another shape; `like` says what has the expected shape."""
    if array.shape != shape:
        raise ValueError(f"{label}: shape {array.shape}, expected {shape}, {like}")


def check_like(label: str, array: jax.Array, of: str, param: jax.Array, dtypes: Sequence[np.dtype[Any]]) -> None:
    """Refuse an array that does not have the shape of a parameter and one of these dtypes."""
    check_shape(label, array, param.shape, f"the shape of {of}")
    if array.dtype not in dtypes:
        raise TypeError(f"{label}: {array.dtype}, expected {' or '.join(map(str, dtypes))} as {of} is {param.dtype}")


def convert_floats(arrays: Arrays, dtypes: Sequence[np.dtype[Any]]) -> Arrays:
    """Arrays of these dtypes; what is not a float array is left for a check to refuse."""
    return [
        x.astype(dtype) if x.dtype != dtype and jnp.issubdtype(x.dtype, jnp.floating) else x
        for x, dtype in zip(arrays, dtypes, strict=True)
    ]


def in_one_dtype(params: Arrays, mu: Arrays, nu: Arrays) -> tuple[Arrays, Arrays]:
    """Both moments of each parameter in the dtype of a step, where optax's ``mu_dtype`` gave them two dtypes."""
    firsts, seconds = [], []
    for param, first, second in zip(params, mu, nu, strict=True):
        wide = state_dtype(param)
        is_wider = jnp.issubdtype(first.dtype, jnp.floating) and jnp.promote_types(first.dtype, wide) == wide
        if first.dtype != second.dtype and is_wider and second.dtype in (param.dtype, wide):
            first, second = first.astype(wide), second.astype(wide)
        firsts.append(first)
        seconds.append(second)
    return firsts, seconds


def convert_gradient(label: str, grad: jax.Array, param: jax.Array, keeps_float32: bool = True) -> jax.Array:
    """Convert a gradient to the parameter's dtype, or to float32 for half parameters with float32 moments."""
    if not jnp.issubdtype(grad.dtype, jnp.floating):
        raise TypeError(f"{label}: {grad.dtype}, expected a float dtype")
    if grad.dtype == param.dtype:
        return grad
    return grad.astype(jnp.float32 if keeps_float32 and param.dtype.name in HALF else param.dtype)
