"""Variables, gradients and pairs that must be refused: a message that names the argument, and nothing changed."""

from __future__ import annotations

import copy
import re

import fastadam
import numpy as np
import pytest

F32 = np.float32


def readonly():
    array = np.ones(5, F32)
    array.flags.writeable = False
    return array


def broadcast():
    array = np.broadcast_to(F32(1), (5,))
    array = np.lib.stride_tricks.as_strided(np.ones(1, F32), (5,), (0,))
    assert array.flags.writeable
    return array


def misaligned():
    return np.frombuffer(bytearray(4 * 5 + 1), np.uint8)[1:].view(F32)


GRADIENT = np.full(5, 0.1, F32)
BAD_VARIABLES = {
    "list": (lambda: [1.0] * 5, TypeError, "vars[2]: list, expected a writable float array"),
    "float": (lambda: 1.0, TypeError, "vars[2]: float, expected a writable float array"),
    "scalar": (lambda: F32(1), TypeError, "vars[2]: float32, expected a writable float array"),
    "none": (lambda: None, TypeError, "vars[2]: NoneType, expected a writable float array"),
    "integer": (lambda: np.ones(5, np.int64), TypeError, "vars[2]: dtype int64, expected float16, bfloat16, float32 or float64"),
    "bool": (lambda: np.ones(5, bool), TypeError, "vars[2]: dtype bool, expected float16"),
    "complex": (lambda: np.ones(5, np.complex64), TypeError, "vars[2]: dtype complex64, expected float16"),
    "object": (lambda: np.ones(5, object), TypeError, "vars[2]: dtype object, expected float16"),
    "longdouble": (lambda: np.ones(5, np.longdouble), TypeError, "vars[2]: dtype "),
    "string": (lambda: np.array(["a"] * 5), TypeError, "vars[2]: dtype <U1, expected float16"),
    "structured": (lambda: np.zeros(5, [("a", F32)]), TypeError, "vars[2]: dtype [('a', '<f4')], expected float16"),
    "read-only": (readonly, ValueError, "vars[2]: read-only, expected a writable array"),
    "strided": (lambda: np.ones(10, F32)[::2], ValueError, "vars[2]: strides (8,) for shape (5,), expected a contiguous array"),
    "reversed": (lambda: np.ones(5, F32)[::-1], ValueError, "vars[2]: strides (-4,) for shape (5,), expected a contiguous"),
    "column": (lambda: np.ones((5, 2), F32)[:, 0], ValueError, "vars[2]: strides (8,) for shape (5,), expected a contiguous"),
    "broadcast": (broadcast, ValueError, "vars[2]: strides (0,) for shape (5,), expected a contiguous array"),
    "byte-swapped": (lambda: np.ones(5, ">f4"), ValueError, "vars[2]: byte-swapped, expected the byte order of this machine"),
    "misaligned": (misaligned, ValueError, "vars[2]: misaligned, expected an address that is a multiple of the item size"),
    "masked": (lambda: np.ma.ones(5, F32), TypeError, "vars[2]: masked array, whose mask Adam cannot honour"),
    "wrong shape": (lambda: np.ones(4, F32), ValueError, "grads[2]: shape (5,), expected (4,) like vars[2]"),
    "named, wrong shape": (
        lambda: fastadam.Variable(np.ones(4, F32), name="w"), ValueError, "grads[2]: shape (5,), expected (4,) like variable 'w'"
    ),
}  # fmt: skip
BAD_GRADIENTS = {
    "wrong shape": (lambda w: np.ones(4, F32), ValueError, "grads[2]: shape (4,), expected (5,) like vars[2]"),
    "scalar": (lambda w: 1.0, ValueError, "grads[2]: shape (), expected (5,) like vars[2]"),
    "broadcastable": (lambda w: np.ones((1, 5), F32), ValueError, "grads[2]: shape (1, 5), expected (5,) like vars[2]"),
    "list of wrong length": (lambda w: [1.0] * 4, ValueError, "grads[2]: shape (4,), expected (5,) like vars[2]"),
    "ragged": (lambda w: [[1.0], [1.0, 2.0]], TypeError, "grads[2]: list that is not an array of numbers"),
    "complex": (lambda w: np.ones(5, complex), TypeError, "grads[2]: dtype complex128, expected real numbers"),
    "generator": (lambda w: (x for x in range(5)), TypeError, "grads[2]: generator, expected an array of numbers"),
    "object": (lambda w: np.ones(5, object), TypeError, "grads[2]: dtype object, expected real numbers"),
    "string": (lambda w: np.array(["1"] * 5), TypeError, "grads[2]: dtype <U1, expected real numbers"),
    "bool": (lambda w: np.ones(5, bool), TypeError, "grads[2]: dtype bool, expected real numbers"),
    "masked": (lambda w: np.ma.ones(5, F32), TypeError, "grads[2]: masked array"),
    "the variable itself": (lambda w: w, ValueError, "grads[2]: shares memory with vars[2], which the step writes"),
    "a view of it": (lambda w: w[:], ValueError, "grads[2]: shares memory with vars[2]"),
}


