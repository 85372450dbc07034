"""The state of ``optax.adam``: ``ScaleByAdamState``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastadam._core.common.checks import check_iterations
from fastadam._core.common.frameworks import require
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.tree import flatten
from fastadam._core.common.types import AnyArray, Foreign, Tree
from fastadam.exchange._state import (
    assign,
    check_adam,
    check_epsilon_here,
    copies_of_slots,
    require_no_average,
)

if TYPE_CHECKING:
    from fastadam._core.adam import Adam
    from fastadam._core.common.types import VariableTree

__all__ = ["from_optax_state", "to_optax_state"]

_FIELDS = {"m": "mu", "v": "nu"}
_EMPTY = ("EmptyState", "NoneType")
_WHY_NOT_AMSGRAD = (
    "the AMSGrad of optax keeps the maximum of bias-corrected second moments, fastadam (like TensorFlow and PyTorch) "
    "the maximum of the second moments, and neither can be computed from the other"
)
Leaves = list[tuple[str, AnyArray]]


@suggests_keywords()
def from_optax_state(optimizer: Adam, state: Foreign, variables: VariableTree, *, epsilon: float) -> None:
    r"""Set the moments, the count and ``epsilon`` from the state of ``optax.adam`` or ``adamw``.

    .. math:: \hat\epsilon = \epsilon_{optax} \sqrt{1 - \beta_2^t}

    optax and PyTorch add epsilon after the bias correction, fastadam and TensorFlow before it, so no constant is the
    same in both and the steps that follow differ from optax's to that extent. The equation gives the epsilon that has
    the same effect at step t; after many steps optax's own value has.

    The state does not hold the hyperparameters: make the optimizer with the transformation's learning rate, betas and
    weight decay. It does not show ``eps_root`` and ``nesterov`` either, which fastadam does not have: the state of a
    transformation made with them continues as plain Adam.

    States of ``optax.amsgrad`` are refused: optax keeps the maximum of bias-corrected second moments; fastadam,
    TensorFlow and PyTorch keep the maximum of the second moments; neither can be computed from the other. To start a
    new maximum, pass ``ScaleByAdamState(state.count, state.mu, state.nu)``, then set ``optimizer.amsgrad = True``.

    Args:
        optimizer: The optimizer to change; ``amsgrad`` becomes False.
        state: A ``ScaleByAdamState``, or the tuple of a chain with one, in which all other states are empty or a
            ``ScaleByScheduleState``. JAX is not imported.
        variables: A list of variables in the order of ``jax.tree.leaves``, or a tree of variables like the moments'.
        epsilon: The value for this optimizer.

    Raises:
        TypeError: ``optimizer`` is not an Adam, or a leaf is not an array.
        ValueError: There is no state of Adam, more than one, or a state that cannot be converted; a schedule has
            another count; the state is one of AMSGrad; the tree, the number of arrays or a shape is wrong. Nothing is
            changed.

    Source: ``scale_by_adam`` and ``scale_by_amsgrad`` in ``optax/_src/transform.py``.

    >>> import collections, numpy as np, fastadam
    >>> ScaleByAdamState = collections.namedtuple("ScaleByAdamState", "count mu nu")  # optax's, where it is installed
    >>> state = ScaleByAdamState(1, {"w": np.full(2, 0.1)}, {"w": np.full(2, 0.001)})
    >>> params, opt = {"w": np.ones(2, np.float32)}, fastadam.Adam(0.5)
    >>> fastadam.exchange.from_optax_state(opt, (state,), params, epsilon=1e-8 * (1 - 0.999) ** 0.5)
    >>> int(opt.iterations), opt.get_slot(params["w"], "m")
    (1, array([0.1, 0.1], dtype=float32))
    """
    check_adam(optimizer)
    eps = check_epsilon_here(epsilon)
    adam = _adam_in(state)
    leaves = _leaves(variables, "")
    slots = {name: _like(leaves, getattr(adam, field), field) for name, field in _FIELDS.items()}
    count = check_iterations("count", adam.count)
    assign(optimizer, [variable for _, variable in leaves], count, slots, {"epsilon": eps, "amsgrad": False})


@suggests_keywords()
def to_optax_state(optimizer: Adam, variables: VariableTree) -> Foreign:
    r"""The ``ScaleByAdamState`` of these variables, with JAX arrays.

    .. math:: \epsilon_{optax} = \hat\epsilon / \sqrt{1 - \beta_2^t}

    The state is the first one in the chain ``optax.adam(...)``: use ``(to_optax_state(opt, params),
    *tx.init(params)[1:])``, and give a ``ScaleByScheduleState`` in it the same count. The state does not hold the
    hyperparameters: make the transformation with those of the optimizer. The equation gives optax's epsilon that has
    the same effect at step t. An optimizer with ``amsgrad`` is refused, for the reason given at
    :func:`from_optax_state`. To export its two moments, set ``amsgrad = False`` first.

    Args:
        optimizer: The optimizer, which is not changed.
        variables: A tree of its variables. The moments have the same tree.

    Raises:
        ImportError: optax is not installed.
        ValueError: A variable does not have slots; the optimizer uses moving averages or AMSGrad; the state is float64
            while ``jax_enable_x64`` is off; the number of steps is more than optax's counter can hold.

    Source: ``scale_by_adam`` in ``optax/_src/transform.py``.

    >>> import importlib.util, numpy as np, fastadam
    >>> params = {"w": np.ones(2, np.float32)}
    >>> opt = fastadam.Adam(0.1)
    >>> step = opt.apply_gradients([(np.ones(2, np.float32), params["w"])])
    >>> if importlib.util.find_spec("optax"):
    ...     state = fastadam.exchange.to_optax_state(opt, params)
    ...     assert int(state.count) == 1 and list(state.mu) == ["w"]
    """
    check_adam(optimizer)
    for package in ("jax", "optax"):
        require(package, "a state of optax")
    import jax
    import jax.numpy as jnp
    import optax

    require_no_average(optimizer, "a state of optax")
    if optimizer.iterations >= 2**31 - 1:  # at which optax's counter stops
        raise ValueError(f"iterations: {optimizer.iterations}, expected less than 2**31 - 1, which optax's int32 holds")
    if optimizer.amsgrad:
        raise ValueError(
            f"optimizer: amsgrad=True, expected False: {_WHY_NOT_AMSGRAD}; set amsgrad = False to export the moments"
        )
    _leaves(variables, "variables")  # which refuses what JAX would fail at: a tree that is nested too deeply
    leaves, structure = jax.tree.flatten(variables)
    slots = copies_of_slots(optimizer, leaves, list(_FIELDS))
    if any(array.dtype == np.float64 for array in slots["m"]) and jnp.zeros(0, float).dtype != np.float64:
        raise ValueError("variables: float64, expected jax_enable_x64 to be on: JAX would make them float32")
    trees = {
        _FIELDS[name]: jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays])
        for name, arrays in slots.items()
    }
    return optax.ScaleByAdamState(count=jnp.asarray(int(optimizer.iterations), jnp.int32), **trees)


def _adam_in(state: Foreign) -> Foreign:
    """The only state of Adam in a chain. All other states must be empty, or schedules with the same count."""
    adams: list[Foreign] = []
    counts: list[int] = []
    others: list[str] = []
    _collect(state, adams, counts, others)
    if "ScaleByAmsgradState" in others:
        raise ValueError(
            f"state: ScaleByAmsgradState, expected ScaleByAdamState: {_WHY_NOT_AMSGRAD}; to start a new maximum, pass "
            "ScaleByAdamState(state.count, state.mu, state.nu), then set amsgrad = True"
        )
    if others or len(adams) != 1:
        raise ValueError(
            f"state: {[type(adam).__name__ for adam in adams]} and {others}, expected one ScaleByAdamState, with only "
            "EmptyState and ScaleByScheduleState beside it; of a wrapper pass the inner state"
        )
    adam = adams[0]
    if any(count != int(adam.count) for count in counts):
        raise ValueError(f"state: schedules at {counts}, expected the count {int(adam.count)} of {type(adam).__name__}")
    return adam


def _collect(state: Foreign, adams: list[Foreign], counts: list[int], others: list[str]) -> None:
    """Sort the states of a chain by kind."""
    name = type(state).__name__
    if name == "ScaleByAdamState":
        adams.append(state)
    elif name == "ScaleByScheduleState":
        counts.append(int(state.count))
    elif type(state) is tuple or name == "MaskedState":
        for part in state:
            _collect(part, adams, counts, others)
    elif name not in _EMPTY:
        others.append(name)


def _leaves(tree: Tree, label: str) -> Leaves:
    return list(flatten(tree, label, as_jax=True))


def _like(variables: Leaves, moments: Tree, field: str) -> list[AnyArray]:
    """The moments in the order of the variables. Paths must agree, unless the variables are a list."""
    leaves = _leaves(moments, "")
    if len(leaves) != len(variables):
        raise ValueError(f"{field}: {len(leaves)} arrays, expected {len(variables)} like variables")
    is_list = [path for path, _ in variables] == [f"[{i}]" for i in range(len(variables))]
    for (path, _), (other, _) in zip(variables, leaves, strict=True):
        if path != other and not is_list:
            raise ValueError(f"{field}: an array at {other or 'the root'}, expected one at {path} like variables")
    return [moment for _, moment in leaves]
