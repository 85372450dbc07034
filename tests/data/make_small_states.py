"""Ask bitsandbytes and torchao for their 8-bit states half way, for how they read them, and for what they make of them.

In an environment of its own:  pip install torch bitsandbytes torchao  and  python tests/data/make_small_states.py
For every optimizer small_states.npz holds, under "name/": the parameter half way ("there"), the tensors of its state,
the moments as the library itself decodes them ("m", "v"), and the parameter after the last step ("after"). Gradients are
those of `gradients` in tests/small_states.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
import torchao.optim

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_states import DATA, HALF, STEPS, gradients, start

BITSANDBYTES = {
    "Adam8bit": lambda p: bnb.optim.Adam8bit(p, lr=1e-2, weight_decay=0.1, min_8bit_size=1),
    "AdamW8bit": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=1),
    "AdamW32bit": lambda p: bnb.optim.AdamW32bit(p, lr=1e-2),
}
TORCHAO = {"torchao8": torchao.optim.AdamW8bit, "torchaofp8": torchao.optim.AdamWFp8}


def train(optimizer, parameter, steps):
    for step in steps:
        parameter.grad = torch.from_numpy(gradients(step, parameter.numel()))
        optimizer.step()


def of_bitsandbytes(make):
    parameter = torch.nn.Parameter(torch.from_numpy(start(600)))  # two blocks and a part
    optimizer = make([parameter])
    train(optimizer, parameter, range(HALF))
    found = {"there": parameter.detach().numpy().copy()}
    saved = optimizer.state_dict()["state"][0]["__bnb_optimizer_quant_state__"]
    found |= {name: tensor.numpy().copy() for name, tensor in saved.items()}
    for number, name in enumerate("mv", 1):
        moment = saved[f"state{number}"]
        if moment.dtype == torch.uint8:
            qmap, absmax = saved[f"qmap{number}"], saved[f"absmax{number}"]
            moment = torch.ops.bitsandbytes.dequantize_blockwise(moment, absmax, qmap, 256, torch.float32)
        found[name] = moment.numpy().copy()
    train(optimizer, parameter, range(HALF, STEPS))
    return found | {"after": parameter.detach().numpy()}


def of_torchao(make):
    parameter = torch.nn.Parameter(torch.from_numpy(start(4096)))  # the fewest that it quantizes
    optimizer = make([parameter], lr=1e-2)
    train(optimizer, parameter, range(HALF))
    found = {"there": parameter.detach().numpy().copy()}
    state = optimizer.state_dict()["state"][0]
    for name, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
        moment = state[key]
        found[name] = moment.dequantize().numpy().copy()
        for part in moment.tensor_attrs:
            tensor = getattr(moment, part)
            found[f"{name}_{part}"] = (tensor.view(torch.uint8) if part == "codes" else tensor).numpy().copy()
    train(optimizer, parameter, range(HALF, STEPS))
    return found | {"after": parameter.detach().numpy()}


if __name__ == "__main__":
    found = {name: of_bitsandbytes(make) for name, make in BITSANDBYTES.items()}
    found |= {name: of_torchao(make) for name, make in TORCHAO.items()}
    arrays = {f"{name}/{key}": array for name, arrays in found.items() for key, array in arrays.items()}
    np.savez_compressed(DATA, **arrays)
    print(DATA, DATA.stat().st_size, bnb.__version__, torchao.__version__, torch.__version__)
