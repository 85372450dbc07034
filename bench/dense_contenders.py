"""The contenders of bench/compare.py: every one steps the same NumPy buffers (sizes, values) with the same numbers.

Each is given its best configuration: what its documentation advises, state in huge pages, no conversions in the step.
"""

from __future__ import annotations

import ctypes

import numpy as np
from common import Contender, load_floor

HYPER = {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in a dtype of NumPy, or in bfloat16 of ml_dtypes."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16, copy=False)
    return array.astype(dtype, copy=False)


def buffers(sizes: list[int], dtype: str = "float32") -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Variables and gradients as NumPy allocates them."""
    rng = np.random.default_rng(0)
    return tuple([rounded(rng.standard_normal(n, dtype=np.float32), dtype) for n in sizes] for _ in range(2))


def slots(variables: list[np.ndarray], count: int) -> list[list[np.ndarray]]:
    """Zeros, placed as fastadam places m and v."""
    from fastadam._core.native.arrays import zeros_like_variable
    from fastadam._core.native.backend import _cpu

    return [[zeros_like_variable(_cpu.Buffer(w, "vars")) for w in variables] for _ in range(count)]


class _List(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("offsets", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("var", "grad", "m", "v", "vhat", "copy", "low")),
    )


def floor_of(function: str, streams: list[list[np.ndarray]], copies=None, low=None) -> Contender:
    """A function of bench/floor.cpp on these streams: variables, gradients, m, v and, if there is one, vhat."""
    kernel = load_floor(function)
    sizes = [array.size for array in streams[0]]
    offsets = (ctypes.c_int64 * (len(sizes) + 1))(*np.cumsum([0, *sizes]).tolist())
    named = dict(zip(("var", "grad", "m", "v", "vhat"), streams, strict=False))
    named |= {name: arrays for name, arrays in (("copy", copies), ("low", low)) if arrays}
    pointers = {k: (ctypes.c_void_p * len(sizes))(*(a.ctypes.data for a in arrays)) for k, arrays in named.items()}
    tensors = ctypes.byref(_List(len(sizes), offsets, **pointers))
    return Contender(lambda _keep_alive=named: kernel(tensors))


def floor(sizes, dtype="float32", amsgrad=False):
    """The same reads and writes with next to no arithmetic, its state placed as ours."""
    variables, gradients = buffers(sizes, dtype)
    function = "floor_amsgrad" if amsgrad else "floor_float32" if dtype == "float32" else "floor_half"
    return floor_of(function, [variables, gradients, *slots(variables, 3 if amsgrad else 2)])


def divider(sizes):
    """A square root and a division for every element, and no traffic: the limit in a cache."""
    return floor_of("floor_divider", [buffers(sizes)[0]])


def fastadam(sizes, dtype="float32", threads=None, **options):
    """`Adam.apply_gradients`, what a user calls."""
    import fastadam

    if threads is not None:
        fastadam.set_num_threads(threads)
    variables, gradients = buffers(sizes, dtype)
    optimizer = fastadam.Adam(**HYPER, **options)
    pairs = list(zip(gradients, variables, strict=True))
    return Contender(lambda: optimizer.apply_gradients(pairs), lambda: variables, epsilon_hat=True)


def fastadam_kernel(sizes):
    """The native call alone, with its checks of the gradients."""
    import fastadam
    from fastadam._core.native.backend import _cpu

    variables, gradients = buffers(sizes)
    m, v = slots(variables, 2)
    positions = list(range(len(sizes)))
    views = [_cpu.Buffer(w, f"vars[{i}]") for i, w in enumerate(variables)]
    plan = _cpu.Plan(views, {"m": m, "v": v}, [False] * len(views), positions, False, [None] * len(views))
    hyper = fastadam._core.native.plan.StepHyper(step=10, **HYPER)
    step = lambda: plan.step(gradients, hyper, [], None)  # noqa: E731
    return Contender(step, lambda: variables, epsilon_hat=True, fixed_step=10)


def numpy(sizes):
    """What a user of NumPy writes."""
    variables, gradients = buffers(sizes)
    m_list, v_list = ([np.zeros_like(w) for w in variables] for _ in range(2))
    state = {"t": 0}

    def step():
        state["t"] += 1
        t = state["t"]
        alpha = np.float32(HYPER["learning_rate"] * np.sqrt(1 - 0.999**t) / (1 - 0.9**t))
        for w, g, m, v in zip(variables, gradients, m_list, v_list, strict=True):
            m[...] = 0.9 * m + 0.1 * g
            v[...] = 0.999 * v + 0.001 * g * g
            w -= alpha * m / (np.sqrt(v) + 1e-7)

    return Contender(step, lambda: variables, epsilon_hat=True)


def tensor(array):
    """The memory of an array as a tensor of PyTorch."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _parameters(sizes, dtype="float32"):
    """The buffers as parameters of PyTorch with gradients."""
    import torch

    variables, gradients = ([tensor(array) for array in arrays] for arrays in buffers(sizes, dtype))
    parameters = [torch.nn.Parameter(w) for w in variables]
    for w, g in zip(parameters, gradients, strict=True):
        w.grad = g
    return torch, parameters, lambda: [w.detach().float().numpy() for w in parameters]


def torch(sizes, dtype="float32", amsgrad=False):
    """`torch.optim.Adam(fused=True).step()`; of half parameters its moments are half, too."""
    torch, parameters, read = _parameters(sizes, dtype)
    optimizer = torch.optim.Adam(parameters, lr=0.001, eps=1e-7, amsgrad=amsgrad, fused=True)
    return Contender(optimizer.step, read)


def torch_kernel(sizes):
    """`torch._fused_adam_`, the native call under `step()`."""
    torch, parameters, read = _parameters(sizes)
    variables = [w.detach() for w in parameters]
    state = [[torch.zeros_like(w) for w in variables] for _ in range(2)]
    steps = [torch.tensor(10.0) for _ in variables]
    gradients = [w.grad for w in parameters]
    options = {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-7, "amsgrad": False}
    options |= {"maximize": False, "grad_scale": None, "found_inf": None}
    step = lambda: torch._fused_adam_(variables, gradients, *state, [], steps, **options)  # noqa: E731
    return Contender(step, read, fixed_step=10)


def deepspeed(sizes, dtype="float32"):
    """`DeepSpeedCPUAdam`, float32 moments; compiled when it is first used."""
    import logging

    logging.disable(logging.WARNING)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    _, parameters, read = _parameters(sizes, dtype)
    optimizer = DeepSpeedCPUAdam(parameters, lr=0.001, eps=1e-7, adamw_mode=False, fp32_optimizer_states=True)
    return Contender(optimizer.step, read)


def bitsandbytes(sizes):
    """`bitsandbytes.optim.Adam32bit`, which runs eager operations of torch on a CPU."""
    import bitsandbytes as bnb

    _, parameters, read = _parameters(sizes)
    optimizer = bnb.optim.Adam32bit(parameters, lr=0.001, eps=1e-7)
    return Contender(optimizer.step, read)


def optax(sizes):
    """The whole update in one `jax.jit`, parameters and state donated."""
    import jax
    import optax

    variables, gradients = ([jax.numpy.array(a) for a in arrays] for arrays in buffers(sizes))
    adam = optax.adam(0.001, eps=1e-7)
    held = {"now": (variables, adam.init(variables))}

    def update(now, gradients):
        updates, state = adam.update(gradients, now[1])
        return optax.apply_updates(now[0], updates), state

    run = jax.jit(update, donate_argnums=0)

    def step():
        held["now"] = jax.block_until_ready(run(held["now"], gradients))

    return Contender(step, lambda: [np.array(w) for w in held["now"][0]])


def tensorflow(sizes):
    """`tf.keras.optimizers.legacy.Adam` in a tf.function."""
    import tensorflow as tf

    variables, gradients = buffers(sizes)
    variables, gradients = [tf.Variable(w) for w in variables], [tf.constant(g) for g in gradients]
    optimizer = tf.keras.optimizers.legacy.Adam(**HYPER)

    @tf.function
    def step():
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    return Contender(step, lambda: [w.numpy() for w in variables], epsilon_hat=True)
