"""Adam for JAX by the native kernels: an optax transformation, a donated step in place, and a step of sparse rows.

Everything works inside ``jit``, ``scan``, ``vmap`` and ``shard_map``, and beside ``grad``; a step itself is not
differentiated. Sharded arrays stay where they are. In place means: in a jitted function whose arguments are donated;
JAX copies what is not.

The CPU alone: on another platform compilation fails with the name of the missing handler. The rates and the count are
operands, so that other values do not compile again; what is refused of their values (a count of 0, a NaN) is an error
of the computation, ``jax.errors.JaxRuntimeError``, after which donated arrays are gone.

JAX differentiates, batches and shards by rules; those of a step are in ``fastadam/_xla.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastadam import checks
from fastadam._xla import DenseStep, SparseStep, operation

__all__ = [
    "AmsgradState",
    "adam",
    "adamw",
    "fused_update",
    "init",
    "scale_by_adam",
    "sparse_update",
    "step_arrays",
]

_HALF = ("float16", "bfloat16")
_FLOATS = (*_HALF, "float32", "float64")
_INT32_MAX = 2**31 - 1
Arrays = list[jax.Array]


class AmsgradState(NamedTuple):
    """The state of AMSGrad by TensorFlow's and PyTorch's rule: ``nu_max`` is the maximum of the moments as they are.

    optax's ``ScaleByAmsgradState`` has the maximum of bias-corrected moments, which is another algorithm.
    """

    count: Any
    mu: Any
    nu: Any
    nu_max: Any


def init(params: Any, *, amsgrad: bool = False) -> Any:
    """Zero moments for :func:`fused_update` and :func:`sparse_update`, in float32 for half parameters.

    Returns:
        optax's ``ScaleByAdamState``, or an :class:`AmsgradState`.

    >>> import jax.numpy as jnp, fastadam.jax
    >>> fastadam.jax.init(jnp.ones(2, jnp.bfloat16), amsgrad=True)
    AmsgradState(count=Array(0, dtype=int32), mu=Array([0., 0.], dtype=float32), nu=Array([0., 0.], dtype=float32),
    nu_max=Array([0., 0.], dtype=float32))
    """
    labels, leaves, structure = _leaves("params", params)
    _check_params(labels, leaves)

    def zeros() -> Any:
        return structure.unflatten([jnp.zeros_like(x, dtype=_state_dtype(x)) for x in leaves])

    count = jnp.zeros([], jnp.int32)
    if amsgrad:
        return AmsgradState(count, zeros(), zeros(), zeros())
    import optax

    return optax.ScaleByAdamState(count=count, mu=zeros(), nu=zeros())


def fused_update(
    params: Any,
    grads: Any,
    state: Any,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    grad_factor: Any = 1.0,
    epsilon_corrected: bool = True,
) -> tuple[Any, Any]:
    r"""One step of Adam, of AMSGrad with an :class:`AmsgradState`, of all parameters: one pass, in one call.

    .. math::
        m \mathrel{+}= (g - m)(1 - \beta_1), \quad v \mathrel{+}= (g^2 - v)(1 - \beta_2), \quad
        \theta \leftarrow \theta (1 - \lambda\eta) -
        \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
        params: A tree of float16, bfloat16, float32 or float64 arrays.
        grads: The same tree of gradients; another float dtype is converted, float32 for half parameters is not.
        state: Of :func:`init`, or any named tuple with ``count``, ``mu``, ``nu`` (and ``nu_max``): of ``optax.adam``
            the first of the chain. Moments of half parameters are float32, or of the parameters' dtype.
        learning_rate: A number, a scalar array, or a schedule: a function of ``state.count``.
        b1: Decay rate of m, in [0, 1); like the following a number or a scalar array.
        b2: Decay rate of v.
        eps: Added to the root of the bias-corrected moment, as in optax and PyTorch.
        weight_decay: Decoupled (AdamW).
        mask: Which parameters decay: a tree of bools, its prefix, or a function of ``params`` that returns one.
        grad_factor: Multiplies the gradients first: of a norm clip, or 1 / loss scale.
        epsilon_corrected: False: ``eps`` is added to the root of the moment itself, as in TensorFlow and Keras; with
            that a step on the CPU has the bits of :class:`fastadam.Adam`.

    Returns:
        The new parameters and the new state, in the memory of the old if these were donated.

    Raises:
        TypeError: A dtype, or a number that is none.
        ValueError: Another tree or shape, or a number out of range.

    Source: Kingma and Ba, "Adam" (arXiv:1412.6980), algorithm 1.

    >>> import functools, jax, jax.numpy as jnp, fastadam.jax
    >>> step = jax.jit(functools.partial(fastadam.jax.fused_update, learning_rate=0.1), donate_argnums=(0, 2))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> params, state = step(params, {"w": jnp.array([0.5, -0.5])}, fastadam.jax.init(params, amsgrad=True))
    >>> params["w"], int(state.count)
    (Array([0.9, 2.1], dtype=float32), 1)
    """
    labels, leaves, structure = _leaves("params", params)
    count = _incremented(state)
    trees = {name: _like(name, tree, labels, structure) for name, tree in _moments(state).items()}
    new, *moments = _dense(
        labels,
        leaves,
        _like("grads", grads, labels, structure),
        trees,
        count=count,
        numbers=_numbers(_rate(learning_rate, state), b1, b2, eps, weight_decay, grad_factor),
        epsilon_corrected=epsilon_corrected,
        decays=_mask(mask, params, structure),
    )
    fields = dict(zip(trees, (structure.unflatten(arrays) for arrays in moments), strict=True))
    return structure.unflatten(new), state._replace(count=count, **fields)


def sparse_update(
    table: Any,
    ids: Any,
    grads: Any,
    state: Any,
    *,
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    grad_factor: Any = 1.0,
    epsilon_corrected: bool = True,
    mode: str = "dense",
) -> tuple[jax.Array, Any]:
    r"""One step of a table with gradients of some of its rows; those of one row are summed first.

    The gradient of the table, which JAX makes of a lookup, need not be: differentiate by the rows that were looked up.
    A table that is sharded by rows takes of all ids its own. Unlike ``.at[]``, which drops them, an id that is no row
    is an error; so is a negative one.

    Args:
        table: An array with rows along its first axis.
        ids: Integers of any shape, ``0 <= id < len(table)``.
        grads: An array of shape ``ids.shape + table.shape[1:]``.
        state: ``init(table)``; moments of half tables are float32.
        learning_rate: As of :func:`fused_update`, like the following.
        b1: Decay rate of m.
        b2: Decay rate of v.
        eps: Epsilon.
        weight_decay: Decoupled, of the rows that move.
        grad_factor: Multiplies the gradients.
        epsilon_corrected: As of :func:`fused_update`.
        mode: "dense": every row moves, as if the other gradients were zero (TensorFlow's rule). "lazy": only the rows
            that are named, and their moments decay by this step alone (``torch.optim.SparseAdam``).

    Returns:
        The new table and state.

    Raises:
        TypeError: A dtype, or a number that is none.
        ValueError: A shape, a mode, or a number out of range.
        jax.errors.JaxRuntimeError: When it runs: an id that is no row, which it names.

    >>> import jax.numpy as jnp, fastadam.jax
    >>> table, ids, rows = jnp.ones((3, 2)), jnp.array([2, 0, 2]), jnp.ones((3, 2))
    >>> state = fastadam.jax.init(table, amsgrad=True)
    >>> fastadam.jax.sparse_update(table, ids, rows, state, learning_rate=0.5, mode="lazy")[0]
    Array([[0.5, 0.5],
           [1. , 1. ],
           [0.5, 0.5]], dtype=float32)
    """
    if mode not in ("dense", "lazy"):
        raise ValueError(f"mode: {mode!r}, expected 'dense' or 'lazy'")
    table, ids, grads = jnp.asarray(table), _ids(ids), jnp.asarray(grads)
    moments = {name: jnp.asarray(array) for name, array in _moments(state).items()}
    _check_params([""], [table], "table")
    if table.ndim == 0:
        raise ValueError("table: a scalar, expected rows along a first axis")
    _check_shape("grads", grads, (*ids.shape, *table.shape[1:]), "ids.shape + table.shape[1:]")
    for name, array in moments.items():
        _check_like(f"state.{name}", array, "table", table, (_state_dtype(table),))
    count = _incremented(state)
    numbers = _numbers(_rate(learning_rate, state), b1, b2, eps, weight_decay, grad_factor)
    step = SparseStep(table.ndim, table.shape[0], len(moments) == 3, bool(epsilon_corrected), mode == "lazy")
    rows = _convert("grads", grads, table).reshape(-1, *table.shape[1:])
    new, *rest = operation(step)(numbers, count, ids.reshape(-1), rows, table, *moments.values())
    return new, state._replace(count=count, **dict(zip(moments, rest, strict=True)))


def step_arrays(
    params: Sequence[Any],
    grads: Sequence[Any],
    m: Sequence[Any],
    v: Sequence[Any],
    vhat: Sequence[Any] | None = None,
    *,
    step: Any,
    learning_rate: Any,
    beta_1: Any = 0.9,
    beta_2: Any = 0.999,
    epsilon: Any = 1e-7,
    epsilon_corrected: bool = False,
    weight_decay: Any = 0.0,
    grad_factor: Any = 1.0,
    decays: Sequence[bool] | None = None,
) -> tuple[Arrays, Arrays, Arrays, Arrays | None]:
    """:func:`fused_update` of lists, with Keras's names and defaults, for those who keep the moments elsewhere.

    Args:
        params: Arrays.
        grads: Their gradients.
        m: Their first moments.
        v: Their second moments.
        vhat: Maxima of v, for AMSGrad.
        step: The count t of this step, from 1: an int or an int32 scalar array.
        learning_rate: A number or a scalar array, like the following.
        beta_1: Decay rate of m.
        beta_2: Decay rate of v.
        epsilon: Added to the root of v; of the bias-corrected v with ``epsilon_corrected``.
        epsilon_corrected: PyTorch's and optax's epsilon.
        weight_decay: Decoupled.
        grad_factor: Multiplies the gradients.
        decays: Whether weight decay applies, for each array; None: to all.

    Returns:
        New ``params``, ``m``, ``v`` and ``vhat``, which is None if it was.

    >>> import jax.numpy as jnp, fastadam.jax
    >>> w, g, zero = jnp.array([1.0]), jnp.array([0.5]), jnp.zeros(1)
    >>> fastadam.jax.step_arrays([w], [g], [zero], [zero], step=1, learning_rate=0.1)[0]
    [Array([0.90000063], dtype=float32)]
    """
    lists = {"grads": list(grads), "m": list(m), "v": list(v)} | ({} if vhat is None else {"vhat": list(vhat)})
    leaves = [jnp.asarray(x) for x in params]
    for name, arrays in lists.items():
        if len(arrays) != len(leaves):
            raise ValueError(f"{name}: {len(arrays)} arrays, expected {len(leaves)} like params")
    flags = [True] * len(leaves) if decays is None else [checks.check_bool("decays", flag) for flag in decays]
    if len(flags) != len(leaves):
        raise ValueError(f"decays: {len(flags)} flags, expected {len(leaves)} like params")
    new, *moments = _dense(
        [f"[{i}]" for i in range(len(leaves))],
        leaves,
        [jnp.asarray(x) for x in lists.pop("grads")],
        {name: [jnp.asarray(x) for x in arrays] for name, arrays in lists.items()},
        count=_count("step", step),
        numbers=_numbers(
            _scalar("learning_rate", learning_rate),
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


def scale_by_adam(b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, mu_dtype: Any = None) -> Any:
    r"""``optax.scale_by_adam`` by the native kernels, with its state and its arguments but for two.

    .. math:: u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    The kernel makes a step of rate -1 from zero, which is u. What follows in a chain, and ``optax.apply_updates``, XLA
    makes into another pass over memory of the size of the parameters, which optax's own does without: this is for
    states and chains of optax with the arithmetic of fastadam; what is fast is :func:`fused_update`.

    It has no ``eps_root`` and no ``nesterov``, which the kernels have not.

    Args:
        b1: Decay rate of m.
        b2: Decay rate of v.
        eps: Added to the root of the bias-corrected moment.
        mu_dtype: None or the dtype of the parameters, which the moments have in optax. The kernels keep both moments
            in one dtype.

    Raises:
        ImportError: optax is not installed.
        TypeError: In ``init``: another ``mu_dtype``.

    Source: ``scale_by_adam`` in ``optax/_src/transform.py``.

    >>> import importlib.util, jax.numpy as jnp, fastadam.jax
    >>> if importlib.util.find_spec("optax"):
    ...     tx = fastadam.jax.scale_by_adam()
    ...     updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(jnp.ones(2)))
    ...     assert jnp.allclose(updates, jnp.array([1.0, -1.0]))
    """
    import optax

    def init_moments(params: Any) -> Any:
        labels, leaves, structure = _leaves("params", params)
        _check_params(labels, leaves)
        for label, leaf in zip(labels, leaves, strict=True):
            if mu_dtype is not None and np.dtype(mu_dtype) != leaf.dtype:
                raise TypeError(f"mu_dtype: {np.dtype(mu_dtype)}, expected None or {leaf.dtype} like params{label}")
        zeros = [structure.unflatten([jnp.zeros_like(x) for x in leaves]) for _ in range(2)]
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), *zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        labels, leaves, structure = _leaves("updates", updates)
        count = _incremented(state)
        trees = {name: _like(name, tree, labels, structure) for name, tree in _moments(state).items()}
        narrow = [
            leaf.astype(mu.dtype) if leaf.dtype == jnp.float32 and mu.dtype.name in _HALF else leaf
            for leaf, mu in zip(leaves, trees["mu"], strict=True)
        ]
        directions, mu, nu = _dense(
            labels,
            None,
            narrow,
            trees,
            count=count,
            numbers=_numbers(-1.0, b1, b2, eps, 0.0, 1.0),
            epsilon_corrected=True,
            decays=[False] * len(leaves),
        )
        new = state._replace(count=count, mu=structure.unflatten(mu), nu=structure.unflatten(nu))
        return structure.unflatten(directions), new

    return optax.GradientTransformation(init_moments, update)


def adam(learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, mu_dtype: Any = None) -> Any:
    """``optax.adam`` around :func:`scale_by_adam`: the same chain of states, so that checkpoints serve both.

    >>> import importlib.util, jax.numpy as jnp, fastadam.jax
    >>> if importlib.util.find_spec("optax"):
    ...     import optax
    ...
    ...     params, tx = jnp.ones(2), fastadam.jax.adam(0.1)
    ...     updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(params), params)
    ...     assert jnp.allclose(optax.apply_updates(params, updates), jnp.array([0.9, 1.1]))
    """
    import optax

    return optax.chain(scale_by_adam(b1, b2, eps, mu_dtype), optax.scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-4,
    mask: Any = None,
) -> Any:
    """``optax.adamw`` around :func:`scale_by_adam`, with the same chain of states.

    >>> import importlib.util, jax.numpy as jnp, fastadam.jax
    >>> if importlib.util.find_spec("optax"):
    ...     params, tx = jnp.ones(2), fastadam.jax.adamw(0.1, weight_decay=0.5)
    ...     updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(params), params)
    ...     assert jnp.allclose(updates, jnp.array([-0.15, 0.05]))
    """
    import optax

    return optax.chain(
        scale_by_adam(b1, b2, eps, mu_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _dense(
    labels: Sequence[str],
    params: Arrays | None,
    grads: Arrays,
    moments: dict[str, Arrays],
    *,
    count: Any,
    numbers: Any,
    epsilon_corrected: bool,
    decays: Sequence[bool],
) -> list[Arrays]:
    """New parameters, or steps without parameters, and moments: all checked first, and one call for all of them."""
    name, leaves = ("updates", grads) if params is None else ("params", params)
    _check_params(labels, leaves, name)
    n = len(leaves)
    if n == 0:
        return [[] for _ in range(1 + len(moments))]
    converted = []
    for i, (label, leaf) in enumerate(zip(labels, leaves, strict=True)):
        own = next(iter(moments.values()))[i].dtype
        wanted = (own,) if own == leaf.dtype else (_state_dtype(leaf),)
        for moment, arrays in moments.items():
            _check_like(f"{moment}{label}", arrays[i], f"{name}{label}", leaf, wanted)
        _check_shape(f"grads{label}", grads[i], leaf.shape, f"the shape of {name}{label}")
        converted.append(_convert(f"grads{label}", grads[i], leaf, keeps_float32=own != leaf.dtype))
    step = DenseStep(
        ranks=tuple(x.ndim for x in leaves),
        amsgrad=len(moments) == 3,
        epsilon_corrected=bool(epsilon_corrected),
        decays=tuple(decays),
        from_zero=params is None,
    )
    replaced = [*(params or ()), *(x for arrays in moments.values() for x in arrays)]
    results = operation(step)(numbers, count, *converted, *replaced)
    return [list(results[at : at + n]) for at in range(0, len(results), n)]


def _leaves(name: str, tree: Any) -> tuple[list[str], Arrays, Any]:
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in paths], [jnp.asarray(leaf) for _, leaf in paths], structure


def _like(name: str, tree: Any, labels: Sequence[str], structure: Any) -> Arrays:
    found, leaves, other = _leaves(name, tree)
    if found != list(labels) or other != structure:
        raise ValueError(f"{name}: a tree {other}, expected {structure} like the parameters")
    return leaves


def _moments(state: Any) -> dict[str, Any]:
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


def _incremented(state: Any) -> jax.Array:
    """The count of this step; like optax's it stops at the largest."""
    _moments(state)
    count = _count("state.count", state.count, least=0)
    return jnp.where(count < np.iinfo(count.dtype).max, count + 1, count)


