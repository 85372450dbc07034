"""What bench/on_gpu.py times keeps its optimizer and arrays alive: nobody else does, and freed memory faults here."""

from __future__ import annotations

import gc
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from compiled import ROOT


@pytest.fixture
def bench(fake_gpu, monkeypatch):
    """The benchmark, with CuPy's random arrays on the fake GPU."""
    rng = np.random.RandomState(0)
    random = SimpleNamespace(
        standard_normal=lambda shape, dtype: fake_gpu.array(rng.standard_normal(shape).astype(dtype)),
        randint=lambda low, high, count: fake_gpu.array(rng.randint(low, high, count)),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(random=random, float32=np.float32))
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in ("common", "models", "on_gpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("on_gpu")
    for name in ("common", "models", "on_gpu"):
        sys.modules.pop(name, None)


STEPS = {
    "a list": lambda bench: bench.ours([20000, 3]),
    **{mode: lambda bench, mode=mode: bench.table(mode, 50, 4, 6) for mode in ("dense", "lazy", "deferred")},
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_of_the_bench_runs_when_only_the_step_is_left(bench, fake_gpu, kind):
    step = STEPS[kind](bench)
    for _ in range(3):
        gc.collect()
        fake_gpu.runtime.fake_cuda_flush()
        step()
    fake_gpu.clear_log()
    step()
    fake_gpu.native.Context(0).wait()  # raises if a launch has touched freed memory
    assert list(fake_gpu.calls("cudaLaunchKernelEx"))
