"""Tables outside of the model, as DGL's NodeEmbedding is one: rows are looked up, and have gradients of their own."""

from __future__ import annotations

import importlib
import os
import sys

import numpy as np
import packaging.version
import pytest
from absent import need
from helpers import slow

torch = pytest.importorskip("torch")

import fastadam  # noqa: E402
import fastadam.torch  # noqa: E402

SHAPE = (500, 4)
OPTIONS = {"lr": 0.1, "eps": 1e-8}


@pytest.fixture(scope="module")
def dgl():
    """DGL 1.1, which imports `packaging` from where setuptools had it."""
    need("dgl", "setuptools")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools.extern", packaging)
        patch.setitem(sys.modules, "setuptools.extern.packaging", packaging)
        patch.setenv("DGLBACKEND", "pytorch")  # or it writes a file that says so to the user's folder
        return importlib.import_module("dgl")


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


class Table:
    """A table in a tensor, a file, or memory that processes share."""

    def __init__(self, held, folder):
        if held == "file":
            rows = np.memmap(folder / f"{len(list(folder.iterdir()))}.bin", np.float32, "w+", shape=SHAPE)
            self.weight = torch.from_numpy(rows)
        else:
            self.weight = torch.empty(SHAPE)
        if held == "shared memory":
            self.weight.share_memory_()
        self.weight.copy_(start())
        self.trace = []

    def __call__(self, ids):
        rows = self.weight[ids].requires_grad_()
        self.trace.append((ids, rows))
        return rows

    def reset_trace(self):
        self.trace = []


@pytest.fixture(params=["tensor", "file", "shared memory", *slow("NodeEmbedding")])
def make_table(request, tmp_path):
    """A function that makes tables with the same rows."""
    if request.param != "NodeEmbedding":
        return lambda: Table(request.param, tmp_path)
    dgl, made = request.getfixturevalue("dgl"), []

    def make():
        made.append(f"{os.getpid()}-{len(made)}")  # of its shared memory
        return dgl.nn.NodeEmbedding(*SHAPE, made[-1], init_func=lambda rows: rows.copy_(start()))

    return make


