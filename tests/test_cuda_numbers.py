"""Numbers of a step that lie on the GPU: what gradients were scaled by, and whether the step is to be skipped."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from cases import random_array
from fastadam._core.native.backend import _cpu
from fastadam._core.native.plan import StepHyper
from test_cuda import F32, same

SIZES = (5, 20000, 1)
HYPER = StepHyper(step=1, learning_rate=0.01, beta_1=0.9, beta_2=0.99, epsilon=1e-7)
OPTIONS = {
    "torch": {"epsilon_corrected": True, "weight_decay": 0.01},
    "l2": {"epsilon_corrected": True, "l2": 0.1},
    "decay": {"decay": 0.1},
    "clipped": {"clip_value": 0.4, "clip_norm": 0.3},
    "global": {"clip_value": 0.9, "global_clip_norm": 0.5},
    "average": {"ema_momentum": 0.9, "ema_overwrite": True},
}


class Plans:
    """A plan of the host and one of a GPU, with the same variables."""

    def __init__(self, gpu, arrays, *, average=False, lazy=False):
        self.gpu, self.made = gpu, 0
        names = ("m", "v", "vhat", *(["average"] if average else []))
        self.host = [arrays, *([np.zeros_like(a, state_dtype(a)) for a in arrays] for _ in names)]
        self.device = [[gpu.array(a) for a in column] for column in self.host]
        self.plans = []
        for native, columns in ((_cpu, self.host), (gpu.native, self.device)):
            buffers = [native.Buffer(a, f"variables[{i}]") for i, a in enumerate(columns[0])]
            count = len(buffers)
            slots = dict(zip(names, columns[1:], strict=True))
            context = native.Context(0) if native is gpu.native else None
            places = list(range(count))
            plan = native.Plan(buffers, slots, [True] * count, places, lazy, [None] * count, context)
            self.plans.append((native, plan, context))

    def set_numbers(self, **numbers):
        self.plans[1][1].set_device_numbers(None, **numbers)

    def step(self, gradients, hyper, *, scale, skip=False, factors=(), counts=False):
        """On the host with what it knows; on the GPU with what lies there."""
        (_, host, _), (native, device, _) = self.plans
        if not skip:
            self.made += 1
            known = hyper._replace(step=self.made, gradient_scale=1.0 / float(F32(scale)))
            assert not host.step(gradients_for(_cpu, gradients), known, list(factors), np.zeros((), np.int64))
        numbers = {"grad_scale": F32(scale), "found_inf": F32(skip)}
        kept = {name: self.gpu.array(np.asarray(value)) for name, value in numbers.items()}
        self.set_numbers(**kept, counts=counts)
        step = 1 if counts else self.made + skip
        placed = gradients_for(native, gradients, self.gpu.array)
        assert not device.step(placed, hyper._replace(step=step), list(factors), np.zeros((), np.int64))

    def check(self):
        assert self.plans[1][2].step() == self.made
        for ours, theirs in zip(self.host, self.device, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert same(np.asarray(a), self.gpu.get(b))


def state_dtype(array):
    return F32 if array.dtype == np.float16 else array.dtype


def gradients_for(native, gradients, place=np.asarray):
    found = [tuple(map(place, g)) if isinstance(g, tuple) else place(g) for g in gradients]
    return [native.Slices(*g) if isinstance(g, tuple) else g for g in found]


def dense(dtype, seed):
    rng = np.random.RandomState(seed)
    return [random_array(rng, (size,)).astype(dtype) for size in SIZES]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("counts", [False, True], ids=["t of the host", "t of the GPU"])
@pytest.mark.parametrize("options", OPTIONS)
def test_scaled_steps_have_the_bits_of_the_host(gpu, dtype, counts, options):
    plans = Plans(gpu, dense(dtype, 0), average=options == "average")
    hyper = HYPER._replace(**OPTIONS[options])
    factors = [-1.0] * len(SIZES) if options == "l2" else []
    for seed, scale in enumerate((3.0, 65536.0, 1.0, 0.7)):
        gradients = [g * g.dtype.type(scale) for g in dense(dtype, seed + 1)] if scale < 9 else dense(dtype, seed + 1)
        plans.step(gradients, hyper, scale=scale, factors=factors, counts=counts and seed > 0)
    plans.check()


@pytest.mark.parametrize("counts", [False, True], ids=["t of the host", "t of the GPU"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_that_is_skipped_changes_nothing(gpu, counts, options):
    plans = Plans(gpu, dense("float32", 0), average=options == "average")
    hyper = HYPER._replace(**OPTIONS[options])
    for seed, skip in enumerate((False, True, False, True, True, False)):
        gradients = dense("float32", seed + 1)
        if skip:
            gradients[1][7] = np.inf
        plans.step(gradients, hyper, scale=8.0, skip=skip, counts=counts and seed > 0)
        plans.check()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("options", ["decay", "clipped"])
def test_rows_are_scaled_and_skipped(gpu, lazy, options):
    rng = np.random.RandomState(0)
    plans = Plans(gpu, [random_array(rng, (30, 3)).astype(F32)], lazy=lazy)
    for seed, skip in enumerate((False, True, False, True, False)):
        values = random_array(np.random.RandomState(seed), (4, 3)).astype(F32)
        if skip:
            values[0, 0] = np.nan
        slices = (values, np.array([3, 3, seed, 29]))
        plans.step([slices], HYPER._replace(**OPTIONS[options]), scale=7.0, skip=skip, counts=seed > 0)
        plans.check()


def test_t_after_a_bad_index_is_that_of_the_last_good_step(gpu):
    plans = Plans(gpu, [np.ones((30, 3), F32)])
    values = np.ones((2, 3), F32)
    plans.step([(values, np.array([3, 4]))], HYPER, scale=2.0)
    plans.step([(values, np.array([3, 4]))], HYPER, scale=2.0, skip=True, counts=True)
    _, plan, context = plans.plans[1]
    for row in (30, 4, 5):
        plan.step(gradients_for(gpu.native, [(values, np.array([3, row]))], gpu.array), HYPER, [], np.zeros((), int))
    context.wait()
    assert context.take_failure()[1] == "grads[0].indices[1]: 30 is not a row of variables[0], expected 0 <= index < 30"
    plans.check()
    plans.step([(values, np.array([5, 4]))], HYPER, scale=2.0, counts=True)
    plans.check()


def test_a_graph_reads_them_in_every_replay(gpu):
    plans = Plans(gpu, dense("float32", 0))
    plan = plans.plans[1][1]
    gradients = dense("float32", 1)
    plans.step(gradients, HYPER, scale=4.0)
    placed = [gpu.array(g) for g in gradients]
    scale, found_inf = (gpu.array(np.asarray(F32(value))) for value in (4.0, 0.0))
    plans.set_numbers(grad_scale=scale, found_inf=found_inf)
    gpu.begin_capture()
    assert not plan.step(placed, HYPER, [], np.zeros((), np.int64))
    graph = gpu.end_capture()
    for k, skip in enumerate((False, True, True, False)):
        fastadam._core.native.arrays.assign(found_inf, float(skip))
        fastadam._core.native.arrays.assign(scale, 2.0**k)
        gpu.replay(graph)
        if not skip:
            plans.made += 1
            known = HYPER._replace(step=plans.made, gradient_scale=0.5**k)
            plans.plans[0][1].step(gradients, known, [], np.zeros((), np.int64))
    plans.check()
    plans.step(gradients, HYPER, scale=4.0, counts=True)
    plans.check()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_step_of_an_optimizer_reads_its_rate(gpu, dtype):
    rate, array, gradient = gpu.array(np.array(0.01, dtype)), np.ones(5, F32), np.full(5, 0.5, F32)
    twin, placed = gpu.array(array), gpu.array(gradient)
    host, device = fastadam.Adam(), fastadam.Adam(rate)
    for value in (0.01, 0.5, 0.25):
        fastadam._core.native.arrays.assign(rate, value)
        host.learning_rate = float(dtype(value))
        host.apply_gradients([(gradient, array)])
        device.apply_gradients([(placed, twin)])
    assert same(array, gpu.get(twin))
    assert device.get_config()["learning_rate"] == 0.25


def test_a_rate_on_the_gpu_is_for_arrays_there(fake_gpu):
    rate = fake_gpu.array(np.array(0.1, F32))
    optimizer = fastadam.Adam(rate)
    with pytest.raises(ValueError, match="learning_rate: on a GPU, expected a number"):
        optimizer.apply_gradients([(np.ones(3, F32), np.ones(3, F32))])
    w, gradient = (fake_gpu.array(np.ones(3, F32)) for _ in range(2))
    optimizer.learning_rate = fake_gpu.array(np.ones(2, F32))
    with pytest.raises(ValueError, match=r"learning_rate: \(2,\) float32 in CUDA device 0, expected one float32"):
        optimizer.apply_gradients([(gradient, w)])
    deferred = fastadam.Adam(rate, sparse_update="deferred")
    with pytest.raises(ValueError, match="learning_rate: on the GPU with sparse_update='deferred'"):
        deferred.apply_gradients([(gradient, w)])


def test_nothing_waits_for_the_gpu(fake_gpu):
    plans = Plans(fake_gpu, dense("float32", 0))
    hyper = HYPER._replace(epsilon_corrected=True)
    plans.step(dense("float32", 1), hyper, scale=2.0)
    gradients = [fake_gpu.array(g) for g in dense("float32", 2)]
    numbers = {name: fake_gpu.array(np.asarray(F32(1))) for name in ("grad_scale", "found_inf")}
    _, plan, _ = plans.plans[1]
    fake_gpu.clear_log()
    plans.set_numbers(**numbers, counts=True)
    assert plan.can_count(hyper)
    assert not plan.step(gradients, hyper, [], np.zeros((), np.int64))
    waiting = [call[0] for call in fake_gpu.calls() if "ynchronize" in call[0] or call[0] == "cudaMemcpy"]
    assert fake_gpu.calls("cudaLaunchKernelEx")
    assert not waiting


def test_betas_whose_powers_the_gpu_has(gpu):
    plans = Plans(gpu, dense("float32", 0))
    plan = plans.plans[1][1]
    plans.step(dense("float32", 1), HYPER, scale=2.0)
    assert plan.can_count(HYPER)
    assert not plan.can_count(HYPER._replace(beta_1=0.8))
    plans.step(dense("float32", 2), HYPER._replace(beta_1=0.8), scale=2.0)  # with t of the host
    plans.check()
    other = Plans(gpu, dense("float32", 0)).plans[1][1]
    assert not other.can_count(HYPER._replace(beta_2=1 - 1e-7))


REFUSED = {
    "shape": ({"found_inf": np.zeros(2, F32)}, r"found_inf: \(2,\) float32 in CUDA device 0, expected one float32 on"),
    "dtype": ({"grad_scale": np.ones(())}, r"grad_scale: \(\) float64 in CUDA device 0, expected one float32 on CUDA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_numbers_are_refused(gpu, case):
    numbers, message = REFUSED[case]
    plans = Plans(gpu, dense("float32", 0))
    placed = {name: gpu.array(value) for name, value in numbers.items()}
    with pytest.raises(ValueError, match=message):
        plans.set_numbers(**placed)
    plans.step(dense("float32", 1), HYPER, scale=1.0)
    plans.check()


def test_steps_that_the_host_has_to_know_are_refused(gpu):
    plans = Plans(gpu, dense("float32", 0))
    with pytest.raises(RuntimeError, match="found_inf: on the GPU, of a step that requires finite gradients"):
        plans.step(dense("float32", 1), HYPER._replace(require_finite=True), scale=1.0, skip=True)
    plans.made = 0
    plans.step(dense("float32", 1), HYPER, scale=1.0)
    plans.check()
