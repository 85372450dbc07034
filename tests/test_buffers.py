"""What counts as a variable: any writable contiguous CPU buffer, updated in place and never copied."""

from __future__ import annotations

import array
import ctypes

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from helpers import assert_moved

F32 = np.float32


def expected_after_one_step(value, gradient):
    result = np.array(value, F32)
    fastadam.adam_step(
        result, np.asarray(gradient, F32), np.zeros_like(result), np.zeros_like(result), step=1, learning_rate=0.1
    )
    assert_moved(result, np.asarray(value, F32))
    return result


class ArrayInterface:
    """An object of another library that shares memory through `__array_interface__`."""

    def __init__(self, values):
        self.values = values

    @property
    def __array_interface__(self):
        return self.values.__array_interface__


class DLPack:
    """An object of another library that shares memory through DLPack."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


def test_a_memmap_is_updated_on_disk(tmp_path):
    values = np.memmap(tmp_path / "w", F32, "w+", shape=(100,))
    values[:] = 1
    gradient = np.full(100, 0.5, F32)
    expected = expected_after_one_step(values, gradient)
    fastadam.Adam(0.1).apply_gradients([(gradient, values)])
    values.flush()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "w", F32), expected)


@pytest.mark.parametrize("grad_order", ["C", "F"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_orders_of_variable_and_gradient_may_differ(order, grad_order):
    rng = np.random.RandomState(0)
    value, gradient = random_array(rng, (7, 5)), random_array(rng, (7, 5))
    expected = expected_after_one_step(value, gradient)
    variable = np.array(value, order=order)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.array(gradient, order=grad_order), variable)])
    np.testing.assert_array_equal(bits(variable), bits(expected))
    slot = optimizer.get_slot(variable, "m")
    assert slot.flags[f"{order}_CONTIGUOUS"]
    np.testing.assert_allclose(slot, gradient * 0.1, rtol=1e-6)


def test_strided_and_transposed_gradients_are_converted():
    rng = np.random.RandomState(0)
    value, gradient = random_array(rng, (6, 4)), random_array(rng, (6, 4))
    wide = np.zeros((12, 8), F32)
    wide[::2, ::2] = gradient
    for form in (
        wide[::2, ::2],
        np.ascontiguousarray(gradient.T).T,
        gradient[::-1][::-1],
        np.asfortranarray(gradient),
        gradient.tolist(),
    ):
        variable = value.copy()
        fastadam.Adam(0.1).apply_gradients([(form, variable)])
        np.testing.assert_array_equal(bits(variable), bits(expected_after_one_step(value, gradient)))


def test_a_byte_swapped_gradient_is_converted():
    variable = np.ones(5, F32)
    fastadam.Adam(0.1).apply_gradients([(np.full(5, 0.5, ">f4"), variable)])
    np.testing.assert_array_equal(variable, expected_after_one_step(np.ones(5), np.full(5, 0.5)))


def test_a_gradient_is_converted_once():
    class Counted:
        conversions = 0

        def __array__(self, dtype=None, copy=None):
            self.conversions += 1
            return np.full(3, 0.5, F32)

    optimizer, w, gradient = fastadam.Adam(0.1), np.ones(3, F32), Counted()
    for step in (1, 2):
        optimizer.apply_gradients([(gradient, w)])
        assert gradient.conversions == step
    assert (w < 0.81).all()


@pytest.mark.parametrize("wrap", [ArrayInterface, DLPack, fastadam.Variable])
def test_other_holders_of_memory_are_updated_in_place(wrap):
    values, gradient = np.ones(9, F32), np.full(9, 0.5, F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(wrap(gradient), wrap(values))])
    np.testing.assert_array_equal(values, expected_after_one_step(np.ones(9), gradient))
    optimizer.apply_gradients([(gradient, wrap(values))])
    assert len(optimizer.weights) == 3
    assert optimizer.get_slot(values, "m") is optimizer.get_slot(wrap(values), "m")


@pytest.mark.parametrize("wrap", [ArrayInterface, DLPack])
def test_other_holders_of_read_only_memory_are_refused(wrap):
    values = np.ones(9, F32)
    values.flags.writeable = False
    with pytest.raises(ValueError, match="read-?only"):  # "readonly": a NumPy before 2.1 does not export them at all
        fastadam.Adam(0.1).apply_gradients([(np.ones(9, F32), wrap(values))])


def test_buffers_of_the_standard_library_are_updated_in_place():
    gradient = np.full(4, 0.5, F32)
    expected = expected_after_one_step(np.ones(4), gradient)
    for values in (array.array("f", [1] * 4), (ctypes.c_float * 4)(1, 1, 1, 1), memoryview(array.array("f", [1] * 4))):
        fastadam.Adam(0.1).apply_gradients([(gradient, values)])
        np.testing.assert_array_equal(np.asarray(values), expected)
    with pytest.raises(ValueError, match="read-only"):
        fastadam.Adam().apply_gradients([(gradient, memoryview(bytes(16)).cast("f"))])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1), (2, 1, 3)])
def test_shapes_without_or_with_single_elements(shape):
    variable, gradient = np.ones(shape, F32), np.full(shape, 0.5, F32)
    optimizer = fastadam.Adam(0.1)
    for _ in range(2):
        optimizer.apply_gradients([(gradient, variable)])
    assert optimizer.get_slot(variable, "v").shape == shape
    np.testing.assert_allclose(variable, np.full(shape, 0.8), rtol=1e-5)


def test_a_size_one_axis_may_have_any_stride():
    base = np.ones((4, 6), F32)
    row = base[1:2, :]
    fastadam.Adam(0.1).apply_gradients([(np.ones((1, 6), F32), row)])
    np.testing.assert_allclose(base[:, 0], [1, 0.9, 1, 1], rtol=1e-5)


def test_variable_holds_arrays_and_copies_numbers():
    values = np.ones(3, np.float64)
    held = fastadam.Variable(values, name="w")
    assert held.value is values
    assert held.dtype == np.float64
    assert np.asarray(held) is values
    assert held.numpy() is not values
    numbers = fastadam.Variable([[1, 2], [3, 4]])
    assert (numbers.shape, numbers.dtype, numbers.name) == ((2, 2), np.float32, None)
    numbers.assign(np.zeros((2, 2)))
    assert not numbers.value.any()
    assert np.array(held, dtype=np.float32).dtype == np.float32
    with pytest.raises(ValueError, match=r"value: shape \(3,\), expected \(2, 2\)"):
        numbers.assign(np.zeros(3))
    with pytest.raises(TypeError, match="variable 'w': dtype int64"):
        fastadam.Variable(np.ones(3, np.int64), name="w")
    with pytest.raises(ValueError, match=r"value: strides \(16,\)"):
        fastadam.Variable(np.ones(6)[::2])
    assert repr(held) == "fastadam.Variable(array([1., 1., 1.], dtype=float64), name='w')"


def test_slots_are_placed_like_their_variable():
    for size, period in ((100, 64), (5000, 4096), (300_000, 4096)):
        variable = np.ones(size, F32)
        optimizer = fastadam.Adam()
        optimizer.build([variable])
        for name in ("m", "v"):
            slot = optimizer.get_slot(variable, name)
            assert (slot.ctypes.data - variable.ctypes.data) % period == 0
            assert slot.flags.c_contiguous
            assert slot.dtype == F32


def test_bfloat16_arrays_are_recognised_by_their_dtype():
    variable = np.ones(5, ml_dtypes.bfloat16)
    fastadam.Adam(0.25).apply_gradients([(np.full(5, 0.5, ml_dtypes.bfloat16), variable)])
    np.testing.assert_array_equal(variable.astype(F32), np.full(5, 0.75, F32))
    with pytest.raises(TypeError, match="dtype float8_e4m3fn, expected float16, bfloat16, float32 or float64"):
        fastadam.Adam().apply_gradients([(np.ones(5, F32), np.ones(5, ml_dtypes.float8_e4m3fn))])
