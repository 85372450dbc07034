"""Threads: their count, what happens on them, and that results depend on neither."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
from pathlib import Path

import fastadam
import numpy as np
import pytest
from cases import bits, random_array
from helpers import COUNT_THREADS, assert_moved, run_python, slow

F32 = np.float32
SIZE = 300_000  # enough for several threads


def problem():
    rng = np.random.RandomState(0)
    return random_array(rng, SIZE), random_array(rng, SIZE)


def steps(optimizer, gradient, variable, count=3):
    for _ in range(count):
        optimizer.apply_gradients([(gradient, variable)])
    return variable


@pytest.mark.parametrize(
    ("size", "threads", "helpers"), [(SIZE, 1, 0), (SIZE, 3, 2), (SIZE, 5, 4), (100_000, 3, 0), (5, 5, 0)]
)
def test_a_step_runs_on_as_many_threads_as_it_may(size, threads, helpers):
    """One that is short starts none."""
    code = f"""{COUNT_THREADS}
import fastadam, numpy as np
fastadam.set_num_threads({threads})
optimizer, variable, gradient = fastadam.Adam(), np.ones({size}, np.float32), np.ones({size}, np.float32)
before = native_threads()
optimizer.apply_gradients([(gradient, variable)])
print(native_threads() - before, (variable < 1).all())
"""
    result = run_python(code)
    assert result.stdout.split() == [str(helpers), "True"], result.stderr


@pytest.mark.parametrize("threads", [1, 3])
def test_denormal_numbers_are_flushed_on_every_thread(threads, isa):
    fastadam.set_num_threads(threads)
    variable, gradient = np.ones(SIZE, F32), np.full(SIZE, 1e-20, F32)  # the square is denormal
    optimizer = fastadam.Adam(0.1)
    for _ in range(3):  # helpers that sleep may come late to a single step
        optimizer.apply_gradients([(gradient, variable)])
    assert not optimizer.get_slot(variable, "v").any()
    assert optimizer.get_slot(variable, "m").all()


def test_steps_of_several_threads_at_once_do_not_disturb_each_other():
    variable, gradient = problem()
    expected = steps(fastadam.Adam(0.1), gradient, variable.copy())
    assert_moved(expected, variable)
    copies = [variable.copy() for _ in range(4)]
    threads = [threading.Thread(target=steps, args=(fastadam.Adam(0.1), gradient, copy)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for copy in copies:
        np.testing.assert_array_equal(bits(copy), bits(expected))


def test_importing_the_extensions_leaves_a_gil_that_is_off_off():
    """On a free-threaded Python; one that has a GIL keeps it."""
    code = """
