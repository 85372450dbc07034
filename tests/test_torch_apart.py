"""fastadam.torch with one optimizer for each parameter, as torchao and Megatron-Core offload."""

from __future__ import annotations

import copy
import gc
import sys
import tracemalloc

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from helpers import COUNT_THREADS, run_python  # noqa: E402
from on_host import OfGpu, megatron_offload, torchao_offload  # noqa: E402


@pytest.fixture
def offload(monkeypatch):
    return torchao_offload(monkeypatch)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(80, 70), torch.nn.Tanh(), torch.nn.Linear(70, 5))


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(6, 80)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_torchaos_offload_takes_the_class(offload):
    options = {"lr": 0.01, "weight_decay": 0.1}
    model, twin = network(), network()
    ours = offload(model.parameters(), fastadam.torch.AdamW, **options)
    train(model, ours, range(5))
    train(twin, fastadam.torch.AdamW(twin.parameters(), **options), range(5))
    torch.testing.assert_close(values(model), values(twin), rtol=0, atol=0)
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    other = offload(resumed.parameters(), fastadam.torch.AdamW, **options)
    other.load_state_dict(ours.state_dict())
    for host, device in zip(other.param_d2h_map.values(), other.param_d2h_map, strict=True):
        host.data.copy_(device.data)
    train(model, ours, range(5, 8))
    train(resumed, other, range(5, 8))
    torch.testing.assert_close(values(resumed), values(model), rtol=0, atol=0)


@pytest.mark.slow  # of a package that takes seconds to import
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"overlap_cpu_optimizer_d2h_h2d": False}),
        (torch.bfloat16, {"param_update_in_fp32": True}),
    ],
    ids=["float32", "one optimizer for each group", "bfloat16, updated in float32"],
)
def test_megatrons_offload_takes_the_class_and_resumes_to_the_bit(dtype, options, monkeypatch):
    """Its own keys are in every group, it sets rates there, and replaces groups and states."""
    kind = megatron_offload(monkeypatch)

    def start(of):
        torch.manual_seed(0)
        return [of(torch.randn(shape).to(dtype)) for shape in ((8, 7), (7,), (5000,))]

    def groups(params):
        return [{"params": params[:2], "weight_decay": 0.25}, {"params": params[2:], "lr": 0.05}]

    def offloaded(params):
        return kind(groups(params), offload_fraction=1.0, cpu_optimizer_cls=fastadam.torch.AdamW, **options)

    def step(params, optimizer, numbers, given=None):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + number)
            for param, receiver in zip(params, given or params, strict=True):
                receiver.grad = torch.randn(param.shape, generator=generator).to(dtype).to(receiver.dtype)
            optimizer.step()
            optimizer.zero_grad()

    params, masters = start(OfGpu), [torch.nn.Parameter(p.float()) for p in start(torch.nn.Parameter)]
    ours, plain = offloaded(params), fastadam.torch.AdamW(groups(masters))
    assert {type(each) for each in ours.sub_optimizers} == {fastadam.torch.AdamW}
    step(params, ours, range(4))
    step(params, plain, range(4), masters)
    torch.testing.assert_close([p.detach() for p in params], [p.detach().to(dtype) for p in masters], rtol=0, atol=0)
    resumed = [OfGpu(p.detach().clone()) for p in params]
    other = offloaded(resumed)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    step(params, ours, range(4, 7))
    step(resumed, other, range(4, 7))
    torch.testing.assert_close([p.detach() for p in resumed], [p.detach() for p in params], rtol=0, atol=0)
    assert all(float(state["step"]) == 7 for state in other.state.values())


def test_one_optimizer_for_each_parameter_does_what_one_for_all_does():
    """As HybridDeviceOptimizer of Megatron-Core: masters with gradients in buffers, rates set in every group."""

    def masters():
        torch.manual_seed(0)
        of = [torch.nn.Parameter(torch.randn(size)) for size in (7, 4096, 33)]
        for master in of:
            master.grad = torch.empty_like(master)
        return of

    apart, together = masters(), masters()
    single = [fastadam.torch.AdamW([{"params": [master]}], weight_decay=0.1) for master in apart]
    whole = [fastadam.torch.AdamW(together, weight_decay=0.1)]
    for of, optimizers in ((apart, single), (together, whole)):
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for master in of:
                master.grad.copy_(torch.randn(master.shape, generator=generator))
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
                optimizer.step()
    torch.testing.assert_close([p.detach() for p in apart], [p.detach() for p in together], rtol=0, atol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="counts threads in /proc or by ps")
def test_a_thousand_optimizers_share_one_pool_of_threads():
    found = run_python(
        COUNT_THREADS
        + """
import torch, fastadam.torch

def optimizers(count):
    made = []
    for _ in range(count):
        parameter = torch.nn.Parameter(torch.zeros(2**16))
        parameter.grad = torch.ones(2**16)
        made.append(fastadam.torch.AdamW([parameter]))
    return made

def step(made):
    for _ in range(3):
        for optimizer in made:
            optimizer.step()

made = optimizers(300)
before = native_threads()
step(made)
assert native_threads() <= before + 2, (before, native_threads())
""",
        FASTADAM_NUM_THREADS="3",
        OMP_NUM_THREADS="1",
    )
    assert found.returncode == 0, found.stderr


def test_their_memory_is_bounded():
    """Each keeps a few kilobytes beside its state, from its second step on no more with further steps."""

    def memory():
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    count = 200
    parameters = [torch.nn.Parameter(torch.zeros(8)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.ones(8)
    fastadam.torch.AdamW(parameters).step()  # modules that are imported only now
    tracemalloc.start()
    try:
        start = memory()
        optimizers = [fastadam.torch.AdamW([parameter]) for parameter in parameters]
        found = []
        for _ in range(6):
            for optimizer in optimizers:
                optimizer.step()
            found.append(memory() - start)
    finally:
        tracemalloc.stop()
    assert found[-1] < count * 20_000
    assert found[-1] - found[2] < count * 16