def _ids(ids: Any) -> jax.Array:
    """As int32 or int64. What JAX would wrap around into another row is refused."""
    given = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"ids: {given.dtype}, expected integers")
    widest = jnp.result_type(int)
    if isinstance(given, np.ndarray) and given.size:
        limits = np.iinfo(widest)
        if not (limits.min <= int(given.min()) and int(given.max()) <= limits.max):
            raise ValueError(f"ids: {given.min()} to {given.max()}, expected integers that {widest} holds")
    array = jnp.asarray(given)
    return array if array.dtype in ("int32", "int64") else array.astype(widest)


def _count(name: str, value: Any, least: int = 1) -> jax.Array:
    if isinstance(value, (bool, np.bool_)) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{name}: {value!r}, expected an integer or an integer array")
    if jnp.shape(value) != ():
        raise ValueError(f"{name}: shape {jnp.shape(value)}, expected a scalar")
    if isinstance(value, (int, np.integer)) and not least <= value <= _INT32_MAX:
        raise ValueError(f"{name}: {value}, expected an integer from {least} to 2**31 - 1")
    is_long = getattr(value, "dtype", None) == jnp.int64 and jnp.result_type(int) == jnp.int64
    return jnp.asarray(value, jnp.int64 if is_long else jnp.int32)


def _rate(learning_rate: Any, state: Any) -> Any:
    return _scalar("learning_rate", learning_rate(state.count) if callable(learning_rate) else learning_rate)


