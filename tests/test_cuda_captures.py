"""What may happen while a CUDA graph is captured, and after: garbage, refused calls, memory that the graph goes on using."""

from __future__ import annotations

import gc
import threading

import fastadam
import numpy as np
import pytest
from test_cuda import F32
from test_cuda_graph import COUNTER, capture, replay
from test_cuda_numbers import HYPER, Plans, dense, gradients_for


def used_optimizer(gpu, **options):
    table, w = gpu.array(np.ones((30, 2), F32)), gpu.array(np.ones(5, F32))
    optimizer = fastadam.Adam(global_clipnorm=1.0, **options)
    slices = fastadam.IndexedSlices(gpu.array(np.ones((2, 2), F32)), gpu.array(np.array([1, 3])))
    for _ in range(2):
        optimizer.apply_gradients([(slices, table), (gpu.array(np.ones(5, F32)), w)])
    optimizer.gather(table, gpu.array(np.array([1, 2])))
    return optimizer


GARBAGE = {
    "an optimizer": used_optimizer,
    "an optimizer with deferred tables": lambda gpu: used_optimizer(gpu, sparse_update="deferred"),
    "an array": lambda gpu: fastadam.cuda.array(np.ones(3, F32)),
    "a plan": lambda gpu: Plans(gpu, dense("float32", 0)),
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("thread", ["the same", "another"])
def test_garbage_may_be_collected_during_a_capture(gpu, kind, thread):
    plans, gradients = Plans(gpu, dense("float32", 0)), dense("float32", 1)
    plans.step(gradients, HYPER, scale=1.0)
    plans.set_numbers()
    gc.collect()
    garbage = [GARBAGE[kind](gpu)]
    garbage.append(garbage)  # freed by the collector, whenever that runs
    native, plan, _ = plans.plans[1]
    placed = gradients_for(native, gradients, gpu.array)
    gpu.begin_capture()
    del garbage
    if thread == "the same":
        gc.collect()
    else:
        collector = threading.Thread(target=gc.collect)
        collector.start()
        collector.join()
    plan.step(placed, HYPER, [], COUNTER)
    replay(plans, gpu.end_capture(), gradients, HYPER)
    plans.check()


def slices(count, seed=0):
    rng = np.random.RandomState(seed)
    return [(rng.standard_normal((count, 3)).astype(F32), rng.randint(0, 30, count))]


KINDS = {  # gradients that were given before the capture, then those in it, and how the latter are refused
    "more indices": (slices(4), slices(200), "more memory than any step before the capture"),
    "the first indices": ([np.ones((30, 3), F32)], slices(4), "more memory than any step before the capture"),
    "the first dense gradient": (slices(4), [np.ones((30, 3), F32)], "no step with gradients of these kinds"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_has_to_allocate_is_refused_and_the_capture_goes_on(gpu, kind):
    before, within, message = KINDS[kind]
    plans = Plans(gpu, [np.ones((30, 3), F32)])
    native, plan, _ = plans.plans[1]
    plans.step(before, HYPER, scale=1.0)
    plans.set_numbers()
    refused, placed = (gradients_for(native, given, gpu.array) for given in (within, before))
    gpu.begin_capture()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            plan.step(refused, HYPER, [], COUNTER)
    plan.step(placed, HYPER, [], COUNTER)
    replay(plans, gpu.end_capture(), before, HYPER)
    plans.check()
    plans.step(within, HYPER, scale=1.0)
    plans.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip_norm", [np.inf, 0.1])
def test_later_steps_of_other_kinds_leave_a_graph_its_memory(gpu, kind, clip_norm):
    """They need tables of other sizes; what they replace is what the graph was captured with."""
    captured, later, _ = KINDS[kind]
    hyper = HYPER._replace(clip_norm=clip_norm)
    plans = Plans(gpu, [np.ones((30, 3), F32)])
    plans.step(captured, hyper, scale=1.0)
    plans.set_numbers()
    graph, _kept = capture(plans, captured, hyper)
    for seed in range(3):
        plans.step(later if seed else slices(100 * seed + 10), hyper, scale=1.0)
        plans.set_numbers()
        replay(plans, graph, captured, hyper)
    plans.check()


@pytest.mark.parametrize("captured", ["the gradients of other steps", "other gradients"])
def test_steps_and_replays_in_turns_each_read_their_own_gradients(gpu, captured):
    """The GPU has one table of addresses, which a replay overwrites when the host does not see it."""
    plans = Plans(gpu, dense("float32", 0))
    (_, host, _), (_, device, _) = plans.plans
    plans.step(dense("float32", 1), HYPER, scale=1.0)
    plans.set_numbers()
    gradients = [dense("float32", seed) for seed in (2, 3)]
    eager, other = ([gpu.array(g) for g in given] for given in gradients)
    in_graph = 1 if captured == "other gradients" else 0

    def step_eagerly():
        plans.made += 1
        hyper = HYPER._replace(step=plans.made)
        host.step(gradients[0], hyper, [], COUNTER.copy())
        device.step(eager, hyper, [], COUNTER.copy())

    if in_graph:
        step_eagerly()
    gpu.begin_capture()
    device.step(other if in_graph else eager, HYPER, [], COUNTER)
    graph = gpu.end_capture()
    step_eagerly()
    replay(plans, graph, gradients[in_graph], HYPER)
    step_eagerly()
    plans.check()
