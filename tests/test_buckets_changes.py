"""Gradients that change while a step in buckets is open, and what is left of the step when it is over."""

from __future__ import annotations

import copy
import weakref

import pytest
from fastadam._core.native.plan import Plan
from test_buckets import built, pairs_of, same, state_of


def test_a_changed_gradient_leaves_the_variables_as_they_were():
    optimizer, variables = built(global_clipnorm=50.0)
    pairs = pairs_of(variables, 0.1)
    for _ in range(2):
        optimizer.apply_gradients(pairs)
    before = copy.deepcopy(state_of(optimizer, variables))
    for finish in (optimizer.abort_step, optimizer.end_step):
        optimizer.begin_step(early=True)
        pairs = pairs_of(variables, 0.2)
        pairs[2][0][:] = 99.0  # the step is clipped
        for pair in pairs:
            optimizer.step_bucket([pair]).result(30)
        pairs[1][0][1] = 7.0
        with pytest.raises(RuntimeError, match=r"gradients of variables\[1\] of build\(\): changed since step_bucket"):
            finish()
        after = state_of(optimizer, variables)
        changed = [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if not same([a], [b])]
        assert changed == [5, 8]  # m and v of the second variable
        optimizer.set_weights(before[3:])


def test_a_gradient_that_changes_while_the_step_is_made_again(monkeypatch):
    """The step is whole and counted, and the error says so."""
    optimizer, variables = built(global_clipnorm=1.0)
    twin, others = built(global_clipnorm=1.0)
    for _ in range(2):
        twin.apply_gradients(pairs_of(others))
    optimizer.apply_gradients(pairs_of(variables))
    optimizer.begin_step(early=True)
    pairs = pairs_of(variables)
    for pair in pairs:
        optimizer.step_bucket([pair]).result(30)

    def change(*_):
        pairs[1][0].fill(7)
        return []

    monkeypatch.setattr(Plan, "changed_since", change)
    with pytest.raises(RuntimeError, match=r"variables\[1\] of build\(\): changed .* The step was made, but moments"):
        optimizer.end_step()
    assert optimizer.iterations == 2
    assert same(variables[:1] + variables[2:], others[:1] + others[2:])


def test_a_step_that_is_over_runs_no_python_when_it_is_dropped():
    """Exceptions of signal handlers are lost there."""
    optimizer, variables = built()
    optimizer.begin_step()
    step = optimizer._parts.runtime.open
    optimizer.step_bucket(pairs_of(variables))
    optimizer.end_step()
    assert all(ref.__callback__ is None for ref in weakref.getweakrefs(step))
