"""The contenders: every one steps the same NumPy buffers (sizes, alignment, values) with the same hyperparameters."""

from __future__ import annotations

import json
import sys

import numpy as np
from common import load_floor, serve

HYPER = {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}


def buffers(sizes: list[int], state: str = "none") -> list[list[np.ndarray]]:
    """Variables and gradients as NumPy allocates them; m and v too ("numpy") or as fastadam's slots ("placed")."""
    from fastadam._backend import _cpu
    from fastadam.slots import zeros_like_variable

    rng = np.random.default_rng(0)
    variables, gradients = ([rng.standard_normal(n, dtype=np.float32) for n in sizes] for _ in range(2))
    if state == "none":
        return [variables, gradients]
    new = np.zeros_like if state == "numpy" else lambda w: zeros_like_variable(_cpu.Buffer(w, "vars"))
    return [variables, gradients, *([new(w) for w in variables] for _ in range(2))]


def floor(sizes):
    """The same reads and writes with next to no arithmetic, its state placed as well as ours."""
    kernel = load_floor()
    tensors = list(zip(*buffers(sizes, "placed"), strict=True))
    calls = [(*(array.ctypes.data for array in arrays), arrays[0].size) for arrays in tensors]

    def step(_keep_alive=tensors):
        for call in calls:
            kernel(*call)

    return step


def fastadam_apply(sizes, **options):
    """`Adam.apply_gradients`, what a user calls."""
    import fastadam

    variables, gradients = buffers(sizes)
    optimizer = fastadam.Adam(**HYPER, **options)
    pairs = list(zip(gradients, variables, strict=True))
    return lambda: optimizer.apply_gradients(pairs)


def fastadam_kernel(sizes):
    """The native call alone, with its checks of the gradients."""
    import fastadam
    from fastadam._backend import _cpu

    variables, gradients, m, v = buffers(sizes, "placed")
    positions = list(range(len(sizes)))
    views = [_cpu.Buffer(w, f"vars[{i}]") for i, w in enumerate(variables)]
    plan = _cpu.Plan(views, m, v, None, None, [False] * len(views), positions)
    hyper = fastadam.hyper.StepHyper(step=10, **HYPER)
    return lambda: plan.step(gradients, hyper, [], None)


def numpy_plain(sizes):
    """What a user of NumPy writes."""
    variables, gradients, m_list, v_list = buffers(sizes, "numpy")
    state = {"t": 0}

    def step():
        state["t"] += 1
        t = state["t"]
        alpha = np.float32(HYPER["learning_rate"] * np.sqrt(1 - 0.999**t) / (1 - 0.9**t))
        for w, g, m, v in zip(variables, gradients, m_list, v_list, strict=True):
            m[...] = 0.9 * m + 0.1 * g
            v[...] = 0.999 * v + 0.001 * g * g
            w -= alpha * m / (np.sqrt(v) + 1e-7)

    return step


def _torch_parameters(sizes):
    import torch

    variables, gradients = ([torch.from_numpy(a) for a in arrays] for arrays in buffers(sizes))
    for w, g in zip(variables, gradients, strict=True):
        w.grad = g
    return torch, variables


def torch_step(sizes):
    """`torch.optim.Adam(fused=True).step()`."""
    torch, variables = _torch_parameters(sizes)
    optimizer = torch.optim.Adam(variables, lr=0.001, eps=1e-7, fused=True)
    return optimizer.step


def torch_kernel(sizes):
    """`torch._fused_adam_`, the native call under `step()`."""
    torch, variables = _torch_parameters(sizes)
    state = [[torch.zeros_like(w) for w in variables] for _ in range(2)]
    steps = [torch.tensor(10.0) for _ in variables]
    gradients = [w.grad for w in variables]
    options = {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-7, "amsgrad": False}
    options |= {"maximize": False, "grad_scale": None, "found_inf": None}
    return lambda: torch._fused_adam_(variables, gradients, *state, [], steps, **options)


if __name__ == "__main__":
    name, sizes, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    serve(globals()[name](sizes, **options))
