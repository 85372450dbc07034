"""State dicts that fastadam.torch refuses when they are loaded, and those that it takes."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import check_same, parameters, step  # noqa: E402

SHAPES = [(5, 3), (7,), ()]


def quantized(tensor):
    """A wrapper subclass, as torchao and bitsandbytes have for moments in 8 bits."""
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(tensor, tensor)


def rename(saved):
    """As bitsandbytes calls the moments, of which the second is missing."""
    for named in saved["state"].values():
        named["state1"] = named.pop("exp_avg")
        del named["exp_avg_sq"]


def quantize(saved):
    for named in saved["state"].values():
        named["exp_avg"] = quantized(named["exp_avg"])


def reshape(saved):
    for named in saved["state"].values():
        named["exp_avg_sq"] = torch.zeros(11)


FOREIGN = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), None, r"param_groups\[0\]: without 'betas', 'eps', expected lr"),
    "SGD with momentum": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda saved: saved["param_groups"][0].update(betas=(0.9, 0.999), eps=1e-8),
        "state of parameter 'a': without 'step', 'exp_avg', 'exp_avg_sq', expected",
    ),
    "RMSprop": (lambda p: torch.optim.RMSprop(p), None, "without 'betas', expected lr, betas and eps"),
    "Adamax": (lambda p: torch.optim.Adamax(p), None, "state of parameter 'a': without 'exp_avg_sq', expected step"),
    "bitsandbytes": (torch.optim.Adam, rename, "without 'state2', expected step, state1 and state2"),
    "NAdam": (
        torch.optim.NAdam,
        None,
        r"parameter 'a': with 'mu_product' of shape \(\), expected step, exp_avg and exp_",
    ),
    "torchao": (torch.optim.Adam, quantize, "parameter 'a': exp_avg: TwoTensor, expected a plain tensor"),
    "another model": (torch.optim.Adam, reshape, r"parameter 'a': exp_avg_sq: shape \(11,\), expected \(5, 3\)"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_state_dict_of_another_optimizer_is_refused_at_load(kind):
    make, change, message = FOREIGN[kind]
    foreign = make(parameters(*SHAPES))
    step(foreign, 0)
    saved = copy.deepcopy(foreign.state_dict())
    if change:
        change(saved)
    ours, twin = (fastadam.torch.Adam(zip("abc", parameters(*SHAPES), strict=True), lr=0.1) for _ in range(2))
    for optimizer in (ours, twin):
        step(optimizer, 0)
    with pytest.raises((TypeError, ValueError), match=message):
        ours.load_state_dict(saved)
    for optimizer in (ours, twin):
        step(optimizer, 1)
    check_same(ours, twin, 0)


def put(name, value):
    """A change of a saved group or, for a name in its state, of the state of the first parameter."""

    def change(saved):
        (saved["state"][0] if name in saved["state"][0] else saved["param_groups"][0])[name] = value

    return change


NAN = float("nan")
UNUSABLE = {
    **{
        f"{name} of {dtype}": (put(name, torch.ones(5, 3).to(dtype)), rf"'a': {name}: {dtype}, expected torch.float32 or")
        for name in ("exp_avg", "exp_avg_sq")
        for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)
    },
    **{
        f"{name} of torch.uint8": (put(name, torch.ones(5, 3).byte()), "'a': without 'exp_avg_scale', 'exp_avg_sq_scale', exp")
        for name in ("exp_avg", "exp_avg_sq")
    },
    **{
        f"step of {value!r}": (put("step", value), rf"state of parameter 'a': step:? {shown}, expected a (whole )?number")
        for value, shown in [(-3, "-3.0"), (NAN, "nan"), (1.5, "1.5"), ("3", "'3'"), (None, "None"), (torch.tensor(-3.0), "-3.0")]
    },
    **{
        f"{name}={value!r}": (put(name, value), rf"state_dict: param_groups\[0\]: {message}")
        for name in ("lr", "eps", "weight_decay")
        for value, message in [
            (None, f"{name}: NoneType, expected a number"),
            ("0.1", f"{name}: str, expected a number"),
            (NAN, f"(Invalid )?{name}( value)?: nan"),
            (torch.ones(2), f"Tensor {name} must be 1-element"),
        ]
    },
    "a complex lr": (put("lr", torch.tensor(1j)), r"param_groups\[0\]: lr: a tensor of torch.complex64 on cpu, expected a"),
    "an lr without data": (put("lr", torch.ones((), device="meta")), r"\[0\]: lr: a tensor of torch.float32 on meta, exp"),
    "a list of lists": (put("params", [[0], 1, 2]), r"param_groups\[0\]: params\[0\]: list, expected the number of a"),
    "betas='ab'": (put("betas", "ab"), r"param_groups\[0\]: betas: 'ab', expected a pair of numbers"),
    "one beta": (put("betas", (0.9,)), r"param_groups\[0\]: betas: \(0.9,\), expected a pair of numbers"),
    "a beta of 1": (put("betas", (0.9, 1.0)), r"param_groups\[0\]: betas: \(0.9, 1.0\), expected 0 or more and less than 1"),
    "a beta of NaN": (put("betas", (NAN, 0.9)), r"param_groups\[0\]: betas: \(nan, 0.9\), expected 0 or more"),
    "a negative eps": (put("eps", -1e-8), r"param_groups\[0\]: eps: -1e-08, expected 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_every_later_step_would_refuse_is_refused_at_load(kind):
    change, message = UNUSABLE[kind]
    ours, twin = (fastadam.torch.Adam(zip("abc", parameters(*SHAPES, dtype=torch.float32), strict=True)) for _ in "ab")
    for optimizer in (ours, twin):
        step(optimizer, 0)
    saved = copy.deepcopy(ours.state_dict())
    change(saved)
    with pytest.raises((TypeError, ValueError), match=message):
        ours.load_state_dict(saved)
    for optimizer in (ours, twin):
        step(optimizer, 1)
    check_same(ours, twin, 0)


@pytest.mark.parametrize("value", [torch.ones(2), [1.0], 3], ids=["tensor", "list", "number"])
def test_a_state_that_is_not_a_dict_is_refused_by_its_key(value):
    ours, _ = (fastadam.torch.Adam(parameters(*SHAPES, dtype=torch.float32)) for _ in "ab")
    step(ours, 0)
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][1] = value
    with pytest.raises(TypeError, match=rf"state of .*\[1\]: {type(value).__name__}, expected a dict"):
        ours.load_state_dict(saved)


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "decoupled_weight_decay"])
@pytest.mark.parametrize("moments", [None, "8bit"])
def test_a_flag_that_is_a_tensor_is_refused_by_its_name(name, moments):
    ours = fastadam.torch.Adam(parameters(*SHAPES, dtype=torch.float32), moments=moments)
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0][name] = torch.ones(2)
    with pytest.raises(TypeError, match=rf"param_groups\[0\]: {name}: Tensor, expected True or False"):
        ours.load_state_dict(saved)


@pytest.mark.parametrize("name", ["moments", "master"])
@pytest.mark.parametrize("value", [np.ones(3), torch.ones(3), 8], ids=["array", "tensor", "number"])
def test_formats_of_a_state_dict_do_not_count_whatever_they_are(name, value):
    """The optimizer that loads has its own."""
    ours = fastadam.torch.Adam(parameters(*SHAPES, dtype=torch.float32))
    step(ours, 0)
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0][name] = value
    ours.load_state_dict(saved)
    assert name not in ours.param_groups[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "state_dict: NoneType, expected a dict, as state_dict"),
        ([], "state_dict: list, expected a dict"),
        ("x", "state_dict: str 'x', expected a dict"),
        ({}, "state_dict: without 'state', 'param_groups', expected state and param_groups"),
        ({"param_groups": []}, "state_dict: without 'state', expected state and param_groups"),
        ({"state": [], "param_groups": []}, "state_dict: state: list, expected a dict of the states"),
        ({"state": {}, "param_groups": {}}, "state_dict: param_groups: dict, expected a list of dicts"),
        ({"state": {}, "param_groups": [3]}, r"state_dict: param_groups\[0\]: int, expected a dict"),
        ({"state": {}, "param_groups": [{"lr": 1.0}]}, r"param_groups\[0\]: params: missing, expected a list"),
        ({"state": {}, "param_groups": [{"params": 3}]}, r"param_groups\[0\]: params: int, expected a list"),
    ],
)
def test_what_is_not_a_state_dict_is_refused_by_name(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastadam.torch.Adam(parameters(*SHAPES)).load_state_dict(given)


@pytest.mark.parametrize(
    "change",
    [
        put("lr", torch.tensor(0.1)),
        put("lr", torch.tensor([0.1])),
        put("betas", [0.8, torch.tensor(0.9)]),
        put("capturable", True),
        put("differentiable", True),
        put("initial_lr", "anything"),
        put("exp_avg", torch.zeros(5, 3, dtype=torch.bfloat16)),
        put("exp_avg", torch.zeros(5, 3, dtype=torch.float64)),
        put("step", 3),
        put("step", torch.tensor([3], dtype=torch.int64)),
        lambda saved: saved["state"][0].update(note="x", mask=torch.ones(5, 3, dtype=torch.bool)),
    ],
)
def test_what_a_step_can_use_loads(change):
    ours = fastadam.torch.Adam(parameters(*SHAPES, dtype=torch.float32))
    step(ours, 0)
    saved = copy.deepcopy(ours.state_dict())
    change(saved)
    ours.load_state_dict(saved)
    step(ours, 1)


def test_a_step_that_is_not_a_number_is_refused_by_name():
    ours = fastadam.torch.Adam(zip("abc", parameters(*SHAPES), strict=True))
    step(ours, 0)
    for named in ours.state.values():
        named["step"] = None
    with pytest.raises(ValueError, match="state of parameter 'a': step: None, expected a number"):
        step(ours, 1)


def test_a_state_dict_before_the_first_step_loads():
    ours = fastadam.torch.Adam(parameters(*SHAPES))
    ours.load_state_dict(fastadam.torch.AdamW(parameters(*SHAPES), lr=0.3).state_dict())
    step(ours, 0)
    assert ours.param_groups[0]["lr"] == 0.3
