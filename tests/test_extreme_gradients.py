"""Gradients whose squares overflow or underflow, or whose factors have no normal number: clipped as any other."""

from __future__ import annotations

import ctypes

import fastadam
import numpy as np
import pytest
from c_twins import DTYPES, OK, with_signatures
from cases import bits
from helpers import first_step_gradients
from test_c_interface import ABI, List, Tensor, option

LARGE = 2.0**700  # a power of two: multiplication changes no other bit, and the squares overflow
SMALL = 2.0**-700  # and these underflow
MOST = np.finfo(np.float64).max
LEAST = np.finfo(np.float64).tiny


def gradient(size=50, seed=0):
    return np.random.RandomState(seed).standard_normal(size)


def repeated_rows(values):
    return fastadam.IndexedSlices(values.reshape(-1, 5), np.arange(values.size // 5) % 4)


CLIPS = {
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "clipvalue first": {"global_clipnorm": 0.5, "clipvalue": 1.5 * LARGE},
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("size", [1, 50, 5000, 300_000])
def test_a_gradient_of_huge_elements_is_clipped_to_the_bits_of_a_small_one(size, clip, isa):
    small = {**CLIPS[clip], **({"clipvalue": 1.5} if "clipvalue" in CLIPS[clip] else {})}
    expected = first_step_gradients([gradient(size), gradient(7, 1)], **small)
    actual = first_step_gradients([gradient(size) * LARGE, gradient(7, 1) * LARGE], **CLIPS[clip])
    for a, e in zip(actual, expected, strict=True):
        assert a.any()
        np.testing.assert_array_equal(bits(a), bits(e))


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("size", [1, 50, 5000, 300_000])
def test_a_gradient_of_tiny_elements_is_clipped_to_the_bits_of_a_larger_one(size, clip, isa):
    usual = {**CLIPS[clip], **({"clipvalue": 1.5} if "clipvalue" in CLIPS[clip] else {})}
    expected = first_step_gradients([gradient(size), gradient(7, 1)], **usual)
    small = {name: bound * SMALL for name, bound in usual.items()}
    actual = first_step_gradients([gradient(size) * SMALL, gradient(7, 1) * SMALL], **small)
    for a, e in zip(actual, expected, strict=True):
        assert a.any()
        np.testing.assert_array_equal(bits(a), bits(e * SMALL))


@pytest.mark.parametrize(
    ("size", "bound"),
    [
        *((size, 2.0) for size in (1e160, 1e200, 1e300)),
        *((1e-190, bound) for bound in (1e-191, 1e-200, 1e-305)),
        (1e-158, 1e-160),  # squares of a few digits
        (1e-300, 1e-305),
        (1e300, 1e-200),  # the factor is no float64 at all
        (1e300, 1e-300),
    ],
)
@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_clipped_gradients_have_the_norm_of_the_bound(clip, size, bound):
    (clipped,) = first_step_gradients([gradient() * size], **{clip: bound})
    np.testing.assert_allclose(np.linalg.norm(clipped / bound), 1.0, rtol=1e-14)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_a_tiny_gradient_within_the_bound_keeps_its_bits(clip):
    (kept,) = first_step_gradients([gradient() * 1e-200], **{clip: 1e-198})
    np.testing.assert_array_equal(bits(kept), bits(gradient() * 1e-200))


@pytest.mark.parametrize("count", [1, 100])
def test_squares_that_are_lost_only_for_each_gradient_count_beside_others(count):
    """Tiny float64 gradients beside float32 ones, whose norm decides."""
    gradients = [*(gradient(10, i) * 1e-200 for i in range(count)), np.array([3e-30, 4e-30], np.float32)]
    *tiny, single = first_step_gradients(gradients, global_clipnorm=5e-32)
    np.testing.assert_allclose(single, [3e-32, 4e-32], rtol=1e-6)
    for actual, before in zip(tiny, gradients, strict=False):
        np.testing.assert_allclose(actual, before * 0.01, rtol=1e-6)


KINDS = {
    "dense": {},
    "AMSGrad": {"amsgrad": True},
    "clip after dedupe": {"clip_after_dedupe": True},
    "lazy": {"sparse_update": "lazy"},
    "deferred": {"sparse_update": "deferred"},
}
# 1 / factor of the clipped or scaled gradient, and how it comes about.
FACTORS = {
    "clipnorm": (lambda norm: {"clipnorm": 1.0}, lambda norm: norm),
    "global_clipnorm": (lambda norm: {"global_clipnorm": 1.0}, lambda norm: norm),
    "both scales": (lambda norm: {"clipnorm": 1.0, "loss_scale_factor": 2.0**100}, lambda norm: norm),
    "loss_scale_factor": (lambda norm: {"loss_scale_factor": norm * 2}, lambda norm: norm * 2),
}
# The arithmetic of the variable, and gradients near its largest number.
DTYPES_AND_SIZES = [("float32", np.float32, 1e38), ("float64", np.float64, 2e307), ("bfloat16", np.float32, 1e38)]


def dtype_of(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def exact_norm(values):
    return np.linalg.norm(values.astype(np.float64).ravel() * 2.0**-600) * 2.0**600


@pytest.mark.parametrize(("dtype", "arithmetic", "size"), DTYPES_AND_SIZES)
@pytest.mark.parametrize("how", FACTORS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_factor_that_has_no_normal_number_scales_as_exactly_as_any(
    dtype, arithmetic, size, how, kind, is_sparse, isa
):
    values = (np.random.RandomState(0).uniform(0.5, 1, (6, 5)) * size).astype(dtype_of(dtype))
    options, divisor = FACTORS[how]
    norm = exact_norm(values)
    indices = np.array([3, 0, 5, 1, 2, 4])
    optimizer = fastadam.Adam(beta_1=0.0, **KINDS[kind], **options(norm))
    w = np.zeros((6, 5), values.dtype)
    optimizer.apply_gradients([(fastadam.IndexedSlices(values, indices) if is_sparse else values, w)])
    expected = values.astype(np.float64) / divisor(norm)
    expected = expected[np.argsort(indices)] if is_sparse else expected
    few = 2 * np.finfo(arithmetic).eps
    np.testing.assert_allclose(optimizer.get_slot(w, "m"), expected, rtol=few)
    np.testing.assert_allclose(optimizer.get_slot(w, "v"), expected**2 * 0.001, rtol=2e-4 if few > 1e-10 else 1e-12)
    if KINDS[kind].get("amsgrad"):
        np.testing.assert_array_equal(optimizer.get_slot(w, "vhat"), optimizer.get_slot(w, "v"))
    assert (np.abs(w.astype(np.float64)) > 0.0009).all()


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size", "scale"), [(np.float32, 3e38, 1e39), (np.float32, 3e38, 1e60), (np.float64, 1e308, 1e308)]
)
def test_gradients_are_accumulated_with_a_factor_that_has_no_normal_number(dtype, size, scale, is_sparse):
    w, values = np.zeros((2, 3), dtype), np.full((2, 3), size, dtype)
    g = fastadam.IndexedSlices(values, np.array([1, 0])) if is_sparse else values
    optimizer = fastadam.Adam(beta_1=0.0, gradient_accumulation_steps=2, loss_scale_factor=scale)
    for _ in range(2):
        optimizer.apply_gradients([(g, w)])
    np.testing.assert_allclose(optimizer.get_slot(w, "m"), float(dtype(size)) / scale, rtol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("dtype", "size", "factor", "product"),
    [
        (np.float32, 2.0**127, 2.0**-130, 0.125),
        (np.float32, 2.0**127, -(2.0**-150), -(2.0**-23)),
        (np.float32, 2.0**127, 2.0**-252, 2.0**-125),
        (np.float32, 2.0**127, 2.0**-254, 0.0),  # the product is no normal number
        (np.float32, 1.0, 1e-40, 0.0),
        (np.float32, np.inf, 1e-40, np.inf),
        (np.float64, 2.0**1023, 2.0**-1074, 2.0**-51),
        (np.float64, 2.0**1023, -(2.0**-1030), -(2.0**-7)),
        (np.float64, 1.0, 2.0**-1070, 0.0),
    ],
)
def test_adam_step_multiplies_by_a_factor_that_has_no_normal_number(dtype, size, factor, product, isa):
    w, g, m, v = (np.full(40, x, dtype) for x in (1, size, 0, 0))
    fastadam.adam_step(w, g, m, v, step=1, beta_1=0.0, grad_factor=factor)
    np.testing.assert_array_equal(m, np.full(40, product, dtype))


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("factor", [1e-40, 3e-60])
def test_jax_multiplies_by_a_factor_that_has_no_normal_number(is_sparse, factor):
    jax = pytest.importorskip("jax")
    import fastadam.jax as fj

    gradients, params = jax.numpy.full((2, 4), 3e38), jax.numpy.zeros((2, 4))
    options = {"learning_rate": 0.1, "b1": 0.0, "grad_factor": factor}
    if is_sparse:
        _, state = fj.sparse_update(params, jax.numpy.array([1, 0]), gradients, fj.init(params), **options)
    else:
        _, state = fj.fused_update(params, gradients, fj.init(params), **options)
    np.testing.assert_allclose(state.mu, float(np.float32(3e38)) * factor, rtol=2e-7)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("how", FACTORS)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e38), ("float64", 2e307), ("float64", SMALL)])
def test_a_gpu_gives_the_bits_of_the_cpu(gpu, dtype, size, how, is_sparse):
    values = (np.random.RandomState(0).uniform(0.5, 1, (6, 5)) * size).astype(dtype)
    if size == SMALL:
        options = {"global_clipnorm" if how == "global_clipnorm" else "clipnorm": size / 8}
    else:
        options = FACTORS[how][0](exact_norm(values))
    w, ours, theirs = np.zeros((6, 5), dtype), *(fastadam.Adam(beta_1=0.0, **options) for _ in range(2))
    twin, indices = gpu.array(w), np.array([3, 0, 5, 1, 2, 4])

    def gradient_of(array):
        return fastadam.IndexedSlices(array(values), array(indices)) if is_sparse else array(values)

    ours.apply_gradients([(gradient_of(np.array), w)])
    theirs.apply_gradients([(gradient_of(gpu.array), twin)])
    assert ours.get_slot(w, "m").all()
    np.testing.assert_array_equal(bits(ours.get_slot(w, "m")), bits(gpu.get(theirs.get_slot(twin, "m"))))
    np.testing.assert_array_equal(bits(w), bits(gpu.get(twin)))


def test_a_loss_scale_and_a_norm_multiply_each_other():
    """Each factor is a float32, their product is none."""
    w, g = np.zeros(4, np.float32), np.full(4, 1e38, np.float32)
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(beta_1=0.0, clipnorm=2e-6), initial_scale=2.0**100)
    assert optimizer.apply_gradients([(g, w)]) == 1
    np.testing.assert_allclose(optimizer.get_slot(w, "m"), 1e-6, rtol=2e-7)


