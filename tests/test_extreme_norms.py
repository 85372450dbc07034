"""Norms of gradients whose squares overflow or underflow: clipped as any other, from the least to the largest float64."""

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
