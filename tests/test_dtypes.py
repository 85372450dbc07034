"""float64 against the reference; float16 and bfloat16 against the float32 path."""

from __future__ import annotations

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from fastadam._core.native.gradients import bfloat16_to_float32, float32_to_bfloat16

HALF_TYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
OPTIONS = [{}, {"amsgrad": True}, {"clipvalue": 0.3}, {"amsgrad": True, "clipvalue": 0.01, "decay": 0.1}]


def ulps(actual, expected):
    return np.max(np.abs(actual - expected) / np.spacing(np.maximum(np.abs(actual), np.abs(expected))), initial=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_is_within_two_ulps_of_the_reference_in_every_step(options, isa):
    rng = np.random.RandomState(1)
    var = random_array(rng, 1001, -3, 3, np.float64)
    optimizer = fastadam.Adam(0.01, **options)
    optimizer.build([var])
    amsgrad = options.get("amsgrad", False)
    for step in range(1, 51):
        slots = [optimizer.get_slot(var, name).copy() for name in optimizer.get_slot_names()]
        gradient = random_array(rng, 1001, -10, 2, np.float64)
        arguments = {"step": step, "learning_rate": 0.01, "decay": options.get("decay", 0.0)}
        expected = fastadam.reference.adam_step(var, gradient, *slots, clipvalue=options.get("clipvalue"), **arguments)
        optimizer.apply_gradients([(gradient, var)])
        actual = [var, *(optimizer.get_slot(var, name) for name in optimizer.get_slot_names())]
        assert len(actual) == (4 if amsgrad else 3)
        for name, a, e in zip(("var", "m", "v", "vhat"), actual, expected, strict=False):
            assert ulps(a, e) <= 2, (step, name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_types_have_the_state_of_float32_and_round_the_variable_once(dtype, options, isa):
    rng = np.random.RandomState(2)
    half = random_array(rng, 1001, -8, 3).astype(dtype)
    single = half.astype(np.float32)
    start = single.copy()
    half_optimizer, single_optimizer = (fastadam.Adam(0.01, **options) for _ in range(2))
    for _ in range(30):
        gradient = random_array(rng, 1001, -12, 1).astype(dtype)
        single[...] = half.astype(np.float32)
        half_optimizer.apply_gradients([(gradient, half)])
        single_optimizer.apply_gradients([(gradient.astype(np.float32), single)])
        np.testing.assert_array_equal(bits(half), bits(single.astype(dtype)))
        for name in single_optimizer.get_slot_names():
            slot = half_optimizer.get_slot(half, name)
            assert slot.dtype == np.float32
            np.testing.assert_array_equal(bits(slot), bits(single_optimizer.get_slot(single, name)))
    assert (single != start).mean() > 0.5  # a large half stays where a step is less than half an ulp


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_types_move_with_default_arguments(dtype):
    """TF's own half arithmetic does not: beta_2 rounds to 1 in bfloat16, v underflows in float16."""
    var, gradient = np.ones(5, dtype), np.full(5, 1e-3, dtype)
    exact, *_ = fastadam.reference.adam_step(var, gradient, np.zeros(5), np.zeros(5), step=1, learning_rate=0.125)
    fastadam.Adam(learning_rate=0.125).apply_gradients([(gradient, var)])
    np.testing.assert_array_equal(var, exact.astype(dtype))
    assert (var < 0.9).all()


def test_every_bfloat16_is_widened_and_rounded_as_ml_dtypes_does():
    patterns = np.arange(65536, dtype=np.uint16)
    widened = patterns.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bfloat16_to_float32(patterns), widened)
    number = ~np.isnan(widened)
    np.testing.assert_array_equal(float32_to_bfloat16(widened)[number], patterns[number])
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(widened[~number]))).all()


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize(
    "grad_dtype", [np.float16, np.float32, np.float64, np.int32, np.longdouble, ml_dtypes.bfloat16]
)
def test_gradients_of_another_dtype_are_converted_and_not_modified(dtype, grad_dtype):
    gradient = np.array([[1, -2, 0], [3, 4, -5]]).astype(grad_dtype)
    before = gradient.copy()
    expected, actual = np.ones((2, 3), dtype), np.ones((2, 3), dtype)
    fastadam.Adam(0.1).apply_gradients([(gradient.astype(dtype), expected)])
    fastadam.Adam(0.1).apply_gradients([(gradient, actual)])
    np.testing.assert_array_equal(bits(actual), bits(expected))
    np.testing.assert_array_equal(actual != 1, before != 0)
    np.testing.assert_array_equal(gradient, before)


def unaligned(array):
    return np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


LAYOUTS = {
    "F order": np.asfortranarray,
    "strided": lambda g: np.repeat(g, 2, axis=0)[::2],
    "unaligned": unaligned,
    "byte-swapped": lambda g: g.astype(">f4"),
    "float64": lambda g: g.astype(np.float64),
    "list": lambda g: g.tolist(),
}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["dense", "slices", "accumulated", "repeated", "bfloat16", "8bit"])
def test_half_variables_take_float32_gradients_of_any_layout_without_rounding_them(rule, layout, dtype):
    """Values that float16 has not, and a last bit that neither half type has."""
    gradient = np.float32([[1e5, 1 + 2**-20], [1e-9, -3e-8]])
    options = {"gradient_accumulation_steps": 2 if rule == "accumulated" else None, "sum_repeated": rule == "repeated"}
    if rule in ("bfloat16", "8bit"):
        options |= {"moments": rule, "float32_for": 0}
    states = []
    for convert in (lambda g: g, LAYOUTS[layout]):
        w = np.ones((2, 2), dtype)
        optimizer = fastadam.Adam(0.1, epsilon=1e-12, **options)
        given = fastadam.IndexedSlices(convert(gradient), [1, 0]) if rule == "slices" else convert(gradient)
        optimizer.apply_gradients([(given, w)] * (2 if rule == "repeated" else 1))
        optimizer.apply_gradients([(gradient, w)])
        states.append([w, *optimizer.get_weights()])
    for found, expected in zip(*states, strict=True):
        np.testing.assert_array_equal(bits(found), bits(expected))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_moments_need_gradients_of_their_dtype(dtype):
    w, m, v = np.ones((2, 2), dtype), np.zeros((2, 2), dtype), np.zeros((2, 2), dtype)
    fastadam.adam_step(w, np.full((2, 2), 0.5, np.float32, order="F"), m, v, step=1)
    np.testing.assert_array_equal(m.astype(np.float32), np.float32(0.05).astype(dtype).astype(np.float32))


def test_nan_in_one_element_stays_there():
    var = np.ones(9, np.float32)
    gradient = np.ones(9, np.float32)
    gradient[4] = np.nan
    fastadam.Adam(0.1, clipvalue=0.5).apply_gradients([(gradient, var)])
    assert np.isnan(var).tolist() == [i == 4 for i in range(9)]


def test_amsgrad_keeps_the_old_maximum_against_a_nan():
    var = np.ones(9, np.float32)
    optimizer = fastadam.Adam(0.1, amsgrad=True)
    optimizer.apply_gradients([(np.ones(9, np.float32), var)])
    before = optimizer.get_slot(var, "vhat").copy()
    assert before.all()
    optimizer.apply_gradients([(np.full(9, np.nan, np.float32), var)])
    np.testing.assert_array_equal(optimizer.get_slot(var, "vhat"), before)
