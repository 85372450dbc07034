"""The contenders of bench/host.py: AdamW with float32 state, and a bfloat16 copy of the variables after every step.

`gradients` is the dtype in which they come; `clip` the largest norm of all gradients together.
"""

from __future__ import annotations

import os

import numpy as np
from common import Contender
from dense_contenders import HYPER, buffers, floor_of, rounded, slots, tensor

WEIGHT_DECAY = 0.01
PRIME_RL_FLAGS = {  # those of its loader
    "AVX512": "-DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512 -mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma",
    "AVX2": "-DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c",
}


def _buffers(sizes, gradients):
    """Variables, gradients, and zeros for the copies."""
    variables, float32 = buffers(sizes)
    copies = [rounded(np.zeros(size, np.float32), "bfloat16") for size in sizes]
    return variables, [rounded(g, gradients) for g in float32], copies


def floor(sizes, gradients="float32", streamed=False):
    """The same reads and writes with next to no arithmetic; `streamed`: the copy is written past the caches."""
    variables, arrays, copies = _buffers(sizes, gradients)
    function = f"floor_copy_{gradients}{'_streamed' if streamed else ''}"
    return floor_of(function, [variables, arrays, *slots(variables, 2)], copies)


def fastadam_function(sizes, gradients="float32", clip=None):
    """`fastadam.adam_step` on arrays that the caller owns."""
    import fastadam

    variables, arrays, copies = _buffers(sizes, gradients)
    m, v = slots(variables, 2)
    held = {"step": 0}
    options = HYPER | {"weight_decay": WEIGHT_DECAY, "global_clipnorm": clip, "copies": copies}

    def step():
        held["step"] += 1
        fastadam.adam_step(variables, arrays, m, v, step=held["step"], **options)

    return _ours(step, variables, copies, epsilon_hat=True)


def fastadam_optimizer(sizes, gradients="float32", clip=None, telemetry=False):
    """`fastadam.AdamW.apply_gradients`."""
    import fastadam

    variables, arrays, copies = _buffers(sizes, gradients)
    optimizer = fastadam.AdamW(**HYPER, weight_decay=WEIGHT_DECAY, global_clipnorm=clip, telemetry=telemetry)
    pairs = list(zip(arrays, variables, strict=True))
    return _ours(lambda: optimizer.apply_gradients(pairs, copies=copies), variables, copies, epsilon_hat=True)


def fastadam_torch(sizes, gradients="float32", clip=None, buckets=None):
    """`fastadam.torch.AdamW.step()`; `buckets`: in so many parts, from the last parameter to the first."""
    import fastadam.torch

    variables, arrays, copies = _buffers(sizes, gradients)
    parameters = _parameters(variables, arrays)
    group = {"params": parameters, "compute_params": [tensor(copy) for copy in copies]}
    options = {} if clip is None else {"global_clipnorm": clip}
    optimizer = fastadam.torch.AdamW([group], lr=0.001, eps=1e-7, weight_decay=WEIGHT_DECAY, **options)
    if buckets is None:
        return _ours(optimizer.step, variables, copies)
    parts = _parts(parameters[::-1], buckets)

    def step():
        optimizer.begin_step()
        for part in parts:
            optimizer.step_bucket(part)
        optimizer.end_step()

    return _ours(step, variables, copies)


def torch(sizes, gradients="float32", clip=None):
    """What users of PyTorch call: cast, `clip_grad_norm_`, `AdamW(fused=True)`, copy; one call for all casts."""
    import torch

    variables, arrays, copies = _buffers(sizes, gradients)
    parameters, come, computes = _parameters(variables), [tensor(g) for g in arrays], [tensor(c) for c in copies]
    optimizer = torch.optim.AdamW(parameters, lr=0.001, eps=1e-7, weight_decay=WEIGHT_DECAY, fused=True)
    return _ours(_sequence(optimizer, parameters, come, computes, clip), variables, copies)


def deepspeed(sizes, gradients="float32", clip=None):
    """The same sequence around `DeepSpeedCPUAdam`: ZeRO-Offload keeps float32 masters, and casts and clips before."""
    import logging

    logging.disable(logging.WARNING)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    variables, arrays, copies = _buffers(sizes, gradients)
    parameters, come, computes = _parameters(variables), [tensor(g) for g in arrays], [tensor(c) for c in copies]
    optimizer = DeepSpeedCPUAdam(parameters, lr=0.001, eps=1e-7, weight_decay=WEIGHT_DECAY)
    return _ours(_sequence(optimizer, parameters, come, computes, clip), variables, copies)


def prime_rl(sizes, gradients="float32"):
    """`adamw_step` of prime-rl; PRIME_RL_KERNEL names its source, which is built as its loader builds it."""
    import torch
    from torch.utils.cpp_extension import load

    isa = torch.backends.cpu.get_cpu_capability().upper()
    flags = PRIME_RL_FLAGS.get(isa, "").split()
    kernel = load(
        f"prime_rl_cpu_adam_{isa.lower()}",
        [os.environ["PRIME_RL_KERNEL"]],
        extra_cflags=["-O3", "-fopenmp", *flags],
        extra_ldflags=["-fopenmp"],
    )
    variables, arrays, copies = _buffers(sizes, gradients)
    lists = [[tensor(array) for array in of] for of in (variables, arrays)]
    lists += [[torch.zeros_like(w) for w in lists[0]] for _ in range(2)]
    lists += [[torch.zeros(()) for _ in sizes], [tensor(copy) for copy in copies]]
    numbers = [0.001, 0.9, 0.999, WEIGHT_DECAY, 1e-7, 1.0]
    return _ours(lambda: kernel.adamw_step(*lists, *numbers), variables, copies)


def _ours(step, variables, copies, epsilon_hat=False):
    """A contender that steps these buffers."""
    return Contender(step, lambda: variables, epsilon_hat, weight_decay=WEIGHT_DECAY, copies=lambda: copies)


def _parameters(variables, gradients=()):
    """The buffers as parameters of PyTorch, with gradients in their own dtype if there are any."""
    import torch

    parameters = [torch.nn.Parameter(tensor(w)) for w in variables]
    for parameter, gradient in zip(parameters, gradients, strict=False):
        value = tensor(gradient)
        if value.dtype != parameter.dtype:
            parameter.grad_dtype = value.dtype
        parameter.grad = value
    return parameters


def _sequence(optimizer, parameters, gradients, computes, clip):
    """The step of torch and DeepSpeed: every part of it a pass of its own over the list."""
    import torch

    masters = [parameter.detach() for parameter in parameters]
    cast = gradients[0].dtype != torch.float32
    float32 = [torch.empty_like(w) for w in masters] if cast else gradients
    for parameter, gradient in zip(parameters, float32, strict=True):
        parameter.grad = gradient

    def step():
        if cast:
            torch._foreach_copy_(float32, gradients)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        torch._foreach_copy_(computes, masters)

    return step


def _parts(parameters, count):
    """The list in `count` runs of about as many numbers; a tensor that is larger than a run counts as one run."""
    largest = sum(parameter.numel() for parameter in parameters) / count
    weights = [min(parameter.numel(), largest) for parameter in parameters]
    total, before = sum(weights), 0.0
    parts = [[] for _ in range(count)]
    for parameter, weight in zip(parameters, weights, strict=True):
        parts[int((before + weight / 2) / total * count)].append(parameter)
        before += weight
    return [part for part in parts if part]
