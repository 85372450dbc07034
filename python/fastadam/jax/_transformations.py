"""optax's transformations with the native kernels, in the same chains and with the same states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fastadam._core.common.checks import check_bool, shown
from fastadam._core.common.frameworks import require
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import Tree
from fastadam.jax._arguments import (
    CLIPPING,
    Arrays,
    check_params,
    check_scalar,
    convert_floats,
    flatten,
    flatten_like,
    moments_of,
    next_count,
    pack_numbers,
)
from fastadam.jax._steps import step_leaves

if TYPE_CHECKING:
    import optax
    from jax.typing import DTypeLike

    from fastadam.jax._arguments import Mask, Rate, Scalar


@suggests_keywords(elsewhere=CLIPPING)
def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    r"""``optax.scale_by_adam`` with the native kernels, the same state and the same arguments.

    .. math:: u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    The kernel computes u as a step of rate -1 from zero. XLA makes another pass over memory for the rest of a chain and
    for ``optax.apply_updates``, which it fuses with optax's own transformation. Use this function for fastadam's
    arithmetic with optax's states and chains; for speed use :func:`fused_update`.

    Float32 updates differ from optax's by up to 0.7e-5 of their size (with a ``b2`` of 0.999): optax rounds
    :math:`1 - \beta^t` to float32, fastadam computes it in float64. The second moment is updated as in TensorFlow: if
    the square of a gradient overflows, the moment becomes infinite and in the next step NaN; optax's stays infinite.

    Args:
        b1: Decay rate of m, in [0, 1).
        b2: Decay rate of v, in [0, 1).
        eps: Added to the square root of the bias-corrected moment.
        eps_root: Must be 0: the kernels do not have it. If its value is known only when the computation runs, as under
            ``optax.inject_hyperparams``, another value makes ``eps`` NaN, which the step refuses.
        mu_dtype: The dtype of the first moments. The default is the dtype of the parameters, which the second moments
            always have. Where the two differ, the step runs in the wider dtype, and XLA converts before and after.
        nesterov: Must be False: the kernels do not have it.

    Returns:
        An ``optax.GradientTransformation``. Its ``update`` converts gradients to the dtype of the moments. Complex
        parameters are left to optax's own transformation, which squares the absolute value of a gradient.

    Raises:
        ImportError: optax is not installed.
        TypeError: ``mu_dtype`` is not a float or complex dtype. From ``init``: a parameter is not a float or
            complex array, or is not complex with a complex ``mu_dtype``. From ``update``: the state is not one of Adam.
        ValueError: ``nesterov`` is True, or ``eps_root`` is not 0.

    Source: ``scale_by_adam`` in ``optax/_src/transform.py``.

    >>> import importlib.util, jax.numpy as jnp, fastadam.jax
    >>> if importlib.util.find_spec("optax"):
    ...     tx = fastadam.jax.scale_by_adam()
    ...     updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(jnp.ones(2)))
    ...     assert jnp.allclose(updates, jnp.array([1.0, -1.0]))
    """
    optax = require("optax", "fastadam.jax.scale_by_adam")
    if check_bool("nesterov", nesterov):
        raise ValueError("nesterov: True, expected False: the kernels do not have it")
    corrected = _without_root(eps, check_scalar("eps_root", eps_root))
    first_dtype = _float_dtype(mu_dtype)
    of_complex = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype)

    def init_moments(params: Tree) -> Tree:
        labels, leaves, structure = flatten(params, "params")
        is_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]
        of_floats, floats = _those(is_complex, False, labels, leaves)
        check_params(of_floats, floats, others="complex64, complex128")
        if floats and first_dtype is not None and jnp.issubdtype(first_dtype, jnp.complexfloating):
            raise TypeError(
                f"mu_dtype: {first_dtype} with params{of_floats[0]} of {floats[0].dtype}, expected a float dtype"
            )
        mu = [jnp.zeros_like(leaf, dtype=first_dtype) for leaf in leaves]
        nu = [jnp.zeros_like(leaf) for leaf in leaves]
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), structure.unflatten(mu), structure.unflatten(nu))

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        del params
        count, moments = next_count(state), moments_of(state)
        labels, _, structure = flatten(moments["mu"], "mu")
        leaves = flatten_like("updates", updates, labels, structure, "the moments in the state")
        trees = {name: flatten_like(name, tree, labels, structure) for name, tree in moments.items()}
        is_complex = [jnp.iscomplexobj(nu) for nu in trees["nu"]]
        names, gradients, *arrays = _those(is_complex, False, labels, leaves, *trees.values())
        dtypes = [jnp.promote_types(mu.dtype, nu.dtype) for mu, nu in zip(arrays[0], arrays[1], strict=True)]
        directions, *new = step_leaves(
            names,
            None,
            convert_floats(gradients, dtypes),
            {name: convert_floats(kind, dtypes) for name, kind in zip(trees, arrays, strict=True)},
            count=count,
            numbers=pack_numbers(-1.0, b1, b2, corrected, 0.0, 1.0),
            epsilon_corrected=True,
            decays=[False] * len(names),
        )
        kinds = [[x.dtype for x in kind] for kind in arrays]
        results = [directions, *map(convert_floats, new, kinds)]
        if any(is_complex):
            gradients, mu, nu = _those(is_complex, True, leaves, trees["mu"], trees["nu"])
            found, after = of_complex.update(gradients, optax.ScaleByAdamState(state.count, mu, nu))
            results = [_merged(is_complex, *pair) for pair in zip(results, (found, after.mu, after.nu), strict=True)]
        directions, mu, nu = map(structure.unflatten, results)
        return directions, state._replace(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init_moments, update)


def _those(flags: list[bool], flag: bool, *lists: list[Any]) -> list[list[Any]]:
    """Of each list, the elements whose flag is this one."""
    return [[x for x, own in zip(each, flags, strict=True) if own == flag] for each in lists]


def _merged(is_complex: list[bool], of_floats: Arrays, of_complex: Arrays) -> Arrays:
    floats, others = iter(of_floats), iter(of_complex)
    return [next(others if flag else floats) for flag in is_complex]


def _float_dtype(mu_dtype: DTypeLike | None) -> np.dtype[Any] | None:
    """The dtype that JAX uses for this one: float32 for float64 unless it is configured otherwise."""
    if mu_dtype is None:
        return None
    try:
        dtype = jnp.dtype(mu_dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"mu_dtype: {shown(mu_dtype)}, expected a float dtype") from error
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"mu_dtype: {dtype}, expected a float dtype")
    available: np.dtype[Any] = jax.dtypes.canonicalize_dtype(dtype)
    return available


def _without_root(eps: Scalar, eps_root: Scalar) -> Scalar:
    """``eps``, if ``eps_root`` is 0."""
    if isinstance(eps_root, jax.Array):
        return jnp.where(eps_root == 0, eps, jnp.nan)
    if eps_root != 0:
        raise ValueError(f"eps_root: {eps_root}, expected 0: the kernels do not have it")
    return eps


def _refuse_tree(learning_rate: object) -> None:
    if isinstance(learning_rate, (dict, list, tuple)):
        kind = type(learning_rate).__name__
        raise TypeError(f"learning_rate: {kind}, expected a number or a schedule; parameters go to init(params)")


@suggests_keywords(elsewhere=CLIPPING)
def adam(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """``optax.adam`` with :func:`scale_by_adam` in place of optax's: the same chain of states and the same checkpoints.

    The arguments and errors are the same as for :func:`scale_by_adam`.

    Args:
        learning_rate: A number, a scalar array or a schedule of optax.
        b1: Decay rate of m.
        b2: Decay rate of v.
        eps: Added to the square root of the bias-corrected moment.
        eps_root: Must be 0.
        mu_dtype: The dtype of the first moments; None for the dtype of the parameters.
        nesterov: Must be False.

    >>> import importlib.util, jax.numpy as jnp, fastadam.jax
    >>> if importlib.util.find_spec("optax"):
    ...     import optax
    ...
    ...     params, tx = jnp.ones(2), fastadam.jax.adam(0.1)
    ...     updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(params), params)
    ...     assert jnp.allclose(optax.apply_updates(params, updates), jnp.array([0.9, 1.1]))
    """
    optax = require("optax", "fastadam.jax.adam")
    _refuse_tree(learning_rate)
    scale = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


@suggests_keywords(elsewhere=CLIPPING)
def adamw(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Scalar = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """``optax.adamw`` with :func:`scale_by_adam` in place of optax's, with the same chain of states.

    The arguments and errors are the same as for :func:`scale_by_adam`.

    Args:
        learning_rate: A number, a scalar array or a schedule of optax.
        b1: Decay rate of m.
        b2: Decay rate of v.
        eps: Added to the square root of the bias-corrected moment.
        eps_root: Must be 0.
        mu_dtype: The dtype of the first moments; None for the dtype of the parameters.
        weight_decay: Decoupled weight decay.
        mask: Which parameters decay: a tree of bools, a prefix of one, or a function of the parameters.
        nesterov: Must be False.

    >>> import importlib.util, jax.numpy as jnp, fastadam.jax
    >>> if importlib.util.find_spec("optax"):
    ...     params, tx = jnp.ones(2), fastadam.jax.adamw(0.1, weight_decay=0.5)
    ...     updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(params), params)
    ...     assert jnp.allclose(updates, jnp.array([-0.15, 0.05]))
    """
    optax = require("optax", "fastadam.jax.adamw")
    _refuse_tree(learning_rate)
    return optax.chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
