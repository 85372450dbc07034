"""The floating-point mode of the caller (rounding, denormals, traps) changes no bit, and every call leaves it alone."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import platform
import sys

import fastadam
import numpy as np
import pytest
from cases import bits
from fastadam._core.native.backend import _cpu
from fastadam._core.native.gradients import float32_to_bfloat16
from test_c_interface import ABI, Hyper, List, Tensor, option

F32 = np.float32
IS_ARM = platform.machine() in ("aarch64", "arm64")
# The place of MXCSR (x86) or FPCR (ARM) in fenv_t, in bytes.
PLACE = {"linux": 0 if IS_ARM else 28, "darwin": 8 if IS_ARM else 4}[sys.platform]
CONTROL = 0x07C09F00 if IS_ARM else 0xFFC0  # the bits that are no record of what has happened
if IS_ARM:
    MODES = {"down": 2 << 22, "up": 1 << 22, "toward zero": 3 << 22, "flush denormals": 1 << 24}
else:
    MASKED = 0x1F80
    MODES = {
        "down": MASKED | 1 << 13,
        "up": MASKED | 2 << 13,
        "toward zero": MASKED | 3 << 13,
        "flush to zero": MASKED | 1 << 15,
        "denormals are zero": MASKED | 1 << 6,
        "traps": 1 << 12,  # all but "inexact", which would stop Python itself
        "down, denormals, traps": 1 << 12 | 1 << 13 | 1 << 15 | 1 << 6,
    }
libm = ctypes.CDLL(ctypes.util.find_library("m"))


def get_environment():
    environment = (ctypes.c_uint8 * 64)()
    assert libm.fegetenv(environment) == 0
    return environment


def mode_of(environment):
    return int.from_bytes(bytes(environment[PLACE : PLACE + 4]), "little") & CONTROL


@contextlib.contextmanager
def mode(bits_of_mode):
    before, environment = get_environment(), get_environment()
    environment[PLACE : PLACE + 4] = (ctypes.c_uint8 * 4)(*bits_of_mode.to_bytes(4, "little"))
    assert libm.fesetenv(environment) == 0
    try:
        yield
        assert mode_of(get_environment()) == bits_of_mode & CONTROL, "the mode was not restored"
    finally:
        libm.fesetenv(before)


def values(seed, size, dtype=F32):
    """Thirds of integers, from denormal to large."""
    rng = np.random.RandomState(seed)
    array = rng.randint(-(2**20), 2**20, size) / 3 * 2.0 ** rng.randint(-60, 3, size)
    if dtype == "bfloat16":
        return float32_to_bfloat16(array.astype(F32))
    return (array * 2.0**-20).astype(dtype)


def with_bits(array, dtype):
    return _cpu.bfloat16_bits(array) if dtype == "bfloat16" else array


def dense(dtype=F32, size=1000, steps=3, grads=None, **options):
    gradients = [values(i, size, dtype) if grads is None else grads(i, size) for i in range(steps)]
    variables = [values(9, size, dtype), values(8, 36, dtype)]
    extra = values(7, 36, dtype)

    def run():
        copies = [w.copy() for w in variables]
        optimizer = fastadam.Adam(**options)
        for gradient in gradients:
            pairs = [(gradient, copies[0]), (extra, copies[1])]
            optimizer.apply_gradients([(with_bits(g, dtype), with_bits(w, dtype)) for g, w in pairs])
        return [*copies, *optimizer.get_weights()]

    return run


def sparse(mode_of_rows, **options):
    table, rng = values(3, (50, 7)), np.random.RandomState(1)
    steps = [(values(i, (20, 7)), rng.randint(0, 50 if i < 3 else 4, 20)) for i in range(30)]

    def run():
        w = table.copy()
        optimizer = fastadam.Adam(sparse_update=mode_of_rows, **options)
        for rows, ids in steps:
            optimizer.apply_gradients([(fastadam.IndexedSlices(rows, ids), w)])
        rows = optimizer.gather(w, [40, 1])
        optimizer.sync()
        return [rows, w, *optimizer.get_weights()]

    return run


def loss_scale():
    gradient, start = values(1, 100), values(2, 100)

    def run():
        w = start.copy()
        optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1, global_clipnorm=0.3), initial_scale=3.0)
        for _ in range(3):
            optimizer.apply_gradients([(gradient, w)])
        return [w]

    return run


def stateless():
    arrays = [values(i, 100) for i in range(3)]

    def run():
        w, g, m = (a.copy() for a in arrays)
        v = np.zeros_like(w)
        fastadam.adam_step(w, g, m, v, step=3, learning_rate=0.1, beta_1=0.7, epsilon=1e-3)
        return [w, m, v]

    return run


def norm():
    arrays = [values(1, 10_001), values(2, 77, np.float64), values(3, 5, np.float16)]
    huge = 1e200 * arrays[1]
    return lambda: [np.array([fastadam.global_norm(arrays), fastadam.global_norm([huge])])]


def c_interface(**numbers):
    library = ctypes.CDLL(option("--library").strip())
    start, g = values(4, 100), values(5, 100)

    def run():
        w, m, v = start.copy(), np.zeros(100, F32), np.zeros(100, F32)
        tensor = Tensor(*(a.ctypes.data for a in (w, g, m, v)), size=100, grad_size=100, next=-1, grad_factor=1.0)
        tensor.dtype = tensor.grad_dtype = tensor.copy_dtype = 2
        tensor.decays = True
        listed = List(ABI, ctypes.pointer(tensor), 1, None, None, 0)
        hyper = Hyper(step=3, learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-7, gradient_scale=1)
        bounds = dict.fromkeys(("clip_value", "clip_norm", "global_clip_norm"), np.inf)
        for name, number in (bounds | numbers).items():
            setattr(hyper, name, number)
        assert library.fastadam_step(ctypes.byref(listed), ctypes.byref(hyper), ctypes.c_bool(False)) == 0
        return [w, m, v]

    return run


SCHEDULE = fastadam.schedules.CosineDecay(0.1, 7, warmup_target=0.3, warmup_steps=2)
RUNS = {
    "float32": lambda: dense(weight_decay=0.1, decay=0.03, amsgrad=True),
    "float64": lambda: dense(np.float64, clipnorm=0.1),
    "float16": lambda: dense(np.float16, global_clipnorm=0.1, use_ema=True, ema_momentum=0.7),
    "bfloat16": lambda: dense("bfloat16", clipvalue=0.01),
    "global_clipnorm, several threads": lambda: dense(size=100_000, global_clipnorm=0.1),
    "accumulation": lambda: dense(steps=6, gradient_accumulation_steps=3, clipnorm=0.01),
    "schedule": lambda: dense(learning_rate=SCHEDULE),
    "gradients that are converted": lambda: dense(grads=lambda i, size: values(i, size, np.float64) * 2.0**-100),
    "gradients in lists": lambda: dense(grads=lambda i, size: values(i, size, np.float64).tolist()),
    "rows": lambda: sparse("dense", global_clipnorm=0.1),
    "rows, clipped after they are summed": lambda: sparse("lazy", clipnorm=0.1, clip_after_dedupe=True),
    "deferred": lambda: sparse("deferred", weight_decay=0.01),
    "deferred_fast": lambda: sparse("deferred_fast", weight_decay=0.01),
    "loss scale": loss_scale,
    "adam_step": stateless,
    "global_norm": norm,
    "C interface": lambda: c_interface(decay=0.1, clip_norm=0.1, weight_decay=0.1),
    "C interface, PyTorch's epsilon": lambda: c_interface(epsilon_corrected=True, l2=0.1),
}


SCHEDULES = {
    "CosineDecay": fastadam.schedules.CosineDecay(0.1, 77, warmup_target=0.2, warmup_steps=3),
    "CosineDecayRestarts": fastadam.schedules.CosineDecayRestarts(0.1, 7, m_mul=0.9),
    "ExponentialDecay": fastadam.schedules.ExponentialDecay(0.1, 7, 0.9),
    "InverseTimeDecay": fastadam.schedules.InverseTimeDecay(0.1, 7, 0.9),
    "LinearCosineDecay": fastadam.schedules.LinearCosineDecay(0.1, 77),
    "PolynomialDecay": fastadam.schedules.PolynomialDecay(0.1, 77, power=1.7),
}


class Halves(fastadam.schedules.LearningRateSchedule):
    """A schedule of the user's own."""

    def __call__(self, step):
        return 0.1 / (step + 3.0) ** 0.5