def test_squares_that_overflow_only_together():
    """The sum over each gradient is finite, that over all is not; beside float32, which cannot overflow."""
    others = [np.full(3, 2.0**100, np.float32), np.ones(2, np.float16)]
    gradients = [gradient(10, i) * 2.0**509 for i in range(100)]
    assert all(np.isfinite((g**2).sum()) for g in gradients)
    clipped = first_step_gradients([*gradients, *others], global_clipnorm=2.0**400)
    expected = first_step_gradients([g * 2.0**-509 for g in gradients], global_clipnorm=2.0**-109)
    for actual, small in zip(clipped, expected, strict=False):
        np.testing.assert_array_equal(bits(actual * 2.0**-509), bits(small))


@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("size", [LARGE, SMALL])
def test_rows_are_clipped_as_they_come_and_after_they_are_summed(mode, after, size):
    moments = []
    for factor in (1.0, size):
        bound = 0.5 * factor if size == SMALL else 0.5
        w = np.zeros((6, 5))
        optimizer = fastadam.Adam(beta_1=0.0, clipnorm=bound, clip_after_dedupe=after, sparse_update=mode)
        optimizer.apply_gradients([(repeated_rows(gradient() * factor), w)])
        moments.append(optimizer.get_slot(w, "m") * 0.5 / bound)
    assert moments[0].any()
    np.testing.assert_array_equal(bits(moments[0]), bits(moments[1]))


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_a_loss_scale_steps_on_huge_gradients_and_skips_a_norm_above_the_largest_number(clip):
    w = np.ones(4)
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1, **{clip: 1.0}), initial_scale=4.0)
    assert optimizer.apply_gradients([(np.full(4, 1e200), w)]) == 1
    np.testing.assert_allclose(w, 0.9, rtol=1e-6)
    assert optimizer.dynamic_scale == 4.0
    before = w.copy()
    for bad in (np.array([1.0, np.inf, 1, 1]), np.full(4, np.nan)):
        assert optimizer.apply_gradients([(bad, w)]) == 1
    assert optimizer.dynamic_scale == 1.0
    for _ in range(2):
        assert optimizer.apply_gradients([(np.full(4, 1.7e308), w)]) == 1  # a norm of 3.4e308
    np.testing.assert_array_equal(w, before)
    optimizer.dynamic_scale = 4.0  # with it the norm is below the largest number
    assert optimizer.apply_gradients([(np.full(4, 1.7e308), w)]) == 2
    assert (w < before).all()


