"""CUDA graphs: the native steps that fastadam.torch captures count t on the GPU; fastadam.Adam refuses a capture."""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest
from fastadam._core.native.backend import _cpu
from test_cuda import F32, same
from test_cuda_numbers import HYPER, OPTIONS, Plans, dense, gradients_for

COUNTER = np.zeros((), np.int64)


def capture(plans, gradients, hyper, factors=()):
    """A graph of one step, with gradients where they are now."""
    native, plan, _ = plans.plans[1]
    placed = gradients_for(native, gradients, plans.gpu.array)
    plans.gpu.begin_capture()
    try:
        assert not plan.step(placed, hyper, list(factors), COUNTER)
    finally:
        graph = plans.gpu.end_capture()
    return graph, placed


def replay(plans, graph, gradients, hyper, factors=()):
    """On the GPU, and the same step on the host."""
    plans.gpu.replay(graph)
    plans.made += 1
    known = hyper._replace(step=plans.made)
    assert not plans.plans[0][1].step(gradients_for(_cpu, gradients), known, list(factors), COUNTER.copy())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS)
def test_replays_have_the_bits_of_the_host(gpu, dtype, options):
    plans = Plans(gpu, dense(dtype, 0), average=options == "average")
    hyper, gradients = HYPER._replace(**OPTIONS[options]), dense(dtype, 1)
    factors = [-1.0] * len(gradients) if options == "l2" else []
    plans.step(gradients, hyper, scale=1.0, factors=factors)
    plans.set_numbers()
    graph, _kept = capture(plans, gradients, hyper, factors)
    plans.check()
    for _ in range(3):
        replay(plans, graph, gradients, hyper, factors)
    plans.check()
    plans.step(gradients, hyper, scale=1.0, factors=factors)
    plans.set_numbers()
    replay(plans, graph, gradients, hyper, factors)
    plans.check()


@pytest.mark.parametrize("beta_1", [0.0, 0.5, 0.9])
def test_powers_of_the_betas_have_the_bits_of_the_host_far_out(gpu, beta_1):
    plans, gradients = Plans(gpu, dense("float32", 0)), dense("float32", 1)
    hyper = HYPER._replace(beta_1=beta_1, beta_2=0.98)
    plans.step(gradients, hyper, scale=1.0)
    plans.set_numbers()
    graph, _kept = capture(plans, gradients, hyper)
    for plans.made in (57, 348, 684, 5000):
        plans.step(gradients, hyper, scale=1.0)
        replay(plans, graph, gradients, hyper)
        plans.check()


@pytest.mark.parametrize("lazy", [False, True])
def test_rows_in_a_graph_until_an_index_is_no_row(gpu, lazy):
    rng = np.random.RandomState(0)
    plans = Plans(gpu, [rng.standard_normal((30, 3)).astype(F32)], lazy=lazy)
    gradients = [(rng.standard_normal((4, 3)).astype(F32), np.array([3, 3, 1, 29]))]
    hyper = HYPER._replace(clip_norm=0.1)
    plans.step(gradients, hyper, scale=1.0)
    plans.set_numbers()
    indices = gpu.array(gradients[0][1])
    slices, context = gpu.native.Slices(gpu.array(gradients[0][0]), indices), plans.plans[1][2]
    gpu.begin_capture()
    assert not plans.plans[1][1].step([slices], hyper, [], COUNTER)
    graph = gpu.end_capture()
    for _ in range(3):
        replay(plans, graph, gradients, hyper)
    plans.check()
    fastadam._core.native.arrays.assign(indices, np.array([3, 30, 1, 29]))
    gpu.replay(graph)
    gpu.replay(graph)
    context.wait()
    steps, message = context.take_failure()
    assert steps == 4
    assert message.startswith("grads[0].indices[1]: 30 is not a row")
    plans.check()
    fastadam._core.native.arrays.assign(indices, gradients[0][1])
    replay(plans, graph, gradients, hyper)
    plans.check()


