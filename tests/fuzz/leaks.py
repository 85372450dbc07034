"""Memory that grows: many steps of one optimizer, many optimizers, many handles of the C interface, many files.

What a program holds is measured in three ways: the blocks of Python's allocator, the bytes that malloc has given out
(glibc: `mallinfo2`), and the resident set. The first part of the turns, at most a tenth, is for caches to fill. After
that none of the three may be higher than the limits below in the lowest of ten measurements at the end: over the turns
of one run, much less than one byte for each turn.

The last line says the number of turns and what grew by how much. `core-optimizers` needs 2000 turns or more: fewer end
before the caches of Python are full.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import pickle
import resource
import sys
import tempfile
from pathlib import Path

import campaign
import fastadam
import numpy as np
from c_twins import INVALID, OK, Side, Twins, hyper_of, variable, with_signatures
from fastadam._core.native.backend import _cpu

LIMITS = {"blocks of Python": 600, "bytes of malloc": 32 * 1024, "bytes resident": 4 * 2**20}
SIZE, ROWS = 36, 1000


class MallInfo(ctypes.Structure):
    """``struct mallinfo2``."""

    _names_ = (
        "arena",
        "ordblks",
        "smblks",
        "hblks",
        "hblkhd",
        "usmblks",
        "fsmblks",
        "uordblks",
        "fordblks",
        "keepcost",
    )
    _fields_ = [(name, ctypes.c_size_t) for name in _names_]


def held():
    gc.collect()
    found = {"blocks of Python": sys.getallocatedblocks()}
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = MallInfo
        info = libc.mallinfo2()
        found["bytes of malloc"] = info.uordblks + info.hblkhd
    if (statm := Path("/proc/self/statm")).exists():
        found["bytes resident"] = int(statm.read_text().split()[1]) * resource.getpagesize()
    return found


# ---- turns ----------------------------------------------------------------------------------------------------------


def core_steps():
    """Dense, clipped, sparse, accumulated, in buckets; and a call that is refused."""
    w, g, table = np.ones(SIZE, np.float32), np.ones(SIZE, np.float32), np.ones((ROWS, 4), np.float32)
    plain, clipped = fastadam.Adam(), fastadam.Adam(global_clipnorm=1.0, use_ema=True)
    accumulated, waiting = fastadam.Adam(gradient_accumulation_steps=2), fastadam.Adam(sparse_update="deferred")
    others = [w.copy() for _ in range(2)]
    clipped.build(others[:1])

    def turn(k):
        plain.apply_gradients([(g, w)])
        if k % 4 == 0:
            clipped.apply_gradients([(g, others[0])])
            accumulated.apply_gradients([(g, others[1])])
            ids = np.arange(k % 900, k % 900 + 8)
            waiting.gather(table, ids)
            waiting.apply_gradients([(fastadam.IndexedSlices(np.ones((8, 4), np.float32), ids), table)])
        if k % 16 == 0:
            plain.apply_gradients([(g.astype(np.float64), w)])
            plain.begin_step()
            plain.step_bucket([(g, w)])
            plain.end_step()
            plain.learning_rate = 0.1 / (k + 1)
            with contextlib.suppress(ValueError):
                plain.apply_gradients([(g[:5], w)])

    return turn


def core_optimizers():
    w, g, table = np.ones(SIZE, np.float32), np.ones(SIZE, np.float32), np.ones((ROWS, 4), np.float32)
    slices = fastadam.IndexedSlices(np.ones((8, 4), np.float32), np.arange(8))

    def turn(k):
        kinds = ({}, {"amsgrad": True}, {"sparse_update": "deferred"}, {"use_ema": True, "global_clipnorm": 1.0})
        optimizer = fastadam.Adam(**kinds[k % 4])
        optimizer.apply_gradients([(g, w), (slices, table)])
        if k % 16 == 0:
            copy.deepcopy(optimizer).get_weights()
            pickle.loads(pickle.dumps(optimizer))
            optimizer.resize(table, table.copy())

    return turn


def core_files():
    folder = tempfile.TemporaryDirectory()
    w, table = np.ones(SIZE, np.float32), np.ones((ROWS, 4), np.float32)
    optimizer = fastadam.Adam(sparse_update="deferred")
    optimizer.build([w, table])
    base, delta = Path(folder.name) / "base", Path(folder.name) / "delta"

    def turn(k):
        optimizer.save(base, values=True)
        slices = fastadam.IndexedSlices(np.ones((8, 4), np.float32), np.arange(8))
        optimizer.apply_gradients([(np.ones(SIZE, np.float32), w), (slices, table)])
        optimizer.save_delta(delta)
        fastadam.Adam.load(base, [w.copy(), table.copy()], deltas=[delta])
        fastadam.merge_deltas(base, [delta], base)
        delta.unlink()
        assert folder

    return turn


def torch_steps():
    import fastadam.torch
    import torch

    params = [torch.nn.Parameter(torch.ones(SIZE)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(SIZE)
    plain = fastadam.torch.AdamW(params[:1], fused=True)
    clipped = fastadam.torch.AdamW(params[1:], global_clipnorm=1.0)

    def turn(k):
        plain.step()
        if k % 8 == 0:
            clipped.step()
        if k % 64 == 0:
            params[0].grad = torch.ones(SIZE)
            plain.load_state_dict(plain.state_dict())

    return turn


def torch_optimizers():
    import fastadam.torch
    import torch

    def turn(k):
        param = torch.nn.Parameter(torch.ones(SIZE))
        param.grad = torch.ones(SIZE)
        optimizer = fastadam.torch.AdamW([param], amsgrad=k % 2 == 1)
        optimizer.step()
        if k % 16 == 0:
            copy.deepcopy(optimizer).step()
            pickle.loads(pickle.dumps(optimizer))

    return turn


def c_library():
    package = Path(_cpu.__file__).parent
    return with_signatures(ctypes.CDLL(os.fspath(next((package / "lib").glob("libfastadam.*")))), "fastadam")


def c_steps():
    library, side = c_library(), Side([variable(np.random.RandomState(0), SIZE, "float32")])
    side.give([np.ones(SIZE, np.float32)])
    listed, hyper = side.listed, hyper_of()
    bad = hyper_of(step=0)
    norm = np.zeros(1)

    def turn(k):
        assert library.fastadam_step(listed, ctypes.byref(hyper), False) == OK
        assert library.fastadam_norm(listed, norm.ctypes.data) == OK
        if k % 16 == 0:
            assert library.fastadam_step(listed, ctypes.byref(bad), False) == INVALID
            library.fastadam_error()

    return turn


def c_handles():
    """Plans of fastadam_cuda.h on the fake runtime, which the first run compiles."""
    from gpu import FakeGpu, build_fake

    gpu = FakeGpu(build_fake("_cuda"))
    gpu.start()
    tensors = [variable(np.random.RandomState(0), SIZE, "float32")]
    twins = Twins(gpu, tensors)
    twins.give([np.ones(SIZE, np.float32)])

    def turn(k):
        twins.cuda.fastadam_cuda_plan_destroy(twins.plan)
        assert twins.cuda.fastadam_cuda_plan_create(0, twins.device.listed, ctypes.byref(twins.plan)) == OK
        assert twins.device_step(hyper_of(step=k + 1)) == OK
        if k % 64 == 0:
            assert twins.cuda.fastadam_cuda_wait(twins.plan, None) == OK
            gpu.clear_log()

    return turn


TURNS = {
    "core-steps": core_steps,
    "core-optimizers": core_optimizers,
    "core-files": core_files,
    "torch-steps": torch_steps,
    "torch-optimizers": torch_optimizers,
    "c-steps": c_steps,
    "c-handles": c_handles,
}


def main():
    arguments = campaign.parser(__doc__, count=100_000, what=list(TURNS)).parse_args()
    turn, count = TURNS[arguments.what](), arguments.count
    before = count // 10
    for k in range(before):
        turn(k)
    first = held()
    measured = []
    for k in range(before, count):
        turn(k)
        if k >= count - 10:
            measured.append(held())
    grown = {name: min(found[name] for found in measured) - first[name] for name in first}
    listed = ", ".join(f"{name} {grown[name]:+,}" for name in grown)
    print(f"leaks {arguments.what}: {count - before:,} turns after the first {before:,}; {listed}")
    if leaked := [name for name in grown if grown[name] > LIMITS[name]]:
        raise SystemExit(f"{', '.join(leaked)}: more than {[LIMITS[name] for name in leaked]}, expected no growth")


if __name__ == "__main__":
    main()