@pytest.mark.parametrize("kind", BAD_VARIABLES)
def test_a_bad_variable_at_the_end_of_the_list_changes_nothing(kind, snapshot):
    make, error, message = BAD_VARIABLES[kind]
    with pytest.raises(error, match=re.escape(message)):
        snapshot.optimizer.apply_gradients([*snapshot.good_pairs(), (GRADIENT, make())])
    snapshot.assert_unchanged()


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_a_bad_gradient_at_the_end_of_the_list_changes_nothing(kind, snapshot):
    make, error, message = BAD_GRADIENTS[kind]
    new = np.ones(5, F32)
    with pytest.raises(error, match=re.escape(message)):
        snapshot.optimizer.apply_gradients([*snapshot.good_pairs(), (make(new), new)])
    np.testing.assert_array_equal(new, np.ones(5, F32))
    snapshot.assert_unchanged()


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_a_bad_gradient_of_a_known_variable_changes_nothing(kind):
    make, error, message = BAD_GRADIENTS[kind]
    variables = [np.ones(n, F32) for n in (3, 4, 5)]
    gradients = [np.ones(n, F32) for n in (3, 4, 5)]
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    before = copy.deepcopy([*variables, *optimizer.get_weights()])
    with pytest.raises(error, match=re.escape(message)):
        optimizer.apply_gradients(zip([*gradients[:2], make(variables[2])], variables, strict=True))
    for b, a in zip(before, [*variables, *optimizer.get_weights()], strict=True):
        np.testing.assert_array_equal(b, a)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (None, TypeError, "grads_and_vars: NoneType, expected an iterable of (gradient, variable) pairs"),
        (3, TypeError, "grads_and_vars: int, expected an iterable"),
        ([GRADIENT], TypeError, "grads_and_vars[0]: ndarray, expected a (gradient, variable) pair"),
        ([(GRADIENT,)], ValueError, "grads_and_vars[0]: 1 items, expected a (gradient, variable) pair"),
        ([(GRADIENT, np.ones(5, F32), 1)], ValueError, "grads_and_vars[0]: 3 items, expected a (gradient, variable) pair"),
        ("ab", TypeError, "grads_and_vars: str, expected an iterable of (gradient, variable) pairs"),
    ],
)  # fmt: skip
def test_what_is_not_pairs_changes_nothing(pairs, error, message, snapshot):
    with pytest.raises(error, match=re.escape(message)):
        snapshot.optimizer.apply_gradients(pairs)
    snapshot.assert_unchanged()


def test_partly_overlapping_variables_are_refused(snapshot):
    shared = np.ones(8, F32)
    with pytest.raises(ValueError, match=re.escape("vars[3]: overlaps vars[2] in memory")):
        snapshot.optimizer.apply_gradients([*snapshot.good_pairs(), (GRADIENT, shared[:5]), (GRADIENT, shared[3:])])
    np.testing.assert_array_equal(shared, np.ones(8, F32))
    snapshot.assert_unchanged()


