"""What fastadam.torch refuses: a step that raises has changed nothing."""

from __future__ import annotations

import collections

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import parameters  # noqa: E402


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value"),
        ({"betas": (1.0, 0.0)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.0, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
        ({"lr": torch.tensor(0.001), "foreach": True}, ValueError, "lr as a Tensor is not supported for capturable"),
        ({"betas": (0.9, torch.tensor(0.99))}, ValueError, "betas must be either both floats or both Tensors"),
        (
            {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": True},
            ValueError,
            r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
        ),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"differentiable": True}, ValueError, "differentiable: True, expected False"),
        ({"sparse_update": "rows"}, ValueError, "sparse_update: 'rows', expected one of"),
        ({"moments": torch.float32}, TypeError, "moments: torch.float32, expected 'float32', 'bfloat16', '8bit' or"),
    ],
)
def test_arguments_that_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        fastadam.torch.Adam([torch.nn.Parameter(torch.ones(1))], **options)


def test_parameters_that_are_refused():
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        fastadam.torch.Adam(torch.ones(1))
    with pytest.raises(ValueError, match="empty parameter list"):
        fastadam.torch.Adam([])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        fastadam.torch.Adam([torch.ones(2, requires_grad=True) * 2])


def refuse(match, error=ValueError, *, spoil, **options):
    """A step of two groups, the second of which is spoilt, changes neither."""
    first, second = parameters((3,), (4,))
    optimizer = fastadam.torch.Adam([{"params": [first]}, {"params": [second]}], **options)
    first.grad, second.grad = torch.ones(3).double(), torch.ones(4).double()
    optimizer.step()
    spoil(optimizer, second)
    kept = [t for p in (first, second) for t in (p.detach(), *optimizer.state[p].values()) if torch.is_tensor(t)]
    before = [t.clone() for t in kept]
    with pytest.raises(error, match=match):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    assert float(optimizer.state[first]["step"]) == 1


def test_a_step_that_is_refused_changes_nothing():
    second = r"param_groups\[1\]\['params'\]\[0\]"

    def put(**found):
        return lambda optimizer, parameter: optimizer.state[parameter].update(found)

    def drop(name):
        return lambda optimizer, parameter: optimizer.state[parameter].pop(name)

    def set_option(**found):
        return lambda optimizer, parameter: optimizer.param_groups[1].update(found)

    def expand(optimizer, parameter):
        parameter.data = torch.zeros(1).double().expand(4)

    refuse("exp_avg: shape", spoil=put(exp_avg=torch.zeros(5).double()))
    refuse(f"state of {second}: exp_avg_sq: list", TypeError, spoil=put(exp_avg_sq=[0.0]))
    refuse(f"state of {second}: step 1.5, expected a whole", spoil=put(step=torch.tensor(1.5)))
    refuse(f"state of {second}: without 'step'", spoil=drop("step"))
    refuse("differentiable: True", spoil=set_option(differentiable=True, amsgrad=True))
    refuse("differentiable: True", spoil=set_option(differentiable=True))
    refuse("Invalid weight_decay value: nan", spoil=set_option(weight_decay=float("nan")))
    refuse("Invalid weight_decay value: -1", spoil=set_option(weight_decay=-1))
    refuse("capturable: True with", spoil=set_option(capturable=True, amsgrad=True))
    refuse(r"betas: \(1.0, 0.5\), expected 0 or more", spoil=set_option(betas=(1.0, 0.5)))
    refuse("eps: -1.0, expected 0 or more", spoil=set_option(eps=-1.0))
    refuse("lr: inf, expected a finite number", spoil=set_option(lr=float("inf")))
    refuse("lr: nan, expected a finite number", spoil=set_option(lr=torch.tensor(float("nan"))))
    refuse("elements share memory", spoil=expand)
    refuse(
        f"state of {second}: exp_avg: torch.float32, expected torch.float64",
        TypeError,
        spoil=put(exp_avg=torch.zeros(4)),
    )


def test_parameters_of_other_dtypes_are_refused_by_name():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    optimizer = fastadam.torch.Adam([("steps", weight)])
    weight.grad = torch.ones(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="parameter 'steps': dtype int32, expected float16"):
        optimizer.step()


# ---- options that were set later -----------------------------------------------------------------------------------


