"""A process that forks, or is interrupted, in the middle of its work."""

from __future__ import annotations

import pytest
from helpers import COUNT_THREADS, FORK_CHILD, run_python

# In interpreters of their own: other libraries of the test process (JAX) do not bear a fork.
FORK = f"""{COUNT_THREADS}
import multiprocessing, sys, threading
import fastadam, numpy as np
context = multiprocessing.get_context("fork")
rng = np.random.default_rng(0)
variable, gradient = (rng.standard_normal(300_000, dtype=np.float32) for _ in range(2))
optimizer = fastadam.Adam(0.1)
fastadam.set_num_threads(3)

def step(count=3):
    before, made = variable.copy(), optimizer.iterations
    for _ in range(count):
        optimizer.apply_gradients([(gradient, variable)])
    assert optimizer.iterations == made + count
    assert (variable != before).all()
    return variable.tobytes()

def child_step(connection, generations):
    before = native_threads()
    connection.send(step())
    assert native_threads() == before + 2, "the child has no helpers of its own"
    if generations > 1:
        assert fork_and_compare(generations - 1)

def fork_and_compare(generations):
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=child_step, args=(theirs, generations))
    child.start()
    theirs.close()
    assert mine.poll(30), "the child hangs"
    result = mine.recv()
    child.join(30)
    return child.exitcode == 0 and result == step()
"""


@pytest.mark.parametrize("generations", [1, 2])
def test_parent_and_forked_child_keep_working_after_a_step_on_several_threads(generations):
    """A libgomp region hangs in the child here."""
    result = run_python(
        f"{FORK}\nstep()\nfor _ in range(3): assert fork_and_compare({generations})\nprint('same bits')"
    )
    assert result.stdout.split() == ["same", "bits"], result.stderr


def test_a_fork_while_another_thread_is_in_a_step_leaves_a_working_child():
    code = """
stop = threading.Event()
def keep_stepping():
    while not stop.is_set():
        step(1)
thread = threading.Thread(target=keep_stepping)
thread.start()
for _ in range(20):
    child = context.Process(target=step)
    child.start()
    child.join(30)
    if child.exitcode != 0:
        child.kill()
        sys.exit("the child hangs or failed")
stop.set()
thread.join()
print("done")
"""
    result = run_python(FORK + code)
    assert result.stdout.split() == ["done"], result.stderr


FORK_BESIDE = f"""{FORK_CHILD}
import threading, time
import fastadam, numpy as np

def fork_beside(step, work):
    stop = threading.Event()
    def keep_stepping():
        while not stop.is_set():
            step()
    thread = threading.Thread(target=keep_stepping)
    thread.start()
    codes = []
    for _ in range(10):
        time.sleep(0.002)
        codes.append(child(work))
    stop.set()
    thread.join()
    return set(codes)
"""


def test_a_fork_while_another_thread_steps_an_optimizer_of_pytorch():
    pytest.importorskip("torch")
    code = """
import torch, fastadam.torch
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.ones(100_000)) for _ in range(4)]
optimizer = fastadam.torch.Adam(params)
for param in params:
    param.grad = torch.ones_like(param)

def work():
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 4

optimizer.step()
print(fork_beside(optimizer.step, work))
"""
    result = run_python(FORK_BESIDE + code)
    assert result.stdout.split() == ["{0}"], result.stderr


def test_a_fork_inside_of_a_block_of_averages_while_another_thread_steps():
    code = """
variable, other = np.ones(5, np.float32), np.ones(300_000, np.float32)
optimizer = fastadam.Adam(0.1, use_ema=True)
for w in (variable, other):
    optimizer.apply_gradients([(np.ones_like(w), w)])
before = variable.copy()
block = optimizer.averages([variable])

def work():
    block.__exit__(None, None, None)
    assert (variable == before).all()

with block:
    print(fork_beside(optimizer.get_weights, work))
"""
    result = run_python(FORK_BESIDE + code)
    assert result.stdout.split() == ["{0}"], result.stderr


INTERRUPT = """
import os, signal, threading, time
import fastadam, numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored
rng = np.random.default_rng(0)
variables = [rng.standard_normal(n, dtype=np.float32) for n in (100_003, 5)]
gradients = [rng.standard_normal(n, dtype=np.float32) for n in (100_003, 5)]
copies = [v.copy() for v in variables]
starts = [v.copy() for v in variables]
optimizer, again = fastadam.Adam(0.01), fastadam.Adam(0.01)
start, ended, caught = time.monotonic(), [], 0

def interrupt():
    while time.monotonic() < start + 1.5 or caught <= 10 and time.monotonic() < start + 30:
        time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGINT)
    ended.append(time.monotonic())

def goes_on():
    return not ended or time.monotonic() < ended[0] + 0.2

thread = threading.Thread(target=interrupt)
while goes_on():
    try:
        if thread.ident is None:
            thread.start()
        while goes_on():
            optimizer.apply_gradients(zip(gradients, variables))
    except KeyboardInterrupt:
        caught += 1
for _ in range(optimizer.iterations):
    again.apply_gradients(zip(gradients, copies))
assert all((v != s).all() for v, s in zip(variables, starts))
print(caught > 10, all((v == c).all() for v, c in zip(variables, copies)))
"""


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_whole_steps():
    """The variables are where as many steps as `iterations` counts bring them."""
    result = run_python(INTERRUPT)
    assert result.stdout.split() == ["True", "True"], result.stderr
