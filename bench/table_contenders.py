"""The contenders of bench/sparse.py: every one steps the same table with the same batches and numbers."""

from __future__ import annotations

import numpy as np
from common import Contender
from dense_contenders import HYPER, buffers, floor_of, slots


def _table(sizes, uniform=False):
    """A table of rows x width, and 400 different batches of ids, Zipf(1.1) over shuffled rows, with their values."""
    rows, width, count = sizes
    rng = np.random.default_rng(0)
    table = rng.standard_normal((rows, width), dtype=np.float32) * np.float32(0.05)
    weights = 1 / np.arange(1, rows + 1) ** (0 if uniform else 1.1)
    cumulated = np.cumsum(weights / weights.sum())
    shuffled = rng.permutation(rows)
    batches = [shuffled[np.searchsorted(cumulated, rng.random(count)).clip(0, rows - 1)] for _ in range(400)]
    values = rng.standard_normal((count, width), dtype=np.float32) * np.float32(1e-3)
    return table, batches, values


def _cycle(batches, step, warm_up):
    state = {"at": 0}

    def next_step():
        step(batches[state["at"] % len(batches)])
        state["at"] += 1

    for _ in range(warm_up):
        next_step()
    return Contender(next_step)


def floor(sizes):
    """3 reads and 3 writes of the whole table."""
    table = buffers([sizes[0] * sizes[1]])[:1]
    return floor_of("floor_table", [*table, [], *slots(table[0], 2)])


def fastadam(sizes, mode, uniform=False, crossover=None):
    """`Adam(sparse_update=mode).apply_gradients` of IndexedSlices."""
    import fastadam

    table, batches, values = _table(sizes, uniform)
    if crossover is not None:
        fastadam._core.deferred.history.crossover = lambda *_: crossover
    optimizer = fastadam.Adam(**HYPER, sparse_update=mode)
    step = lambda ids: optimizer.apply_gradients([(fastadam.IndexedSlices(values, ids), table)])  # noqa: E731
    waiting = 4 * sizes[0] // sizes[2] if uniform else 400  # until gaps are as long as they get
    return _cycle(batches, step, 5 if mode == "dense" else min(400, waiting))


def torch(sizes):
    """`torch.optim.SparseAdam`, the lazy rule, on the uncoalesced gradient that nn.Embedding gives."""
    import torch

    table, batches, values = _table(sizes)
    parameter = torch.nn.Parameter(torch.from_numpy(table))
    optimizer = torch.optim.SparseAdam([parameter], lr=0.001, eps=1e-7)
    rows = torch.from_numpy(values)

    def step(ids):
        indices = torch.from_numpy(ids)[None]
        parameter.grad = torch.sparse_coo_tensor(indices, rows, parameter.shape, check_invariants=False)
        optimizer.step()

    return _cycle(batches, step, 20)


def tensorflow(sizes):
    """`tf.keras.optimizers.legacy.Adam` of tf.IndexedSlices, in a tf.function."""
    import tensorflow as tf

    table, batches, values = _table(sizes)
    variable, rows = tf.Variable(table), tf.constant(values)
    optimizer = tf.keras.optimizers.legacy.Adam(**HYPER)
    shape = tf.constant(table.shape)

    @tf.function
    def run(ids):
        optimizer.apply_gradients([(tf.IndexedSlices(rows, ids, shape), variable)])

    return _cycle([tf.constant(ids) for ids in batches[:40]], run, 2)