def two_groups(steps, **options):
    first, second = parameters((3,), (4,))
    optimizer = fastadam.torch.Adam([{"params": [first]}, {"params": [second]}], lr=0.1, **options)
    for _ in range(steps):
        first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
        optimizer.step()
    return optimizer, first, second


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("lr", None, TypeError, "lr: NoneType, expected a number"),
        ("lr", "0.1", TypeError, "lr: str, expected a number"),
        ("lr", [0.1], TypeError, "lr: list, expected a number"),
        ("lr", lambda: 0.1, TypeError, "lr: function, expected a number; torch.optim.lr_scheduler.LambdaLR"),
        ("lr", torch.ones(2), ValueError, "Tensor lr must be 1-element"),
        ("lr", torch.tensor(1j), TypeError, "lr: a tensor of torch.complex64 on cpu, expected a real number"),
        ("lr", float("nan"), ValueError, "lr: nan, expected a finite number"),
        ("betas", None, TypeError, "betas: None, expected a pair of numbers"),
        ("betas", (0.9,), TypeError, r"betas: \(0.9,\), expected a pair of numbers"),
        ("betas", (0.9, None), TypeError, r"betas\[1\]: NoneType, expected a number"),
        ("betas", (0.9, 1.0), ValueError, r"betas: \(0.9, 1.0\), expected 0 or more and less than 1"),
        ("eps", "1", TypeError, "eps: str, expected a number"),
        ("eps", torch.ones(2), ValueError, "Tensor eps must be 1-element"),
        ("weight_decay", None, TypeError, "weight_decay: NoneType, expected a number"),
        ("weight_decay", -1.0, ValueError, "Invalid weight_decay value: -1.0"),
        ("maximize", "no", TypeError, "maximize: str, expected True or False"),
        ("amsgrad", [], TypeError, "amsgrad: list, expected True or False"),
        ("decoupled_weight_decay", torch.ones(1), TypeError, "decoupled_weight_decay: Tensor, expected True or False"),
        ("differentiable", True, ValueError, "differentiable: True, expected False"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_an_option_set_later_is_refused_by_name(name, value, error, text, steps, has_gradient):
    optimizer, first, second = two_groups(steps)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second) if has_gradient else None
    before = [p.detach().clone() for p in (first, second)]
    optimizer.param_groups[1][name] = value
    for _ in range(2):
        with pytest.raises(error, match=rf"^param_groups\[1\]: {text}"):
            optimizer.step()
    assert all(map(torch.equal, before, (first, second)))
    assert [float(named["step"]) for named in optimizer.state.values()] == [steps] * 2 * (steps > 0)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_capturable_is_refused_on_the_cpu_whenever_it_is_set(steps):
    optimizer, first, second = two_groups(steps)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.param_groups[1]["capturable"] = True
    for _ in range(2):
        with pytest.raises(ValueError, match=r"capturable: True with param_groups\[1\]\['params'\]\[0\] on cpu"):
            optimizer.step()
    second.grad = None  # as in torch
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_foreach_is_refused_with_shared_memory_whenever_it_is_set(steps):
    values = torch.ones(6)
    shared = [torch.nn.Parameter(values[:4]), torch.nn.Parameter(values[2:])]
    optimizer = fastadam.torch.Adam(shared, lr=0.1)
    for k in range(steps + 1):
        for p in shared:
            p.grad = torch.ones_like(p)
        if k < steps:
            optimizer.step()
    optimizer.param_groups[0]["foreach"] = True
    with pytest.raises(ValueError, match="foreach: True with parameters that share memory"):
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", ["foreach", "fused", "capturable", "differentiable"])
def test_a_flag_of_torchs_that_is_removed_counts_as_unset(name, steps):
    optimizer, first, second = two_groups(steps)
    expected, *theirs = two_groups(steps)
    del optimizer.param_groups[0][name]
    for _ in range(4):
        for p in (first, second, *theirs):
            p.grad = torch.ones_like(p)
        optimizer.step()
        expected.step()
    assert all(map(torch.equal, (first, second), theirs))


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"])
def test_an_option_that_was_removed_is_named(name, steps):
    optimizer, first, second = two_groups(steps)
    first.grad = second.grad = None
    second.grad = torch.ones_like(second)
    del optimizer.param_groups[0][name]
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^param_groups\[0\]: without '{name}', expected it"):
            optimizer.step()


def as_tuple(optimizer):
    optimizer.param_groups = tuple(optimizer.param_groups)


def as_user_list(optimizer):
    optimizer.param_groups = collections.UserList(optimizer.param_groups)


def groups_as_user_dicts(optimizer):
    optimizer.param_groups[0] = collections.UserDict(optimizer.param_groups[0])


def state_as_user_dict(optimizer):
    optimizer.state = collections.UserDict(optimizer.state)


def params_as_tuple(optimizer):
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize(
    "convert",
    [as_tuple, as_user_list, groups_as_user_dicts, state_as_user_dict, params_as_tuple],
    ids=lambda convert: convert.__name__,
)
def test_other_containers_of_groups_and_states_are_read(convert, steps):
    optimizer, first, second = two_groups(steps)
    expected, *theirs = two_groups(steps)
    convert(optimizer)
    for _ in range(4):
        for p in (first, second, *theirs):
            p.grad = torch.ones_like(p)
        optimizer.step()
        expected.step()
    assert all(map(torch.equal, (first, second), theirs))


