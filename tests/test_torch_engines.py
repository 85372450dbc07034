"""fastadam.torch.Adam under engines that own the parameters: ZeRO, FSDP2, checkpoints, torch.compile."""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from gloo_processes import needs_gloo, run_in_two_processes  # noqa: E402
from torch import distributed  # noqa: E402


def network():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)]
    return torch.nn.Sequential(*layers).double()


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(6, 8).double()).pow(2).sum().backward()
        optimizer.step()


def unsharded(steps, **options):
    model = network()
    train(model, torch.optim.Adam(model.parameters(), lr=0.1, **options), range(steps))
    return [parameter.detach() for parameter in model.parameters()]


def check_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        whole = a.full_tensor() if hasattr(a, "full_tensor") else a
        torch.testing.assert_close(whole.detach(), b, rtol=1e-12, atol=1e-14)


def sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = network(), init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def zero(_folder):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def made():
        model = network()
        options = {"optimizer_class": fastadam.torch.Adam, "lr": 0.1, "amsgrad": True}
        return model, ZeroRedundancyOptimizer(model.parameters(), **options)

    model, optimizer = made()
    train(model, optimizer, range(5))
    check_equal(model.parameters(), unsharded(5, amsgrad=True))
    optimizer.consolidate_state_dict(0)
    saved = [copy.deepcopy(optimizer.state_dict()) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(saved, 0)  # as if both processes read it from a file
    resumed, other = made()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(saved[0])
    for run in ((model, optimizer), (resumed, other)):
        train(*run, range(5, 8))
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))
    assert all(float(state["step"]) == 8 for state in other.optim.state.values())


def fsdp(_folder):
    model = sharded()
    optimizer = fastadam.torch.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    train(model, optimizer, range(5))
    check_equal(model.parameters(), unsharded(5, weight_decay=0.1))
    assert type(optimizer.state[model[0].weight]["exp_avg"]).__name__ == "DTensor"
    assert type(optimizer.state[model[0].weight]["step"]) is torch.Tensor
    compiled = SimpleNamespace(
        zero_grad=optimizer.zero_grad, step=torch.compile(lambda: optimizer.step(), backend="aot_eager")
    )
    train(model, compiled, range(5, 8))  # which is eager
    check_equal(model.parameters(), unsharded(8, weight_decay=0.1))


def clipped(_folder):
    """The norm is that of whole tensors, and one process skips when the other does."""
    for bounds in ({"global_clipnorm": 0.5}, {"clipnorm": 0.3}, {"clipvalue": 0.2, "global_clipnorm": 0.5}):
        model, twin = sharded(), network()
        tested = fastadam.torch.Adam(model.parameters(), lr=0.1, skip_nonfinite=True, **bounds)
        plain = fastadam.torch.Adam(twin.parameters(), lr=0.1, **bounds)
        for step in range(6):
            train(twin, plain, [step])
            train(model, tested, [step])
            assert not tested.last_step_skipped
        check_equal(model.parameters(), [parameter.detach() for parameter in twin.parameters()])
        before = [parameter.to_local().clone() for parameter in model.parameters()]
        if distributed.get_rank() == 1:
            model[2].weight.grad.to_local().view(-1)[-1] = float("nan")
        tested.step()
        assert tested.last_step_skipped
        assert all(map(torch.equal, before, [parameter.to_local() for parameter in model.parameters()]))
        assert float(tested.state[model[0].weight]["step"]) == 6
    norms_that_overflow()


