"""Factors of gradients that are below the smallest normal number: products are as exact as with any other factor."""

from __future__ import annotations

import ctypes

import fastadam
import ml_dtypes
import numpy as np
import pytest
from c_twins import DTYPES, OK, with_signatures
from cases import bits
from test_c_interface import ABI, List, Tensor, option

TINY = 2.0**-700  # squares of such gradients underflow


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
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


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
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e38), ("float64", 2e307), ("float64", TINY)])
def test_a_gpu_gives_the_bits_of_the_cpu(gpu, dtype, size, how, is_sparse):
    values = (np.random.RandomState(0).uniform(0.5, 1, (6, 5)) * size).astype(dtype)
    if size == TINY:
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