@pytest.mark.parametrize("name", ["down", "up", "toward zero"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_called_directly_does_not_depend_on_the_rounding_mode(schedule, name):
    one_by_one, together = [schedule(step) for step in range(200)], schedule(np.arange(200))
    with mode(MODES[name]):
        actual = [schedule(step) for step in range(200)], schedule(np.arange(200))
    assert actual[0] == one_by_one
    np.testing.assert_array_equal(actual[1], together)


@pytest.mark.parametrize("name", ["down", "up", "toward zero"])
@pytest.mark.parametrize(
    "rate", [*SCHEDULES.values(), Halves(), lambda: 0.1 / float("3")], ids=lambda s: type(s).__name__
)
def test_the_current_learning_rate_does_not_depend_on_the_rounding_mode(rate, name):
    optimizer = fastadam.Adam(rate, decay=0.03)

    def rates():
        found = []
        for optimizer.iterations in range(100):
            found.append(optimizer.current_learning_rate)
        return found

    expected = rates()
    with mode(MODES[name]):
        actual = rates()
    assert actual == expected


@pytest.mark.parametrize("of", RUNS)
@pytest.mark.parametrize("name", MODES)
def test_the_callers_floating_point_mode_changes_no_bit(name, of, rows_wait):
    run = RUNS[of]()
    expected = run()
    with mode(MODES[name]):
        actual = run()
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(e)))