def _scalar(name: str, value: Any, check: Callable[[str, Any], float] = checks.check_number) -> Any:
    """A number of Python, checked now; or a scalar array, which the handler checks when its value is known."""
    if not isinstance(value, jax.Array):
        return check(name, value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name}: {value.dtype}{list(value.shape)}, expected a number or a float scalar")
    return value


def _numbers(
    learning_rate: Any,
    beta_1: Any,
    beta_2: Any,
    epsilon: Any,
    weight_decay: Any,
    grad_factor: Any,
    names: tuple[str, str, str] = ("b1", "b2", "eps"),
) -> Any:
    """The operand `numbers`: in float64 where JAX has it, which is exact for both."""
    values = [
        learning_rate,
        _scalar(names[0], beta_1, checks.check_beta),
        _scalar(names[1], beta_2, checks.check_beta),
        _scalar(names[2], epsilon, checks.check_non_negative),
        _scalar("weight_decay", weight_decay, checks.check_non_negative),
        _scalar("grad_factor", grad_factor),
    ]
    dtype = jnp.result_type(float)
    if not any(isinstance(value, jax.Array) for value in values):
        return np.asarray(values, dtype)
    return jnp.stack([jnp.asarray(value, dtype) for value in values])


def _mask(mask: Any, params: Any, structure: Any) -> list[bool]:
    if mask is None:
        return [True] * structure.num_leaves
    prefix = mask(params) if callable(mask) else mask
    spread = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), prefix, params)
    return [checks.check_bool("mask", flag) for flag in jax.tree.leaves(spread)]


