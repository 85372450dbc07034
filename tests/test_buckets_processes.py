"""Processes that fork or exit while a step in buckets is open."""

from __future__ import annotations

import pytest
from helpers import FORK_CHILD, run_python

START = f"""{FORK_CHILD}
import threading, time
import fastadam, numpy as np
variables = [np.linspace(1, 2, size, dtype=np.float32) for size in (300_000, 5, 700)]
def pairs(size=0.5):
    return [(np.full_like(w, size), w) for w in variables]
optimizer = fastadam.Adam(0.1, global_clipnorm=1.0)
optimizer.build(variables)
optimizer.apply_gradients(pairs())
before = [w.copy() for w in variables]
optimizer.begin_step(early=True)
handles = [optimizer.step_bucket([pair]) for pair in pairs()[:2]]
def is_undone():
    return all((a == b).all() for a, b in zip(before, variables))
"""


@pytest.mark.parametrize("waits", [False, True])
def test_a_fork_while_a_step_is_open(waits):
    """Both processes have the open step: the child aborts it or ends it, and so does its parent."""
    code = f"""
if {waits}:
    for handle in handles: handle.result(20)
def abort():
    optimizer.abort_step()
    assert is_undone()
    optimizer.apply_gradients(pairs())
    assert optimizer.iterations == 2
def end():
    for handle in handles: handle.result(20)
    optimizer.step_bucket(pairs()[2:]).result(20)
    assert optimizer.end_step() == 2
    assert not is_undone()
    return b"".join(w.tobytes() for w in variables)
read, write = os.pipe()
print(child(abort), child(lambda: os.write(write, __import__("hashlib").sha256(end()).digest())))
print(os.read(read, 32) == __import__("hashlib").sha256(end()).digest())
"""
    result = run_python(START + code)
    assert result.stdout.split() == ["0", "0", "True"], result.stderr


def test_forks_while_other_threads_make_steps():
    code = """
optimizer.abort_step()
stop = threading.Event()
def keep_stepping():
    while not stop.is_set():
        optimizer.begin_step(early=True)
        for pair in pairs(): optimizer.step_bucket([pair])
        optimizer.end_step()
def work():
    optimizer.abort_step()
    optimizer.begin_step(early=True)
    for pair in pairs(): optimizer.step_bucket([pair]).result(10)
    optimizer.end_step()
thread = threading.Thread(target=keep_stepping)
thread.start()
codes = set()
for _ in range(20):
    time.sleep(0.002)
    codes.add(child(work))
stop.set()
thread.join()
print(codes)
"""
    result = run_python(START + code)
    assert result.stdout.split() == ["{0}"], result.stderr


EXITS = {
    "an open step": "",
    "a running worker": "[optimizer.step_bucket([pair]) for pair in pairs()[2:]]",
    "a step in a daemon thread": """
def forever():
    while True:
        optimizer.begin_step(early=True)
        for pair in pairs(): optimizer.step_bucket([pair])
        optimizer.end_step()
def until_the_exit():
    try:
        forever()
    except RuntimeError:  # the exit has undone the open step
        pass
optimizer.abort_step()
threading.Thread(target=until_the_exit, daemon=True).start()
time.sleep(0.1)
""",
    "a step at the exit": """
import atexit
def last():
    assert optimizer.end_step() == 2
    optimizer.begin_step(early=True)
    optimizer.step_bucket(pairs()).result(10)
    assert optimizer.end_step() == 3
atexit.register(last)
""",
    "an exception": "raise SystemExit(0)",
}


@pytest.mark.parametrize("kind", EXITS)
def test_the_interpreter_exits(kind):
    result = run_python(START + EXITS[kind], exits=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_open_step_is_undone_at_the_exit():
    code = """
import atexit
atexit.register(lambda: print(is_undone()))
import fastadam
""" + START.replace("import fastadam, numpy as np", "import numpy as np")
    result = run_python("import numpy as np\n" + code, exits=True)
    assert result.stdout.split() == ["True"], result.stderr
