"""Ctrl-C at any line of Python: a call has either happened or not."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import linecache
import sys
import threading

import fastadam
import numpy as np
import pytest
from helpers import bits, weekly


def at_a_line(place):
    """A trace function that raises KeyboardInterrupt at one line of the package, and what says whether it did."""
    lines, raised = itertools.count(), []

    def trace(frame, event, _argument):
        if "fastadam" not in frame.f_code.co_filename:
            return None
        if event != "line" or raised or is_safe(frame.f_code.co_filename, frame.f_lineno):
            return trace
        if next(lines) == place:
            raised.append(place)
            raise KeyboardInterrupt
        return trace

    return sys.settrace, trace, raised


@functools.cache
def is_safe(file, number):
    """Whether CPython runs no signal handler before this line.

    A ``with`` is traced again before it is left. A ``try`` has no instruction, and ``finally`` follows a native call.
    """
    before, line = (linecache.getline(file, number + k).strip() for k in (-1, 0))
    return line.startswith(("with ", "try:")) or before == "finally:"


def at_a_call(place):
    """The same before the first instruction of one function, or after a native call: there CPython runs handlers."""
    calls, raised = itertools.count(), []

    def profile(frame, event, _argument):
        is_ours = any(part in frame.f_code.co_filename for part in ("fastadam", "contextlib"))
        if event in ("call", "c_return") and is_ours and not raised and next(calls) == place:
            raised.append(place)
            sys.setprofile(None)
            raise KeyboardInterrupt

    return sys.setprofile, profile, raised


either_way = pytest.mark.parametrize("way", [*weekly(at_a_line), at_a_call])


def interrupted(call, place, way=at_a_line):
    """The KeyboardInterrupt raised at one place of a call, as a signal handler may; None if there are fewer places.

    It is alive as long as the caller holds it, as ``sys.last_exc`` does after Ctrl-C in a session.
    """
    install, function, raised = way(place)
    error = None
    gc.disable()  # or it runs the `__del__` of earlier cases in the call, which drops what a handler raises
    install(function)
    try:
        call()
    except KeyboardInterrupt as caught:
        error = caught
    finally:
        install(None)
        gc.enable()
    return (error or KeyboardInterrupt()) if raised else None


def require_free(optimizer):
    """No lock of the optimizer is held."""
    runtime, free = optimizer._parts.runtime, []

    def try_it():
        free.append(runtime.lock.acquire(timeout=1))
        if free[0]:
            runtime.lock.release()

    other = threading.Thread(target=try_it)
    other.start()
    other.join()
    assert free[0]
    assert not runtime.step_lock.locked()


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


def check_all_places(way, make, call, go_on, *, changes=True):
    """Interrupt ``call`` at every line; whatever comes after it must be as if it had, or had not, been made."""
    outcomes = []
    for made in (False, True):
        optimizer, variables = make()
        if made:
            call(optimizer, variables)
        at_once = state_of(optimizer, variables)
        go_on(optimizer, variables)
        outcomes.append((at_once, state_of(optimizer, variables)))
    assert changes != same(outcomes[0][0], outcomes[1][0])
    seen = set()
    for place in itertools.count():
        optimizer, variables = make()
        error = interrupted(lambda o=optimizer, v=variables: call(o, v), place, way)
        if error is None:
            break
        require_free(optimizer)
        found = state_of(optimizer, variables)
        which = [same(found, outcome) for outcome, _ in outcomes]
        assert any(which), f"torn at line {place}"
        go_on(optimizer, variables)
        assert same(state_of(optimizer, variables), outcomes[which.index(True)][1]), f"line {place}"
        seen.add(which.index(True))
    assert place > 10
    return seen


def evaluate(optimizer, variables):
    with optimizer.averages(variables):
        pass


def step_with_halves(optimizer, variables):
    optimizer.apply_gradients([(np.full_like(w, 0.5), w) for w in variables])


@either_way
def test_averages_are_in_the_variables_for_the_block_alone(way):
    check_all_places(way, lambda: trained(use_ema=True), evaluate, step_with_halves, changes=False)


@pytest.mark.slow
@either_way
def test_averages_that_are_kept(way):
    check_all_places(way, lambda: trained(use_ema=True), lambda o, v: o.finalize_variable_values(v), step_with_halves)


def sparse(rows):
    return fastadam.IndexedSlices(np.full((len(rows), 2), 0.5, np.float32), rows)


def with_rows_that_wait():
    tables = ones((9, 2), (9, 2))
    optimizer = fastadam.Adam(0.1, sparse_update="deferred")
    for k in range(3):
        step_on_rows(optimizer, tables, [k, k + 1])
    return optimizer, tables


def step_on_rows(optimizer, tables, rows):
    for table in tables:
        optimizer.gather(table, rows)
    optimizer.apply_gradients([(sparse(rows), table) for table in tables])


@either_way
def test_a_step_of_tables_whose_rows_wait(way):
    def step(optimizer, tables):
        step_on_rows(optimizer, tables, [1, 5])

    check_all_places(way, with_rows_that_wait, step, step)


@either_way
@pytest.mark.parametrize(
    "call",
    [lambda o, t: o.sync(), lambda o, t: o.gather(t[1], [0, 4]), lambda o, t: setattr(o, "sparse_update", "dense")],
    ids=["sync", "gather", "sparse_update"],
)
def test_rows_are_brought_up_to_date(call, way):
    def step(optimizer, tables):
        step_on_rows(optimizer, tables, [1, 5])

    check_all_places(way, with_rows_that_wait, call, step, changes=False)


@pytest.mark.slow
@either_way
def test_load_and_save(way, tmp_path):
    path = tmp_path / "state.safetensors"
    optimizer, variables = trained()
    optimizer.save(path)
    before, whole = state_of(optimizer, variables), path.read_bytes()
    for call in (lambda: optimizer.save(path), lambda: fastadam.Adam.load(path, variables)):
        for place in itertools.count():
            if interrupted(call, place, way) is None:
                break
            require_free(optimizer)
            assert same(state_of(optimizer, variables), before)
            assert path.read_bytes() == whole
        assert place > 10
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a generator that is closed
@either_way
def test_a_loss_that_reads_variables(way):
    pytest.importorskip("autograd")
    variable = fastadam.Variable(np.ones(3, np.float32), "w")
    for place in itertools.count():
        optimizer = fastadam.Adam(0.1)
        error = interrupted(
            lambda o=optimizer: o.minimize(lambda: (variable.value**2).sum(), [variable], gradient="autograd"),
            place,
            way,
        )
        if error is None:
            break
        require_free(optimizer)
        assert type(variable.value) is np.ndarray, place
    assert place > 10


@either_way
def test_set_weights(way):
    other = [array + np.ones_like(array) for array in trained()[0].get_weights()]
    check_all_places(
        way,
        trained,
        lambda optimizer, variables: optimizer.set_weights(other),
        lambda optimizer, variables: optimizer.apply_gradients([(np.ones_like(w), w) for w in variables]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0, 1, 2])
@either_way
def test_a_call_that_accumulates(calls, way):
    """The second variable comes in the middle of a cycle, where its old accumulator must not count."""

    def make():
        optimizer, variables = trained(3, gradient_accumulation_steps=3)
        for _ in range(calls):
            optimizer.apply_gradients([(np.ones_like(variables[0]), variables[0])])
        return optimizer, variables

    def go_on(optimizer, variables):
        while int(optimizer.weights[0]) < 7:
            optimizer.apply_gradients([(np.ones_like(variables[2]), variables[2])])

    check_all_places(way, make, lambda o, v: o.apply_gradients([(np.full_like(w, 0.5), w) for w in v[:2]]), go_on)


@pytest.mark.slow
@pytest.mark.usefixtures("rows_wait")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a generator that is closed
@pytest.mark.parametrize("mode", ["deferred", "lazy"])
@pytest.mark.parametrize("calls", [2, 3])
@either_way
def test_a_call_that_accumulates_rows(calls, mode, way):
    def give(optimizer, variables, *ids):
        slices = fastadam.IndexedSlices(np.full((len(ids), 2), 0.5, np.float32), np.array(ids))
        optimizer.apply_gradients([(slices, variables[0])])

    def make():
        variables = ones((400, 2))
        optimizer = fastadam.Adam(0.1, gradient_accumulation_steps=3, use_ema=True, sparse_update=mode)
        for call in range(3 + calls):
            give(optimizer, variables, call, 9)
        return optimizer, variables

    def go_on(optimizer, variables):
        while int(optimizer.weights[0]) < 9:
            give(optimizer, variables, 7)

    check_all_places(way, make, lambda o, v: give(o, v, 3, 20), go_on)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"use_ema": True}, {"clipnorm": 1.0}], ids=str)
@either_way
def test_a_step(options, way):
    def step(optimizer, variables):
        optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])

    check_all_places(way, lambda: trained(**options), step, step)


@either_way
def test_a_first_step(way):
    def step(optimizer, variables):
        optimizer.apply_gradients([(np.ones_like(w), w) for w in variables])

    def make():
        return fastadam.Adam(0.1), ones(3, 4)

    optimizer, variables = make()
    step(optimizer, variables)
    once = [w.copy() for w in variables]
    for place in itertools.count():
        optimizer, variables = make()
        if not interrupted(lambda o=optimizer, v=variables: step(o, v), place, way):
            break
        require_free(getattr(optimizer, "inner_optimizer", optimizer))
        made = int(optimizer.iterations)
        assert all(np.array_equal(w, o if made else np.ones_like(w)) for w, o in zip(variables, once, strict=True))
        again = copy.deepcopy(variables)
        step(optimizer, variables)
        assert all((w < a).all() for w, a in zip(variables, again, strict=True))
        assert optimizer.iterations == made + 1


@pytest.mark.parametrize("bad", [False, True])
@either_way
def test_a_step_under_a_loss_scale_and_its_scale_belong_together(bad, way):
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
        if not interrupted(lambda o=optimizer, v=variables: step(o, v), place, way):
            break
        require_free(getattr(optimizer, "inner_optimizer", optimizer))
        made = int(optimizer.iterations) == 2
        found = optimizer.dynamic_scale, optimizer.step_counter
        assert found == ((16.0, 0) if made else (8.0, 1)) or (bad and found == (4.0, 0)), place
        assert not (bad and made)