def _state_dtype(param: Any) -> Any:
    return jnp.dtype("float32") if param.dtype.name in _HALF else param.dtype


def _check_params(labels: Sequence[str], params: Sequence[Any], name: str = "params") -> None:
    for label, param in zip(labels, params, strict=True):
        if param.dtype.name not in _FLOATS:
            raise TypeError(f"{name}{label}: {param.dtype}, expected one of {', '.join(_FLOATS)}")


def _check_shape(label: str, array: Any, shape: tuple[int, ...], like: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{label}: shape {array.shape}, expected {shape}, {like}")


def _check_like(label: str, array: Any, of: str, param: Any, dtypes: Sequence[Any]) -> None:
    _check_shape(label, array, param.shape, f"the shape of {of}")
    if array.dtype not in dtypes:
        raise TypeError(f"{label}: {array.dtype}, expected {' or '.join(map(str, dtypes))} as {of} is {param.dtype}")


def _convert(label: str, grad: Any, param: Any, keeps_float32: bool = True) -> Any:
    """A gradient of a dtype that the kernels read: the parameter's, or float32 for half ones with float32 moments."""
    if not jnp.issubdtype(grad.dtype, jnp.floating):
        raise TypeError(f"{label}: {grad.dtype}, expected a float dtype")
    is_read = grad.dtype == param.dtype or (keeps_float32 and param.dtype.name in _HALF and grad.dtype == jnp.float32)
    return grad if is_read else grad.astype(param.dtype)
