"""What fastadam.torch refuses: a step that raises has changed nothing."""

from __future__ import annotations

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