# ---- gradients and states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda g: g, lambda g: g.to_sparse()], ids=["dense", "sparse"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kinds", [(torch.complex64, torch.float32), (torch.float32, torch.complex64)], ids=str)
def test_a_gradient_of_the_other_field_is_refused_by_name(kinds, steps, form):
    weight = torch.nn.Parameter(torch.ones(3, dtype=kinds[0]))
    weight.grad_dtype = None
    optimizer = fastadam.torch.Adam([("weight", weight)])
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    weight.grad = form(torch.ones(3, dtype=kinds[1]))
    with pytest.raises(TypeError, match=f"grad of parameter 'weight': {kinds[1]}, expected {kinds[0]}"):
        optimizer.step()


THIRD = {False: r"param_groups\[2\]\['params'\]\[0\]", True: "parameter 'third'"}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("has_names", [False, True])
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda p, state: setattr(p, "grad", p.detach()), "grad of {0}: shares memory with {0}"),
        (lambda p, state: setattr(p, "grad", state["exp_avg"]), "grad of {0}: shares memory with exp_avg of {0}"),
        (lambda p, state: state.update(exp_avg=p.detach()), "exp_avg of {0}: overlaps {0} in memory"),
        (lambda p, state: state.update(exp_avg_sq=[0.0]), "state of {0}: exp_avg_sq: list, expected a tensor"),
    ],
)
def test_a_gradient_and_a_state_are_named_by_group_or_name(spoil, text, has_names, steps):
    params = parameters((3,), (3,), (4,))
    names = ("first", "second", "third")
    optimizer = fastadam.torch.Adam(
        [{"params": [(n, p) if has_names else p]} for n, p in zip(names, params, strict=True)]
    )
    for _ in range(max(steps, 1)):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    before = params[0].detach().clone()
    spoil(params[2], optimizer.state[params[2]])
    with pytest.raises((TypeError, ValueError), match=f"^{text.format(THIRD[has_names])}"):
        optimizer.step()
    assert torch.equal(before, params[0])


@pytest.mark.parametrize("spoil", ["option", "gradient", "another group"])
def test_a_refused_step_leaves_what_a_state_has_and_lacks(spoil):
    optimizer, first, second = two_groups(2)
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    state, group = optimizer.state[first], optimizer.param_groups[0]
    state["step"] = 7
    group["amsgrad"] = True
    if spoil == "option":
        group["eps"] = -1.0
    elif spoil == "gradient":
        first.grad = first.detach()
    else:
        optimizer.state[second]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match="eps|shares memory|exp_avg"):
        optimizer.step()
    assert optimizer.state[first] is state
    assert state["step"] == 7
    assert type(state["step"]) is int
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    state["step"] = 8  # the next step reads it
    group["eps"], first.grad, second.grad = 1e-8, torch.ones_like(first), None
    optimizer.step()
    assert float(optimizer.state[first]["step"]) == 9
    assert "max_exp_avg_sq" in optimizer.state[first]


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
def test_a_duration_is_no_number(name):
    """NumPy derives its type from that of integers."""
    with pytest.raises(TypeError, match=f"{name}: timedelta64, expected a number"):
        fastadam.torch.Adam([torch.nn.Parameter(torch.ones(2))], **{name: np.timedelta64(1, "s")})


@pytest.mark.parametrize("make", [fastadam.torch.Adam, fastadam.torch.DeepSpeedCPUAdam])
def test_a_closure_that_cannot_be_called_is_refused(make):
    with pytest.raises(TypeError, match="closure: str, expected a function without arguments, or None"):
        make([torch.nn.Parameter(torch.ones(2))]).step("x")


def test_options_that_are_neither_true_nor_false_are_refused():
    for name in ("foreach", "fused"):
        with pytest.raises(TypeError, match=f"{name}: .*, expected True or False"):
            fastadam.torch.Adam([torch.nn.Parameter(torch.ones(2))], **{name: np.ones(2)})
    with pytest.raises(TypeError, match="set_to_none: .*, expected True or False"):
        fastadam.torch.Adam([torch.nn.Parameter(torch.ones(2))]).zero_grad(np.ones(2))


def test_deepspeeds_class_names_what_is_wrong_with_a_state_dict():
    optimizer = fastadam.torch.DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(2))])
    for saved in (3, {"state": 3, "param_groups": []}, {"state": {}, "param_groups": [{}]}):
        with pytest.raises(TypeError, match="^state_dict: "):
            optimizer.load_state_dict(saved)
    for call, name in ((optimizer.step_subgroup, "subgroup_id"), (optimizer.rollback_subgroup, "sub_group_id")):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        with pytest.raises(TypeError, match=f"^{name}: list, expected a number"):
            call([])
