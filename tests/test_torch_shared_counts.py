"""Parameters of fastadam.torch that share a step count or a state, and what fused and foreach make of it in torch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from test_torch_twice import SHARED, given_twice, numbers, parameter, trained  # noqa: E402
from torch_twins import PAIRS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")

MODES = [{}, {"foreach": True}, {"fused": True}]


def share_counts(optimizer, *owners):
    """Let parameters count in the state of another one, as code that sets ``state["step"]`` may."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for place, owner in enumerate(owners):
        optimizer.state[params[place]]["step"] = optimizer.state[params[owner]]["step"]


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("owners", [(0, 0, 2), (0, 1, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parameters_that_share_a_step_count_raise_it_one_after_another(mode, owners, groups):
    found = []
    for cls in PAIRS["Adam"]:
        weights = [parameter(numbers(n)) for n in (3, 4, 3)]
        split = [weights] if groups == 1 else [weights[:1], weights[1:]] if groups == 2 else [[w] for w in weights]
        optimizer = cls([{"params": part} for part in split], lr=0.1, amsgrad=True, **mode)
        trained(optimizer, weights, range(6))  # from the fourth on a step like the last is repeated natively
        share_counts(optimizer, *owners)
        found.append(trained(optimizer, weights, range(6, 12)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_a_step_count_that_lies_in_the_memory_of_another():
    found = []
    for cls in PAIRS["Adam"]:
        weights = [parameter(numbers(3)), parameter(numbers(4))]
        optimizer = cls(weights, lr=0.1)
        trained(optimizer, weights, range(2))
        optimizer.state[weights[1]]["step"] = optimizer.state[weights[0]]["step"].view(())
        found.append(trained(optimizer, weights, range(2, 6)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_a_shared_step_count_in_a_compiled_step(mode):
    found = []
    for cls in PAIRS["AdamW"]:
        weights = [parameter(numbers(n)) for n in (3, 4, 3)]
        optimizer = cls(weights, lr=0.1, **mode)
        trained(optimizer, weights, range(2))
        share_counts(optimizer, 0, 0, 2)
        step = optimizer.step
        if cls is fastadam.torch.AdamW:
            step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")  # noqa: B023
        found.append(trained(optimizer, weights, range(2, 6), step))
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES[1:], ids=str)
def test_a_step_count_of_two_dtypes_is_refused_where_torch_has_no_order(mode):
    weights = [parameter(numbers(3)), parameter(numbers(3).float())]
    optimizer = fastadam.torch.Adam(weights, lr=0.1, **mode)
    trained(optimizer, weights, range(2))
    share_counts(optimizer, 0, 0)
    before = [w.detach().clone() for w in weights]
    with pytest.raises(ValueError, match="one tensor in the states of parameters of different dtypes"):
        trained(optimizer, weights, [2])
    assert all(map(torch.equal, before, weights))
    assert float(optimizer.state[weights[0]]["step"]) == 2


# ---- fused and foreach -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("make", SHARED[:4])  # torch's fused kernels on the CPU overlook strides
def test_fused_raises_all_counts_before_the_first_parameter_moves(make, name, options):
    found = []
    for cls in PAIRS[name]:
        weights = make()
        found.append(trained(cls(weights, lr=0.1, fused=True, **options), weights, range(4)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_fused_with_a_repeated_parameter_in_a_compiled_step():
    found = []
    for cls in PAIRS["AdamW"]:
        weights = given_twice()
        optimizer = cls(weights, lr=0.1, amsgrad=True, fused=True)
        step = optimizer.step
        if cls is fastadam.torch.AdamW:
            step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")  # noqa: B023
        found.append(trained(optimizer, weights, range(3), step))
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("make", "compiled"), [*((make, False) for make in SHARED), (given_twice, True)])
@pytest.mark.filterwarnings("ignore")  # of Dynamo
def test_foreach_with_parameters_that_share_memory_is_refused(make, compiled):
    weights = make()
    optimizer = fastadam.torch.Adam(weights, lr=0.1, foreach=True)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager") if compiled else optimizer.step
    before = [w.detach().clone() for w in weights]
    for k in range(2):
        with pytest.raises(ValueError, match="foreach: True with parameters that share memory"):
            trained(optimizer, weights, [k], step)
    torch._dynamo.reset()
    assert all(map(torch.equal, before, weights))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parameters_that_share_a_whole_state_update_it_one_after_another(mode):
    found = []
    for cls in PAIRS["Adam"]:
        weights = [parameter(numbers(3)), parameter(numbers(3) + 1)]
        optimizer = cls(weights, lr=0.1, **mode)
        trained(optimizer, weights, range(6))
        optimizer.state[weights[1]] = optimizer.state[weights[0]]
        if mode == {"foreach": True} and cls is fastadam.torch.Adam:
            with pytest.raises(ValueError, match="foreach: True with parameters that share moments"):
                optimizer.step()
            return
        found.append(trained(optimizer, weights, range(6, 12)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_moment_of_two_parameters_is_refused_by_its_name(name):
    weights = [parameter(numbers(3)), parameter(numbers(3) + 1)]
    optimizer = fastadam.torch.Adam(weights, lr=0.1)
    trained(optimizer, weights, range(2))
    optimizer.state[weights[1]][name] = optimizer.state[weights[0]][name]
    with pytest.raises(
        ValueError, match=rf"\['params'\]\[1\]: {name}: shares memory with the state of .*: {name}, exp"
    ):
        optimizer.step()
