"""Parameters of fastadam.torch that come twice or share memory: torch steps them one after another."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")


def numbers(*shape):
    return torch.linspace(1, 2, 60, dtype=torch.float64)[: torch.Size(shape).numel()].reshape(shape).clone()


def parameter(values):
    return torch.nn.Parameter(values)


def given_twice():
    x, other = parameter(numbers(3)), parameter(numbers(4))
    return [x, other, x]


def given_three_times_beside_its_view():
    x = parameter(numbers(3))
    return [x, x, parameter(x.detach()[1:]), x]


def two_on_one_storage():
    base = numbers(6)
    return [parameter(base), parameter(numbers(2)), parameter(base)]


def overlapping_slices():
    base = numbers(6)
    return [parameter(base[:4]), parameter(base[2:]), parameter(base[3:5])]


def a_matrix_and_its_column():
    base = numbers(4, 3)
    return [parameter(base), parameter(base[:, 1])]


def columns_that_interleave():
    base = numbers(4, 3)
    return [parameter(base[:, k]) for k in range(3)]


def transposed():
    base = numbers(3, 4)
    return [parameter(base), parameter(base.T), parameter(numbers(2))]


def real_parts():
    base = torch.complex(numbers(3), numbers(3))
    return [parameter(base), parameter(torch.view_as_real(base))]


SHARED = [
    given_twice,
    given_three_times_beside_its_view,
    two_on_one_storage,
    overlapping_slices,
    a_matrix_and_its_column,
    columns_that_interleave,
    transposed,
    real_parts,
]


def give_gradients(weights, k):
    for place, weight in enumerate({id(w): w for w in weights}.values()):
        weight.grad = (torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape) + place - k).to(
            weight.dtype
        )


def trained(optimizer, weights, steps, step=None):
    for k in steps:
        give_gradients(weights, k)
        (step or optimizer.step)()
    counts = [float(optimizer.state[w]["step"]) for w in {id(w): w for w in weights}.values()]
    return [w.detach() for w in weights], counts


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("make", SHARED)
def test_parameters_that_share_memory_step_one_after_another(make, name, options):
    found = []
    for cls in PAIRS[name]:
        weights = make()
        found.append(trained(cls(weights, lr=0.1, **options), weights, range(4)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [make for make in SHARED if not make.__name__.startswith("given")])
def test_one_group_or_several(make):
    found = []
    for cls in PAIRS["Adam"]:
        weights = make()
        optimizer = cls([{"params": [w]} for w in weights], lr=0.1)
        found.append(trained(optimizer, weights, range(4)))
    weights = make()
    found.append(trained(fastadam.torch.Adam(weights, lr=0.1), weights, range(4)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-14)


def test_a_parameter_in_two_groups_is_refused_as_by_torch():
    x = parameter(numbers(3))
    for cls in PAIRS["Adam"]:
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            cls([{"params": [x]}, {"params": [x]}])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: o], ids=["copied", "loaded"])
def test_a_repeated_parameter_goes_on_after_a_copy_or_a_load(copied):
    found = []
    for cls in PAIRS["Adam"]:
        weights = given_twice()
        optimizer = cls(weights, lr=0.1)
        trained(optimizer, weights, range(2))
        optimizer = copied(optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        found.append(trained(optimizer, optimizer.param_groups[0]["params"], range(2, 4)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    assert found[0][1] == [8, 4]


def test_a_repeated_parameter_with_grad_scaler():
    found = []
    for cls in PAIRS["Adam"]:
        x = parameter(numbers(3))
        optimizer, scaler = cls([x, x], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
        for k in range(4):
            optimizer.zero_grad()
            scaler.scale((x**2).sum()).backward()
            x.grad[0] = float("inf") if k == 2 else x.grad[0]
            scaler.step(optimizer)
            scaler.update()
        found.append(([x.detach()], float(optimizer.state[x]["step"])))
    assert found[1][1] == found[0][1] == 6


def sparse_gradient(weight, rows):
    values = torch.ones(len(rows), 2, dtype=torch.float64)
    return torch.sparse_coo_tensor([rows], values, weight.shape, check_invariants=True)


def test_a_repeated_table_in_lazy_mode_moves_twice():
    found = []
    for make in (
        lambda w: torch.optim.SparseAdam(w, lr=0.1),
        lambda w: fastadam.torch.Adam(w, lr=0.1, sparse_update="lazy"),
    ):
        table = parameter(numbers(9, 2))
        optimizer = make([table, table])
        for k in range(4):
            table.grad = sparse_gradient(table, [k, k + 1, k])
            optimizer.step()
        found.append((table.detach(), float(optimizer.state[table]["step"])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=1e-14)
    assert found[1][1] == 8


@pytest.mark.parametrize("mode", ["deferred", "deferred_fast"])
def test_tables_whose_rows_wait_must_have_their_memory_for_themselves(mode):
    base = numbers(9, 2)
    for tables in ([parameter(base)] * 2, [parameter(base), parameter(base)], [parameter(base), parameter(base[1:])]):
        optimizer = fastadam.torch.Adam(tables, lr=0.1, sparse_update=mode)
        for table in tables:
            table.grad = sparse_gradient(table, [0, 1])
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"shares memory with another parameter .* sparse_update='{mode}'"):
                optimizer.step()
        assert torch.equal(base, numbers(9, 2))
        assert not optimizer.state


@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_a_repeated_parameter_in_a_compiled_step():
    found = []
    for cls in PAIRS["Adam"]:
        weights = given_twice()
        optimizer = cls(weights, lr=0.1)
        step = optimizer.step
        if cls is fastadam.torch.Adam:
            step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")  # noqa: B023
        found.append(trained(optimizer, weights, range(3), step))
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