def test_a_norm_above_the_largest_number_is_infinite():
    huge = np.full(4, 1.7e308)
    (clipped,) = first_step_gradients([huge], clipnorm=1.0)
    np.testing.assert_array_equal(clipped, 0.0)  # as in tf.clip_by_norm
    (clipped,) = first_step_gradients([huge], global_clipnorm=1.0)
    assert np.isnan(clipped).all()  # as in tf.clip_by_global_norm


@pytest.mark.parametrize(
    ("gradients", "norm"),
    [
        ([np.full(4, 1e200)], 2e200),
        ([np.full(4, -1e308)], np.inf),
        ([np.array([MOST])], MOST),
        ([np.array([3e200]), np.array([4e200]), np.ones(2, np.float32)], 5e200),
        ([np.full(2, 1e154)] * 8, 4e154),
        ([np.array([1e200, np.inf])], np.inf),
        ([np.array([1e200]), np.array([np.inf], np.float32)], np.inf),
        ([np.array([1e200, np.nan])], np.nan),
        ([np.array([1e200]), np.array([np.nan], np.float16)], np.nan),
        ([], 0.0),
        ([np.array([1e-200])], 1e-200),
        ([np.array([3e-200, 0.0]), np.array([-4e-200])], 5e-200),
        ([np.full(4, 1e-307)], 2e-307),
        ([np.full(4, 1e-162)], 2e-162),  # squares that are denormal
        ([np.array([LEAST])], LEAST),
        ([np.array([LEAST / 2])], 0.0),  # a denormal counts as 0, as it does in a step
        ([np.array([1e-200, np.nan])], np.nan),
        ([np.array([1e-200, 1e200])], 1e200),
        ([np.array([1e-200]), np.array([1e200])], 1e200),
        ([np.array([1e-200]), np.array([1e-30], np.float32)], np.float32(1e-30)),
        ([np.zeros(5), np.zeros(3, np.float32)], 0.0),
    ],
)
def test_global_norm(gradients, norm):
    np.testing.assert_allclose(fastadam.global_norm(gradients), norm, rtol=1e-15)


