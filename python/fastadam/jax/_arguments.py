"""What a step is given: trees of arrays, a state, numbers; checked, and converted to what the kernels read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fastadam._core import checks
from fastadam._core.warning import warn
from fastadam.schedules import LearningRateSchedule

Scalar: TypeAlias = "float | np.floating[Any] | jax.Array"
Rate: TypeAlias = "Scalar | Callable[[jax.Array], Any]"  # a schedule is given the count before the step
Mask: TypeAlias = Any  # bools in the tree of the parameters, a prefix of it, a function of them; None for all
CLIPPING = {  # for keywords that Keras has
    "clipnorm": "clip the gradients before, as optax.clip_by_global_norm does",
    "clipvalue": "clip the gradients before, as optax.clip does",
    "global_clipnorm": "clip the gradients before, as optax.clip_by_global_norm does",
}
HALF = ("float16", "bfloat16")
_FLOATS = (*HALF, "float32", "float64")
_INT32_MAX = 2**31 - 1
Arrays = list[jax.Array]


class AdamState(Protocol):
    """What optax's ``ScaleByAdamState`` is known by; its own annotations have a count that may be no array."""

    @property
    def count(self) -> jax.Array:
        """Steps made before."""

    @property
    def mu(self) -> Any:
        """First moments, in the tree of the parameters."""

    @property
    def nu(self) -> Any:
        """Second moments, likewise."""


class AmsgradState(NamedTuple):
    """The state of AMSGrad by TensorFlow's and PyTorch's rule: ``nu_max`` is the maximum of the moments as they are.

    optax's ``ScaleByAmsgradState`` has the maximum of bias-corrected moments, which is another algorithm.
    """

    count: jax.Array
    mu: Any
    nu: Any
    nu_max: Any


def flatten(name: str, tree: Any) -> tuple[list[str], Arrays, Any]:
    """The paths of the leaves, for messages, the leaves as arrays, and the structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in paths], [jnp.asarray(leaf) for _, leaf in paths], structure


def flatten_like(name: str, tree: Any, labels: Sequence[str], structure: Any) -> Arrays:
    """The leaves of a tree that must have this structure."""
    found, leaves, other = flatten(name, tree)
    if found != list(labels) or other != structure:
        raise ValueError(f"{name}: a tree {other}, expected {structure} like the parameters")
    return leaves


def check_array(name: str, value: Any) -> jax.Array:
    """One array, no tree of them."""
    if not jax.tree_util.all_leaves([value]):
        raise TypeError(f"{name}: {type(value).__name__}, expected an array")
    return jnp.asarray(value)


def moments_of(state: Any) -> dict[str, Any]:
    """The fields of the moments by name."""
    fields = getattr(state, "_fields", ())
    if type(state).__name__ == "ScaleByAmsgradState":
        raise TypeError(
            "state: ScaleByAmsgradState, whose nu_max is of bias-corrected moments, expected an AmsgradState"
        )
    if not {"count", "mu", "nu"} <= set(fields):
        raise TypeError(
            f"state: {type(state).__name__}, expected ScaleByAdamState or AmsgradState, as init() makes them"
        )
    return {name: getattr(state, name) for name in ("mu", "nu", "nu_max") if name in fields}


def next_count(state: Any) -> jax.Array:
    """The count of this step; like optax's it stops at the largest."""
    moments_of(state)
    count = check_count("state.count", state.count, least=0)
    return jnp.where(count < np.iinfo(count.dtype).max, count + 1, count)


def check_ids(ids: Any) -> jax.Array:
    """As int32 or int64. What JAX would wrap around into another row is refused."""
    given = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if isinstance(ids, (list, tuple)) and not given.size:
        given = given.astype(np.int32)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"ids: {given.dtype}, expected integers")
    widest = jnp.result_type(int)
    if isinstance(given, np.ndarray) and given.size:
        limits = np.iinfo(widest)
        if not (limits.min <= int(given.min()) and int(given.max()) <= limits.max):
            raise ValueError(f"ids: {given.min()} to {given.max()}, expected integers that {widest} holds")
    array = jnp.asarray(given)
    return array if array.dtype in ("int32", "int64") else array.astype(widest)


def check_count(name: str, value: Any, least: int = 1) -> jax.Array:
    """The count t as int32, or int64 where JAX has it and it is given so."""
    if isinstance(value, (bool, np.bool_)) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{name}: {value!r}, expected an integer or an integer array")
    if jnp.shape(value) != ():
        raise ValueError(f"{name}: shape {jnp.shape(value)}, expected a scalar")
    if isinstance(value, (int, np.integer)) and not least <= value <= _INT32_MAX:
        raise ValueError(f"{name}: {value}, expected an integer from {least} to 2**31 - 1")
    is_long = getattr(value, "dtype", None) == jnp.int64 and jnp.result_type(int) == jnp.int64
    return jnp.asarray(value, jnp.int64 if is_long else jnp.int32)


