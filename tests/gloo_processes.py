"""Tests that run in two processes, which torch connects by gloo."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs PyTorch with gloo"
)


def run_in_two_processes(engines, folder):
    """Calls each function of `engines` with `folder` in both processes; an error names the function."""
    torch.multiprocessing.spawn(work, args=(engines, os.fspath(folder)), nprocs=2)


def work(rank, engines, folder):
    """What one process does. It ends without finalizing Python, as children that `multiprocessing` forks do.

    A thread of gloo may own a tensor for a moment after the main thread has its result, also after
    `destroy_process_group`. If it gives up the tensor while Python is being finalized, it waits for the GIL, Python ends
    the thread, and that aborts the process (pytorch/pytorch#190489).
    """
    # A file, as another process can take a free port before rank 0 listens there.
    address = (Path(folder) / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for engine in engines:
        engine(folder)
    distributed.barrier()  # neither leaves while the other still receives
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
