"""Steps in which other parameters have gradients each time: layer drop, mixtures of experts, frozen and thawed layers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from helpers import run_python, weekly  # noqa: E402
from torch_twins import PAIRS, Twins, parameters  # noqa: E402

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


@pytest.mark.parametrize("mode", ["dense", *weekly("lazy")])
def test_memory_is_bounded_with_layer_drop(mode):
    """After the caches have filled, resident memory stays what it is."""
    found = run_python(MEMORY.format(count=200, mode=mode, steps=300))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2])
def test_step_counts_that_differ_are_one_native_call(dtype, groups):
    """After layer drop; the step is repeated natively with the count of each parameter."""
    found = []
    for cls in PAIRS["AdamW"]:
        weights = parameters(*[(3,), (2, 2), ()] * 3, dtype=dtype)
        optimizer = cls([{"params": weights[k::groups]} for k in range(groups)], lr=0.1, amsgrad=True)
        for k in range(12):
            for place, weight in enumerate(weights):
                weight.grad = torch.full_like(weight, 1.0 + place - k) if k > 5 or place % (k + 1) == 0 else None
            optimizer.step()
        found.append(([w.detach() for w in weights], [float(optimizer.state[w]["step"]) for w in weights]))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=tolerance)
    assert found[1][1] == found[0][1]
    assert len(set(found[0][1])) > 3
    assert optimizer._stepper._repeated is not None
    assert len(optimizer._stepper._last) == groups


def test_a_count_that_is_not_whole_is_refused_before_anything_is_written():
    """Natively repeated or not, and whichever parameter has it."""
    weights = parameters((3,), (2,), (4,))
    optimizer = fastadam.torch.Adam(weights, lr=0.1)
    for stepped in ([0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]):
        for place, weight in enumerate(weights):
            weight.grad = torch.ones_like(weight) if place in stepped else None
        optimizer.step()
    before = [w.detach().clone() for w in weights]
    optimizer.state[weights[1]]["step"].fill_(2.5)
    with pytest.raises(
        ValueError, match=r"state of param_groups\[0\]\['params'\]\[1\]: step 2.5, expected a whole number"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert [float(optimizer.state[w]["step"]) for w in weights] == [5, 2.5, 3]


def test_counts_and_memory_stay_right_where_each_gradient_has_to_be_converted():
    """Strides, other dtypes of gradients, and counts that differ, in one set."""
    found = []
    for cls in PAIRS["Adam"]:
        weights = [torch.nn.Parameter(torch.ones(4, 2, dtype=torch.float64)[:, 0]), *parameters((3,), (2,))]
        optimizer = cls(weights, lr=0.1)
        for k in range(6):
            for place, weight in enumerate(weights):
                weight.grad = torch.arange(1.0, 1 + weight.numel(), dtype=torch.float64) if k >= place else None
            optimizer.step()
        found.append(([w.detach() for w in weights], [float(optimizer.state[w]["step"]) for w in weights]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
