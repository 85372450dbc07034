"""Steps in buckets and what can come between: mistakes, other calls, Ctrl-C."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
import time
from pathlib import Path

import fastadam
import numpy as np
import pytest
from helpers import COUNT_THREADS, run_python, slow, weekly
from test_buckets import built, give, pairs_of, same, state_of
from test_interrupts import either_way, interrupted, require_free
from test_interrupts_by_signals import alarm  # noqa: F401 - a fixture

# ---- mistakes --------------------------------------------------------------------------------------------------------


def opened(early=True, **options):
    optimizer, variables = built(**options)
    optimizer.apply_gradients(pairs_of(variables))
    optimizer.begin_step(early=early)
    return optimizer, variables


def refuses(error, pattern, call, optimizer, variables):
    before = copy.deepcopy(variables)
    with pytest.raises(error, match=pattern):
        call()
    assert same(before, variables)
    optimizer.step_bucket(pairs_of(variables))  # the step goes on
    assert optimizer.end_step() == 2


@pytest.mark.parametrize("early", [False, True])
def test_a_variable_that_comes_twice(early):
    optimizer, variables = opened(early)
    [first, *_] = pairs_of(variables)
    for pairs in ([first, first], [first, (first[0], variables[0][:])]):
        with pytest.raises(ValueError, match=r"grads_and_vars\[1\] was given before in this step, expected it once"):
            optimizer.step_bucket(pairs)
    optimizer.step_bucket([first]).result(30)
    with pytest.raises(ValueError, match=r"grads_and_vars\[0\] was given before in this step"):
        optimizer.step_bucket([first])
    optimizer.step_bucket(pairs_of(variables[1:]))
    again, others = built()
    for _ in range(2):
        again.apply_gradients(pairs_of(others))
    assert optimizer.end_step() == 2
    assert same(state_of(optimizer, variables), state_of(again, others))


MISTAKES = {
    "an unknown variable": (ValueError, "without slots, expected build", lambda w: [(np.ones(9), np.ones(9))]),
    "a wrong shape": (ValueError, r"grads\[0\]", lambda w: [(np.ones(9, np.float32), w[0])]),
    "no pair": (TypeError, "expected a .gradient, variable. pair", lambda w: [w[0]]),
    "no list": (TypeError, "grads_and_vars", lambda w: 5),
    "no gradient": (ValueError, "No gradients provided", lambda w: [(None, w[0])]),
    "no numbers": (TypeError, r"grads\[0\]", lambda w: [("text", w[0])]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_bucket_that_is_refused_is_not_taken(kind):
    error, pattern, pairs = MISTAKES[kind]
    optimizer, variables = opened()
    refuses(error, pattern, lambda: optimizer.step_bucket(pairs(variables)), optimizer, variables)


def test_an_option_that_changes_the_state_during_a_step():
    optimizer, variables = opened()
    optimizer.amsgrad = True
    with pytest.raises(RuntimeError, match="options were set since begin_step"):
        optimizer.step_bucket(pairs_of(variables))
    optimizer.abort_step()
    optimizer.begin_step()
    with pytest.raises(ValueError, match="without slots, expected build"):
        optimizer.step_bucket(pairs_of(variables))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: with begin_step.., expected None"),
        ({"sparse_update": "deferred"}, "sparse_update: with begin_step.., expected 'dense' or 'lazy'"),
        ({"sparse_update": "deferred_fast"}, "sparse_update: with begin_step.., expected 'dense' or 'lazy'"),
        ({"telemetry": True}, "telemetry: with begin_step.., expected False"),
    ],
)
def test_options_that_need_all_gradients_at_once(options, pattern):
    with pytest.raises(ValueError, match=pattern):
        fastadam.Adam(**options).begin_step()


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [({"early": 1}, TypeError, "early"), ({"threads": 0}, ValueError, "threads"), ({"threads": "2"}, TypeError, "thr")],
)
def test_arguments_of_begin_step(arguments, error, pattern):
    for optimizer in (fastadam.Adam(), fastadam.LossScaleOptimizer(fastadam.Adam())):
        with pytest.raises(error, match=pattern):
            optimizer.begin_step(**arguments)
        with pytest.raises(RuntimeError, match="step_bucket: no step is open, expected begin_step"):
            optimizer.step_bucket([])


OTHERS = {
    "begin_step": lambda o, w: o.begin_step(),
    "apply_gradients": lambda o, w: o.apply_gradients(pairs_of(w)),
    "minimize": lambda o, w: o.minimize(lambda: 1.0, w, gradient=lambda *_: [g for g, _ in pairs_of(w)]),
    "get_weights": lambda o, w: o.get_weights(),
    "weights": lambda o, w: o.weights,
    "set_weights": lambda o, w: o.set_weights([]),
    "get_config": lambda o, w: o.get_config(),
    "save": lambda o, w: o.save("unwritten"),
    "pickle": lambda o, w: pickle.dumps(o),
    "copy": lambda o, w: copy.deepcopy(o),
    "copy.copy": lambda o, w: copy.copy(o),
    "build": lambda o, w: o.build(w),
    "get_slot": lambda o, w: o.get_slot(w[0], "m"),
    "add_slot": lambda o, w: o.add_slot(w[0], "x"),
    "gather": lambda o, w: o.gather(w[0], [0]),
    "sync": lambda o, w: o.sync(),
    "iterations": lambda o, w: setattr(o, "iterations", 5),
    "sparse_update": lambda o, w: setattr(o, "sparse_update", "lazy"),
    "averages": lambda o, w: o.averages(w),
    "finalize_variable_values": lambda o, w: o.finalize_variable_values(w),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_refused_while_a_step_is_open(name):
    optimizer, variables = opened()
    optimizer.step_bucket(pairs_of(variables[:1])).result(30)
    before = copy.deepcopy(variables)
    with pytest.raises(RuntimeError, match=r": a step is open, expected end_step\(\) or abort_step\(\) first"):
        OTHERS[name](optimizer, variables)
    assert same(before, variables)
    assert optimizer.end_step() == 2
    assert not Path("unwritten").exists()
    optimizer.get_weights()


# ---- many steps, many optimizers -------------------------------------------------------------------------------------


def test_two_optimizers_at_once():
    pair = [opened() for _ in range(2)]
    for place in range(3):
        for optimizer, variables in pair:
            optimizer.step_bucket(pairs_of(variables[place : place + 1]))
    pair[0][0].abort_step()
    assert pair[1][0].end_step() == 2
    assert pair[0][0].iterations == 1
    assert not same(pair[0][1], pair[1][1])


def test_a_dropped_optimizer_leaves_its_variables_alone():
    optimizer, variables = opened()
    optimizer.step_bucket(pairs_of(variables)).result(30)
    before = copy.deepcopy(variables)
    del optimizer
    gc.collect()
    assert same(before, variables)
    again = fastadam.Adam(0.1)
    again.apply_gradients(pairs_of(variables))
    assert again.iterations == 1


LEAKS = f"""{COUNT_THREADS}
import gc, resource, fastadam, numpy as np
def cycle(optimizer, k):
    optimizer.begin_step(early=True)
    for place in range(3):
        optimizer.step_bucket([(np.ones_like(w), w) for w in variables[(place + k) % 3 : (place + k) % 3 + 1]])
    (optimizer.end_step, optimizer.abort_step)[k % 5 == 0]()