@pytest.mark.parametrize("size", [LARGE, SMALL])
@pytest.mark.parametrize("threads", [1, 3])
def test_global_norm_has_the_same_bits_whatever_the_size_of_the_elements(threads, size, isa):
    fastadam.set_num_threads(threads)
    arrays = [gradient(300_001), gradient(13)]
    assert fastadam.global_norm([a * size for a in arrays]) == fastadam.global_norm(arrays) * size


@pytest.mark.parametrize(
    ("arrays", "squares", "norm"),
    [
        ([np.full(4, 3e200), np.full(4, 2.0, np.float32)], [np.inf, 16.0], 6e200),
        ([np.full(4, 3e-200), np.full(4, 4e-200)], [0.0, 0.0], 1e-199),
    ],
)
def test_the_c_interface_gives_the_norm_where_the_sum_of_squares_has_no_number(arrays, squares, norm):
    library = with_signatures(ctypes.CDLL(option("--library").strip()), "fastadam")
    tensors = (Tensor * 2)()
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.grad, tensor.grad_size, tensor.grad_dtype = array.ctypes.data, array.size, DTYPES[array.dtype.name]
    listed, sums, found = ctypes.byref(List(ABI, tensors, 2, None, None, 0)), np.zeros(2), ctypes.c_double()
    assert library.fastadam_sum_squares(listed, sums.ctypes.data) == OK
    assert sums.tolist() == squares
    assert library.fastadam_norm(listed, ctypes.byref(found)) == OK
    assert found.value == pytest.approx(norm, rel=1e-15, abs=0)


@pytest.mark.parametrize(("dtype", "size", "factor"), [(np.float32, 3e38, 1e-40), (np.float64, 1e308, 1e-310)])
def test_the_c_interface_takes_a_factor_that_has_no_normal_number(dtype, size, factor):
    library = with_signatures(ctypes.CDLL(option("--library").strip()), "fastadam")
    w, g, accumulator = np.zeros(40, dtype), np.full(40, size, dtype), np.zeros(40, dtype)
    tensor = Tensor(size=40, grad_size=40, next=-1, grad_factor=factor, dtype=DTYPES[g.dtype.name])
    tensor.grad_dtype = tensor.dtype
    tensor.var, tensor.grad, tensor.accumulator = (a.ctypes.data for a in (w, g, accumulator))
    listed = ctypes.byref(List(ABI, ctypes.pointer(tensor), 1, None, None, 0))
    assert library.fastadam_accumulate(listed, True, False) == OK
    np.testing.assert_allclose(accumulator, float(dtype(size)) * factor, rtol=2 * np.finfo(dtype).eps)
