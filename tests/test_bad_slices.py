"""IndexedSlices that must be refused before a row is touched or a slot is made."""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest
from cases import random_array
from fastadam import IndexedSlices

F32 = np.float32

BAD = {
    "too large": (lambda: IndexedSlices(np.ones((2, 5), F32), [3, 60]), ValueError,
                  "grads[1].indices[1]: 60 is not a row of vars[1], expected 0 <= index < 60"),
    "negative": (lambda: IndexedSlices(np.ones((2, 5), F32), [-1, 0]), ValueError, "grads[1].indices[0]: -1 is not a row of vars[1]"),
    "row shape": (lambda: IndexedSlices(np.ones((2, 4), F32), [1, 2]), ValueError,
                  "grads[1].values: shape (2, 4), expected (2, 5), a row of vars[1] for each index"),
    "count": (lambda: IndexedSlices(np.ones((3, 5), F32), [1, 2]), ValueError, "grads[1].values: shape (3, 5), expected (2, 5)"),
    "2-D indices": (lambda: IndexedSlices(np.ones((2, 5), F32), [[1, 2]]), ValueError, "indices: shape (1, 2), expected one dimension, as of tf.IndexedSlices; reshape both, to values (n, ...) and indices (n,)"),
    "float indices": (lambda: IndexedSlices(np.ones((2, 5), F32), [1.0, 2.0]), TypeError, "indices: dtype float64, expected integers"),
    "huge indices": (lambda: IndexedSlices(np.ones((1, 5), F32), np.array([2**63], np.uint64)), ValueError,
                     "indices: 9223372036854775808, expected int64"),
    "dense_shape": (lambda: IndexedSlices(np.ones((2, 5), F32), [1, 2], (61, 5)), ValueError,
                    "grads[1]: dense_shape (61, 5), expected (60, 5) like vars[1]"),
    "complex values": (lambda: IndexedSlices(np.ones((2, 5), complex), [1, 2]), TypeError, "grads[1].values: dtype complex128, expected real"),
}  # fmt: skip


@pytest.mark.parametrize("mode", fastadam._core.native.slices.SPARSE_UPDATES)
@pytest.mark.parametrize("kind", BAD)
def test_bad_slices_change_nothing(kind, mode):
    make, error, message = BAD[kind]
    rng = np.random.RandomState(0)
    table, values, indices = random_array(rng, (60, 5)), random_array(rng, (20, 5)), rng.randint(0, 60, 20)
    variables = [np.ones(3, F32), table]
    optimizer = fastadam.Adam(0.1, sparse_update=mode)
    optimizer.apply_gradients(zip([np.ones(3, F32), IndexedSlices(values, indices)], variables, strict=True))
    before = [np.array(x) for x in (*variables, *optimizer.get_weights())]
    with pytest.raises(error, match=re.escape(message)):
        optimizer.apply_gradients(zip([np.ones(3, F32), make()], variables, strict=True))
    for a, b in zip(before, (*variables, *optimizer.get_weights()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_variables_without_rows_are_refused():
    slices = IndexedSlices(np.ones((1, 5), F32), [0])
    with pytest.raises(
        ValueError, match=re.escape("grads[0]: IndexedSlices for vars[0] of shape (), expected at least one")
    ):
        fastadam.Adam().apply_gradients([(slices, np.ones((), F32))])
    with pytest.raises(ValueError, match=re.escape("grads[0]: IndexedSlices for vars[0] in order F, expected order C")):
        fastadam.Adam().apply_gradients([(slices, np.ones((4, 5), F32, order="F"))])
    w = np.ones((4, 5), F32)
    with pytest.raises(
        ValueError, match="which comes twice, expected it once .fastadam.Adam adds them up with sum_repeated=True"
    ):
        fastadam.Adam(sparse_update="lazy").apply_gradients([(slices, w), (slices, w)])
    with pytest.raises(ValueError, match=re.escape("grads[0]: shares memory with vars[0]")):
        fastadam.Adam().apply_gradients([(IndexedSlices(w[:2], [0, 1]), w)])
    np.testing.assert_array_equal(w, np.ones((4, 5)))


@pytest.mark.parametrize("amsgrad_later", [False, True])
def test_a_step_refused_for_an_index_makes_no_slot(amsgrad_later):
    table, optimizer = np.ones((5, 2), F32), fastadam.Adam()
    if amsgrad_later:
        optimizer.apply_gradients([(IndexedSlices(np.ones((1, 2), F32), [1]), table)])
        optimizer.amsgrad = True
    before = len(optimizer.weights)
    with pytest.raises(ValueError, match=r"indices\[0\]: 5 is not a row of"):
        optimizer.apply_gradients([(IndexedSlices(np.ones((1, 2), F32), [5]), table)])
    assert len(optimizer.weights) == before


@pytest.mark.parametrize("dense_shape", [5, "ab"])
def test_a_dense_shape_that_is_none(dense_shape):
    with pytest.raises(TypeError, match="dense_shape: .*, expected the shape of the variable"):
        IndexedSlices(np.ones((1, 2)), [0], dense_shape)


@pytest.mark.parametrize("place", [-1, 32768, 20000])
def test_a_bad_index_is_found_wherever_it_is(place):
    """Many are checked in blocks."""
    table, indices = np.ones((100, 4), F32), np.zeros(40_000, np.int64)
    indices[place] = 100
    place %= len(indices)
    slices = IndexedSlices(np.ones((len(indices), 4), F32), indices)
    with pytest.raises(ValueError, match=rf"indices\[{place}\]: 100 is not a row of vars\[0\]"):
        fastadam.Adam(0.1, sparse_update="lazy").apply_gradients([(slices, table)])
    assert (table == 1).all()


def test_a_mask_of_integers_is_refused():
    """Not silently left out."""
    table, indices = np.ones((5, 4), F32), np.ma.array([1, 2], mask=[True, False])
    optimizer = fastadam.Adam(0.1, sparse_update="deferred")
    optimizer.apply_gradients([(IndexedSlices(np.ones((1, 4), F32), [0]), table)])
    calls = [
        ("indices", lambda: IndexedSlices(np.ones((2, 4), F32), indices)),
        ("indices", lambda: optimizer.gather(table, indices)),
        ("rows", lambda: optimizer.reset(table, indices)),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"^{name}: masked array, whose mask Adam cannot honour; pass its "):
            call()


def test_values_that_grow_into_the_variable_are_refused():
    """From the address at which those of the steps before were apart from it."""
    memory = np.ones(4096, F32)
    table = memory[64:104].reshape(10, 4)
    optimizer = fastadam.Adam(0.1, sparse_update="lazy")

    def step(count):
        values = memory[32 : 32 + 4 * count].reshape(count, 4)
        optimizer.apply_gradients([(IndexedSlices(values, np.arange(count)), table)])

    step(2)
    step(2)
    before = memory.copy()
    with pytest.raises(ValueError, match="shares memory with"):
        step(10)
    np.testing.assert_array_equal(memory, before)
