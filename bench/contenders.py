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
    from fastadam.placement import zeros_like_variable

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
    histories = [None] * len(views)
    plan = _cpu.Plan(views, {"m": m, "v": v}, [False] * len(views), positions, False, histories)
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


def _table(sizes, uniform=False):
    """A table of rows x width, and 400 different batches of ids, Zipf(1.1) over shuffled rows, with their values."""
    rows, width, count = sizes
    rng = np.random.default_rng(0)
    table = rng.standard_normal((rows, width), dtype=np.float32) * np.float32(0.05)
    weights = 1 / np.arange(1, rows + 1) ** (0 if uniform else 1.1)
    cumulated = np.cumsum(weights / weights.sum())
    shuffled = rng.permutation(rows)
    batches = [shuffled[np.searchsorted(cumulated, rng.random(count)).clip(0, rows - 1)] for _ in range(400)]
    values = rng.standard_normal((count, width), dtype=np.float32) * np.float32(1e-3)
    return table, batches, values


def _cycle(batches, step, warm_up):
    state = {"at": 0}

    def next_step():
        step(batches[state["at"] % len(batches)])
        state["at"] += 1

    for _ in range(warm_up):
        next_step()
    return next_step


def table_floor(sizes):
    """3 reads and 3 writes of the whole table."""
    kernel = load_floor("table_floor", 3)
    arrays = [array[0] for array in buffers([sizes[0] * sizes[1]], "placed")]
    pointers = [arrays[i].ctypes.data for i in (0, 2, 3)]
    return lambda _keep_alive=arrays: kernel(*pointers, arrays[0].size)


def table_fastadam(sizes, mode, uniform=False, crossover=None):
    """`Adam(sparse_update=mode).apply_gradients` of IndexedSlices."""
    import fastadam

    table, batches, values = _table(sizes, uniform)
    if crossover is not None:
        fastadam.staleness.crossover = lambda *_: crossover
    optimizer = fastadam.Adam(**HYPER, sparse_update=mode)
    step = lambda ids: optimizer.apply_gradients([(fastadam.IndexedSlices(values, ids), table)])  # noqa: E731
    waiting = 4 * sizes[0] // sizes[2] if uniform else 400  # until gaps are as long as they get
    return _cycle(batches, step, 5 if mode == "dense" else min(400, waiting))


def table_torch(sizes):
    """`torch.optim.SparseAdam`, the lazy rule, on the uncoalesced gradient that nn.Embedding gives."""
    import torch

    table, batches, values = _table(sizes)
    parameter = torch.nn.Parameter(torch.from_numpy(table))
    optimizer = torch.optim.SparseAdam([parameter], lr=0.001, eps=1e-7)
    rows = torch.from_numpy(values)

    def step(ids):
        indices = torch.from_numpy(ids)[None]
        parameter.grad = torch.sparse_coo_tensor(indices, rows, parameter.shape, check_invariants=False)
        optimizer.step()

    return _cycle(batches, step, 20)


def table_tensorflow(sizes):
    """`tf.keras.optimizers.legacy.Adam` of tf.IndexedSlices, in a tf.function."""
    import tensorflow as tf

    table, batches, values = _table(sizes)
    variable, rows = tf.Variable(table), tf.constant(values)
    optimizer = tf.keras.optimizers.legacy.Adam(**HYPER)
    shape = tf.constant(table.shape)

    @tf.function
    def run(ids):
        optimizer.apply_gradients([(tf.IndexedSlices(rows, ids, shape), variable)])

    return _cycle([tf.constant(ids) for ids in batches[:40]], run, 2)


if __name__ == "__main__":
    name, sizes, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    serve(globals()[name](sizes, **options))
