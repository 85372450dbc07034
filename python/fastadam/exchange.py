"""The state of other libraries' Adam, to and from this one: lists of tf.keras, dicts of PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastadam._backend import _cpu
from fastadam.checks import check_iterations, check_list, check_non_negative
from fastadam.variable import buffers_of

if TYPE_CHECKING:
    from fastadam.optimizer import Adam

__all__ = ["from_keras_weights", "from_torch_state_dict", "to_keras_weights", "to_torch_state_dict"]

_TORCH = {"m": "exp_avg", "v": "exp_avg_sq", "vhat": "max_exp_avg_sq"}
_NOT_HERE = {"maximize": False, "decoupled_weight_decay": False}


def to_keras_weights(optimizer: Adam, variables: Iterable[Any]) -> list[Any]:
    """What ``get_weights`` of a tf.keras legacy Adam gives for these variables: iterations, all m, all v, all vhat.

    Raises:
        ValueError: A variable without these slots.
    """
    return [optimizer.iterations, *(a for slot in _slots_of(optimizer, variables).values() for a in slot)]


def from_keras_weights(optimizer: Adam, weights: Iterable[Any], variables: Iterable[Any]) -> None:
    """Set the state of these variables from ``get_weights`` of a tf.keras legacy Adam, whose dummies are left out.

    Raises:
        ValueError: Another number of arrays, or other shapes; nothing is changed.
    """
    names = _names(optimizer)
    given, arrays = check_list("variables", variables), check_list("weights", weights)
    count = len(given)
    if len(arrays) == 3 * count + 1 and len(names) == 2 and all(np.shape(a) == (1,) for a in arrays[2 * count + 1 :]):
        arrays = arrays[: 2 * count + 1]
    if len(arrays) != len(names) * count + 1:
        raise ValueError(f"weights: {len(arrays)} arrays, expected {len(names) * count + 1} for {count} variables")
    slots = {name: arrays[1 + i * count : 1 + (i + 1) * count] for i, name in enumerate(names)}
    _assign(optimizer, given, check_iterations("weights[0]", arrays[0]), slots)


def to_torch_state_dict(optimizer: Adam, variables: Iterable[Any], *, epsilon: float) -> dict[str, Any]:
    """A ``state_dict`` that ``torch.optim.Adam.load_state_dict`` takes, of NumPy arrays turned into tensors.

    PyTorch adds its epsilon after the bias correction, TF before it: no constant of one is the other's. ``epsilon`` is
    the value that PyTorch shall have: this optimizer's divided by ``sqrt(1 - beta_2**t)`` does the same at step t.

    Raises:
        ValueError: A schedule, clipping or another option that PyTorch's Adam does not have.
    """
    import torch

    config = _plain_config(optimizer)
    slots = _slots_of(optimizer, variables)
    count = len(slots["m"])
    step = float(optimizer.iterations)
    if step != int(optimizer.iterations) or step > 2**24:
        raise ValueError(
            f"iterations: {optimizer.iterations}, expected at most 2**24, which PyTorch's float32 step holds"
        )
    state = {
        i: {"step": torch.tensor(step), **{_TORCH[name]: torch.from_numpy(slots[name][i]) for name in slots}}
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


def from_torch_state_dict(
    optimizer: Adam, state_dict: Mapping[str, Any], variables: Iterable[Any], *, epsilon: float
) -> None:
    """Set hyperparameters and state from ``torch.optim.Adam.state_dict()``; ``variables`` in the order of its params.

    PyTorch adds its epsilon after the bias correction, TF before it: no constant of one is the other's, and the steps
    that follow differ from PyTorch's by that. ``epsilon`` is the value for this optimizer: PyTorch's times
    ``sqrt(1 - beta_2**t)`` does the same at step t, PyTorch's own in the long run.

    Clipping, ``decay`` and other options of this optimizer that PyTorch's does not have stay as they are.

    Raises:
        ValueError: Several groups of different options, ``maximize``, ``weight_decay``, steps that differ between
            parameters, or other shapes; nothing is changed.
    """
    eps = check_non_negative("epsilon", epsilon)
    if eps == 0:
        raise ValueError("epsilon: 0, expected epsilon > 0: here, as in TF, 0 means 1e-7")
    given = check_list("variables", variables)
    group, states = _torch_group(state_dict)
    if len(states) != len(given):
        raise ValueError(f"state_dict: {len(states)} parameters with state, expected {len(given)} like variables")
    names = ["m", "v", *(["vhat"] if group["amsgrad"] else [])]
    missing = [_TORCH[name] for name in names if any(_TORCH[name] not in state for state in states)]
    steps = {float(state["step"]) for state in states}
    if missing or len(steps) != 1:
        raise ValueError(f"state_dict: steps {sorted(steps)}, without {missing}; expected one step and all of {names}")
    beta_1, beta_2 = map(float, group["betas"])
    hyper: dict[str, Any] = {"learning_rate": float(group["lr"]), "beta_1": beta_1, "beta_2": beta_2, "epsilon": eps}
    type(optimizer)(**hyper, amsgrad=bool(group["amsgrad"]))  # refuses what no optimizer takes
    slots = {name: [_array(state[_TORCH[name]]) for state in states] for name in names}
    _assign(optimizer, given, check_iterations("step", steps.pop()), slots)
    for name, value in {**hyper, "amsgrad": bool(group["amsgrad"])}.items():
        setattr(optimizer, name, value)


def _torch_group(state_dict: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    groups = state_dict["param_groups"]
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    if any(option != options[0] for option in options):
        raise ValueError("state_dict: parameter groups of different options, expected one optimizer for each")
    refused = {key: options[0][key] for key, plain in _NOT_HERE.items() if options[0].get(key, plain) != plain}
    if options[0].get("weight_decay"):
        refused["weight_decay"] = options[0]["weight_decay"]  # PyTorch's Adam adds it to the gradient
    if refused:
        raise ValueError(f"state_dict: {refused}, which this Adam does not have")
    return options[0], [state_dict["state"][i] for group in groups for i in group["params"]]


def _array(tensor: Any) -> npt.NDArray[Any]:
    return np.asarray(tensor.detach().cpu().float() if tensor.dtype.itemsize < 4 else tensor.detach().cpu())


def _names(optimizer: Adam) -> list[str]:
    return ["m", "v", "vhat"] if optimizer.amsgrad else ["m", "v"]


def _plain_config(optimizer: Adam) -> dict[str, Any]:
    config = optimizer.get_config()
    plain = ("name", "learning_rate", "decay", "beta_1", "beta_2", "epsilon", "amsgrad")
    if config["decay"] or isinstance(config["learning_rate"], dict) or not set(config) <= set(plain):
        raise ValueError(f"optimizer: {config}, expected no schedule, decay, clipping or other option PyTorch has not")
    return config


def _slots_of(optimizer: Adam, variables: Iterable[Any]) -> dict[str, list[npt.NDArray[Any]]]:
    """Copies in C order, by slot name."""
    given = check_list("variables", variables)
    found = [optimizer._slots.find(buffer) or {} for buffer in buffers_of(given, range(len(given)))]
    for i, slots in enumerate(found):
        if not set(_names(optimizer)) <= set(slots):
            raise ValueError(f"variables[{i}]: slots {list(slots)}, expected {_names(optimizer)}")
    return {name: [np.array(slots[name], order="C") for slots in found] for name in _names(optimizer)}


def _assign(optimizer: Adam, variables: list[Any], iterations: int, slots: Mapping[str, list[Any]]) -> None:
    buffers = buffers_of(variables, range(len(variables)))
    for name, arrays in slots.items():
        for i, (array, buffer) in enumerate(zip(arrays, buffers, strict=True)):
            _require_like(f"{name}[{i}]", array, buffer)
    with optimizer._lock:
        prepared = optimizer._slots.prepare(buffers, list(slots))
        prepared.commit()
        for target, arrays in zip(prepared.slots, slots.values(), strict=True):
            for old, new in zip(target, arrays, strict=True):
                old[...] = new
        optimizer.iterations = iterations


def _require_like(name: str, array: Any, buffer: _cpu.Buffer) -> None:
    if np.shape(array) != buffer.shape or np.asarray(array).dtype.kind != "f":
        raise ValueError(f"{name}: {np.asarray(array).dtype} {np.shape(array)}, expected floats {buffer.shape}")
