"""Dense steps on a GPU: the bits of the CPU. On a real one with `pytest -m gpu`, on the fake runtime with `-m fake_gpu`."""

from __future__ import annotations

import copy
import pickle

import fastadam
import numpy as np
import pytest
from cases import bits, number_bits, random_array

F32 = np.float32
SHAPES = ((3,), (), (4, 5), (0, 3), (16384 * 2 + 5,), (1,))
DTYPES = ["float16", "float32", "float64"]
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "decay": {"decay": 0.1, "weight_decay": 0.1},
    "clipvalue": {"clipvalue": 0.2},
    "clipnorm": {"clipnorm": 0.3, "amsgrad": True},
    "global_clipnorm": {"global_clipnorm": 0.5, "clipvalue": 1.0},
    "loss_scale": {"loss_scale_factor": 8.0},
    "average": {"use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5},
    "average and accumulation": {"gradient_accumulation_steps": 2, "use_ema": True},
    "schedule": {"learning_rate": fastadam.schedules.CosineDecay(0.1, 7, warmup_target=0.2, warmup_steps=2)},
}


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(number_bits(a), number_bits(b))


class Pair:
    """Two optimizers, of which one updates arrays of the host, the other the same on a GPU."""

    def __init__(self, gpu, arrays, **options):
        self.gpu = gpu
        self.options = options
        self.host = fastadam.Adam(**options)
        self.device = fastadam.Adam(**options)
        self.arrays = arrays
        self.twins = [gpu.array(array) for array in arrays]

    def step(self, gradients):
        self.host.apply_gradients(zip(gradients, self.arrays, strict=True))
        self.device.apply_gradients(zip(map(self.gpu.array, gradients), self.twins, strict=True))

    def check(self):
        for array, twin in zip(self.arrays, self.twins, strict=True):
            assert same(array, self.gpu.get(twin))
        for ours, theirs in zip(self.host.get_weights(), self.device.get_weights(), strict=True):
            assert same(np.asarray(ours), np.asarray(theirs))


