"""A small network with dropout, its data, and the bits of a training, for tests of what surrounds the optimizer."""

from __future__ import annotations

import torch

BATCHES = 8


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 7), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(7, 1))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 8, generator=generator) for _ in range(BATCHES)]


def bits(model, optimizer):
    """Parameters and states, in the order of the groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    slots = [optimizer.state[p][name] for p in params for name in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in [*model.parameters(), *slots]]


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
