"""Optimizers and tables for the tests of resize, forget and reset."""

from __future__ import annotations

import pickle

import fastadam
import numpy as np
from cases import bits, random_array
from fastadam import IndexedSlices
from fastadam._core.parts import parts_of
from helpers import F32, history_of

NEW = np.zeros((3, 2), F32)
DEFERRED = {"sparse_update": "deferred"}
MODES = {
    "dense": {},
    "lazy": {"sparse_update": "lazy"},
    "deferred": DEFERRED,
    "amsgrad": {**DEFERRED, "amsgrad": True},
    "decay": {**DEFERRED, "weight_decay": 0.1},
    "staleness": {**DEFERRED, "max_staleness": 3},
    "averages": {"use_ema": True, "ema_momentum": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2},
    "deferred averages": {**DEFERRED, "use_ema": True, "ema_momentum": 0.5},
    "deferred accumulation": {**DEFERRED, "gradient_accumulation_steps": 3, "weight_decay": 0.1},
}


def mapped(rows, old, fresh):
    """Rows of an old array in new places; -1 is one of ``fresh``."""
    new = np.array(fresh, old.dtype, order="C" if old.flags.c_contiguous else "F")
    rows = np.asarray(rows, np.int64)
    new[rows >= 0] = old[rows[rows >= 0]]
    return new


class Twins:
    """An optimizer that is told to resize, and one on a table of its own that is made anew from its weights."""

    def __init__(self, rows=6, width=(3,), dtype=F32, order="C", learning_rate=0.1, **options):
        self.rng = np.random.RandomState(0)
        self.table = np.asarray(random_array(self.rng, (rows, *width), -3, 2).astype(dtype), order=order)
        self.twin_table = self.table.copy(order="K")
        exact = "dense" if options.get("sparse_update") == "deferred" else options.get("sparse_update", "dense")
        self.optimizer = fastadam.Adam(learning_rate, **options)
        self.twin = fastadam.Adam(learning_rate, **{**options, "sparse_update": exact, "max_staleness": None})

    def step(self, ids=None):
        shape = (len(self.table if ids is None else ids), *self.table.shape[1:])
        values = random_array(self.rng, shape, -6, 2).astype(self.table.dtype)
        gradient = values if ids is None else IndexedSlices(values, np.asarray(ids, np.int64))
        self.optimizer.apply_gradients([(gradient, self.table)])
        self.twin.apply_gradients([(gradient, self.twin_table)])

    def resize(self, rows, new_rows=None):
        """With rows None the table becomes this long."""
        given = rows
        if rows is None:
            rows = [i if i < len(self.table) else -1 for i in range(new_rows)]
        fresh = random_array(self.rng, (len(rows), *self.table.shape[1:]), -3, 2).astype(self.table.dtype)
        old, old_twin = self.table, self.twin_table
        self.table, self.twin_table = mapped(rows, old, fresh), mapped(rows, old_twin, fresh)
        self.optimizer.resize(old, self.table, given)
        self._rebuild(lambda name, slot: mapped(rows, slot, self._start(name, self.twin_table)))

    def forget(self):
        self.optimizer.forget(self.table)
        self._rebuild(lambda name, slot: self._start(name, self.twin_table), knows=False)

    def reset(self, ids):
        self.optimizer.reset(self.table, ids)

        def reset(name, slot):
            start = self._start(name, self.twin_table)
            slot[slice(None) if ids is None else ids] = start[slice(None) if ids is None else ids]
            return slot

        self._rebuild(reset)

    def _start(self, name, table):
        return table.astype(F32) if name == "average" and table.dtype != np.float64 else (
            table if name == "average" else np.zeros(table.shape)
        )  # fmt: skip

    def _rebuild(self, change, *, knows=True):
        iterations, *slots = self.twin.get_weights()
        names = self.twin.get_slot_names()
        self.twin = type(self.twin).from_config(self.twin.get_config())
        if knows:
            self.twin.build([self.twin_table])
            self.twin.set_weights([iterations, *map(change, names, slots)])
        else:
            self.twin.weights[0][...] = iterations

    def compare(self):
        found, expected = self.optimizer.get_weights(), self.twin.get_weights()
        for a, b in zip([*found, self.table], [*expected, self.twin_table], strict=True):
            np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(b)))
            assert np.shape(a) == np.shape(b)


def used(**options):
    optimizer, table = fastadam.Adam(0.1, **options), np.arange(12, dtype=F32).reshape(6, 2)
    for ids in ([0, 1], [1, 2], [0]):
        optimizer.apply_gradients([(IndexedSlices(np.ones((len(ids), 2), F32), ids), table)])
    return optimizer, table


def state_of(optimizer, table):
    """What a refused call must not have changed, rows that wait included."""
    history = history_of(optimizer)
    behind = history.behind().copy() if history else None
    return pickle.dumps([table, parts_of(optimizer).state.copies(), behind])
