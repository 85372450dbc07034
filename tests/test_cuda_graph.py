"""Steps in a CUDA graph: the counter, and the rate if it lies there, are the GPU's."""

from __future__ import annotations

import fastadam
import numpy as np
import pytest
from test_cuda import F32, same


class Captured:
    """One step of an optimizer in a graph, and the same optimizer on the host."""

    def __init__(self, gpu, rate=0.01, sizes=(5, 20000), dtype="float32", **options):
        rng = np.random.RandomState(0)
        self.gpu, self.options = gpu, options
        self.arrays = [rng.standard_normal(size).astype(dtype) for size in sizes]
        self.gradients = [rng.standard_normal(size).astype(dtype) for size in sizes]
        self.twins = [gpu.array(array) for array in self.arrays]
        self.pairs = [(gpu.array(g), twin) for g, twin in zip(self.gradients, self.twins, strict=True)]
        self.host = fastadam.Adam(0.01, **options)
        self.device = fastadam.Adam(rate, **options)
        self.eager()
        gpu.begin_capture()
        try:
            self.device.apply_gradients(self.pairs)
        finally:
            self.graph = gpu.end_capture()

    def step_host(self):
        self.host.apply_gradients(zip(self.gradients, self.arrays, strict=True))

    def eager(self):
        self.step_host()
        self.device.apply_gradients(self.pairs)

    def replay(self):
        self.step_host()
        self.gpu.replay(self.graph)

    def check(self):
        assert int(self.device.iterations) == int(self.host.iterations)
        for array, twin in zip(self.arrays, self.twins, strict=True):
            assert same(array, self.gpu.get(twin))
        for ours, theirs in zip(self.host.get_weights(), self.device.get_weights(), strict=True):
            assert same(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "decay": 0.1, "weight_decay": 0.01}, {"global_clipnorm": 0.1}]
)
def test_replays_count_on(gpu, dtype, options):
    captured = Captured(gpu, dtype=dtype, **options)
    captured.check()
    for _ in range(3):
        captured.replay()
    captured.check()
    captured.eager()
    captured.replay()
    captured.check()


@pytest.mark.parametrize("beta_1", [0.0, 0.5, 0.9])
def test_powers_of_the_betas_have_the_bits_of_the_host_far_out(gpu, beta_1):
    captured = Captured(gpu, beta_1=beta_1, beta_2=0.98, sizes=(3,))
    for iterations in (57, 348, 684, 5000):
        captured.host.iterations = captured.device.iterations = iterations
        captured.eager()
        captured.replay()
        captured.check()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_rate_on_the_gpu_is_read_by_every_step(gpu, dtype):
    rate = gpu.array(np.array(0.01, dtype))
    captured = Captured(gpu, rate=rate)
    captured.replay()
    fastadam._core.placement.assign(rate, 0.5)
    captured.host.learning_rate = float(dtype(0.5))
    captured.replay()
    captured.eager()
    captured.check()
    assert captured.device.get_config()["learning_rate"] == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_rows_in_a_graph(gpu, mode):
    rng = np.random.RandomState(0)
    table = rng.standard_normal((30, 3)).astype(F32)
    values, ids = rng.standard_normal((4, 3)).astype(F32), np.array([3, 3, 1, 29])
    twin = gpu.array(table)
    ours, theirs = (fastadam.Adam(0.01, sparse_update=mode, clipnorm=0.1) for _ in range(2))
    pairs = [(fastadam.IndexedSlices(gpu.array(values), gpu.array(ids)), twin)]
    theirs.apply_gradients(pairs)
    gpu.begin_capture()
    theirs.apply_gradients(pairs)
    graph = gpu.end_capture()
    for _ in range(3):
        gpu.replay(graph)
    for _ in range(4):
        ours.apply_gradients([(fastadam.IndexedSlices(values, ids), table)])
    assert same(table, gpu.get(twin))
    assert int(theirs.iterations) == 4


def test_a_bad_index_in_a_graph_stops_it(gpu):
    table, ids = gpu.array(np.ones((30, 3), F32)), gpu.array(np.array([3, 4]))
    optimizer = fastadam.Adam(0.01)
    pairs = [(fastadam.IndexedSlices(gpu.array(np.ones((2, 3), F32)), ids), table)]
    optimizer.apply_gradients(pairs)
    gpu.begin_capture()
    optimizer.apply_gradients(pairs)
    graph = gpu.end_capture()
    gpu.replay(graph)
    after_two = gpu.get(table).copy()
    fastadam._core.placement.assign(ids, np.array([3, 30]))
    gpu.replay(graph)
    gpu.replay(graph)
    with pytest.raises(ValueError, match=r"grads\[0\].indices\[1\]: 30 is no row"):
        optimizer.get_weights()
    assert same(gpu.get(table), after_two)
    assert int(optimizer.iterations) == 2
    fastadam._core.placement.assign(ids, np.array([3, 4]))
    optimizer.apply_gradients(pairs)
    gpu.replay(graph)
    assert int(optimizer.iterations) == 4


