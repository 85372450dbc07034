"""Ctrl-C in a step of fastadam.torch that takes several native calls: all of them have been made, or none."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from test_interrupts import at_a_call, interrupted  # noqa: E402


def numbers(*sizes):
    return [torch.nn.Parameter(torch.linspace(1, 2, n, dtype=torch.float64)) for n in sizes]


def step(optimizer, params):
    for place, param in enumerate({id(p): p for p in params}.values()):
        param.grad = torch.arange(param.numel(), dtype=torch.float64).reshape(param.shape) + place - 1
    optimizer.step()


def alone(steps):
    return lambda: (numbers(3, 4, 5), steps, lambda p: p)


def twice():
    x, y = numbers(3, 4)
    return [x, y, x], 2, lambda p: p


def columns():
    base = torch.linspace(1, 2, 24, dtype=torch.float64).reshape(6, 4)
    return [torch.nn.Parameter(base[:, k]) for k in (0, 2)], 2, lambda p: p


def groups():
    return numbers(3, 4, 5), 1, lambda p: [{"params": p[:1]}, {"params": p[1:], "lr": 0.2}]


def trained(make):
    params, steps, group = make()
    optimizer = fastadam.torch.AdamW(group(params), lr=0.1)
    for _ in range(steps):
        step(optimizer, params)
    return optimizer, params


def state_of(optimizer, params):
    return [p.detach().clone() for p in params] + [
        tensor.clone() for p in params for _, tensor in sorted(optimizer.state[p].items())
    ]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


KINDS = {
    "first": alone(0),
    "second": alone(1),
    "repeated": alone(4),
    "twice": twice,
    "columns": columns,
    "groups": groups,
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a generator that is closed
@pytest.mark.parametrize("kind", KINDS)
def test_a_step(kind):
    outcomes = []
    for made in (False, True):
        optimizer, params = trained(KINDS[kind])
        if made:
            step(optimizer, params)
        before = state_of(optimizer, params)
        step(optimizer, params)
        outcomes.append((before, state_of(optimizer, params)))
    for place in itertools.count():
        optimizer, params = trained(KINDS[kind])
        error = interrupted(lambda o=optimizer, p=params: step(o, p), place, at_a_call)
        if error is None:
            break
        optimizer.sync()
        found = state_of(optimizer, params)
        which = [same(found, outcome) for outcome, _ in outcomes]
        assert any(which), f"torn at place {place}"
        step(optimizer, params)
        assert same(state_of(optimizer, params), outcomes[which.index(True)][1])
    assert place > 10
