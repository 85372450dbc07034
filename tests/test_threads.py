"""Threads, fork, environment, and the split of work between threads."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from fastadam._backend import _cpu
from helpers import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

F32 = np.float32
SIZE = 300_000  # enough for several threads


def problem():
    rng = np.random.RandomState(0)
    return random_array(rng, SIZE), random_array(rng, SIZE)


def steps(optimizer, gradient, variable, count=3):
    for _ in range(count):
        optimizer.apply_gradients([(gradient, variable)])
    return variable


# In interpreters of their own: other libraries of the test process (JAX) do not bear a fork.
FORK = """
import multiprocessing, sys, threading
import fastadam, numpy as np
context = multiprocessing.get_context("fork")
rng = np.random.default_rng(0)
variable, gradient = (rng.standard_normal(300_000, dtype=np.float32) for _ in range(2))
optimizer = fastadam.Adam(0.1)
fastadam.set_num_threads(3)

def step(count=3):
    for _ in range(count):
        optimizer.apply_gradients([(gradient, variable)])
    return variable.tobytes()

def child_step(connection, generations):
    connection.send(step())
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


INTERRUPT = """
import os, signal, threading, time
import fastadam, numpy as np
rng = np.random.default_rng(0)
variables = [rng.standard_normal(n, dtype=np.float32) for n in (100_003, 5)]
gradients = [rng.standard_normal(n, dtype=np.float32) for n in (100_003, 5)]
copies = [v.copy() for v in variables]
optimizer, again = fastadam.Adam(0.01), fastadam.Adam(0.01)
end = time.monotonic() + 1.5

def interrupt():
    while time.monotonic() < end:
        time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGINT)

thread = threading.Thread(target=interrupt)
caught = 0
while time.monotonic() < end + 0.2:
    try:
        if thread.ident is None:
            thread.start()
        while time.monotonic() < end + 0.2:
            optimizer.apply_gradients(zip(gradients, variables))
    except KeyboardInterrupt:
        caught += 1
for _ in range(optimizer.iterations):
    again.apply_gradients(zip(gradients, copies))
print(caught > 10, all((v == c).all() for v, c in zip(variables, copies)))
"""


def test_ctrl_c_at_any_moment_leaves_whole_steps():
    """The variables are where as many steps as `iterations` counts bring them."""
    result = run_python(INTERRUPT)
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_steps_of_several_threads_at_once_do_not_disturb_each_other():
    variable, gradient = problem()
    expected = steps(fastadam.Adam(0.1), gradient, variable.copy())
    copies = [variable.copy() for _ in range(4)]
    threads = [threading.Thread(target=steps, args=(fastadam.Adam(0.1), gradient, copy)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for copy in copies:
        np.testing.assert_array_equal(bits(copy), bits(expected))


def test_other_threads_of_python_run_during_a_step():
    """The GIL is released: a long step does not stop a counting thread."""
    size = 20_000_000
    variable, gradient = np.ones(size, F32), np.full(size, 0.5, F32)
    optimizer = fastadam.Adam(0.1)
    optimizer.apply_gradients([(gradient, variable)])
    during, running = [], threading.Event()

    def step():
        running.set()
        optimizer.apply_gradients([(gradient, variable)])
        running.clear()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # nobody is made to give the GIL up
    try:
        thread = threading.Thread(target=step)
        thread.start()
        running.wait()
        while running.is_set():
            during.append(1)
            time.sleep(0)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert optimizer.iterations == 2
    assert during


PRINT_THREADS = "import fastadam; print(fastadam.info.num_threads())"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"FASTADAM_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"FASTADAM_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "nonsense", "FASTADAM_NUM_THREADS": "2"}, 2),
    ],
)
def test_thread_counts_of_the_environment_are_honoured(environment, threads):
    assert run_python(PRINT_THREADS, **environment).stdout.split() == [str(threads)]


