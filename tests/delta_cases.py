"""A training whose deltas are saved and loaded."""

from __future__ import annotations

import os

import fastadam
import numpy as np
import pytest
from helpers import assert_same

F32 = np.float32
ROWS = 200


class Training:
    """A table, a variable that is no table, and an optimizer that steps both; the same for every object."""

    def __init__(self, dtype=F32, width=(3,), **options):
        rng = np.random.RandomState(0)
        self.variables = [
            rng.standard_normal((ROWS, *width)).astype(dtype),
            rng.standard_normal(4).astype(F32),
        ]
        self.optimizer = fastadam.Adam(0.05, weight_decay=options.pop("weight_decay", None), **options)
        self.optimizer.build(self.variables)
        self.time = 0

    def steps(self, count, ids=10):
        for _ in range(count):
            rng = np.random.RandomState(self.time)
            self.time += 1
            table, bias = self.variables
            rows = rng.randint(0, ROWS // 2, rng.randint(0, ids))
            values = rng.standard_normal((len(rows), *table.shape[1:])).astype(table.dtype)
            pairs = [(fastadam.IndexedSlices(values, rows), table)]
            if rng.randint(3):
                pairs.append((rng.standard_normal(bias.shape).astype(F32), bias))
            self.optimizer.apply_gradients(pairs)

    def dense_step(self):
        rng = np.random.RandomState(self.time)
        self.time += 1
        table = self.variables[0]
        self.optimizer.apply_gradients([(rng.standard_normal(table.shape).astype(table.dtype), table)])

    def load(self, base, deltas, *, like=None):
        """A training that goes on from files."""
        twin = object.__new__(Training)
        twin.time = self.time
        twin.variables = [np.full_like(w, 7) if like is None else like for w in self.variables]
        twin.optimizer = type(self.optimizer).load(base, twin.variables, deltas=deltas)
        return twin

    def assert_same(self, other):
        self.optimizer.sync()
        other.optimizer.sync()
        assert_same(other.variables, self.variables)
        assert_same(other.optimizer.get_weights(), self.optimizer.get_weights())
        assert other.optimizer.get_config() == self.optimizer.get_config()


def fail_to_save(optimizer, path, monkeypatch, name):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(OSError, match="No space left"):
            optimizer.save_delta(path)
