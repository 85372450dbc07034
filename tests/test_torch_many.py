"""Hundreds of optimizers of one parameter each, as torchao and Megatron-Core offload: what each costs, and leaves behind."""

from __future__ import annotations

import gc
import sys

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from helpers import COUNT_THREADS, run_python  # noqa: E402

CLASSES = [fastadam.torch.Adam, fastadam.torch.AdamW]
OPTIONS = [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"clipnorm": 0.5}]
DTYPES = [torch.float32, torch.bfloat16]


def parameter(size=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
    made.grad = torch.randn(size, generator=generator).to(dtype)
    return made


def calls(function):
    """How many functions, of Python and of C, are called meanwhile: a measure of time that does not vary."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # finalizers of other tests
    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_apart_they_do_what_one_optimizer_does(cls, options, dtype):
    apart, together = ([parameter(3 + i, dtype, i) for i in range(20)] for _ in range(2))
    optimizers, one = [cls([p], lr=0.1, **options) for p in apart], cls(together, lr=0.1, **options)
    for k in range(5):
        for p, twin in zip(apart, together, strict=True):
            p.grad = p.detach() * (1 + k)
            twin.grad = p.grad.clone()
        for optimizer in (*optimizers, one):
            optimizer.step()
        assert all(map(torch.equal, apart, together))
    assert all(each.state[p]["step"] == 5 for each, p in zip(optimizers, apart, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_each_is_made_and_stepped_with_few_calls(cls, dtype):
    """A step after the first is that of native code. The bounds leave room for the calls of other versions of PyTorch."""
    cls([parameter(dtype=dtype)]).step()  # what is done once for each process
    p = parameter(dtype=dtype)
    made, optimizer = calls(lambda: cls([p]))
    assert made < 220
    first, _ = calls(optimizer.step)
    assert first < 480
    second, _ = calls(optimizer.step)
    assert second < 110
    for _ in range(3):
        later, _ = calls(optimizer.step)
        assert later < 40


def test_each_holds_few_objects():
    """With more the garbage collector goes through all objects of the process while hundreds are made."""
    params = [parameter() for _ in range(100)]
    fastadam.torch.AdamW([parameter()]).step()
    gc.collect()
    before = len(gc.get_objects())
    optimizers = [fastadam.torch.AdamW([p]) for p in params]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    gc.collect()
    assert (len(gc.get_objects()) - before) / len(params) < 75


@pytest.mark.weekly  # test_torch_apart.py has the same of more optimizers
def test_all_share_the_threads_of_one_pool():
    code = f"""{COUNT_THREADS}
import fastadam, torch
from fastadam.torch import AdamW
fastadam.set_num_threads(3)
def optimizer():
    p = torch.nn.Parameter(torch.ones(300_000))
    p.grad = torch.ones(300_000)
    return AdamW([p])
optimizers = [optimizer() for _ in range(40)]
before = native_threads()
optimizers[0].step()
one = native_threads()
for each in optimizers * 2:
    each.step()
print(one - before, native_threads() - before)
"""
    result = run_python(code)
    assert result.stdout.split() == ["2", "2"], result.stderr


def test_they_leave_no_memory_behind():
    code = """
import gc, resource, torch, fastadam.torch
params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(100)]
for p in params:
    p.grad = torch.ones(1000)
def kilobytes():
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def work(rounds):
    for _ in range(rounds):
        for each in [fastadam.torch.AdamW([p]) for p in params]:
            for _ in range(3):
                each.step()
work(5)
before = kilobytes()
work(20)
print(kilobytes() - before)
"""
    result = run_python(code)
    assert int(result.stdout) < 2000, result.stderr  # 2000 optimizers; the moments of one take 8 kB
