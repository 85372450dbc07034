"""What tests/data/make_small_states.py and tests/test_exchange_*.py share: the file, starts and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "small_states.npz"
HALF, STEPS = 4, 8


def start(size: int) -> np.ndarray:
    """A pattern that repeats, so that the file compresses well."""
    return np.resize(np.linspace(-1, 1, 64, dtype=np.float32), size)


def gradients(step: int, size: int) -> np.ndarray:
    """A pattern that repeats, too; each of four parts has a scale of its own."""
    pattern = np.random.RandomState(step).standard_normal(64).astype(np.float32)
    scales = np.repeat(np.float32([1, 0.1, 0.01, 1]), -(-size // 4))[:size]
    return np.resize(pattern, size) * scales
