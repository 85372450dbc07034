"""Steps in donated memory: for trees of parameters, for a table with gradients of rows, and for lists of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import jax
import jax.numpy as jnp

from fastadam._core.common.checks import check_bool, check_list, shown
from fastadam._core.common.frameworks import require
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import HostArray, Tree
from fastadam.jax._arguments import (
    CLIPPING,
    AmsgradState,
    Arrays,
    check_array,
    check_count,
    check_ids,
    check_like,
    check_order,
    check_params,
    check_scalar,
    check_shape,
    convert_floats,
    convert_gradient,
    flatten,
    flatten_like,
    in_one_dtype,
    moments_of,
    next_count,
    pack_numbers,
    rate_of,
    spread_mask,
    state_dtype,
)
from fastadam.jax._operation import DenseStep, SparseStep, operation

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from fastadam.jax._arguments import AdamState, Mask, Rate, Scalar

Params = TypeVar("Params")
State = TypeVar("State")
_MOST_LEAVES = 64  # in one call: XLA's compile time grows with the cube of their number, 10 s for 400


@overload
def init(params: Tree, *, amsgrad: Literal[False] = False) -> AdamState: ...
@overload
def init(params: Tree, *, amsgrad: Literal[True]) -> AmsgradState: ...
@overload
def init(params: Tree, *, amsgrad: bool) -> AdamState | AmsgradState: ...
@suggests_keywords()
def init(params: Tree, *, amsgrad: bool = False) -> AdamState | AmsgradState:
    """Make the initial state for :func:`fused_update` and :func:`sparse_update`: a count of 0 and moments of zeros.

    Args:
        params: A tree of float16, bfloat16, float32 or float64 arrays. Moments of half parameters are float32.
        amsgrad: Make a state of AMSGrad.

    Returns:
        optax's ``ScaleByAdamState``, or an :class:`AmsgradState` with ``amsgrad``.

    Raises:
        ImportError: optax is not installed, and ``amsgrad`` is False.
        TypeError: A parameter has another dtype.

    >>> import jax.numpy as jnp, fastadam.jax
    >>> fastadam.jax.init(jnp.ones(2, jnp.bfloat16), amsgrad=True)
    AmsgradState(count=Array(0, dtype=int32), mu=Array([0., 0.], dtype=float32), nu=Array([0., 0.], dtype=float32),
    nu_max=Array([0., 0.], dtype=float32))
    """
    check_bool("amsgrad", amsgrad)
    labels, leaves, structure = flatten(params, "params")
    check_params(labels, leaves)

    def zeros() -> Tree:
        return structure.unflatten([jnp.zeros_like(x, dtype=state_dtype(x)) for x in leaves])

    count = jnp.zeros([], jnp.int32)
    if amsgrad:
        return AmsgradState(count, zeros(), zeros(), zeros())
    optax = require("optax", "the state of fastadam.jax (without amsgrad)")
    state: AdamState = optax.ScaleByAdamState(count=count, mu=zeros(), nu=zeros())
    return state


@suggests_keywords(elsewhere=CLIPPING)
def fused_update(
    params: Params,
    grads: Tree,
    state: State,
    *,
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    grad_factor: Scalar = 1.0,
    epsilon_corrected: bool = True,
) -> tuple[Params, State]:
    r"""Make one step of Adam for all parameters, in one pass over memory; of AMSGrad with an :class:`AmsgradState`.

    .. math::
        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \leftarrow \theta (1 - \lambda\eta) -
        \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
        params: A tree of float16, bfloat16, float32 or float64 arrays.
        grads: The gradients in the same tree, in any float dtype. They are converted to the parameter's dtype, or to
            float32 for half parameters with float32 moments.
        state: The result of :func:`init`, or a named tuple with ``count``, ``mu``, ``nu`` (and ``nu_max``), such as
            the first state in the chain of ``optax.adam``. Moments of half parameters are float32, or have the
            parameters' dtype. First moments may have optax's ``mu_dtype``, if the dtype of the step is as wide
            (float32 for half parameters, else the parameters'); XLA then converts them before and after.
        learning_rate: A number, a scalar array, or a schedule: a function of ``state.count``.
        b1: Decay rate of m, in [0, 1); a number or a scalar array, like the arguments below.
        b2: Decay rate of v, in [0, 1).
        eps: Added to the square root of the bias-corrected moment, as in optax and PyTorch.
        weight_decay: Decoupled weight decay (AdamW).
        mask: Which parameters decay: a tree of bools, a prefix of one, or a function of ``params`` that returns one.
        grad_factor: Multiplies the gradients first, for clipping by a norm or to divide by a loss scale.
        epsilon_corrected: If False, ``eps`` is added to the square root of the moment before the bias correction, as in
            TensorFlow and Keras. A float32 step on the CPU then has the bits of :class:`fastadam.Adam`.

    Returns:
        The new parameters and the new state, in the memory of the old ones if they were donated.

    Raises:
        TypeError: A dtype or the type of a number or state is wrong.
        ValueError: A tree or a shape is wrong, or a number is out of range.
        jax.errors.JaxRuntimeError: The value of an array (the count, a rate) is invalid. A function that has run before
            raises ValueError instead.

    Source: Kingma and Ba, "Adam" (arXiv:1412.6980), algorithm 1.

    >>> import functools, jax, jax.numpy as jnp, fastadam.jax
    >>> step = jax.jit(functools.partial(fastadam.jax.fused_update, learning_rate=0.1), donate_argnums=(0, 2))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> params, state = step(params, {"w": jnp.array([0.5, -0.5])}, fastadam.jax.init(params, amsgrad=True))
    >>> params["w"], int(state.count)
    (Array([0.9, 2.1], dtype=float32), 1)
    """
    labels, leaves, structure = flatten(params, "params")
    count = next_count(state)
    trees = {name: flatten_like(name, tree, labels, structure) for name, tree in moments_of(state).items()}
    mu, nu = in_one_dtype(leaves, trees["mu"], trees["nu"])
    new, *moments = step_leaves(
        labels,
        leaves,
        flatten_like("grads", grads, labels, structure),
        {**trees, "mu": mu, "nu": nu},
        count=count,
        numbers=pack_numbers(rate_of(learning_rate, state), b1, b2, eps, weight_decay, grad_factor),
        epsilon_corrected=epsilon_corrected,
        decays=spread_mask(mask, params, structure, weight_decay),
    )
    fields = {
        name: structure.unflatten(convert_floats(new_arrays, [x.dtype for x in arrays]))
        for (name, arrays), new_arrays in zip(trees.items(), moments, strict=True)
    }
    return structure.unflatten(new), _replace(state, count=count, **fields)


@suggests_keywords(elsewhere=CLIPPING)
def sparse_update(
    table: ArrayLike,
    ids: ArrayLike | Sequence[int],
    grads: ArrayLike,
    state: State,
    *,
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    grad_factor: Scalar = 1.0,
    epsilon_corrected: bool = True,
    mode: Literal["dense", "lazy"] = "dense",
) -> tuple[jax.Array, State]:
    r"""Make one step for a table, with gradients of some of its rows. Gradients of the same row are summed first.

    Differentiate with respect to the rows that were looked up; JAX then never makes a gradient of the table's size. If
    the table is sharded by rows, each shard uses the ids of its own rows. An invalid id, negative ids included, is an
    error; JAX's own ``.at[]`` would ignore it.

    Args:
        table: A float16, bfloat16, float32 or float64 array with rows along its first axis.
        ids: Integers of any shape, ``0 <= id < len(table)``.
        grads: A float array of shape ``ids.shape + table.shape[1:]``.
        state: ``init(table)``. Moments of half tables are float32.
        learning_rate: As for :func:`fused_update`, like the arguments below.
        b1: Decay rate of m.
        b2: Decay rate of v.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay, of the rows that move.
        grad_factor: Multiplies the gradients.
        epsilon_corrected: As for :func:`fused_update`.
        mode: With "dense" every row moves, as if the other gradients were zero (TensorFlow's rule). With "lazy" only
            the rows in ``ids`` move, and only their moments decay, once per step they occur in
            (``torch.optim.SparseAdam``).

    Returns:
        The new table and the new state.

    Raises:
        TypeError: A dtype or the type of a number or state is wrong; arguments in another order.
        ValueError: A shape or the mode is wrong, or a number is out of range.
        NotImplementedError: Raised in a message of XLA at compile time if ``shard_map`` is manual along only some axes
            of a mesh.
        jax.errors.JaxRuntimeError: An id is not a row; the message names it. A function that has run before raises
            ValueError instead.

    >>> import jax.numpy as jnp, fastadam.jax
    >>> table, ids, rows = jnp.ones((3, 2)), jnp.array([2, 0, 2]), jnp.ones((3, 2))
    >>> state = fastadam.jax.init(table, amsgrad=True)
    >>> fastadam.jax.sparse_update(table, ids, rows, state, learning_rate=0.5, mode="lazy")[0]
    Array([[0.5, 0.5],
           [1. , 1. ],
           [0.5, 0.5]], dtype=float32)
    """
    if not isinstance(mode, str) or mode not in ("dense", "lazy"):
        raise ValueError(f"mode: {shown(mode, 60)}, expected 'dense' or 'lazy'")
    check_order(table, ids, grads, state)
    table, ids, grads = check_array("table", table), check_ids(ids), check_array("grads", grads)
    moments = {name: check_array(f"state.{name}", array) for name, array in moments_of(state).items()}
    check_params([""], [table], "table")
    if table.ndim == 0:
        raise ValueError("table: a scalar, expected rows along a first axis")
    check_shape("grads", grads, (*ids.shape, *table.shape[1:]), "ids.shape + table.shape[1:]")
    if ids.size and not table.shape[0]:
        raise ValueError(f"ids: {ids.size}, expected none for a table without rows")
    for name, array in moments.items():
        check_like(f"state.{name}", array, "table", table, (state_dtype(table),))
    count = next_count(state)
    numbers = pack_numbers(rate_of(learning_rate, state), b1, b2, eps, weight_decay, grad_factor)
    step = SparseStep(
        table.ndim,
        table.shape[0],
        len(moments) == 3,
        check_bool("epsilon_corrected", epsilon_corrected),
        mode == "lazy",
    )
    rows = convert_gradient("grads", grads, table).reshape(ids.size, *table.shape[1:])
    new, *rest = operation(step)(numbers, count, ids.reshape(-1), rows, table, *moments.values())
    return new, _replace(state, count=count, **dict(zip(moments, rest, strict=True)))


def _replace(state: State, **fields: Tree) -> State:
    """A named tuple with new values of these fields."""
    new: State = state._replace(**fields)  # type: ignore[attr-defined]
    return new


@suggests_keywords(elsewhere=CLIPPING)
def step_arrays(
    params: Sequence[ArrayLike],
    grads: Sequence[ArrayLike],
    m: Sequence[ArrayLike],
    v: Sequence[ArrayLike],
    vhat: Sequence[ArrayLike] | None = None,
    *,
    step: ArrayLike,
    learning_rate: Scalar,
    beta_1: Scalar = 0.9,
    beta_2: Scalar = 0.999,
    epsilon: Scalar = 1e-7,
    epsilon_corrected: bool = False,
    weight_decay: Scalar = 0.0,
    grad_factor: Scalar = 1.0,
    decays: Sequence[bool] | None = None,
) -> tuple[Arrays, Arrays, Arrays, Arrays | None]:
    """:func:`fused_update` for lists of arrays, with Keras's names and defaults and without a state object.

    Args:
        params: Arrays.
        grads: Their gradients.
        m: Their first moments.
        v: Their second moments.
        vhat: Maxima of v, for AMSGrad.
        step: The count t of this step, from 1: an int or an int32 scalar array.
        learning_rate: A number or a scalar array, like the arguments below.
        beta_1: Decay rate of m.
        beta_2: Decay rate of v.
        epsilon: Added to the square root of v before the bias correction.
        epsilon_corrected: Add epsilon after the bias correction, as PyTorch and optax do.
        weight_decay: Decoupled weight decay.
        grad_factor: Multiplies the gradients.
        decays: For each array, whether weight decay applies to it. None means that it applies to all.

    Returns:
        New ``params``, ``m``, ``v`` and ``vhat``. The last is None if ``vhat`` is None.

    Raises:
        TypeError: A dtype or the type of a number is wrong.
        ValueError: The length of a list or a shape is wrong, or a number is out of range.

    >>> import jax.numpy as jnp, fastadam.jax
    >>> w, g, zero = jnp.array([1.0]), jnp.array([0.5]), jnp.zeros(1)
    >>> fastadam.jax.step_arrays([w], [g], [zero], [zero], step=1, learning_rate=0.1)[0]
    [Array([0.90000063], dtype=float32)]
    """
    given = {"grads": grads, "m": m, "v": v} | ({} if vhat is None else {"vhat": vhat})
    lists = {name: check_list(name, arrays, "a list of arrays") for name, arrays in given.items()}
    leaves = [jnp.asarray(x) for x in check_list("params", params, "a list of arrays")]
    for name, arrays in lists.items():
        if len(arrays) != len(leaves):
            raise ValueError(f"{name}: {len(arrays)} arrays, expected {len(leaves)} like params")
    flags = [True] * len(leaves) if decays is None else [check_bool("decays", x) for x in check_list("decays", decays)]
    if len(flags) != len(leaves):
        raise ValueError(f"decays: {len(flags)} flags, expected {len(leaves)} like params")
    new, *moments = step_leaves(
        [f"[{i}]" for i in range(len(leaves))],
        leaves,
        [jnp.asarray(x) for x in lists.pop("grads")],
        {name: [jnp.asarray(x) for x in arrays] for name, arrays in lists.items()},
        count=check_count("step", step),
        numbers=pack_numbers(
            check_scalar("learning_rate", learning_rate),
            beta_1,
            beta_2,
            epsilon,
            weight_decay,
            grad_factor,
            names=("beta_1", "beta_2", "epsilon"),
        ),
        epsilon_corrected=epsilon_corrected,
        decays=flags,
    )
    return new, moments[0], moments[1], moments[2] if vhat is not None else None


def step_leaves(
    labels: Sequence[str],
    params: Arrays | None,
    grads: Arrays,
    moments: dict[str, Arrays],
    *,
    count: jax.Array,
    numbers: HostArray | jax.Array,
    epsilon_corrected: bool,
    decays: Sequence[bool],
) -> list[Arrays]:
    """Check all arrays, then make the step in a few native calls.

    Returns:
        New parameters (the steps themselves if ``params`` is None), then each of the moments.
    """
    name, leaves = ("updates", grads) if params is None else ("params", params)
    check_params(labels, leaves, name)
    converted = []
    for i, (label, leaf) in enumerate(zip(labels, leaves, strict=True)):
        own = next(iter(moments.values()))[i].dtype
        wanted = (own,) if own == leaf.dtype else (state_dtype(leaf),)
        for moment, arrays in moments.items():
            check_like(f"{moment}{label}", arrays[i], f"{name}{label}", leaf, wanted)
        check_shape(f"grads{label}", grads[i], leaf.shape, f"the shape of {name}{label}")
        converted.append(convert_gradient(f"grads{label}", grads[i], leaf, keeps_float32=own != leaf.dtype))
    replaced = [*([] if params is None else [params]), *moments.values()]
    results: list[Arrays] = [[] for _ in range(1 + len(moments))]
    for part in (slice(at, at + _MOST_LEAVES) for at in range(0, len(leaves), _MOST_LEAVES)):
        step = DenseStep(
            ranks=tuple(x.ndim for x in leaves[part]),
            amsgrad=len(moments) == 3,
            epsilon_corrected=check_bool("epsilon_corrected", epsilon_corrected),
            decays=tuple(decays[part]),
            from_zero=params is None,
        )
        new = operation(step)(numbers, count, *converted[part], *(x for arrays in replaced for x in arrays[part]))
        for k, arrays in enumerate(results):
            arrays += new[k * len(step.ranks) : (k + 1) * len(step.ranks)]
    return results
