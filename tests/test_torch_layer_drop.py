"""Steps in which other parameters have gradients each time: layer drop, mixtures of experts, frozen and thawed layers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from helpers import run_python  # noqa: E402
from torch_twins import Twins, parameters  # noqa: E402

MEMORY = """
import pathlib, random
import torch, fastadam.torch

def megabytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

random.seed(0)
weights = [torch.nn.Parameter(torch.ones(8)) for _ in range({count})]
optimizer = fastadam.torch.Adam(weights, sparse_update={mode!r})
ones, rows = torch.ones(8), torch.ones(8).to_sparse()
for k in range({steps}):
    if k == {steps} // 3:
        before = megabytes()
    for weight in weights:
        dense = rows if {mode!r} == "lazy" and random.random() < 0.3 else ones
        weight.grad = dense if random.random() < 0.5 else None
    optimizer.step()
assert megabytes() < before + 8, (before, megabytes())
assert sum(len(each.params) for each in optimizer._stepper.partitions) <= 8192
"""


@pytest.mark.parametrize(("count", "mode", "steps"), [(200, "dense", 300), (200, "lazy", 300)])
def test_memory_is_bounded_with_layer_drop(count, mode, steps):
    """After the caches have filled, resident memory stays what it is."""
    found = run_python(MEMORY.format(count=count, mode=mode, steps=steps))
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=str)
def test_layer_drop_is_torch_whatever_was_forgotten(monkeypatch, options):
    """With a cache so small that patterns come back after their sets were forgotten."""
    monkeypatch.setattr("fastadam.torch._partition._MOST_PARAMETERS", 20)
    twins = Twins("AdamW", parameters(*[(3,)] * 12), lr=0.1, **options)
    generator = torch.Generator().manual_seed(0)
    patterns = [torch.nonzero(torch.rand(12, generator=generator) < 0.5).flatten().tolist() for _ in range(8)]
    for k in range(60):
        twins.step(patterns[k * 5 % 8] if k % 7 else None)
    assert twins.difference() < 1e-12
    counts = [
        [float(o.state[p]["step"]) for p in ps]
        for o, ps in ((twins.reference, twins.theirs), (twins.tested, twins.ours))
    ]
    assert counts[0] == counts[1]
    assert len(set(counts[0])) > 3
    assert len(twins.tested._stepper.partitions) == 4
