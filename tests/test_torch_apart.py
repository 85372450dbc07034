"""fastadam.torch with one optimizer for each parameter, as torchao and Megatron-Core offload."""

from __future__ import annotations

import contextlib
import gc
import sys
import tracemalloc

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from absent import need  # noqa: E402
from helpers import COUNT_THREADS, run_python  # noqa: E402


class OnHost:
    """A stream or an event where nothing runs at the same time."""

    def wait_stream(self, other):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


@pytest.fixture
def offload(monkeypatch):
    """torchao's CPUOffloadOptimizer with parameters in CPU memory in place of a GPU's."""
    need("torchao")
    from torchao.optim import cpu_offload

    empty_like = torch.empty_like
    monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(torch, "empty_like", lambda *given, pin_memory=False, **named: empty_like(*given, **named))
    for name, value in {"Stream": OnHost, "current_stream": OnHost, "stream": contextlib.nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return cpu_offload.CPUOffloadOptimizer


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