def test_what_a_graph_would_have_to_ask_the_host_is_refused(gpu):
    values, indices = np.ones((2, 3), F32), np.array([3, 4])
    plans = Plans(gpu, [np.ones((30, 3), F32)])
    native, plan, _ = plans.plans[1]
    plans.step([(values, indices)], HYPER, scale=1.0)
    plans.set_numbers()
    near_1, plan_near_1 = HYPER._replace(beta_2=1 - 1e-7), Plans(gpu, [np.ones((30, 3), F32)]).plans[1][1]
    plan_near_1.step(gradients_for(native, [np.ones((30, 3), F32)], gpu.array), near_1, [], COUNTER.copy())
    on_gpu = gradients_for(native, [(values, indices)], gpu.array)
    other = gradients_for(native, [np.ones((30, 3), F32)], gpu.array)
    on_host = [native.Slices(gpu.array(values), indices)]
    calls = {
        "indices in CPU memory": lambda: plan.step(on_host, HYPER, [], COUNTER),
        "a step that waits": lambda: plan.step(on_gpu, HYPER._replace(require_finite=True), [], COUNTER),
        "a beta is too close to 1": lambda: plan_near_1.step(other, near_1, [], COUNTER),
        "a beta has changed": lambda: plan.step(on_gpu, HYPER._replace(beta_1=0.5), [], COUNTER),
        "no step with gradients of these kinds": lambda: plan.step(other, HYPER, [], COUNTER),
        "gradient_accumulation_steps": lambda: plan.accumulate(on_gpu, 1.0, False, True, None, [], HYPER, COUNTER),
    }
    for message, call in calls.items():
        gpu.begin_capture()
        with pytest.raises(RuntimeError, match=message):
            call()
        gpu.end_capture()
    plans.step([(values, indices)], HYPER, scale=1.0)
    plans.check()


def rows(gpu):
    return fastadam.IndexedSlices(gpu.array(np.ones((1, 2), F32)), gpu.array(np.array([1])))


STEPS = {  # how the optimizer is made, the gradient, and the steps before the capture
    "the first step": (fastadam.Adam, None, 0),
    "a later step": (fastadam.Adam, None, 2),
    "rows": (fastadam.Adam, rows, 1),
    "deferred rows": (lambda: fastadam.Adam(sparse_update="deferred"), rows, 3),
    "lazy rows": (lambda: fastadam.Adam(sparse_update="lazy"), rows, 1),
    "accumulation": (lambda: fastadam.Adam(gradient_accumulation_steps=3), None, 4),
    "averages": (lambda: fastadam.Adam(use_ema=True, ema_overwrite_frequency=2), None, 1),
    "a schedule": (lambda: fastadam.Adam(fastadam.schedules.CosineDecay(0.1, 9)), None, 1),
    "a dynamic loss scale": (lambda: fastadam.LossScaleOptimizer(fastadam.Adam()), None, 1),
}


@pytest.mark.parametrize("case", STEPS)
def test_an_optimizer_refuses_to_be_captured(fake_gpu, case):
    make, gradient_of, before = STEPS[case]
    twins = [(make(), fake_gpu.array(np.ones((30, 2), F32))) for _ in range(2)]
    gradient = gradient_of(fake_gpu) if gradient_of else fake_gpu.array(np.ones((30, 2), F32))
    for optimizer, w in twins:
        for _ in range(before):
            optimizer.apply_gradients([(gradient, w)])
    optimizer, w = twins[0]
    text = (
        "apply_gradients: a CUDA graph is being captured, expected no capture "
        "(fastadam.torch.Adam(capturable=True) can be captured)"
    )
    fake_gpu.begin_capture()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(text)):
            optimizer.apply_gradients([(gradient, w)])
    assert fake_gpu.end_capture() >= 0  # the capture itself goes on
    for optimizer, w in twins:
        optimizer.apply_gradients([(gradient, w)])
    (ours, w), (theirs, twin) = twins
    assert ours.iterations == theirs.iterations
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert same(np.asarray(a), np.asarray(b))
    assert same(fake_gpu.get(w), fake_gpu.get(twin))