def batches(step):
    """What is looked up: twice, with rows in common."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, SHAPE[0], (7,), generator=generator) for _ in range(2)]


def gradient(ids, rows):
    """Of the loss below."""
    return (rows - ids[:, None] % 7) * 2


def look_up(embedding, ids):
    (embedding(ids) - ids[:, None] % 7).square().sum().backward()


def optimizer_of(embedding, mode):
    table = torch.nn.Parameter(embedding.weight)
    assert table.data_ptr() == embedding.weight.data_ptr()
    return fastadam.torch.Adam([table], **OPTIONS, sparse_update=mode)


def train(embedding, opt, steps):
    table = opt.param_groups[0]["params"][0]
    for step in steps:
        for ids in batches(step):
            opt.gather(table, ids)
            look_up(embedding, ids)
        ids, gradients = zip(*((ids, rows.grad) for ids, rows in embedding.trace), strict=True)
        table.grad = torch.sparse_coo_tensor(
            torch.cat(ids)[None], torch.cat(gradients), table.shape, check_invariants=True
        )
        opt.step()
        embedding.reset_trace()


def of_numpy(mode, steps):
    """The table after steps of ``fastadam.Adam``, and its optimizer."""
    table = start().numpy()
    opt = fastadam.Adam(OPTIONS["lr"], epsilon=OPTIONS["eps"], sparse_update=mode)
    for step in steps:
        ids = torch.cat(batches(step))
        opt.gather(table, ids.numpy())
        gradients = gradient(ids, torch.from_numpy(table)[ids])
        opt.apply_gradients([(fastadam.IndexedSlices(gradients.numpy(), ids.numpy()), table)])
    opt.sync()
    return torch.from_numpy(table)


@pytest.mark.parametrize(
    ("mode", "expected"), [("deferred", "dense"), ("deferred_fast", "deferred_fast"), ("lazy",) * 2]
)
def test_a_table_gets_the_steps_of_numpys(make_table, mode, expected):
    """Whether rows wait or not: those of dense steps, to the bit."""
    embedding = make_table()
    opt = optimizer_of(embedding, mode)
    train(embedding, opt, range(20))
    opt.sync()
    torch.testing.assert_close(embedding.weight, of_numpy(expected, range(20)), rtol=0, atol=0)


def test_waiting_rows_have_the_numbers_of_torchs_adam(make_table):
    embedding, expected = make_table(), torch.nn.Parameter(start())
    opt, theirs = optimizer_of(embedding, "deferred"), torch.optim.Adam([expected], **OPTIONS)
    train(embedding, opt, range(20))
    for step in range(20):
        theirs.zero_grad()
        for ids in batches(step):
            look_up(expected.__getitem__, ids)
        theirs.step()
    opt.sync()
    torch.testing.assert_close(embedding.weight, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "lazy", "deferred", "deferred_fast"])
def test_a_table_resumes_with_the_bits_of_the_uninterrupted_run(make_table, mode):
    whole = make_table()
    opt = optimizer_of(whole, mode)
    train(whole, opt, range(5))
    resumed = make_table()
    states = opt.state_dict()  # all rows are up to date then
    resumed.weight.copy_(whole.weight)
    other = optimizer_of(resumed, mode)
    other.load_state_dict(states)
    train(whole, opt, range(5, 10))
    train(resumed, other, range(5, 10))
    opt.sync()
    other.sync()
    assert not torch.equal(whole.weight, start())
    torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)


# ---- DGL's own optimizer ---------------------------------------------------------------------------------------------


def both(dgl, steps):
    """What "lazy" and dgl.optim.SparseAdam make of a table of zeros whose rows ids[k] have gradients[k] in step k."""
    ours, theirs = (dgl.nn.NodeEmbedding(4, 1, f"{os.getpid()}-{name}", init_func=torch.zero_) for name in "ab")
    table = torch.nn.Parameter(ours.weight)
    opt, other = (
        fastadam.torch.Adam([table], **OPTIONS, sparse_update="lazy"),
        dgl.optim.SparseAdam([theirs], **OPTIONS),
    )
    for ids, gradients in steps:
        ids, gradients = torch.tensor(ids), torch.tensor(gradients)[:, None]
        table.grad = torch.sparse_coo_tensor(ids[None], gradients, table.shape, check_invariants=True)
        opt.step()
        (theirs(ids) * gradients).sum().backward()
        other.step()
        theirs.reset_trace()
    return ours.weight[:, 0].tolist(), theirs.weight[:, 0].tolist()


@pytest.mark.slow
def test_lazy_steps_are_those_of_dgl_if_rows_come_once_in_every_step(dgl):
    ours, theirs = both(dgl, [([3, 1, 0], [0.5 * k, -1.0, 2.0 + k]) for k in range(1, 30)])
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[2] == theirs[2] == 0


@pytest.mark.slow
def test_dgl_counts_the_steps_of_each_row(dgl):
    """A new row moves by the whole rate there; here the count is the optimizer's, as in torch.optim.SparseAdam."""
    ours, theirs = both(dgl, [([0], [1.0]), ([1], [1.0])])
    assert theirs[:2] == pytest.approx([-0.1, -0.1], rel=1e-5)
    assert ours[:2] == pytest.approx([-0.1, -0.1 * (0.1 / 0.19) / (0.001 / 0.001999) ** 0.5], rel=1e-5)


@pytest.mark.slow
def test_dgl_takes_the_mean_of_the_gradients_of_a_repeated_row(dgl):
    ours, theirs = both(dgl, [([0, 1], [1.0, 1.0]), ([0, 0, 1], [1.0, 3.0, 2.0])])
    assert theirs[0] == theirs[1]
    ours, expected = both(dgl, [([0, 1], [1.0, 1.0]), ([0, 0, 1], [1.0, 3.0, 4.0])])
    assert ours[0] == ours[1] == pytest.approx(expected[1], rel=1e-5)
