"""The handlers of JAX on CUDA devices: on a fake one they pass the tests of those of the CPU, bits and all."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu import skip_or_fail
from helpers import run_python, weekly

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
jnp = jax.numpy
import fastadam.jax as fj  # noqa: E402  after importorskip
from fastadam.jax import _operation as operation  # noqa: E402

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "chosen",
    [
        ["test_jax_refusals.py"],
        ["test_jax_sparse.py"],
        *weekly(
            ["test_jax_adam.py", "-k", "not trajectory and not chain"],
            ["test_jax_sharded.py", "-k", "table"],
            ["test_jax_ffi.py", "-k", "not threads and not scan"],
        ),
    ],
    ids=lambda chosen: chosen[0],
)
def test_the_tests_of_the_cpu_pass(fake_jax_cuda, chosen):
    """But for those that take long there."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fake_xla", "-p", "no:cacheprovider", *chosen]
    environment = {
        **os.environ,
        "FASTADAM_FAKE_JAX_CUDA": str(fake_jax_cuda),
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    if chosen[0] != "test_jax_sharded.py":  # whose steps are made in processes of their own
        assert int(re.search(r"(\d+) launches", result.stdout)[1]) > 0


def test_the_plan_of_arrays_that_come_again_is_kept(fake_jax_cuda):
    code = """
import functools, jax, jax.numpy as jnp
import fake_xla, fastadam.jax as fj
params = {"w": jnp.ones((30, 4)), "b": jnp.ones(7)}
state, gradients = fj.init(params), jax.tree.map(jnp.sin, params)
step = jax.jit(functools.partial(fj.fused_update, learning_rate=0.1), donate_argnums=(0, 2))
ids, rows = jnp.array([3, 1, 3]), jnp.ones((3, 4))
table, moments = jnp.ones((30, 4)), fj.init(params["w"])
sparse = jax.jit(functools.partial(fj.sparse_update, learning_rate=0.1), donate_argnums=(0, 3))
counts = []
for _ in range(5):
    params, state = step(params, gradients, state)
    table, moments = sparse(table, ids, rows, moments)
    jax.block_until_ready((params, table))
    counts.append((fake_xla.calls("cudaMalloc"), fake_xla.calls("cudaLaunchKernelEx")))
print(*[a > b for (a, _), (b, _) in zip(counts[2:], counts[1:])], counts[-1][1] > counts[-2][1])
"""
    result = run_python(code, FASTADAM_FAKE_JAX_CUDA=str(fake_jax_cuda), PYTHONPATH=str(TESTS))
    assert result.stdout.split() == ["False", "False", "False", "True"], result.stderr


@pytest.fixture
def on_a_gpu(request):
    if not operation.has_cuda():
        skip_or_fail(request.config, "needs a GPU, JAX for it and a CUDA build of fastadam")
    return jax.devices("cuda")[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_gpu_has_the_bits_of_the_cpu(on_a_gpu, dtype, amsgrad):
    results = []
    for device in (on_a_gpu, jax.devices("cpu")[0]):
        params = {"w": jnp.linspace(-1, 1, 100_000).astype(dtype), "b": jnp.ones((3, 5), dtype)}
        params = jax.device_put(params, device)
        state = jax.device_put(fj.init(params, amsgrad=amsgrad), device)
        step = jax.jit(functools.partial(fj.fused_update, learning_rate=0.1, weight_decay=0.01), donate_argnums=(0, 2))
        for i in range(5):
            gradients = jax.tree.map(lambda w, i=i: jnp.roll(w, i), params)
            params, state = step(params, gradients, state)
        results.append(jax.device_get((params, state)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_rows_on_a_gpu_have_the_bits_of_the_cpu(on_a_gpu, mode):
    results = []
    for device in (on_a_gpu, jax.devices("cpu")[0]):
        table = jax.device_put(jnp.linspace(-1, 1, 6400).reshape(100, 64), device)
        state = jax.device_put(fj.init(table), device)
        step = jax.jit(functools.partial(fj.sparse_update, learning_rate=0.1, mode=mode), donate_argnums=(0, 3))
        for i in range(5):
            ids = jnp.array([3, 99, 3, i])
            table, state = step(table, jax.device_put(ids, device), table[ids], state)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"indices\[1\]: 100 is not a row"):
            jax.block_until_ready(step(table + 0, jax.device_put(ids.at[1].set(100), device), table[ids], state))
        results.append(np.asarray(table))
    assert results[0].tobytes() == results[1].tobytes()