def arrays_of(dtype, seed=0):
    rng = np.random.RandomState(seed)
    return [np.asarray(random_array(rng, shape)).astype(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_have_the_bits_of_the_cpu(gpu, dtype, options):
    pair = Pair(gpu, arrays_of(dtype), **OPTIONS[options])
    for seed in range(1, 6):
        pair.step(arrays_of(dtype, seed))
    pair.check()


def test_bfloat16_of_any_library(gpu):
    import ml_dtypes

    pair = Pair(gpu, arrays_of(ml_dtypes.bfloat16))
    for seed in range(1, 4):
        pair.step(arrays_of(ml_dtypes.bfloat16, seed))
    for array, twin in zip(pair.arrays, pair.twins, strict=True):
        assert np.array_equal(bits(array), bits(gpu.get(twin).view(ml_dtypes.bfloat16)))


def test_half_variables_take_float32_gradients(gpu):
    pair = Pair(gpu, arrays_of("float16"), clipnorm=1.0)
    pair.step(arrays_of("float32", 1))
    pair.check()


def test_a_list_of_all_dtypes(gpu):
    pair = Pair(gpu, [array for dtype in DTYPES for array in arrays_of(dtype)], global_clipnorm=0.1)
    for seed in (1, 2):
        pair.step([array for dtype in DTYPES for array in arrays_of(dtype, seed)])
    pair.check()


def test_a_list_of_more_than_the_arguments_of_a_launch_hold(gpu):
    pair = Pair(gpu, [np.full(i % 7, i, F32) for i in range(130)])
    for seed in (1, 2):
        pair.step([np.full(i % 7, seed / (i + 1), F32) for i in range(130)])
    pair.check()


def test_order_f(gpu):
    pair = Pair(gpu, [np.asfortranarray(np.arange(12, dtype=F32).reshape(3, 4))])
    pair.step([np.asfortranarray(np.ones((3, 4), F32))])
    pair.check()


def test_a_variable_given_twice_is_updated_twice(gpu):
    w = np.ones(5, F32)
    twin = gpu.array(w)
    gradients = [np.full(5, x, F32) for x in (0.5, -1.0, 2.0)]
    ours, theirs = fastadam.Adam(0.1, use_ema=True), fastadam.Adam(0.1, use_ema=True)
    for _ in range(2):
        ours.apply_gradients([(g, w) for g in gradients])
        theirs.apply_gradients([(gpu.array(g), twin) for g in gradients])
    assert same(w, gpu.get(twin))
    assert same(ours.get_slot(w, "average"), gpu.get(theirs.get_slot(twin, "average")))


def test_an_empty_variable_comes_first(gpu):
    pair = Pair(gpu, [np.zeros((0, 2), F32), np.ones(3, F32)], amsgrad=True)
    for seed in (1, 2):
        pair.step([np.zeros((0, 2), F32), np.full(3, seed, F32)])
    pair.check()


def test_averages_start_at_the_variables(gpu):
    for dtype in DTYPES:
        w = arrays_of(dtype)[2]
        optimizer = fastadam.Adam(use_ema=True)
        twin = gpu.array(w)
        optimizer.build([twin])
        assert np.array_equal(gpu.get(optimizer.get_slot(twin, "average")), w.astype(optimizer.get_weights()[1].dtype))


def test_finalize_puts_the_averages_into_the_variables(gpu):
    pair = Pair(gpu, arrays_of("float16")[:3], use_ema=True)
    pair.step(arrays_of("float16", 1)[:3])
    pair.host.finalize_variable_values(pair.arrays)
    pair.device.finalize_variable_values(pair.twins)
    pair.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_are_swapped_in_and_back(gpu, dtype):
    pair = Pair(gpu, arrays_of(dtype), use_ema=True, ema_momentum=0.5)
    for seed in (1, 2):
        pair.step(arrays_of(dtype, seed))
    with pair.host.averages(pair.arrays), pair.device.averages(pair.twins):
        pair.check()
        inside = pair.arrays[2].copy()
    pair.check()
    assert not same(pair.arrays[2], inside)
    pair.step(arrays_of(dtype, 3))
    pair.check()


def test_a_dynamic_loss_scale_sees_infinities(gpu):
    w = np.ones(4, F32)
    twin = gpu.array(w)
    ours, theirs = (fastadam.LossScaleOptimizer(fastadam.Adam(0.1), initial_scale=8.0) for _ in range(2))
    for gradient in (
        np.ones(4, F32),
        np.array([1, np.inf, 0, 0], F32),
        np.array([np.nan, 1, 1, 1], F32),
        np.ones(4, F32),
    ):
        ours.apply_gradients([(gradient, w)])
        theirs.apply_gradients([(gpu.array(gradient), twin)])
    assert same(w, gpu.get(twin))
    assert ours.dynamic_scale == theirs.dynamic_scale == 2.0
    assert int(ours.iterations) == int(theirs.iterations) == 2


def test_adam_step_without_an_optimizer(gpu):
    w, m, v, vhat = (np.full((3, 2), x, F32) for x in (1.0, 0.25, 0.5, 0.75))
    twins = [gpu.array(x) for x in (w, m, v, vhat)]
    gradient = np.linspace(-1, 1, 6, dtype=F32).reshape(3, 2)
    fastadam.adam_step(w, gradient, m, v, vhat, step=3, clipnorm=0.5, grad_factor=0.5)
    fastadam.adam_step(twins[0], gpu.array(gradient), *twins[1:], step=3, clipnorm=0.5, grad_factor=0.5)
    for ours, theirs in zip((w, m, v, vhat), twins, strict=True):
        assert same(ours, gpu.get(theirs))


@pytest.mark.parametrize("kind", ["pickle", "deepcopy", "weights", "file"])
@pytest.mark.parametrize("onto", ["host", "gpu"])
def test_state_moves_between_host_and_gpu(gpu, kind, onto, tmp_path):
    pair = Pair(gpu, arrays_of("float32"), amsgrad=True)
    for seed in (1, 2):
        pair.step(arrays_of("float32", seed))
    variables = [gpu.get(twin).copy() for twin in pair.twins]
    targets = variables if onto == "host" else [gpu.array(array) for array in variables]
    if kind == "pickle":
        other = pickle.loads(pickle.dumps(pair.device))
    elif kind == "deepcopy":
        other = copy.deepcopy(pair.device)
    elif kind == "file":
        pair.device.save(tmp_path / "adam.safetensors")
        other = fastadam.Adam.load(tmp_path / "adam.safetensors", targets)
    else:
        other = fastadam.Adam(amsgrad=True)
        other.build(targets)
        other.set_weights(pair.device.get_weights())
    gradients = arrays_of("float32", 3)
    pair.step(gradients)
    given = gradients if onto == "host" else [gpu.array(gradient) for gradient in gradients]
    other.apply_gradients(zip(given, targets, strict=True))
    for array, target in zip(pair.arrays, targets, strict=True):
        assert same(array, target if onto == "host" else gpu.get(target))
    for ours, theirs in zip(pair.host.get_weights(), other.get_weights(), strict=True):
        assert same(np.asarray(ours), np.asarray(theirs))


def test_state_of_the_host_goes_on_on_a_gpu(gpu):
    w = np.ones(5, F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.full(5, 0.5, F32), w)])
    moved = pickle.loads(pickle.dumps(optimizer))
    twin = gpu.array(w)
    optimizer.apply_gradients([(np.full(5, 0.25, F32), w)])
    moved.apply_gradients([(gpu.array(np.full(5, 0.25, F32)), twin)])
    assert same(w, gpu.get(twin))