def test_the_cpus_that_the_process_may_use_are_the_default():
    if not hasattr(os, "sched_setaffinity"):  # macOS has no CPU affinity: all of them
        assert run_python(PRINT_THREADS).stdout.split() == [str(os.cpu_count())]
        return
    assert run_python(PRINT_THREADS).stdout.split() == [str(len(os.sched_getaffinity(0)))]
    code = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {PRINT_THREADS}"
    assert run_python(code).stdout.split() == ["1"]


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_bad_thread_count_of_the_environment_is_a_clear_error(value):
    result = run_python(PRINT_THREADS, FASTADAM_NUM_THREADS=value)
    assert result.returncode != 0
    expected = f"environment variable FASTADAM_NUM_THREADS: {value!r}, expected an integer from 1 to 65536"
    assert expected in result.stderr


@pytest.mark.parametrize("value", [0, -1, 1.5, "two", True, 100_000])
def test_set_num_threads_refuses_bad_counts(value):
    before = fastadam.info.num_threads()
    with pytest.raises(ValueError, match="count: .*, expected an integer from 1 to 65536"):
        fastadam.set_num_threads(value)
    assert fastadam.info.num_threads() == before


def test_set_num_threads_none_returns_to_the_default():
    default = fastadam.info.num_threads()
    fastadam.set_num_threads(7)
    assert fastadam.info.num_threads() == 7
    fastadam.set_num_threads(None)
    assert fastadam.info.num_threads() == default


def assert_partition(sizes, addresses, item_sizes, shares):
    """Every element in exactly one piece, cuts at cache lines, shares as equal as the cuts allow."""
    pieces = sorted(piece for share in _cpu.split(sizes, addresses, item_sizes, shares) for piece in share)
    position = dict.fromkeys(range(len(sizes)), 0)
    for tensor, begin, end in pieces:
        assert begin == position[tensor]
        assert begin < end
        position[tensor] = end
        if end < sizes[tensor]:
            assert (addresses[tensor] + end * item_sizes[tensor]) % 64 == 0
    assert [position[i] for i in range(len(sizes))] == list(sizes)
    counts = [sum(end - begin for _, begin, end in share) for share in _cpu.split(sizes, addresses, item_sizes, shares)]
    assert max(counts) - min(counts) <= 2 * 64 + 1


@given(
    tensors=st.lists(
        st.tuples(st.integers(0, 5000), st.integers(0, 63), st.sampled_from([2, 4, 8])), min_size=1, max_size=20
    ),
    shares=st.integers(1, 9),
)
@settings(deadline=None)
def test_the_split_covers_every_element_once(tensors, shares):
    sizes = [size for size, _, _ in tensors]
    assert_partition(sizes, [offset * item for _, offset, item in tensors], [item for *_, item in tensors], shares)


@pytest.mark.parametrize("shares", [1, 2, 3, 7, 64, 128, 8192])
def test_the_split_holds_far_beyond_what_can_be_allocated(shares):
    sizes = [2**32 + 17, 5, 2**40 + 1, 0, 2**33]
    assert_partition(sizes, [16, 4096 + 4, 2**46 + 16, 8, 2**45 + 2], [4, 4, 4, 8, 2], shares)
    assert_partition([2**50 + 3], [64], [2], shares)


@pytest.mark.parametrize("shares", [2, 8, 32, 128])
def test_the_split_of_resnet_50_is_level_to_one_percent(shares):
    sizes = [64 * 3 * 49, *[64] * 14, *[128] * 16, *[256] * 32, *[512] * 22, *[1024] * 14, *[2048] * 8, 1000, 2048 * 1000,
             *[2359296] * 3, *[1048576] * 6, 2097152, *[589824] * 6, *[262144] * 11, *[147456] * 4, *[65536] * 8]  # fmt: skip
    counts = [sum(end - begin for _, begin, end in share)
              for share in _cpu.split(sizes, [16] * len(sizes), [4] * len(sizes), shares)]  # fmt: skip
    assert max(counts) / (sum(counts) / shares) < 1.01


def free_memory():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or free_memory() < 32 * 2**30, reason="needs 32 GB of free memory"
)
def test_a_step_over_more_than_2_31_elements():
    size = 2**31 + 17
    variable, gradient = np.ones(size, np.float16), np.full(size, 0.5, np.float16)
    fastadam.Adam(0.125).apply_gradients([(gradient, variable)])
    for part in (variable[:1000], variable[2**31 - 1000 : 2**31 + 17]):
        assert (part == np.float16(0.875)).all()
    assert int((variable != np.float16(0.875)).sum()) == 0
