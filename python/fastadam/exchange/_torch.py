"""The state dicts of ``torch.optim.Adam``."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fastadam._core.common import frameworks
from fastadam._core.common.checks import check_iterations, check_list, check_non_negative
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import AnyArray, Config
from fastadam._core.native.slices import DEFERRED
from fastadam.exchange._moments import check_state_dict, is_set, moment_of, number_of, plain_tensor, require
from fastadam.exchange._state import assign, check_adam, check_epsilon_here, copies_of_slots, moment_names

if TYPE_CHECKING:
    from fastadam._core.adam import Adam
    from fastadam._core.common.types import VariableLike

__all__ = ["from_torch_state_dict", "to_torch_state_dict"]

_KEYS = {"m": "exp_avg", "v": "exp_avg_sq", "vhat": "max_exp_avg_sq"}
_NOT_HERE = ("maximize", "decoupled_weight_decay", "weight_decay")  # PyTorch's Adam adds the decay to the gradient


@suggests_keywords()
def to_torch_state_dict(optimizer: Adam, variables: Iterable[VariableLike], *, epsilon: float) -> dict[str, Any]:
    r"""A ``state_dict`` for ``torch.optim.Adam.load_state_dict``, with the slots as CPU tensors; small ones as float32.

    .. math:: \epsilon_{torch} = \hat\epsilon / \sqrt{1 - \beta_2^t}

    PyTorch adds epsilon after the bias correction, TensorFlow and fastadam before it, so no constant is the same in
    both. The equation gives PyTorch's epsilon that has the same effect at step t.

    Args:
        optimizer: The optimizer, which is not changed.
        variables: Its variables, in the order of PyTorch's parameters.
        epsilon: The value for PyTorch.

    Raises:
        ImportError: PyTorch is not installed.
        ValueError: The optimizer uses a schedule, clipping or another option that PyTorch's Adam does not have; a
            variable does not have these slots.

    Source: ``torch/optim/adam.py``, ``_single_tensor_adam``.

    >>> import importlib.util, numpy as np, fastadam
    >>> w = np.ones(2, np.float32)
    >>> opt = fastadam.Adam(0.1)
    >>> step = opt.apply_gradients([(np.ones(2, np.float32), w)])
    >>> if importlib.util.find_spec("torch"):
    ...     state_dict = fastadam.exchange.to_torch_state_dict(opt, [w], epsilon=1e-8)
    ...     assert state_dict["param_groups"][0]["lr"] == 0.1
    """
    check_adam(optimizer)
    frameworks.require("torch", "a state dict of PyTorch")
    import torch

    config = _plain_config(optimizer)
    slots = copies_of_slots(optimizer, variables, moment_names(optimizer.amsgrad))
    count = len(slots["m"])
    step = float(optimizer.iterations)
    if step != int(optimizer.iterations) or step > 2**24:
        raise ValueError(
            f"iterations: {optimizer.iterations}, expected at most 2**24, which PyTorch's float32 step holds"
        )
    state = {
        i: {"step": torch.tensor(step), **{_KEYS[name]: torch.from_numpy(slots[name][i]) for name in slots}}
        for i in range(count)
    }
    group = torch.optim.Adam([torch.zeros(1)]).state_dict()["param_groups"][0]
    group.update(
        lr=config["learning_rate"],
        betas=(config["beta_1"], config["beta_2"]),
        eps=check_non_negative("epsilon", epsilon),
        amsgrad=config["amsgrad"],
        params=list(range(count)),
    )
    return {"state": state, "param_groups": [group]}


@suggests_keywords()
def from_torch_state_dict(
    optimizer: Adam, state_dict: Mapping[str, Any], variables: Iterable[VariableLike], *, epsilon: float
) -> None:
    r"""Set hyperparameters and state from ``torch.optim.Adam.state_dict()``, or that of :class:`fastadam.torch.Adam`.

    .. math:: \hat\epsilon = \epsilon_{torch} \sqrt{1 - \beta_2^t}

    PyTorch adds epsilon after the bias correction, fastadam and TensorFlow before it, so no constant is the same in
    both and the steps that follow differ from PyTorch's to that extent. The equation gives the epsilon that has the
    same effect at step t; after many steps PyTorch's own value has. The maximum of AMSGrad is the same in both.

    Clipping, ``decay`` and other options that PyTorch's Adam does not have keep their values.

    Args:
        optimizer: The optimizer to change.
        state_dict: PyTorch's state dict, with tensors on any device or arrays.
        variables: The variables, in the order of PyTorch's parameters.
        epsilon: The value for this optimizer.

    Raises:
        TypeError: ``optimizer`` is not an Adam, or ``state_dict`` is not a state dict.
        ValueError: Parameter groups have different options; ``maximize`` or ``weight_decay`` is used; the numbers of
            steps differ between parameters; a shape is wrong. Nothing is changed.

    Source: ``torch/optim/adam.py``, ``_single_tensor_adam``.

    >>> import numpy as np, fastadam
    >>> w = np.ones(2, np.float32)
    >>> moments = {"step": 1.0, "exp_avg": np.full(2, 0.1), "exp_avg_sq": np.full(2, 0.001)}
    >>> group = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "params": [0]}
    >>> opt = fastadam.Adam()
    >>> state_dict = {"state": {0: moments}, "param_groups": [group]}
    >>> fastadam.exchange.from_torch_state_dict(opt, state_dict, [w], epsilon=1e-8 * (1 - 0.999) ** 0.5)
    >>> opt.learning_rate, int(opt.iterations), opt.get_slot(w, "m")
    (0.5, 1, array([0.1, 0.1], dtype=float32))
    """
    check_adam(optimizer)
    eps = check_epsilon_here(epsilon)
    targets = check_list("variables", variables)
    rule, states = _rule_of(state_dict)
    if len(states) != len(targets):
        raise ValueError(f"state_dict: {len(states)} parameters with state, expected {len(targets)} like variables")
    names = moment_names(rule["amsgrad"])
    missing = [_KEYS[name] for name in names if any(_KEYS[name] not in state for state in states)]
    steps = {number_of(state["step"], "state_dict: step") for state in states}
    if missing or len(steps) != 1:
        raise ValueError(f"state_dict: steps {sorted(steps)}, without {missing}, expected one step and all of {names}")
    hyper = _checked_hyper(rule, eps)
    slots = {name: [_moment(state, _KEYS[name], i) for i, state in enumerate(states)] for name in names}
    assign(optimizer, targets, check_iterations("step", steps.pop()), slots, hyper)


def _checked_hyper(rule: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """The hyperparameters of a rule, checked by making an Adam with them."""
    from fastadam._core.adam import Adam

    names = ("learning_rate", "beta_1", "beta_2")
    hyper: dict[str, Any] = {**dict(zip(names, (rule["lr"], *rule["betas"]), strict=True)), "epsilon": epsilon}
    Adam(**hyper)  # raises if one is invalid
    return {**hyper, "amsgrad": rule["amsgrad"]}


def _rule_of(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """What all groups say of the step, and the states in the order of the parameters."""
    check_state_dict(state_dict)
    groups = state_dict["param_groups"]
    if not groups:
        raise ValueError("state_dict: param_groups: empty, expected the group of the parameters")
    rules = [_rule_of_group(group, f"state_dict: param_groups[{i}]") for i, group in enumerate(groups)]
    if any(rule != rules[0] for rule in rules):
        raise ValueError("state_dict: parameter groups with different options, expected one optimizer for each group")
    if refused := {name: rules[0][name] for name in _NOT_HERE if rules[0][name]}:
        raise ValueError(f"state_dict: {refused}, which fastadam.Adam does not have")
    places = [i for group in groups for i in group["params"]]
    states = state_dict["state"]
    if absent := [i for i in places if not states.get(i)]:
        raise ValueError(f"state_dict: parameters {absent} have no state, expected the state of every parameter")
    for i in places:
        require(("step", "exp_avg", "exp_avg_sq"), states[i], f"state_dict: state of parameter {i}", "Adam has them")
    return rules[0], [states[i] for i in places]


def _rule_of_group(group: Mapping[str, Any], label: str) -> dict[str, Any]:
    require(("lr", "betas", "eps", "params"), group, label, "Adam has them")
    betas, params = group["betas"], group["params"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{label}: betas: {type(betas).__name__}, expected a pair of numbers")
    if not isinstance(params, (tuple, list)) or not all(isinstance(i, Hashable) for i in params):
        raise TypeError(f"{label}: params: {type(params).__name__}, expected a list of the parameters' numbers")
    return {
        "lr": number_of(group["lr"], f"{label}: lr"),
        "betas": tuple(number_of(beta, f"{label}: betas[{i}]") for i, beta in enumerate(betas)),
        "eps": number_of(group["eps"], f"{label}: eps"),
        "weight_decay": number_of(group.get("weight_decay", 0.0), f"{label}: weight_decay"),
        **{name: is_set(group, name, label) for name in ("amsgrad", "maximize", "decoupled_weight_decay")},
    }


def _moment(state: Mapping[str, Any], key: str, number: int) -> AnyArray:
    """A moment in CPU memory; the codes of fastadam.torch as float32."""
    moment, label = state[key], f"state_dict: state of parameter {number}: {key}"
    if not hasattr(moment, "detach"):
        return moment
    moment = plain_tensor(moment, label)
    if str(moment.dtype) == "torch.uint8":
        moment = moment_of(state, key, label, signed=key == "exp_avg")
    return moment.cpu()


def _plain_config(optimizer: Adam) -> Config:
    """The configuration, if PyTorch's Adam has all options in it."""
    config = optimizer.get_config()
    # Without clipping the first have no effect; the others say how moments are stored, which are float32 in the result.
    for unused in ("max_staleness", "clip_after_dedupe", "moments", "float32_for", "seed"):
        config.pop(unused, None)
    if config.get("sparse_update") in DEFERRED:  # the same update as "dense"
        del config["sparse_update"]
    plain = ("name", "learning_rate", "decay", "beta_1", "beta_2", "epsilon", "amsgrad")
    if config["decay"] or isinstance(config["learning_rate"], dict) or not set(config) <= set(plain):
        raise ValueError(
            f"optimizer: {config}, expected no schedule, decay, clipping or other option that PyTorch does not have"
        )
    return config
