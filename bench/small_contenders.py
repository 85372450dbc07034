"""The contenders of bench/small.py: AdamW with moments in few bits and split masters.

`dtype` is that of the variables and gradients: bfloat16 with `master="split"`.
"""

from __future__ import annotations

import numpy as np
from common import Contender
from dense_contenders import buffers, floor_of, slots, tensor
from host_contenders import WEIGHT_DECAY

HYPER = {"lr": 0.001, "eps": 1e-7, "weight_decay": WEIGHT_DECAY}
ITEMS = {"float32": np.float32, "bfloat16": np.uint16, "8bit": np.uint8}


def floor(sizes, dtype="float32", moments="float32", master=None):
    """The same reads and writes with next to no arithmetic."""
    variables, gradients = buffers(sizes, dtype)
    if moments == "float32":
        return floor_of("floor_float32", [variables, gradients, *slots(variables, 2)])
    m, v = ([np.zeros(size, ITEMS[moments]) for size in sizes] for _ in range(2))
    low = [np.zeros(size, np.int16) for size in sizes] if master else None
    function = f"floor_{'split_' if master else ''}{moments}_moments"
    return floor_of(function, [variables, gradients, m, v], low=low)


def fastadam(sizes, dtype="float32", **choice):
    """`fastadam.torch.AdamW.step()`; `choice`: its `moments` and `master`."""
    import fastadam.torch

    return _stepped(sizes, dtype, lambda params: fastadam.torch.AdamW(params, **HYPER, **choice))


def bitsandbytes(sizes, moments="8bit"):
    """`bitsandbytes.optim.AdamW8bit`, which on a CPU decodes, runs eager operations of torch, and encodes."""
    import bitsandbytes

    make = {"8bit": bitsandbytes.optim.AdamW8bit, "float32": bitsandbytes.optim.AdamW32bit}[moments]
    return _stepped(sizes, "float32", lambda params: make(params, **HYPER))


def torchao(sizes, moments="8bit"):
    """`torchao.optim.AdamW8bit`, which compiles the step of every shape when it is first made."""
    import torchao.optim

    make = {"8bit": torchao.optim.AdamW8bit, "fp8": torchao.optim.AdamWFp8}[moments]
    return _stepped(sizes, "float32", lambda params: make(params, **HYPER))


def _stepped(sizes, dtype, make):
    """An optimizer of PyTorch on the buffers."""
    import torch

    variables, gradients = buffers(sizes, dtype)
    parameters = [torch.nn.Parameter(tensor(w)) for w in variables]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = tensor(gradient)
    optimizer = make(parameters)

    def read():
        """The variables, or the float32 masters that they and the low halves make up."""
        lows = [optimizer.state[parameter].get("master_low") for parameter in parameters]
        return [
            w if low is None else ((tensor(w).view(torch.int16).int() << 16) + low.int()).view(torch.float32).numpy()
            for w, low in zip(variables, lows, strict=True)
        ]

    return Contender(optimizer.step, read, weight_decay=WEIGHT_DECAY)