def test_a_graph_outlives_its_plan(gpu):
    """Steps of other variables, with more rows and other options, leave a graph's tables alone."""
    table, w = gpu.array(np.ones((30, 3), F32)), gpu.array(np.ones(50, F32))
    optimizer = fastadam.Adam(0.01)

    def pairs(count):
        return [(fastadam.IndexedSlices(gpu.array(np.ones((count, 3), F32)), gpu.array(np.arange(count))), table)]

    first = pairs(2)
    optimizer.apply_gradients(first)
    gpu.begin_capture()
    optimizer.apply_gradients(first)
    graph = gpu.end_capture()
    twin = np.ones((30, 3), F32)
    host = fastadam.Adam(0.01)
    for count in (2, 30, 2):
        slices = fastadam.IndexedSlices(np.ones((count, 3), F32), np.arange(count))
        host.apply_gradients([(slices, twin)])
    optimizer.apply_gradients(pairs(30))
    gpu.replay(graph)
    assert same(gpu.get(table), twin)
    optimizer.apply_gradients([(gpu.array(np.ones(50, F32)), w)])
    optimizer.add_slot(table, "mine")
    gpu.replay(graph)
    assert int(optimizer.iterations) == 5
    assert np.isfinite(gpu.get(table)).all()


def test_steps_elsewhere_count_too(gpu):
    captured = Captured(gpu, sizes=(5,))
    captured.replay()
    w = np.ones(3, F32)
    for optimizer in (captured.host, captured.device):
        optimizer.apply_gradients([(np.ones(3, F32), np.ones(3, F32) if optimizer is captured.host else w)])
    captured.replay()
    assert int(captured.device.iterations) == int(captured.host.iterations) == 4
    assert same(captured.arrays[0], gpu.get(captured.twins[0]))


REFUSED = {
    "another callable": ({"epsilon": lambda: 1e-7}, "epsilon: a schedule or callable"),
    "averages": ({"use_ema": True, "ema_overwrite_frequency": 2}, "ema_overwrite_frequency"),
    "schedule": ({"learning_rate": fastadam.schedules.CosineDecay(0.1, 9)}, "learning_rate: a schedule or callable"),
    "callable": ({"learning_rate": lambda: 0.1}, "learning_rate: a schedule or callable"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    "beta": ({"beta_2": 1 - 1e-7}, "a beta too near to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_host_would_have_to_say_is_refused(fake_gpu, case):
    options, message = REFUSED[case]
    w, gradient = (fake_gpu.array(np.ones(3, F32)) for _ in range(2))
    optimizer = fastadam.Adam(**options)
    optimizer.apply_gradients([(gradient, w)])
    optimizer.apply_gradients([(gradient, w)])
    fake_gpu.begin_capture()
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.apply_gradients([(gradient, w)])
    assert fake_gpu.end_capture() >= 0  # and the capture is not spoilt
    optimizer.apply_gradients([(gradient, w)])


def test_a_first_step_is_not_captured(fake_gpu):
    w, gradient = (fake_gpu.array(np.ones(3, F32)) for _ in range(2))
    optimizer = fastadam.Adam()
    fake_gpu.begin_capture()
    with pytest.raises(RuntimeError, match="expected one before it that is not"):
        optimizer.apply_gradients([(gradient, w)])
    fake_gpu.end_capture()
    optimizer.apply_gradients([(gradient, w)])
    assert int(optimizer.iterations) == 1


def test_indices_of_the_host_are_not_captured(fake_gpu):
    table = fake_gpu.array(np.ones((30, 2), F32))
    optimizer = fastadam.Adam()
    pairs = [(fastadam.IndexedSlices(fake_gpu.array(np.ones((1, 2), F32)), [1]), table)]
    optimizer.apply_gradients(pairs)
    fake_gpu.begin_capture()
    with pytest.raises(RuntimeError, match="indices in CPU memory"):
        optimizer.apply_gradients(pairs)
    fake_gpu.end_capture()


def test_deferred_tables_are_not_captured(fake_gpu):
    table = fake_gpu.array(np.ones((30, 2), F32))
    optimizer = fastadam.Adam(sparse_update="deferred")
    slices = fastadam.IndexedSlices(fake_gpu.array(np.ones((1, 2), F32)), fake_gpu.array(np.array([1])))
    optimizer.apply_gradients([(slices, table)])
    fake_gpu.begin_capture()
    with pytest.raises(RuntimeError, match="sparse_update: a deferred table cannot be captured"):
        optimizer.apply_gradients([(slices, table)])
    fake_gpu.end_capture()


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
