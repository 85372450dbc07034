"""The handlers of JAX on CUDA devices: on a fake one they pass the tests of those of the CPU, bits and all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_python

pytest.importorskip("jax")
pytest.importorskip("optax")

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "chosen",
    [
        ["test_jax_adam.py"],
        ["test_jax_refusals.py"],
        ["test_jax_sparse.py"],
        ["test_jax_sharded.py"],
        ["test_jax_ffi.py", "-k", "not threads and not scan"],  # which take long there
    ],
    ids=lambda chosen: chosen[0],
)
def test_the_tests_of_the_cpu_pass(fake_jax_cuda, chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fake_xla", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "FASTADAM_FAKE_JAX_CUDA": str(fake_jax_cuda), "PYTHONPATH": str(TESTS)}
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    if chosen != ["test_jax_sharded.py"]:  # whose steps are made in processes of their own
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
