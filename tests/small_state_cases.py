"""Variables, gradients and comparisons of bits for the tests of small states."""

from __future__ import annotations

import fastadam
import ml_dtypes
import numpy as np
from fastadam._core.parts import parts_of

F32, BF16 = np.float32, ml_dtypes.bfloat16
BLOCK = 128
MOMENTS = ("float32", "bfloat16", "8bit")
VARIABLES = {  # name: dtype of the variable, options
    "float32": (F32, {}),
    "bfloat16": (BF16, {}),
    "float16": (np.float16, {}),
    "split": (BF16, {"master": "split"}),
    "rounded": (BF16, {"stochastic_rounding": True}),
}

EVERY = [
    ({"moments": "bfloat16"}, F32),
    ({"moments": "8bit", "seed": 2**63 + 5}, F32),
    ({"moments": "8bit", "master": "split"}, BF16),
    ({"moments": "bfloat16", "stochastic_rounding": True}, BF16),
    ({"master": "split"}, BF16),
]


def flat(array):
    return array.reshape(-1, order="A")


def as_bits(array):
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])


def assert_same_bits(actual, expected, what=""):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert np.array_equal(as_bits(actual), as_bits(expected)), what


def slots_of(optimizer, variable):
    _, state, _, _ = parts_of(optimizer)
    entry = next(entry for entry in state.entries if entry.buffer is not None and entry.buffer.source is variable)
    return state.slots.slots_of(entry)


def gradient_of(t, i, size, dtype=F32):
    """Of mixed scales, with zeros."""
    rng = np.random.default_rng(1000 * t + i)
    values = rng.standard_normal(size) * np.exp2(rng.integers(-12, 3, size))
    values[rng.random(size) < 0.05] = 0
    return values.astype(dtype)


def first_values(i, size, dtype):
    return np.random.default_rng(i).standard_normal(size).astype(dtype)


def trained(options, dtype=F32, sizes=(5000, 100), steps=3):
    variables = [first_values(i, size, dtype) for i, size in enumerate(sizes)]
    optimizer = fastadam.Adam(0.01, **options)
    train(optimizer, variables, 0, steps)
    return optimizer, variables


def train(optimizer, variables, start, stop):
    for t in range(start, stop):
        optimizer.apply_gradients([(gradient_of(t, i, v.size), v) for i, v in enumerate(variables)])
