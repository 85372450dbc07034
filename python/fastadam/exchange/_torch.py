"""The state dicts of ``torch.optim.Adam``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fastadam._core.common.checks import check_bool, check_iterations, check_list, check_non_negative
from fastadam._core.common.keywords import suggests_keywords
from fastadam._core.common.types import AnyArray, Config
from fastadam._core.native.slices import DEFERRED
from fastadam.exchange._moments import moment_of
from fastadam.exchange._state import assign, check_adam, check_epsilon_here, copies_of_slots, moment_names

if TYPE_CHECKING:
    from fastadam._core.adam import Adam
    from fastadam._core.common.types import VariableLike

__all__ = ["from_torch_state_dict", "to_torch_state_dict"]

_KEYS = {"m": "exp_avg", "v": "exp_avg_sq", "vhat": "max_exp_avg_sq"}
_NOT_HERE = {"maximize": False, "decoupled_weight_decay": False}


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
    group, states = _group_of(state_dict)
    if len(states) != len(targets):
        raise ValueError(f"state_dict: {len(states)} parameters with state, expected {len(targets)} like variables")
    names = moment_names(check_bool("amsgrad", group["amsgrad"]))
    missing = [_KEYS[name] for name in names if any(_KEYS[name] not in state for state in states)]
    steps = {float(state["step"]) for state in states}
    if missing or len(steps) != 1:
        raise ValueError(f"state_dict: steps {sorted(steps)}, without {missing}, expected one step and all of {names}")
    hyper = _checked_hyper(group, eps)
    slots = {name: [_moment(state, _KEYS[name], i) for i, state in enumerate(states)] for name in names}
    assign(optimizer, targets, check_iterations("step", steps.pop()), slots, hyper)


def _checked_hyper(group: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """The hyperparameters of a group, checked by making an Adam with them."""
    from fastadam._core.adam import Adam

    beta_1, beta_2 = map(float, group["betas"])
    hyper: dict[str, Any] = {
        "learning_rate": float(group["lr"]),
        "beta_1": beta_1,
        "beta_2": beta_2,
        "epsilon": epsilon,
    }
    Adam(**hyper)  # raises if one is invalid
    return {**hyper, "amsgrad": bool(group["amsgrad"])}


def _group_of(state_dict: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(f"state_dict: {type(state_dict).__name__}, expected a dict with 'state' and 'param_groups'")
    groups = state_dict["param_groups"]
    options = [{key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups]
    if any(option != options[0] for option in options):
        raise ValueError("state_dict: parameter groups with different options, expected one optimizer for each group")
    refused = {key: options[0][key] for key, plain in _NOT_HERE.items() if options[0].get(key, plain) != plain}
    if options[0].get("weight_decay"):
        refused["weight_decay"] = options[0]["weight_decay"]  # which PyTorch's Adam adds to the gradient
    if refused:
        raise ValueError(f"state_dict: {refused}, which fastadam.Adam does not have")
    places = [i for group in groups for i in group["params"]]
    if absent := [i for i in places if i not in state_dict["state"]]:
        raise ValueError(f"state_dict: parameters {absent} have no state, expected the state of every parameter")
    return options[0], [state_dict["state"][i] for i in places]


def _moment(state: Mapping[str, Any], key: str, number: int) -> AnyArray:
    moment = state[key]
    if str(getattr(moment, "dtype", "")) == "torch.uint8":  # the codes of fastadam.torch
        moment = moment_of(state, key, f"state_dict: state of parameter {number}: {key}", signed=key == "exp_avg")
    return moment.detach().cpu() if hasattr(moment, "detach") else moment


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