variables = [np.ones(20_000, np.float32) for _ in range(3)]
def run(count):
    for k in range(count):
        optimizer = fastadam.Adam(0.1, global_clipnorm=1e9 if k % 2 else 1.0)
        optimizer.build(variables)
        for step in range(10):
            cycle(optimizer, step)
        if k % 10 == 0:
            optimizer.begin_step(early=True)  # and dropped
            optimizer.step_bucket([(np.ones_like(w), w) for w in variables])
    gc.collect()
run(50)
threads, memory = native_threads(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(300)
import time
end = time.monotonic() + 10
while native_threads() > threads and time.monotonic() < end:
    time.sleep(0.01)
print(native_threads() <= threads + 1, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 20_000)
"""


@pytest.mark.slow
def test_many_steps_leave_no_threads_and_no_memory():
    result = run_python(LEAKS)
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_logs_of_other_buckets_are_dropped():
    optimizer, variables = built((100,) * 12)
    for seed in range(40):
        optimizer.begin_step(early=True)
        give(optimizer, pairs_of(variables), random.Random(seed))
        optimizer.end_step()
    assert len(optimizer._parts.runtime.logs) <= 12


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def step(optimizer, variables):
    optimizer.begin_step(early=True)
    for pair in pairs_of(variables, 2.0):
        optimizer.step_bucket([pair])
    optimizer.end_step()


def outcomes_of(**options):
    found = []
    for made in (False, True):
        optimizer, variables = built(**options)
        optimizer.apply_gradients(pairs_of(variables))
        if made:
            step(optimizer, variables)
        found.append(copy.deepcopy(state_of(optimizer, variables)))
    return found


def check_whole(optimizer, variables, outcomes):
    optimizer.abort_step()
    require_free(optimizer)
    found = state_of(optimizer, variables)
    made = int(optimizer.iterations) == 2
    assert same(found, outcomes[made])
    optimizer.apply_gradients(pairs_of(variables))
    assert optimizer.iterations == 2 + made


MORE_OPTIONS = [{"global_clipnorm": 1e9}, {"use_ema": True}]
OPTIONS = [{}, {"global_clipnorm": 1.0}, *slow(*MORE_OPTIONS)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [*OPTIONS[:2], *weekly(*MORE_OPTIONS)], ids=str)
@either_way
def test_a_signal_at_any_line(options, way):
    outcomes = outcomes_of(**options)
    for place in itertools.count():
        optimizer, variables = built(**options)
        optimizer.apply_gradients(pairs_of(variables))
        error = interrupted(lambda o=optimizer, v=variables: step(o, v), place, way)
        if error is None:
            break
        check_whole(optimizer, variables, outcomes)
    assert place > 50


# What a handler raises inside of the callback of a weak reference, Python prints and drops.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_signal_at_a_random_time(options, alarm):  # noqa: F811
    outcomes = outcomes_of(**options)
    start = time.perf_counter()
    step(*built(**options))
    seconds, choose, raised, end = time.perf_counter() - start, random.Random(0), 0, time.monotonic() + 10
    while raised < 60 and time.monotonic() < end:
        optimizer, variables = built(**options)
        optimizer.apply_gradients(pairs_of(variables))
        alarm.set(choose.random() * 2 * seconds)
        try:
            alarm.is_armed = True
            step(optimizer, variables)
            alarm.is_armed = False
        except KeyboardInterrupt:
            raised += 1
        alarm.wait()
        check_whole(optimizer, variables, outcomes)
    assert raised
