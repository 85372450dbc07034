"""fastadam.torch with parameters and states in shared memory, which several processes step (Hogwild, A3C)."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_twins import PAIRS  # noqa: E402


def steps(optimizer, count):
    for _ in range(count):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.ones_like(weight)
        optimizer.step()


def shared(cls, dtype=torch.float32, **options):
    weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((3,), (2, 2))]
    optimizer = cls(weights, lr=0.1, **options)
    steps(optimizer, 1)
    for tensor in (*weights, *(each for named in optimizer.state.values() for each in named.values())):
        tensor.share_memory_()
    return optimizer


def work(_rank, *optimizers):
    for optimizer in optimizers:
        steps(optimizer, 3)


def test_a_worker_process_steps_the_state_that_it_shares():
    """In a new process: what it unpickles is the parent's memory."""
    theirs, ours = (shared(cls, amsgrad=True) for cls in PAIRS["Adam"])
    torch.multiprocessing.spawn(work, args=(theirs, ours), nprocs=1)
    for stepped in (0, 1):
        for optimizer in (theirs, ours):
            steps(optimizer, stepped)
        for their_state, our_state in zip(theirs.state.values(), ours.state.values(), strict=True):
            assert float(our_state["step"]) == float(their_state["step"]) == 4 + stepped
            for name, value in their_state.items():
                torch.testing.assert_close(our_state[name], value, rtol=1e-6, atol=0)
        for a, b in zip(theirs.state, ours.state, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=0)


@pytest.mark.parametrize("moments", ["float32", None], ids=["float32 moments", "moments like parameters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_unpickling_keeps_the_tensors_of_a_state(dtype, moments):
    """`__setstate__` replaces none, so tensors that are the same object before are the same object after."""
    optimizer = shared(fastadam.torch.Adam, dtype, moments=moments)
    held = list(optimizer.state.values())
    twin, twin_held = copy.deepcopy((optimizer, held))
    other, other_held = pickle.loads(pickle.dumps((optimizer, held)))
    for copied, copied_held in ((twin, twin_held), (other, other_held)):
        for named, kept in zip(copied.state.values(), copied_held, strict=True):
            assert named is kept
    tensors = [list(named.values()) for named in optimizer.state.values()]
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    for named, before in zip(optimizer.state.values(), tensors, strict=True):
        assert all(a is b for a, b in zip(named.values(), before, strict=True))


def test_step_counts_of_older_pickles_become_tensors():
    optimizer = shared(fastadam.torch.Adam)
    first, second = optimizer.state.values()
    first["step"], kept = 1, second["step"]
    twin = pickle.loads(pickle.dumps(optimizer))
    steps(twin, 1)
    assert [float(named["step"]) for named in twin.state.values()] == [2, 2]
    assert all(torch.is_tensor(named["step"]) for named in twin.state.values())
    assert float(kept) == 1
