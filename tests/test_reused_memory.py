"""A variable is identified by memory that is still its own: an address that was freed and reused is another variable."""

from __future__ import annotations

import ctypes
import gc
from multiprocessing import shared_memory

import fastadam
import numpy as np
import pytest

F32 = np.float32


def step(optimizer, variable, times=1):
    for _ in range(times):
        optimizer.apply_gradients([(np.ones(variable.shape, F32), variable)])


class Exporter:
    """An object whose ``__array_interface__`` is an array's, which it may drop."""

    def __init__(self, array):
        self.array = array

    @property
    def __array_interface__(self):
        return self.array.__array_interface__


def at_address(array):
    """Another object with the same memory, as an allocator gives it that reuses an address."""
    pointer = (ctypes.c_float * array.size).from_address(array.ctypes.data)
    return np.ctypeslib.as_array(pointer)


@pytest.fixture
def memory():
    """Stays allocated, so that a freed address can be played."""
    return np.ones(8, F32)


def resized():
    """A view, and what frees its memory."""
    owner = np.ones(2000, F32)
    view = owner[:8]
    return view, lambda: owner.resize(10**6, refcheck=False)


def closed():
    memory = shared_memory.SharedMemory(create=True, size=4096)
    view = np.ndarray(8, F32, buffer=memory.buf)
    view[...] = 1

    def free():
        memory.close()
        memory.unlink()

    return view, free


def dropped():
    exporter = Exporter(np.ones(8, F32))

    def free():
        exporter.array = np.zeros(8, F32)

    return exporter, free


def emptied():
    exporter = Exporter(np.ones(8, F32))

    def free():
        exporter.array = None  # its __array_interface__ raises AttributeError from here on

    return exporter, free


@pytest.mark.parametrize("make", [resized, closed, dropped, emptied])
def test_a_variable_at_a_freed_address_does_not_inherit_moments(make):
    variable, free = make()
    optimizer = fastadam.Adam(0.1)
    for _ in range(3):
        optimizer.apply_gradients([(np.ones(8, F32), variable)])
    address = np.asarray(variable).ctypes.data
    keep = np.asarray(variable)  # its address is what the new array has
    if make is resized:
        free()
        other = np.ones(8, F32)
        found = fastadam._cpu.Buffer(keep, "old")
        assert found.is_current() is False
        assert found.address == address
        step(optimizer, other)
    else:
        found = fastadam._cpu.Buffer(keep, "old")
        assert found.is_current()
        free()
        gc.collect()
        assert not found.is_current()


@pytest.mark.parametrize("make", [resized, closed, dropped])
def test_a_step_for_memory_that_was_freed_is_not_repeated(make, memory):
    """The plan of the last step points to it."""
    variable, free = make()
    optimizer = fastadam.Adam(0.1)
    for _ in range(3):
        optimizer.apply_gradients([(np.ones(8, F32), variable)])
    free()
    if make is dropped:  # has other memory now, and is another variable
        optimizer.apply_gradients([(np.ones(8, F32), variable)])
        fresh, twin = fastadam.Adam(0.1), np.zeros(8, F32)
        fresh.iterations = 3
        step(fresh, twin)
        assert np.array_equal(np.asarray(variable), twin)
        return
    with pytest.raises(ValueError, match="freed"):
        optimizer.apply_gradients([(np.ones(8, F32), variable)])
    assert optimizer.iterations == 3


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[:],
        lambda a: a[:].view(np.uint8).view(F32),
        lambda a: memoryview(a),
        lambda a: np.frombuffer(a, F32),
        lambda a: np.frombuffer(memoryview(a)[:], F32)[2:6],
        lambda a: np.lib.stride_tricks.as_strided(a),
        lambda a: Exporter(a),
        lambda a: np.asarray(Exporter(a))[1:5],
        at_address,
    ],
)
def test_views_of_live_memory_go_on(view, memory):
    optimizer, plain = fastadam.Adam(0.1), fastadam.Adam(0.1)
    twin = np.asarray(view(memory.copy())).copy()
    for _ in range(4):
        variable = view(memory)
        gradient = np.ones(np.asarray(variable).shape, F32)
        optimizer.apply_gradients([(gradient, variable)])
        plain.apply_gradients([(gradient, twin)])
    assert np.array_equal(np.asarray(view(memory)), twin)