def test_a_reshaped_view_of_a_known_variable_is_refused(snapshot):
    with pytest.raises(
        ValueError, match=re.escape("vars[0]: overlaps a variable of this optimizer known as float32 (2, 2)")
    ):
        snapshot.optimizer.apply_gradients([(np.ones(4, F32), snapshot.variables[1].reshape(4))])
    snapshot.assert_unchanged()


def test_a_gradient_that_shares_memory_with_another_variable_is_refused(snapshot):
    with pytest.raises(ValueError, match=re.escape("grads[0]: shares memory with vars[1], which the step writes")):
        snapshot.optimizer.apply_gradients(
            [
                (snapshot.variables[1].reshape(-1)[:3], snapshot.variables[0]),
                (snapshot.gradients[1], snapshot.variables[1]),
            ]
        )
    snapshot.assert_unchanged()


def test_a_gradient_that_shares_memory_with_a_slot_is_refused(snapshot):
    slot = snapshot.optimizer.get_slot(snapshot.variables[0], "m")
    with pytest.raises(ValueError, match=re.escape("grads[0]: shares memory with m[0], which the step writes")):
        snapshot.optimizer.apply_gradients([(slot, snapshot.variables[0])])
    snapshot.assert_unchanged()


def test_memory_that_was_freed_under_the_optimizer_is_not_taken_for_a_variable():
    """`refcheck=False` lets NumPy free memory that others hold."""
    w = np.zeros(1000, F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(np.ones(1000, F32), w)])
    address = w.ctypes.data
    w.resize(100_000, refcheck=False)
    reused = [x for x in (np.zeros(1000, F32) for _ in range(50)) if x.ctypes.data == address]
    for x in reused:
        with pytest.raises(ValueError, match="lies where a variable of this optimizer was before its memory was freed"):
            optimizer.apply_gradients([(np.ones(1000, F32), x)])


def test_a_gradient_that_frees_its_variable_while_it_is_read_is_refused():
    n = 100_000
    w = np.zeros(n, F32)
    armed = []

    class Freeing:
        def __array__(self, dtype=None, copy=None):
            gradient = np.ones(n, F32)
            if armed:
                w.resize(1, refcheck=False)
            return gradient

    optimizer = fastadam.Adam()
    optimizer.apply_gradients([(Freeing(), w)])
    armed.append(True)
    with pytest.raises(ValueError, match="was given other memory while the step was prepared|shares memory"):
        optimizer.apply_gradients([(Freeing(), w)])
    assert optimizer.iterations == 1


def test_a_step_inside_a_step_is_refused(snapshot):
    class Stepping:
        def __array__(self, dtype=None, copy=None):
            snapshot.optimizer.apply_gradients(snapshot.good_pairs())
            return np.ones(5, F32)

    with pytest.raises(RuntimeError, match="apply_gradients of optimizer Adam was called from within itself"):
        snapshot.optimizer.apply_gradients([*snapshot.good_pairs(), (Stepping(), np.ones(5, F32))])
    snapshot.assert_unchanged()
    snapshot.optimizer.learning_rate = lambda: snapshot.optimizer.apply_gradients(snapshot.good_pairs())
    with pytest.raises(RuntimeError, match="was called from within itself"):
        snapshot.optimizer.apply_gradients(snapshot.good_pairs())
    snapshot.optimizer.learning_rate = 0.1
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc", "value: dtype <U3, expected real numbers"),
        ([1 + 2j], "value: dtype complex128, expected real numbers"),
        ([[1], [2, 3]], "value: list that is not an array of numbers"),
        (None, "value: dtype object, expected real numbers"),
    ],
)
def test_variable_refuses_what_is_not_numbers(value, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        fastadam.Variable(value)
    with pytest.raises(TypeError, match="value: dtype complex128, expected real numbers"):
        fastadam.Variable([1.0]).assign([1j])


def test_an_exporter_that_fails_is_named():
    class Broken:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            raise BufferError("not today")

    message = re.escape("vars[0]: Broken whose memory cannot be read (not today)")
    with pytest.raises(ValueError, match=message):
        fastadam.Adam().apply_gradients([(GRADIENT, Broken())])