def norms_that_overflow():
    """Of a tensor whose squares are infinite in one process and not in the other, beside a replicated one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    values = torch.tensor([3e200, 1.0, 4e200, 2.0], dtype=torch.float64)
    params, gradients = [], []
    for placement, whole in ((Shard(0), values), (Replicate(), values.flip(0)), (Shard(0), torch.ones(1).double())):
        params.append(torch.nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, [placement])))
        gradients.append(distribute_tensor(whole, mesh, [placement]))
    optimizer = fastadam.torch.Adam(params, betas=(0.0, 0.9), global_clipnorm=1e200, skip_nonfinite=True)
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    optimizer.step()
    assert not optimizer.last_step_skipped
    factor = 1e200 / (5e200 * 2**0.5)
    for param, gradient in zip(params, gradients, strict=True):
        moment = optimizer.state[param]["exp_avg"]
        assert isinstance(moment, DTensor)
        torch.testing.assert_close(moment.full_tensor(), gradient.full_tensor() * factor, rtol=1e-14, atol=0)


def checkpoint(folder):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = sharded()
    optimizer = fastadam.torch.Adam(model.parameters(), lr=0.1)
    train(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)
    train(model, optimizer, range(3, 6))
    check_equal(model.parameters(), unsharded(6))
    resumed = sharded()
    other = fastadam.torch.Adam(resumed.parameters(), lr=0.5)
    weights, state = get_state_dict(resumed, other)
    dcp.load({"weights": weights, "state": state}, checkpoint_id=folder)
    set_state_dict(resumed, other, model_state_dict=weights, optim_state_dict=state)
    train(resumed, other, range(3, 6))
    for a, b in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())
        for name, value in optimizer.state[b].items():
            found = other.state[a][name]
            assert torch.equal(found, value) if name == "step" else torch.equal(found.to_local(), value.to_local())


@needs_gloo
def test_two_processes_do_what_one_does(tmp_path):
    """With all engines, since starting the processes is what takes long."""
    run_in_two_processes((zero, fsdp, clipped, checkpoint), tmp_path)


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of Dynamo and its backends
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("eager", {}),
        ("aot_eager", {"amsgrad": True, "weight_decay": 0.1}),
        ("aot_eager", {"lr": torch.tensor(0.01, dtype=torch.float64)}),
        pytest.param("inductor", {"amsgrad": True, "weight_decay": 0.1}, marks=pytest.mark.weekly),
    ],
    ids=str,
)
def test_a_compiled_step_has_one_graph(backend, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.fspath(tmp_path))
    model, twin = network(), network()
    theirs = torch.optim.AdamW(model.parameters(), **copy.deepcopy(options))
    ours = fastadam.torch.AdamW(twin.parameters(), **copy.deepcopy(options))
    train(model, theirs, range(2))
    train(twin, ours, range(2))  # eager steps before, and after

    class Compiled:
        zero_grad = staticmethod(ours.zero_grad)
        step = staticmethod(torch.compile(lambda: ours.step(), fullgraph=True, backend=backend))

    train(model, theirs, range(2, 5))
    train(twin, Compiled, range(2, 5))
    train(model, theirs, range(5, 7))
    train(twin, ours, range(5, 7))
    check_equal(twin.parameters(), [parameter.detach() for parameter in model.parameters()])
    assert float(ours.state[twin[0].weight]["step"]) == 7


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_first_step_makes_the_state():
    model, twin = network(), network()
    theirs, ours = torch.optim.Adam(model.parameters(), lr=0.1), fastadam.torch.Adam(twin.parameters(), lr=0.1)
    train(model, theirs, range(1))
    torch.manual_seed(0)
    twin(torch.randn(6, 8).double()).pow(2).sum().backward()
    torch.compile(lambda: ours.step(), fullgraph=True, backend="aot_eager")()
    check_equal(twin.parameters(), [parameter.detach() for parameter in model.parameters()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_compiled_steps_count_in_tensors_of_their_own_where_inductor_needs_that(first, monkeypatch):
    """Before PyTorch 2.13 it reads views of one tensor from the wrong place."""
    monkeypatch.setattr("fastadam.torch._compiled._VIEWS_ARE_SAFE", False)
    model, twin = network(), network()
    theirs, ours = torch.optim.Adam(model.parameters(), lr=0.1), fastadam.torch.Adam(twin.parameters(), lr=0.1)
    compiled = SimpleNamespace(
        zero_grad=ours.zero_grad, step=torch.compile(lambda: ours.step(), fullgraph=True, backend="aot_eager")
    )
    for optimizer in (compiled if first == "compiled" else ours, compiled, ours):
        train(model, theirs, range(1))
        train(twin, optimizer, range(1))
    counts = [state["step"] for state in ours.state.values()]
    assert all(count.untyped_storage().nbytes() == count.nbytes and float(count) == 3 for count in counts)
    check_equal(twin.parameters(), [parameter.detach() for parameter in model.parameters()])


@pytest.mark.parametrize("safe", [True, False])
def test_parameters_in_one_storage_are_compiled_where_inductor_can(safe, monkeypatch):
    monkeypatch.setattr("fastadam.torch._compiled._VIEWS_ARE_SAFE", safe)
    flat = torch.ones(10)
    weights = [torch.nn.Parameter(part) for part in (flat[:4], flat[4:])]
    apart = torch.nn.Parameter(torch.ones(3))
    for weight in (*weights, apart):
        weight.grad = torch.ones_like(weight)
    for parameters, is_traced in ((weights, safe), ([weights[1], apart], True)):
        optimizer, columns = fastadam.torch.Adam(parameters), [[] for _ in range(6)]
        assert optimizer._init_group(optimizer.param_groups[0], *columns) == is_traced
        assert [len(column) for column in columns] == [2 * is_traced] * 4 + [0, 2 * is_traced]


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shared", ["exp_avg", "exp_avg_sq", "both"])
def test_moments_in_one_storage_are_compiled_where_inductor_can(safe, shared, monkeypatch):
    monkeypatch.setattr("fastadam.torch._compiled._VIEWS_ARE_SAFE", safe)
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad, other = torch.ones(4), torch.nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    optimizer, flat = fastadam.torch.Adam([weight, other]), torch.zeros(16)
    optimizer.step()
    for place, name in enumerate(("exp_avg", "exp_avg_sq")):
        if shared in (name, "both"):
            optimizer.state[weight][name] = flat[8 * place : 8 * place + 4]
            optimizer.state[other][name] = flat[8 * place + 4 : 8 * place + 8]
    assert optimizer._init_group(optimizer.param_groups[0], *([] for _ in range(6))) == safe


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("early", [True, False], ids=["before the load", "after the load"])
def test_a_compiled_step_is_resumed_to_the_bit(early):
    """With a state that is loaded after the step was compiled, or before."""

    class Run:
        def __init__(self):
            self.model = network()
            self.optimizer = fastadam.torch.AdamW(self.model.parameters(), lr=0.1, amsgrad=True)
            self.zero_grad = self.optimizer.zero_grad
            self.step = torch.compile(lambda: self.optimizer.step(), fullgraph=True, backend="aot_eager")

        def train(self, steps):
            train(self.model, self, steps)

        def bits(self):
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            return [tensor.detach().clone() for tensor in [*self.model.parameters(), *states]]

    whole, resumed = Run(), Run()
    whole.train(range(3))
    if early:
        resumed.train(range(7, 9))
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    for run in (whole, resumed):
        run.train(range(3, 6))
    assert all(map(torch.equal, resumed.bits(), whole.bits()))
    assert len(whole.bits()) == 5 * 6


def test_the_operator_says_what_it_mutates():
    model = network()
    params = [parameter.detach().clone() for parameter in model.parameters()]
    grads, m, v, vhat = ([torch.ones_like(p) for p in params] for _ in range(4))
    steps = list(torch.zeros(len(params)).unbind())
    numbers = (None, None, None, 0.1, 0.9, 0.99, 1e-8, 0.0, False, False, 0, 0)
    arguments = (params, grads, m, v, vhat, steps, *numbers)
    torch.library.opcheck(torch.ops.fastadam.adam_.default, arguments, test_utils=("test_schema", "test_faketensor"))