import sys, fastadam, fastadam._jax
print(getattr(sys, "_is_gil_enabled", lambda: True)())
"""
    result = run_python(code)
    expected = not sysconfig.get_config_var("Py_GIL_DISABLED")
    assert (result.stdout, result.stderr) == (f"{expected}\n", "")


def test_threads_that_share_optimizers_lose_no_step():
    """A short run of stress_threads.py; wheels for a Python without a GIL are tested by a long one."""
    program = str(Path(__file__).with_name("fuzz") / "stress_threads.py")
    code = f"import runpy, sys; sys.argv[1:] = ['--calls', '20']; runpy.run_path({program!r}, run_name='__main__')"
    result = run_python(code)
    assert "no step lost, no error" in result.stdout, result.stdout + result.stderr


@pytest.fixture
def frequent_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def on_threads(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class SlowToCount(fastadam.Adam):
    """Other threads run while the count is read."""

    @property
    def iterations(self):
        time.sleep(0.0001)
        return fastadam.Adam.iterations.fget(self)


@pytest.mark.parametrize("way", ["apply_gradients", "end_step"])
def test_every_step_returns_its_own_count(way):
    variable, optimizer, counts = np.ones(36, F32), SlowToCount(), []
    optimizer.build([variable])
    pairs, one_at_a_time = [(np.ones(36, F32), variable)], threading.Lock()

    def in_buckets():
        with one_at_a_time:
            optimizer.begin_step()
            optimizer.step_bucket(pairs)
        return optimizer.end_step()

    make = in_buckets if way == "end_step" else lambda: optimizer.apply_gradients(pairs)
    on_threads(*4 * [lambda: counts.extend([make().item() for _ in range(50)])])
    assert sorted(counts) == list(range(1, 201))


@pytest.mark.usefixtures("frequent_switches")
def test_hyperparameters_that_threads_set_at_once_are_all_set():
    optimizer = fastadam.Adam(weight_decay=0.01)
    names = ["learning_rate", "beta_1", "epsilon", "clipvalue", "clipnorm", "weight_decay", "ema_momentum"]

    def setting(name):
        def set_it():
            for value in np.linspace(0.1, 0.9, 2000):
                setattr(optimizer, name, value.item())
                lost.extend([name] if getattr(optimizer, name) != value else [])

        return set_it

    lost = []
    on_threads(*map(setting, names))
    assert lost == []


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
        while thread.is_alive():
            if running.is_set():
                during.append(1)
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert optimizer.iterations == 2
    np.testing.assert_allclose(variable[:: size // 10], 0.8, rtol=1e-5)
    assert during


STEPS_OF_A_DAEMON = {
    "small": "o.apply_gradients([(np.ones(36, 'f'), small)])",
    "large": "o.apply_gradients([(ones, large)])",
    "clipped": "clipped.apply_gradients([(ones, large)])",
    "accumulated": "accumulates.apply_gradients([(ones, large)])",
    "rows": "deferred.apply_gradients([(fastadam.IndexedSlices(rows, ids), table)]); deferred.gather(table, ids)",
    "stateless": "fastadam.adam_step(large, ones, m, v, step=1)",
    "norm": "fastadam.global_norm([ones])",
}


def program_with_daemons(step, seconds=0.1):
    """A program that ends while three daemon threads make this call without end."""
    return f"""
import threading, time
import fastadam, numpy as np
ones, rows, ids = np.ones(200_000, 'f'), np.ones((1000, 8), 'f'), np.arange(1000) * 7 % 900
started = threading.Event()

def work():
    small, large, table = np.ones(36, 'f'), np.ones(200_000, 'f'), np.ones((1000, 8), 'f')
    m, v = np.zeros_like(large), np.zeros_like(large)
    o, clipped = fastadam.Adam(), fastadam.Adam(global_clipnorm=1.0)
    accumulates, deferred = fastadam.Adam(gradient_accumulation_steps=2), fastadam.Adam(sparse_update="deferred")
    while True:
        {step}
        started.set()

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep({seconds})
"""


@pytest.mark.parametrize("step", ["large", "rows", *slow("small", "clipped", "accumulated", "stateless", "norm")])
def test_daemon_threads_that_step_do_not_abort_the_interpreter_when_it_exits(step):
    for _ in range(2):
        result = run_python(program_with_daemons(STEPS_OF_A_DAEMON[step]), exits=True)
        assert (result.returncode, result.stderr) == (0, "")


PRINT_THREADS = "import fastadam; print(fastadam.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"FASTADAM_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"FASTADAM_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "nonsense", "FASTADAM_NUM_THREADS": "2"}, 2),
        ({"FASTADAM_NUM_THREADS": "1024"}, 1024),
        ({"OMP_NUM_THREADS": "5000"}, 1024),
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


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1025", "65536"])
def test_a_bad_thread_count_of_the_environment_is_a_clear_error(value):
    result = run_python(PRINT_THREADS, FASTADAM_NUM_THREADS=value)
    assert result.returncode != 0
    expected = f"environment variable FASTADAM_NUM_THREADS: {value!r}, expected an integer from 1 to 1024"
    assert expected in result.stderr


@pytest.mark.parametrize("value", [0, -1, 1.5, "two", True, 1025, 65536, 2**70, np.zeros(2), [2]])
def test_set_num_threads_refuses_bad_counts(value):
    before = fastadam.get_num_threads()
    with pytest.raises(ValueError, match="count: .*, expected an integer from 1 to 1024$"):
        fastadam.set_num_threads(value)
    assert fastadam.get_num_threads() == before


def test_set_num_threads_none_returns_to_the_default():
    default = fastadam.get_num_threads()
    fastadam.set_num_threads(7)
    assert fastadam.get_num_threads() == 7
    fastadam.set_num_threads(None)
    assert fastadam.get_num_threads() == default


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
