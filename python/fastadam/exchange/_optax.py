"""The ``ScaleByAdamState`` of optax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam._core.checks import check_iterations
from fastadam._core.keywords import suggests_keywords
from fastadam._core.tree import flatten
from fastadam.exchange._state import (
    assign,
    check_adam,
    check_epsilon_here,
    copies_of_slots,
    require_no_average,
)

if TYPE_CHECKING:
    from fastadam._core.adam import Adam
    from fastadam._core.types import VariableTree

__all__ = ["from_optax_state", "to_optax_state"]

_FIELDS = {"m": "mu", "v": "nu"}
_EMPTY = ("EmptyState", "NoneType")
_WHY_NOT_AMSGRAD = (
    "the AMSGrad of optax keeps the maximum of bias-corrected second moments, this optimizer (as TF and PyTorch) the "
    "maximum of the second moments, and neither can be computed from the other"
)
Leaves = list[tuple[str, Any]]


@suggests_keywords()
def from_optax_state(optimizer: Adam, state: Any, variables: VariableTree, *, epsilon: float) -> None:
    r"""Set the moments, the count and ``epsilon`` from the state of ``optax.adam`` or ``adamw``.

    .. math:: \hat\epsilon = \epsilon_{optax} \sqrt{1 - \beta_2^t}

    optax adds its epsilon after the bias correction, as PyTorch does, TF before it: no constant of one is the other's,
    and the steps that follow differ from optax's by that. The equation gives what does the same at step t; in the long
    run optax's own value does.

    The state holds no number of the transformation: the optimizer has to have its learning rate, betas and weight
    decay. Nor does it show ``eps_root`` and ``nesterov``, which this optimizer does not have: a transformation made
    with them goes on as plain Adam.

    States of ``optax.amsgrad`` are refused: its maximum is over bias-corrected second moments, here, as in TF and
    PyTorch, it is over the second moments, and neither can be computed from the other. To start a new maximum, pass
    ``ScaleByAdamState(state.count, state.mu, state.nu)``, then set ``optimizer.amsgrad = True``.

    Args:
        optimizer: The optimizer to change; ``amsgrad`` becomes False.
        state: ``ScaleByAdamState``, or the tuple of a chain that holds one, and besides it only empty states and
            ``ScaleByScheduleState``. JAX is not imported.
        variables: The variables: a list in the order of ``jax.tree.leaves``, or the tree of the moments.
        epsilon: The value for this optimizer.

    Raises:
        TypeError: A leaf that is no array.
        ValueError: No such state, several, or others that have no place here; a schedule at another count; the state
            of AMSGrad; another tree, number or shape of arrays. Nothing is changed.

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
    places = _leaves(variables, "")
    slots = {name: _like(places, getattr(adam, field), field) for name, field in _FIELDS.items()}
    count = check_iterations("count", adam.count)
    assign(optimizer, [variable for _, variable in places], count, slots, {"epsilon": eps, "amsgrad": False})


@suggests_keywords()
def to_optax_state(optimizer: Adam, variables: VariableTree) -> Any:
    r"""The ``ScaleByAdamState`` of these variables, as JAX arrays.

    It is the first state of the chain ``optax.adam(...)``: ``(to_optax_state(opt, params), *tx.init(params)[1:])``; a
    ``ScaleByScheduleState`` there needs the same count. No number of the optimizer is in it: the transformation has to
    be made with them, and with an epsilon of optax's convention,

    .. math:: \epsilon_{optax} = \hat\epsilon / \sqrt{1 - \beta_2^t},

    which does the same at step t. An optimizer with ``amsgrad`` is refused, for the reason in
    :func:`from_optax_state`; with ``amsgrad = False`` set, the two moments are exported.

    Args:
        optimizer: The optimizer, which is not changed.
        variables: A tree of its variables; the moments come in the same tree.

    Raises:
        ImportError: optax is not installed.
        ValueError: A variable without slots; moving averages; AMSGrad; float64 state while JAX has its
            ``jax_enable_x64`` off; more steps than optax's counter holds.

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
    import jax
    import jax.numpy as jnp
    import optax

    require_no_average(optimizer, "a state of optax")
    if optimizer.iterations >= 2**31 - 1:  # where optax's counter stops
        raise ValueError(f"iterations: {optimizer.iterations}, expected less than 2**31 - 1, which optax's int32 holds")
    if optimizer.amsgrad:
        raise ValueError(
            f"optimizer: amsgrad=True, expected False: {_WHY_NOT_AMSGRAD}; set amsgrad = False to export the moments"
        )
    given, structure = jax.tree.flatten(variables)
    slots = copies_of_slots(optimizer, given, list(_FIELDS))
    if any(array.dtype == np.float64 for array in slots["m"]) and jnp.zeros(0, float).dtype != np.float64:
        raise ValueError("variables: float64, expected jax_enable_x64 to be on, without which JAX makes them float32")
    trees = {
        _FIELDS[name]: jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays])
        for name, arrays in slots.items()
    }
    return optax.ScaleByAdamState(count=jnp.asarray(int(optimizer.iterations), jnp.int32), **trees)


def _adam_in(state: Any) -> Any:
    """The one state of Adam; every other must be empty, or a schedule at the same count."""
    found: list[Any] = []
    counts: list[int] = []
    others: list[str] = []
    _collect(state, found, counts, others)
    if "ScaleByAmsgradState" in others:
        raise ValueError(
            f"state: ScaleByAmsgradState, expected ScaleByAdamState: {_WHY_NOT_AMSGRAD}; to start a new maximum, pass "
            "ScaleByAdamState(state.count, state.mu, state.nu), then set amsgrad = True"
        )
    if others or len(found) != 1:
        raise ValueError(
            f"state: {[type(adam).__name__ for adam in found]} and {others}, expected one ScaleByAdamState, with only "
            "EmptyState and ScaleByScheduleState beside it; pass the inner state of a wrapper"
        )
    if any(count != int(found[0].count) for count in counts):
        raise ValueError(
            f"state: schedules at {counts}, expected the count {int(found[0].count)} of {type(found[0]).__name__}"
        )
    return found[0]


def _collect(state: Any, found: list[Any], counts: list[int], others: list[str]) -> None:
    name = type(state).__name__
    if name == "ScaleByAdamState":
        found.append(state)
    elif name == "ScaleByScheduleState":
        counts.append(int(state.count))
    elif type(state) is tuple or name == "MaskedState":
        for part in state:
            _collect(part, found, counts, others)
    elif name not in _EMPTY:
        others.append(name)


def _leaves(tree: Any, label: str) -> Leaves:
    return list(flatten(tree, label, as_jax=True))


def _like(places: Leaves, moments: Any, field: str) -> list[Any]:
    """The moments of the variables: by their place in the tree, of a list in order."""
    found = _leaves(moments, "")
    if len(found) != len(places):
        raise ValueError(f"{field}: {len(found)} arrays, expected {len(places)} like variables")
    is_list = [place for place, _ in places] == [f"[{i}]" for i in range(len(places))]
    for (place, _), (other, _) in zip(places, found, strict=True):
        if place != other and not is_list:
            raise ValueError(f"{field}: an array at {other or 'the root'}, expected one at {place} like variables")
    return [moment for _, moment in found]