def test_slots_lie_beside_their_variables(gpu):
    w = gpu.array(np.ones((2, 3), F32))
    optimizer = fastadam.Adam()
    optimizer.apply_gradients([(gpu.array(np.ones((2, 3), F32)), w)])
    m = optimizer.get_slot(w, "m")
    assert hasattr(m, "__cuda_array_interface__")
    assert [tuple(array.shape) for array in optimizer.weights] == [(), (2, 3), (2, 3)]
    made = optimizer.add_slot(w, "mine", np.arange(6).reshape(2, 3))
    assert np.array_equal(gpu.get(made), np.arange(6, dtype=F32).reshape(2, 3))


def test_named_variables_hold_arrays_of_a_gpu(gpu):
    w = fastadam.Variable(gpu.array(np.ones(3, F32)), name="w")
    optimizer = fastadam.Adam(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["w"])
    optimizer.apply_gradients([(gpu.array(np.full(3, 0.5, F32)), w)])
    assert w.numpy().round(4).tolist() == [pytest.approx(0.9)] * 3


def test_an_array_of_our_own(gpu):
    values = np.arange(6, dtype=np.float64).reshape(2, 3)
    made = fastadam.cuda.array(values)
    assert (made.shape, made.dtype, made.device) == ((2, 3), "float64", 0)
    assert same(made.get(), values)
    assert fastadam.cuda.array([1, 2]).dtype == "int64"
    assert "float64 (2, 3)" in repr(made)


def test_host_and_gpu_in_turns_with_one_optimizer(gpu):
    a, b = np.ones(3, F32), gpu.array(np.ones(3, F32))
    optimizer = fastadam.Adam(0.1)
    for _ in range(2):
        optimizer.apply_gradients([(np.full(3, 0.5, F32), a)])
        optimizer.apply_gradients([(gpu.array(np.full(3, 0.5, F32)), b)])
    assert int(optimizer.iterations) == 4
    assert gpu.get(optimizer.get_slot(b, "m")).shape == (3,)


def test_a_gpu_array_is_named_and_not_read(gpu):
    w = gpu.array(np.ones(3, F32))
    assert "of shape (3,), float32, on a GPU>, name='w')" in repr(fastadam.Variable(w, name="w"))
    rate = gpu.array(np.array(0.5, F32))
    optimizer = fastadam.Adam(rate)
    assert "on a GPU>" in repr(optimizer)
    assert optimizer.current_learning_rate == 0.5