def rate_of(learning_rate: Any, state: Any) -> Any:
    """A learning rate, or that of a schedule at the count before this step, as optax asks it."""
    if isinstance(learning_rate, LearningRateSchedule) and isinstance(state.count, jax.core.Tracer):
        raise TypeError(
            f"learning_rate: {type(learning_rate).__name__} of fastadam.schedules under jit, expected a number or a "
            "schedule of JAX functions, such as optax.cosine_decay_schedule"
        )
    return check_scalar("learning_rate", learning_rate(state.count) if callable(learning_rate) else learning_rate)


def check_scalar(name: str, value: Any, check: Callable[[str, Any], float] = checks.check_number) -> Any:
    """A number of Python, checked now; or a scalar array, which the handler checks when its value is known."""
    if not isinstance(value, jax.Array):
        return check(name, value)
    if value.shape != () or not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise ValueError(f"{name}: {value.dtype}{list(value.shape)}, expected a number or a scalar")
    return value


def pack_numbers(
    learning_rate: Any,
    beta_1: Any,
    beta_2: Any,
    epsilon: Any,
    weight_decay: Any,
    grad_factor: Any,
    names: tuple[str, str, str] = ("b1", "b2", "eps"),
) -> Any:
    """The operand `numbers`, a row for each; on the host as long as none is an array."""
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


def _parts_of(value: Any) -> Any:
    """What adds up to a number: itself in float64, or where JAX has only float32 three that hold a float64."""
    is_array = isinstance(value, jax.Array)
    if jnp.result_type(float) == jnp.float64:
        return value.astype(jnp.float64)[None] if is_array else np.asarray([value], np.float64)
    if is_array:
        return jnp.stack([value.astype(jnp.float32), jnp.float32(0), jnp.float32(0)])
    parts = np.zeros(3, np.float32)
    for i in range(3):
        parts[i] = np.float32(value)
        value -= float(parts[i]) if np.isfinite(parts[i]) else value
    return parts


def spread_mask(mask: Any, params: Any, structure: Any, weight_decay: Any) -> list[bool]:
    """Whether weight decay applies, of every leaf; warns if to none."""
    if mask is None:
        return [True] * structure.num_leaves
    prefix = mask(params) if callable(mask) else mask
    try:
        spread = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), prefix, params)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"mask: {prefix!r}, expected bools in the tree of the parameters, or a prefix of it"
        ) from error
    flags = [checks.check_bool("mask", flag) for flag in jax.tree.leaves(spread)]
    if flags and not any(flags) and (isinstance(weight_decay, jax.Array) or weight_decay != 0):
        warn(
            f"mask: False for every parameter, so that weight_decay={weight_decay} does nothing; True where it applies"
        )
    return flags


def state_dtype(param: Any) -> Any:
    """That of the moments which `init` makes."""
    return jnp.dtype("float32") if param.dtype.name in HALF else param.dtype


def check_params(labels: Sequence[str], params: Sequence[Any], name: str = "params") -> None:
    """Dtypes that the kernels have."""
    for label, param in zip(labels, params, strict=True):
        if param.dtype.name not in _FLOATS:
            raise TypeError(f"{name}{label}: {param.dtype}, expected one of {', '.join(_FLOATS)}")


def check_shape(label: str, array: Any, shape: tuple[int, ...], like: str) -> None:
    """`like` says what has the shape that is wanted."""
    if array.shape != shape:
        raise ValueError(f"{label}: shape {array.shape}, expected {shape}, {like}")


def check_like(label: str, array: Any, of: str, param: Any, dtypes: Sequence[Any]) -> None:
    """An array of the shape of a parameter, and of one of these dtypes."""
    check_shape(label, array, param.shape, f"the shape of {of}")
    if array.dtype not in dtypes:
        raise TypeError(f"{label}: {array.dtype}, expected {' or '.join(map(str, dtypes))} as {of} is {param.dtype}")


def convert_gradient(label: str, grad: Any, param: Any, keeps_float32: bool = True) -> Any:
    """A gradient of a dtype that the kernels read: the parameter's, or float32 for half ones with float32 moments."""
    if not jnp.issubdtype(grad.dtype, jnp.floating):
        raise TypeError(f"{label}: {grad.dtype}, expected a float dtype")
    if grad.dtype == param.dtype:
        return grad
    return grad.astype(jnp.float32 if keeps_float32 and param.dtype.name in HALF else param.dtype)
