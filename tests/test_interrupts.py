"""Ctrl-C at any line of Python: a call has either happened or not."""

from __future__ import annotations

import contextlib
import copy
import itertools
import linecache
import sys

import fastadam
import numpy as np
import pytest
from helpers import bits


def interrupted(call, place):
    """Raise KeyboardInterrupt at one line of the package, as a signal handler may; False if there are fewer lines."""
    lines = itertools.count()
    raised = False

    def trace(frame, event, _argument):
        nonlocal raised
        if "fastadam" not in frame.f_code.co_filename:
            return None
        # A `with` is traced again before it is left, where CPython runs no signal handler.
        is_with = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")
        if event == "line" and not raised and not is_with and next(lines) == place:
            raised = True
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            call()
    finally:
        sys.settrace(before)
    return raised


def state_of(optimizer, variables):
    return [bits(np.array(array)) for array in (*variables, *optimizer.get_weights())]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def ones(*shapes):
    return [np.ones(shape, np.float32) for shape in shapes]


def trained(steps=5, **options):
    variables = ones(4, (2, 3), 5)
    optimizer = fastadam.Adam(0.1, **options)
    for step in range(steps):
        optimizer.apply_gradients([(np.full_like(w, step + 1), w) for w in variables])
    return optimizer, variables


def check_all_places(make, call, go_on):
    """Interrupt ``call`` at every line; whatever comes after it must be as if it had, or had not, been made."""
    outcomes = []
    for made in (False, True):
        optimizer, variables = make()
        if made:
            call(optimizer, variables)
        at_once = state_of(optimizer, variables)
        go_on(optimizer, variables)
        outcomes.append((at_once, state_of(optimizer, variables)))
    assert not same(outcomes[0][0], outcomes[1][0])
    seen = set()
    for place in itertools.count():
        optimizer, variables = make()
        if not interrupted(lambda o=optimizer, v=variables: call(o, v), place):
            break
        found = state_of(optimizer, variables)
        which = [same(found, outcome) for outcome, _ in outcomes]
        assert any(which), f"torn at line {place}"
        go_on(optimizer, variables)
        assert same(state_of(optimizer, variables), outcomes[which.index(True)][1]), f"line {place}"
        seen.add(which.index(True))
    assert place > 10
    return seen


def test_set_weights():
    other = [array + np.ones_like(array) for array in trained()[0].get_weights()]
    check_all_places(
        trained,
        lambda optimizer, variables: optimizer.set_weights(other),
        lambda optimizer, variables: optimizer.apply_gradients([(np.ones_like(w), w) for w in variables]),
    )


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_call_that_accumulates(calls):
    """The second variable comes in the middle of a cycle, where its old accumulator must not count."""

    def make():
        optimizer, variables = trained(3, gradient_accumulation_steps=3)
        for _ in range(calls):
            optimizer.apply_gradients([(np.ones_like(variables[0]), variables[0])])
        return optimizer, variables

    def go_on(optimizer, variables):
        while int(optimizer.weights[0]) < 7:
            optimizer.apply_gradients([(np.ones_like(variables[2]), variables[2])])

    check_all_places(make, lambda o, v: o.apply_gradients([(np.full_like(w, 0.5), w) for w in v[:2]]), go_on)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"use_ema": True}, {"clipnorm": 1.0}], ids=str)
def test_a_step(options):
    def step(optimizer, variables):
        optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])

    check_all_places(lambda: trained(**options), step, step)


def test_a_first_step():
    def step(optimizer, variables):
        optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])

    def make():
        return fastadam.Adam(0.1), ones(3, 4)

    optimizer, variables = make()
    step(optimizer, variables)
    once = [w.copy() for w in variables]
    for place in itertools.count():
        optimizer, variables = make()
        if not interrupted(lambda o=optimizer, v=variables: step(o, v), place):
            break
        made = int(optimizer.iterations)
        assert all(np.array_equal(w, o if made else np.ones_like(w)) for w, o in zip(variables, once, strict=True))
        again = copy.deepcopy(variables)
        step(optimizer, variables)
        assert all((w < a).all() for w, a in zip(variables, again, strict=True))
        assert optimizer.iterations == made + 1


@pytest.mark.parametrize("bad", [False, True])
def test_a_step_under_a_loss_scale_and_its_scale_belong_together(bad):
    """Every second good step doubles the scale."""

    def make():
        optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1), 8.0, 2)
        variables = ones(3, 4)
        optimizer.apply_gradients([(np.full_like(w, 8), w) for w in variables])
        return optimizer, variables

    def step(optimizer, variables):
        gradient = np.inf if bad else 8.0
        optimizer.apply_gradients([(np.full_like(w, gradient), w) for w in variables])

    for place in itertools.count():
        optimizer, variables = make()
        if not interrupted(lambda o=optimizer, v=variables: step(o, v), place):
            break
        made = int(optimizer.iterations) == 2
        found = optimizer.dynamic_scale, optimizer.step_counter
        assert found == ((16.0, 0) if made else (8.0, 1)) or (bad and found == (4.0, 0)), place
        assert not (bad and made)
